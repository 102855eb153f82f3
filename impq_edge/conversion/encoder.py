"""What the writer asks how to turn weights into bytes; :mod:`impq_edge.conversion.calibrated` knows the inputs."""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from impq_edge.ggml.types import TensorType
from impq_edge.model.spec import TensorSpec


class Encoder(Protocol):
    """The writer asks for the tensors in the order of the file, each once."""

    def importance(self, tensor: TensorSpec) -> NDArray[np.float32] | None:
        """Return how much an error counts in each column, (row length,), for ggml's encoder; None: all alike."""
        ...

    def solved(self, tensor: TensorSpec, kind: TensorType) -> NDArray[np.uint8] | None:
        """Return the bytes (rows, bytes per row), rows as in the checkpoint; None: ggml's encoder is to do it."""
        ...


class PlainEncoder:
    """ggml's encoder without an importance matrix, as ``llama-quantize`` by default."""

    def importance(self, tensor: TensorSpec) -> NDArray[np.float32] | None:  # noqa: ARG002
        """Return None: all columns count alike."""
        return None

    def solved(self, tensor: TensorSpec, kind: TensorType) -> NDArray[np.uint8] | None:  # noqa: ARG002
        """Return None: ggml's encoder does everything."""
        return None
