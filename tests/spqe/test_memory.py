"""Where blocks go on a GPU, for shapes and sizes of memory that no test machine needs to have."""

import dataclasses
from typing import Any

import pytest

from impq_edge.errors import SensitivityError
from impq_edge.model.config import HyperParameters
from impq_edge.model.spec import ModelSpec, TensorSpec
from impq_edge.spqe.memory import resident_blocks

GIB = 2**30
LLAMA_8B = (32, 4096, 14336, 32)
LLAMA_70B = (80, 8192, 28672, 64)
TEXT: dict[str, Any] = {"windows": 32, "window_tokens": 512, "batch_tokens": 16384, "itemsize": 2, "statistics": "none"}


def llama(n_blocks: int, hidden: int, ffn: int, n_heads: int) -> ModelSpec:
    """A Llama-3.1 of that shape, without weights."""
    hyper = HyperParameters(
        architecture="llama", n_blocks=n_blocks, hidden=hidden, ffn=ffn, n_heads=n_heads, n_kv_heads=8,
        head_dim=hidden // n_heads, vocabulary=128256, context=8192, rms_epsilon=1e-5, rope_theta=5e5,
        rope_scaling=None, tied_embeddings=False, attention_bias=False, sliding_window=None,
        attention_softcap=None, final_softcap=None,
    )  # fmt: skip
    tensors = []
    for name, shape in hyper.expected_shapes().items():
        block = int(name.split(".")[1]) if name.startswith("blk.") else None
        role: Any = {"token_embd.weight": "embedding", "output.weight": "head"}.get(name, "matrix")
        tensors.append(TensorSpec(name, name, shape, "vector" if len(shape) == 1 else role, block, None))
    return ModelSpec("shape", hyper, tuple(tensors), "no weights")


def block_bytes(spec: ModelSpec) -> int:
    return 2 * sum(tensor.weights for tensor in spec.block_matrices(0))


def placed(spec: ModelSpec, gib: float, **changes: Any) -> int:
    return resident_blocks(spec, **{**TEXT, **changes}, free_bytes=int(gib * GIB))


def test_80_gib_hold_both_versions_of_an_8b_model() -> None:
    assert placed(llama(*LLAMA_8B), 79) == placed(llama(*LLAMA_8B), 79, statistics="hessian") == 32


def test_divergences_keep_something_of_the_unquantised_model() -> None:
    """Of 2,048 and 3,584 tokens the probabilities, 1.0 and 1.7 GiB; of 16,384 room to make 7.8 GiB anew."""
    spec = llama(*LLAMA_8B)
    for windows in (4, 7, 32):
        held, judged = (placed(spec, 22, windows=windows, objective=what) for what in ("loss", "divergence"))
        assert 1 <= held - judged <= 3, (windows, held, judged)


def test_24_gib_stream_some_blocks_of_an_8b_model() -> None:
    """Its blocks take 13 GiB in bfloat16, both versions 26, and the activations of 16,384 tokens 8."""
    spec = llama(*LLAMA_8B)
    much, little = placed(spec, 23.5), placed(spec, 23.5, windows=8)
    assert 8 <= much <= 14
    assert 18 <= little <= 24


def test_80_gib_stream_most_blocks_of_a_70b_model() -> None:
    """Its blocks take 127 GiB, both versions 255, and the activations of 16,384 tokens 40."""
    spec = llama(*LLAMA_70B)
    much, little = placed(spec, 79), placed(spec, 79, windows=8)
    assert 5 <= much <= 10
    assert 15 <= little <= 20


@pytest.mark.parametrize("statistics", ["none", "squares", "hessian"])
@pytest.mark.parametrize("shape", [LLAMA_8B, LLAMA_70B])
def test_more_memory_never_holds_less(shape: tuple[int, int, int, int], statistics: str) -> None:
    spec = llama(*shape)
    found: list[int | None] = []
    for gib in range(1, 400, 1):
        try:
            found.append(placed(spec, gib, statistics=statistics))
        except SensitivityError:
            found.append(None)
    first = next(index for index, one in enumerate(found) if one is not None)
    assert first > 0 and all(one is None for one in found[:first])  # hopeless, and never again afterwards
    fit = [one for one in found[first:] if one is not None]
    assert len(fit) == len(found) - first
    assert fit == sorted(fit) and fit[0] < 4 and fit[-1] == spec.n_blocks
    for gib, one in enumerate(found, 1):  # all that is placed there really fits
        if one is not None:
            places = 2 if one < spec.n_blocks else 0
            assert (2 * one + places) * block_bytes(spec) < gib * GIB


def test_what_else_needs_memory_leaves_less_for_blocks() -> None:
    spec = llama(*LLAMA_70B)
    plain = placed(spec, 79, windows=8)
    softcapped = dataclasses.replace(
        spec, hyperparameters=dataclasses.replace(spec.hyperparameters, attention_softcap=50.0)
    )
    assert placed(spec, 79, windows=8, statistics="hessian") < plain
    assert placed(spec, 79, windows=16) < plain
    assert placed(softcapped, 79) < placed(spec, 79)
    assert placed(spec, 79, windows=8, itemsize=4) < plain / 1.5


def test_what_cannot_fit_is_said_with_a_remedy() -> None:
    with pytest.raises(SensitivityError) as caught:
        placed(llama(*LLAMA_70B), 8)
    told = str(caught.value)
    assert "\n" not in told and told.endswith(".") and told.count(". ") == 0
    assert told.startswith("The GPU has 8192 MiB free, but shape needs ")
    assert "ask for fewer --tokens than 16384, or use --compute cpu" in told
    needed = int(told.split("needs ")[1].split(maxsplit=1)[0])
    assert placed(llama(*LLAMA_70B), (needed + 1) / 1024) == 0
    with pytest.raises(SensitivityError):
        placed(llama(*LLAMA_70B), (needed - 1) / 1024)
