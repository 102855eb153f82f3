import dataclasses
from fractions import Fraction
from pathlib import Path

import gguf
import numpy as np
import pytest

from impq_edge.conversion.tokenizer import read_tokenizer
from impq_edge.conversion.writer import header_bytes
from impq_edge.devices.memory import memory_plan, resident_bytes, weight_budget_bytes
from impq_edge.devices.profile import DeviceProfile, load_device
from impq_edge.errors import AllocationError
from impq_edge.ggml.types import TensorType
from impq_edge.impq.allocate import Request, allocate_blocks, bits_at
from impq_edge.impq.allocation import Allocation
from impq_edge.model.players import PlayerKind, players_of
from impq_edge.model.recipe import data_bytes, tensor_types
from impq_edge.model.spec import ModelSpec, read_model
from impq_edge.stages import convert

HEADER_BYTES = 300_000
PHI = np.array([0.3, 0.1, 0.2])
COVARIANCE = np.zeros((3, 3))


@pytest.fixture(scope="module")
def spec(checkpoints: dict[str, Path]) -> ModelSpec:
    return read_model(checkpoints["llama"])


def device_with(weights_bytes: int, spec: ModelSpec) -> DeviceProfile:
    """A Raspberry Pi that does not repack and whose memory leaves exactly that much for the weights."""
    pi = dataclasses.replace(load_device("raspberry-pi-5"), use_extra_bufts=False)
    left = weight_budget_bytes(spec.hyperparameters, pi, context_tokens=512, kv_type="f16")
    return dataclasses.replace(pi, memory_bytes=pi.memory_bytes - left + weights_bytes)


def allocate(spec: ModelSpec, device: DeviceProfile, **request: object) -> Allocation:
    wanted = Request(device=device, context_tokens=512, kv_type="f16", **request)  # type: ignore[arg-type]
    made = allocate_blocks(spec, HEADER_BYTES, PHI, COVARIANCE, "0" * 64, wanted)
    made.check(spec)
    return made


@pytest.fixture(scope="module")
def sizes(spec: ModelSpec) -> tuple[int, int]:
    """File bytes with every block at 2 and at 4 bit."""
    roomy = load_device("laptop-16gb")
    two = allocate(spec, roomy, average_bits=Fraction(2)).predicted_file_bytes
    four = allocate(spec, roomy).predicted_file_bytes
    assert four - two == 3 * sum(t.weights for t in spec.block_matrices(0)) * (144 - 84) // 256
    return two, four


def test_memory_decides_how_many_blocks_get_4_bit(spec: ModelSpec, sizes: tuple[int, int]) -> None:
    two, four = sizes
    step = (four - two) // 3
    expected = {0: (2, 2, 2), 1: (4, 2, 2), 2: (4, 2, 4), 3: (4, 4, 4)}
    for blocks, bits in expected.items():
        for slack in (0, step - 1):
            made = allocate(spec, device_with(two + blocks * step + slack, spec))
            assert made.player_bits == bits, (blocks, slack)
            assert made.everything_fits == (blocks == 3)
            device = device_with(two + blocks * step + slack, spec)
            size = made.predicted_file_bytes
            plan = memory_plan(spec, made.tensor_types, size, device, context_tokens=512, kv_type="f16")
            assert 0 <= plan.free_bytes == slack
            assert made.budget_bytes - made.predicted_file_bytes == slack


def test_one_byte_too_few_says_the_smallest_that_works(spec: ModelSpec, sizes: tuple[int, int]) -> None:
    with pytest.raises(AllocationError, match=f"takes {sizes[0]};"):
        allocate(spec, device_with(sizes[0] - 1, spec))
    with pytest.raises(AllocationError, match=f"--budget {sizes[0]}"):
        allocate(spec, load_device("laptop-16gb"), file_budget_bytes=sizes[0] - 1)
    assert allocate(spec, load_device("laptop-16gb"), file_budget_bytes=sizes[0]).player_bits == (2, 2, 2)


@pytest.mark.parametrize(("bits", "expected"), [("3", 1), ("10/3", 2), ("3.33", 1), ("2", 0), ("4", 3)])
def test_average_bits_are_an_exact_limit(spec: ModelSpec, bits: str, expected: int) -> None:
    made = allocate(spec, load_device("laptop-16gb"), average_bits=Fraction(bits))
    assert made.player_bits.count(4) == expected
    assert made.average_bits <= float(Fraction(bits))


