from pathlib import Path

import pytest
from checkpoints import make_checkpoint

from impq_edge.errors import ModelError
from impq_edge.ggml.types import TensorType
from impq_edge.model.recipe import fallbacks, require_no_fallback, tensor_types
from impq_edge.model.spec import read_model

Q2, Q4, Q6 = TensorType.Q2_K, TensorType.Q4_K, TensorType.Q6_K


def test_blocks_get_what_was_asked_and_the_outside_its_own(checkpoints: dict[str, Path]) -> None:
    types = tensor_types(read_model(checkpoints["qwen3"]), [Q2, Q4, Q2], Q6)
    assert types["token_embd.weight"] == types["output.weight"] == Q6
    assert types["output_norm.weight"] == types["blk.1.attn_q_norm.weight"] == TensorType.F32
    assert {types[f"blk.{i}.ffn_up.weight"] for i in (0, 2)} == {Q2} and types["blk.1.attn_v.weight"] == Q4


def test_rows_that_hold_no_k_quants_are_told_with_their_cost(tmp_path: Path) -> None:
    directory = make_checkpoint(
        tmp_path / "m", "llama", hidden_size=192, num_attention_heads=3, num_key_value_heads=3, intermediate_size=512
    )
    spec = read_model(directory)
    found = fallbacks(spec, Q2, Q6)
    # Everything with rows of 192: the embedding, and all matrices of a block but ffn_down (rows of 512).
    assert len(found) == 1 + 3 * 6
    assert {(f.wanted, f.stored) for f in found} == {(Q2, TensorType.Q4_0), (Q6, TensorType.Q8_0)}
    extra = sum(f.extra_bytes for f in found)
    stored = sum(f.stored.tensor_bytes(f.tensor.shape) for f in found)
    assert extra == pytest.approx(stored - sum(f.tensor.weights * f.wanted.bits_per_weight / 8 for f in found), abs=20)
    with pytest.raises(ModelError, match=r"18 tensors with rows of 192 become q4_0.*--allow-fallback"):
        require_no_fallback(found)


def test_rows_that_fit_need_no_permission(checkpoints: dict[str, Path]) -> None:
    require_no_fallback(fallbacks(read_model(checkpoints["llama"]), Q2, Q6))
