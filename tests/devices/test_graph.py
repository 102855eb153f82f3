"""The compute buffer equals what llama.cpp logged for published shapes."""

import dataclasses

import pytest

from impq_edge.devices.graph import GraphShape, compute_buffer_bytes
from impq_edge.model.spec import ModelSpec

# "CPU compute buffer size" of llama.cpp (llama-cpp-python 0.3.36) for files of these shapes, in MiB, at 8192
# tokens of context: batch, outputs, flash attention, quantised cache → size.
LOGGED = {
    "llama-3.1-8b": {
        (512, 1, True, False): 124.01, (512, 1, False, False): 572.01, (512, 1, True, True): 116.09,
        (256, 1, True, False): 62.01, (512, 512, True, False): 266.50,
    },
    "qwen3-4b": {
        (512, 1, True, False): 88.01, (512, 1, False, False): 563.01, (512, 1, True, True): 88.09,
        (256, 1, True, False): 44.01, (512, 512, True, False): 306.75,
    },
    "gemma2-2b": {
        (512, 1, True, False): 84.02, (512, 1, False, False): 182.51, (512, 1, True, True): 88.55,
        (256, 1, True, False): 41.88, (512, 512, True, False): 509.00,
    },
}  # fmt: skip
CASES = [(name, *case, size) for name, sizes in LOGGED.items() for case, size in sizes.items()]


def shape_of(spec: ModelSpec, batch: int, outputs: int, flash: bool, quantised: bool, cells: int = 8192) -> GraphShape:
    window = spec.hyperparameters.sliding_window
    window_cells = cells if window is None else min(cells, -(-(window + batch) // 256) * 256)
    return GraphShape(batch, outputs, cells, window_cells, flash, quantised)


@pytest.mark.parametrize(("name", "batch", "outputs", "flash", "quantised", "mib"), CASES)
def test_it_is_what_llama_cpp_logs(
    published: dict[str, ModelSpec], name: str, batch: int, outputs: int, flash: bool, quantised: bool, mib: float
) -> None:
    spec = published[name]
    found = compute_buffer_bytes(spec.hyperparameters, shape_of(spec, batch, outputs, flash, quantised))
    assert found / 2**20 == pytest.approx(mib, abs=0.0051)  # the log has two decimals


@pytest.mark.parametrize("name", LOGGED)
@pytest.mark.parametrize("flash", [True, False])
def test_it_grows_with_context_batch_and_outputs(published: dict[str, ModelSpec], name: str, flash: bool) -> None:
    spec = published[name]
    least = shape_of(spec, 64, 1, flash, False, cells=1024)
    size = compute_buffer_bytes(spec.hyperparameters, least)
    for larger in (
        dataclasses.replace(least, cells=16384, window_cells=16384),
        shape_of(spec, 512, 1, flash, False, cells=1024),
        dataclasses.replace(least, outputs=64),
    ):
        assert compute_buffer_bytes(spec.hyperparameters, larger) > size
