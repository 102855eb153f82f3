"""Encoding that knows what enters every matrix on a calibration text: an importance matrix, or GPTQ.

Text passes through the model block after block while the file is written, in the order of the file; no more than one
block is loaded at a time.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from impq_edge.backends import Inputs
from impq_edge.backends.kquant import KQuant
from impq_edge.backends.kquant_gptq import SOLVED
from impq_edge.backends.kquant_kept import Kept
from impq_edge.conversion.encoder import UNWEIGHTED
from impq_edge.conversion.imatrix import Imatrix
from impq_edge.errors import ConversionError
from impq_edge.ggml.types import TensorType
from impq_edge.model.calibration import Windows
from impq_edge.model.load import read_tensor
from impq_edge.model.spec import ModelSpec, TensorSpec
from impq_edge.spqe.memory import memory_told
from impq_edge.spqe.observe import Observer, entering_head
from impq_edge.spqe.run import COMPUTE_DTYPES, game_settings
from impq_edge.spqe.table import encodings_in
from impq_edge.spqe.walk import Hidden, Walk, open_walk


def open_calibrated(
    directory: Path,
    spec: ModelSpec,
    windows: Windows,
    backend: KQuant,
    device: str,
    kept: Path,
    progress: Callable[[int, int], None],
) -> tuple["CalibratedEncoder", dict[str, str | int]]:
    """Return the encoder for a text, and everything its bytes depend on besides weights and types.

    ``kept`` is a directory in which a game that was played with the same encoder and text may have left its bytes.
    """
    settings = game_settings("kquant", backend, windows, players="blocks", device=device)
    facts: dict[str, str | int] = {
        "encode": backend.encode,
        "calibration_sha256": settings.text_sha256,
        "calibration_tokens": settings.calibration_tokens,
        "window_tokens": settings.window_tokens,
        "compute": f"{settings.device} {settings.dtype}",
    }
    encoder = CalibratedEncoder(
        directory, spec, windows, encodings_in(kept, backend, spec, settings),
        torch.device(device), getattr(torch, settings.dtype), progress,
    )  # fmt: skip
    return encoder, facts


class CalibratedEncoder:
    """What the writer asks; see :class:`impq_edge.conversion.encoder.Encoder`.

    Parameters
    ----------
    directory, spec
        The checkpoint.
    windows
        The calibration text.
    kept
        The encoder, and what it has encoded before.
    device, dtype
        Where the text passes through the model, and in what arithmetic.
    progress
        Told how many of the model's blocks the text has passed, and how many there are.
    """

    def __init__(
        self,
        directory: Path,
        spec: ModelSpec,
        windows: Windows,
        kept: Kept,
        device: torch.device,
        dtype: torch.dtype,
        progress: Callable[[int, int], None] = lambda _done, _total: None,
    ) -> None:
        self._directory = directory
        self._spec = spec
        self._windows = windows
        self._kept = kept
        self._device, self._dtype = device, dtype
        self._progress = progress
        self._walk: Walk | None = None  # opened when something is not known yet
        self._passed = 0  # blocks
        self._hidden: Hidden = []
        self._observer: Observer | None = None  # of the block passed last
        self._inputs: dict[str, Inputs | None] = {}  # of that block's matrices that were asked for, and of the head

    def importance(self, tensor: TensorSpec, kind: TensorType) -> NDArray[np.float32] | None:
        """Return the mean square of what every column is multiplied with; None for what is only looked up."""
        if kind in UNWEIGHTED:
            return None
        with memory_told(), torch.no_grad():
            inputs = self._inputs_of(tensor)
        return None if inputs is None else inputs.mean_square.float().cpu().numpy()

    def solved(self, tensor: TensorSpec, kind: TensorType) -> NDArray[np.uint8] | None:
        """Return what was kept, or what GPTQ makes of the tensor; None where ggml's encoder is to do it."""
        found = self._kept.find(tensor, kind)
        if found is None:
            if self._kept.backend.statistics != "hessian" or kind not in SOLVED:
                return None
            with memory_told(), torch.no_grad():
                inputs = self._inputs_of(tensor)
                if inputs is None:
                    return None
                weight = torch.from_numpy(read_tensor(self._directory, tensor)).to(self._device)
                found = self._kept.encoded(tensor, weight, kind, inputs)
        return found.cpu().numpy()

    def _inputs_of(self, tensor: TensorSpec) -> Inputs | None:
        spec = self._spec
        if tensor.role == "embedding" and not spec.hyperparameters.tied_embeddings:
            return None
        self._pass_through(spec.n_blocks if tensor.block is None else tensor.block + 1)
        if tensor.name not in self._inputs:
            self._inputs[tensor.name] = self._taken(tensor)
        return self._inputs[tensor.name]

    def _taken(self, tensor: TensorSpec) -> Inputs | None:
        assert self._walk is not None
        if tensor.block is None:
            return entering_head(self._walk, self._hidden, self._kept.backend.statistics)
        assert self._observer is not None
        return self._observer.take(tensor.name_in_block)

    def _pass_through(self, blocks: int) -> None:
        """Pass the text through the first so many blocks."""
        if self._walk is None:
            self._walk = open_walk(self._directory, self._spec, self._windows, self._device, self._dtype)
            self._hidden = self._walk.embedded
        if blocks < self._passed:
            raise ConversionError(f"Block {blocks - 1} was asked for after block {self._passed - 1}; report this.")
        while self._passed < blocks:
            self._inputs.clear()
            layer = self._walk.take(self._passed)
            watched = self._kept.backend.statistics if self._passed == blocks - 1 else "none"
            self._observer = Observer(layer, watched)
            with self._observer:
                self._hidden = [self._walk.run(layer, self._passed, batch) for batch in self._hidden]
            self._passed += 1
            self._progress(self._passed, self._spec.n_blocks)
            if not all(torch.isfinite(batch).all() for batch in self._hidden):
                raise ConversionError(
                    f"The activations behind block {self._passed - 1} are not finite on the calibration text; "
                    "use another text, --compute cpu, or --encode rtn."
                )


@torch.no_grad()
def collect_imatrix(
    directory: Path,
    spec: ModelSpec,
    windows: Windows,
    text_name: str,
    device: str,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> Imatrix:
    """Collect llama.cpp's importance matrix of the matrices in the blocks, as ``llama-imatrix`` does by default.

    Raises
    ------
    ModelError
        When weights cannot be read.
    SensitivityError
        When the GPU's memory does not suffice.
    """
    squares: dict[str, NDArray[np.float64]] = {}
    with memory_told():
        walk = open_walk(directory, spec, windows, torch.device(device), getattr(torch, COMPUTE_DTYPES[device]))
        hidden = walk.embedded
        for block in range(spec.n_blocks):
            layer = walk.take(block)
            with Observer(layer, "squares") as observer:
                hidden = [walk.run(layer, block, batch) for batch in hidden]
                for tensor in spec.block_matrices(block):
                    inputs = observer.take(tensor.name_in_block)
                    assert inputs is not None
                    squares[tensor.gguf_name] = (inputs.mean_square.double() * inputs.tokens).cpu().numpy()
            progress(block + 1, spec.n_blocks)
    count, length = windows.tokens.shape
    return Imatrix.dense(squares, windows.tokens.size, datasets=[text_name], chunk_count=count, chunk_tokens=length)
