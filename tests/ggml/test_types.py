import gguf
import pytest

from impq_edge.ggml.types import TensorType, type_for_row


@pytest.mark.parametrize(
    ("kind", "block_bytes", "bits"), [("q2_k", 84, 2.625), ("q4_k", 144, 4.5), ("q6_k", 210, 6.5625), ("q8_0", 34, 8.5)]
)
def test_block_sizes(kind: str, block_bytes: int, bits: float) -> None:
    assert TensorType(kind).block_bytes == block_bytes
    assert TensorType(kind).bits_per_weight == bits


@pytest.mark.parametrize("kind", list(TensorType))
def test_numbers_agree_with_gguf(kind: TensorType) -> None:
    assert (kind.block_weights, kind.block_bytes) == gguf.GGML_QUANT_SIZES[kind.ggml]
    assert kind.tensor_bytes((3, 512)) == 3 * 512 // kind.block_weights * kind.block_bytes


@pytest.mark.parametrize(
    ("wanted", "row", "stored"),
    [
        ("q2_k", 256, "q2_k"),
        ("q2_k", 576, "q4_0"),
        ("q4_k", 576, "q5_0"),
        ("q6_k", 576, "q8_0"),
        ("q4_k", 100, "f16"),
        ("q8_0", 100, "f16"),
        ("f32", 100, "f32"),
    ],
)
def test_rows_that_hold_no_k_quants(wanted: str, row: int, stored: str) -> None:
    assert type_for_row(TensorType(wanted), row) == stored