def test_repacked_copies_count_against_memory(spec: ModelSpec, sizes: tuple[int, int]) -> None:
    plain = device_with(sizes[1], spec)
    assert allocate(spec, plain).everything_fits
    # On this processor Q4_K and the tied Q6_K embedding are repacked, Q2_K is not.
    repacking = dataclasses.replace(plain, use_extra_bufts=True, mmap=True)
    # A 4-bit block then costs 144 + 144 instead of 84 bytes per 256 weights: one takes more than three plain ones.
    embedding_bytes, block = 8192 * 210, sum(t.weights for t in spec.block_matrices(0)) // 256
    one_more = (2 * 144 - 84) * block
    spared = 3 * (144 - 84) * block
    for missing, bits in ((0, (4, 2, 2)), (1, (2, 2, 2))):
        memory = plain.memory_bytes + embedding_bytes - spared + one_more - missing
        made = allocate(spec, dataclasses.replace(repacking, memory_bytes=memory))
        assert made.player_bits == bits
        assert made.problem.constraints[0].costs == (one_more,) * 3


def test_every_limit_holds_at_once(spec: ModelSpec, sizes: tuple[int, int]) -> None:
    step = (sizes[1] - sizes[0]) // 3
    made = allocate(
        spec, device_with(sizes[0] + 2 * step, spec), average_bits=Fraction(4), file_budget_bytes=sizes[0] + step
    )
    assert made.player_bits == (4, 2, 2) and made.budget_bytes == sizes[0] + step


def test_record_survives_the_disk_and_notices_edits(spec: ModelSpec, tmp_path: Path) -> None:
    made = allocate(spec, load_device("laptop-16gb"), average_bits=Fraction(3))
    made.save(tmp_path / "a.json")
    assert Allocation.load(tmp_path / "a.json") == made
    assert made.predicted_file_bytes == HEADER_BYTES + data_bytes(spec, made.tensor_types)
    swapped = {**made.tensor_types, "blk.0.attn_q.weight": made.tensor_types["blk.1.attn_q.weight"]}
    for change in (
        {"player_bits": (4, 4, 4)},
        {"player_bits": (4, 2)},
        {"player_bits": (3, 3, 3)},
        {"tensor_types": swapped},
        {"tensor_types": {}},
        {"outer_type": TensorType.F32},
        {"budget_bytes": -5},
        {"bits_per_weight": 1.0},
        {"predicted_file_bytes": 1},
        {"objective": -1.0},
        {"model_sha256": "f" * 64},
    ):
        with pytest.raises(AllocationError):
            dataclasses.replace(made, **change).check(spec)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"average_bits": Fraction(5)}, "--average-bits 5"),
        ({"average_bits": Fraction(1)}, "--average-bits 1"),
        ({"alpha": 1.5}, "--alpha 1.5"),
    ],
)
def test_settings_out_of_range(spec: ModelSpec, request_: dict[str, object], message: str) -> None:
    with pytest.raises(AllocationError, match=message):
        allocate(spec, load_device("laptop-16gb"), **request_)


def finely(
    spec: ModelSpec, players: PlayerKind, device: DeviceProfile, header: int = HEADER_BYTES, **request: object
) -> Allocation:
    """An allocation to finer players, the later ones suffering more."""
    count = len(players_of(spec, players))
    phi, interactions = np.linspace(0.1, 0.4, count), np.random.default_rng(0).normal(0, 0.01, size=(count, count))
    wanted = Request(device=device, context_tokens=512, kv_type="f16", **request)  # type: ignore[arg-type]
    made = allocate_blocks(spec, header, phi, interactions @ interactions.T, "0" * 64, wanted, players)
    made.check(spec)
    return made


@pytest.mark.parametrize("players", ["sublayers", "tensors"])
@pytest.mark.parametrize("repacks", [False, True])
def test_what_finer_players_cost_adds_up_to_the_file(spec: ModelSpec, players: PlayerKind, repacks: bool) -> None:
    """Whatever the choice of players at 4 bit, their costs are what file and memory grow by."""
    roomy = dataclasses.replace(load_device("laptop-16gb"), use_extra_bufts=repacks, mmap=True)
    made = finely(spec, players, roomy, average_bits=Fraction(3), file_budget_bytes=10**9)
    memory, file, bits = made.problem.constraints
    who = players_of(spec, players)
    assert [c.name for c in (memory, file, bits)] == ["device memory", "file budget", "average bits"]
    assert bits.costs == tuple(player.weights for player in who)
    all_2 = tensor_types(spec, [TensorType.Q2_K] * len(who), TensorType.Q6_K, players)
    generator = np.random.default_rng(1)
    for _ in range(5):
        chosen = generator.random(len(who)) < 0.5
        kinds = [TensorType.Q4_K if four else TensorType.Q2_K for four in chosen]
        types = tensor_types(spec, kinds, TensorType.Q6_K, players)
        assert sum(np.array(file.costs)[chosen]) == data_bytes(spec, types) - data_bytes(spec, all_2)
        assert sum(np.array(memory.costs)[chosen]) == (
            resident_bytes(spec, types, roomy) - resident_bytes(spec, all_2, roomy)
        )
    assert all(cost > 0 for cost in (*memory.costs, *file.costs))


