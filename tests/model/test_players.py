from pathlib import Path

import pytest
from checkpoints import ARCHITECTURES

from impq_edge.model.players import PLAYER_KINDS, PlayerKind, players_of
from impq_edge.model.spec import ModelSpec, read_model

PARTS = ["attn_k", "attn_output", "attn_q", "attn_v", "ffn_down", "ffn_gate", "ffn_up"]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def spec(request: pytest.FixtureRequest, checkpoints: dict[str, Path]) -> ModelSpec:
    return read_model(checkpoints[request.param])


@pytest.mark.parametrize("kind", PLAYER_KINDS)
def test_players_share_out_the_matrices_of_the_blocks_in_their_order(spec: ModelSpec, kind: PlayerKind) -> None:
    players = players_of(spec, kind)
    shared_out = [tensor for player in players for tensor in player.tensors]
    wanted = [tensor for tensor in spec.tensors if tensor.role == "matrix" and tensor.block is not None]
    assert sorted(shared_out, key=lambda t: t.name) == sorted(wanted, key=lambda t: t.name)
    assert [tensor.block for tensor in shared_out] == sorted(tensor.block or 0 for tensor in shared_out)
    assert all({tensor.block for tensor in player.tensors} == {player.block} for player in players)
    assert sum(player.weights for player in players) == sum(tensor.weights for tensor in wanted)


def test_names_and_numbers(spec: ModelSpec) -> None:
    blocks = [f"blk.{block}" for block in range(spec.n_blocks)]
    expected = {
        "blocks": blocks,
        "sublayers": [f"{block}.{part}" for block in blocks for part in ("attn", "ffn")],
        "tensors": [f"{block}.{part}" for block in blocks for part in PARTS],
    }
    for kind in PLAYER_KINDS:
        assert [player.name for player in players_of(spec, kind)] == expected[kind]


def test_a_sublayer_is_attention_or_feed_forward_whole(spec: ModelSpec) -> None:
    for player in players_of(spec, "sublayers"):
        names = {tensor.name.removeprefix(f"model.layers.{player.block}.").split(".")[0] for tensor in player.tensors}
        assert names == {"self_attn" if player.name.endswith("attn") else "mlp"}
        assert len(player.tensors) == (4 if player.name.endswith("attn") else 3)
