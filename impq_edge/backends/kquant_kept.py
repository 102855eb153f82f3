"""Encoded matrices kept on disk: what calibrated encoders make takes long, and is needed more than once.

The game encodes every matrix at 2 and at 4 bit; the files that a build writes hold some of these bytes. A run that was
killed finds here what it had finished.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from impq_edge.backends import Inputs, Stored
from impq_edge.backends.kquant import KQuant
from impq_edge.backends.kquant_decode import decode
from impq_edge.ggml.types import TensorType
from impq_edge.model.spec import TensorSpec
from impq_edge.records import atomic_path, sha256_json


class Kept:
    """Encodes each matrix once and type, and remembers.

    Parameters
    ----------
    backend
        What encodes.
    directory
        Where encodings are kept, in a folder for each of their ``inputs``; nothing is created before it is needed.
    inputs
        Everything the bytes depend on besides the matrix and its type, as plain JSON values.
    """

    def __init__(self, backend: KQuant, directory: Path, inputs: Mapping[str, Any]) -> None:
        self.backend = backend
        self._folder = directory / sha256_json(dict(inputs))[:16]

    def store(self, tensor: TensorSpec, weight: torch.Tensor, kind: TensorType, inputs: Inputs | None) -> Stored:
        """Return ``weight`` as its bytes give it back; see :meth:`impq_edge.backends.kquant.KQuant.store`."""
        return Stored(decode(self.encoded(tensor, weight, kind, inputs), kind), kind.bits_per_weight)

    def encoded(
        self, tensor: TensorSpec, weight: torch.Tensor, kind: TensorType, inputs: Inputs | None
    ) -> torch.Tensor:
        """Return the bytes of a matrix, (rows, bytes per row), uint8, where ``weight`` is.

        Raises
        ------
        RecordError
            When they cannot be kept.
        """
        found = self.find(tensor, kind)
        if found is not None:
            return found.to(weight.device)
        data = self.backend.encoded(weight, kind, inputs)
        with atomic_path(self._path(tensor, kind), data.numel()) as temporary:
            data.cpu().numpy().tofile(temporary)
        return data

    def find(self, tensor: TensorSpec, kind: TensorType) -> torch.Tensor | None:
        """Return the bytes of a matrix if they are known."""
        path, row_bytes = self._path(tensor, kind), kind.tensor_bytes((1, tensor.shape[-1]))
        if not path.exists() or path.stat().st_size != kind.tensor_bytes(tensor.shape):
            return None
        return torch.from_numpy(np.fromfile(path, dtype=np.uint8).reshape(-1, row_bytes))

    def _path(self, tensor: TensorSpec, kind: TensorType) -> Path:
        return self._folder / f"{tensor.gguf_name}.{kind}"