@pytest.mark.parametrize("players", ["sublayers", "tensors"])
def test_tensor_types_follow_the_players(spec: ModelSpec, players: PlayerKind) -> None:
    made = finely(spec, players, load_device("laptop-16gb"), average_bits=Fraction(3))
    who = players_of(spec, players)
    assert made.players == players and {2, 4} == set(made.player_bits)
    expected = {
        tensor.gguf_name: TensorType.Q4_K if bits == 4 else TensorType.Q2_K
        for player, bits in zip(who, made.player_bits, strict=True)
        for tensor in player.tensors
    }
    in_blocks = {name: kind for name, kind in made.tensor_types.items() if kind in (TensorType.Q2_K, TensorType.Q4_K)}
    assert in_blocks == expected
    weights = [player.weights for player in who]
    assert made.average_bits == sum(w * b for w, b in zip(weights, made.player_bits, strict=True)) / sum(weights) <= 3
    assert made.predicted_file_bytes == HEADER_BYTES + data_bytes(spec, made.tensor_types) <= made.budget_bytes


def test_the_same_bits_by_finer_players_make_the_same_file(spec: ModelSpec) -> None:
    roomy = load_device("laptop-16gb")
    for bits in (Fraction(2), None):
        files = [finely(spec, kind, roomy, average_bits=bits) for kind in ("blocks", "sublayers", "tensors")]
        assert files[0].tensor_types == files[1].tensor_types == files[2].tensor_types
        assert len({(made.predicted_file_bytes, made.budget_bytes, made.average_bits) for made in files}) == 1


@pytest.mark.parametrize("players", ["sublayers", "tensors"])
def test_a_record_for_other_players_is_refused(spec: ModelSpec, players: PlayerKind) -> None:
    made = finely(spec, players, load_device("laptop-16gb"), average_bits=Fraction(3))
    swapped = list(made.player_bits)
    two, four = swapped.index(2), swapped.index(4)
    swapped[two], swapped[four] = 4, 2
    for change in ({"players": "blocks"}, {"player_bits": (2, 4, 4)}, {"player_bits": tuple(swapped)}):
        with pytest.raises(AllocationError):
            dataclasses.replace(made, **change).check(spec)  # type: ignore[arg-type]


@pytest.mark.parametrize("players", ["sublayers", "tensors"])
def test_bits_without_a_device_are_those_with_one(spec: ModelSpec, players: PlayerKind) -> None:
    made = finely(spec, players, load_device("laptop-16gb"), average_bits=Fraction(11, 4))
    count = len(made.player_bits)
    interactions = np.random.default_rng(0).normal(0, 0.01, size=(count, count))
    found = bits_at(
        players_of(spec, players), np.linspace(0.1, 0.4, count), interactions @ interactions.T, Fraction(11, 4)
    )
    assert found == made.player_bits


@pytest.mark.parametrize("players", ["sublayers", "tensors"])
def test_the_file_of_finer_players_takes_the_bytes_predicted(
    checkpoints: dict[str, Path], tmp_path: Path, players: PlayerKind
) -> None:
    """And holds the tensors in the types allocated, as an independent reader sees them."""
    spec = read_model(checkpoints["gemma2"])
    tokenizer = read_tokenizer(checkpoints["gemma2"], 8192, "gemma2")
    made = finely(spec, players, load_device("laptop-16gb"), header_bytes(spec, tokenizer), average_bits=Fraction(3))
    out = tmp_path / "m.gguf"
    artifact = convert(str(checkpoints["gemma2"]), allocation=made, out=out)
    assert artifact.file_bytes == made.predicted_file_bytes == out.stat().st_size
    stored = {tensor.name: tensor.tensor_type.name.lower() for tensor in gguf.GGUFReader(out).tensors}
    assert stored == {name: str(kind) for name, kind in made.tensor_types.items()}
    assert set(made.player_bits) == {2, 4}
