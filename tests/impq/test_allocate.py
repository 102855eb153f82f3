import dataclasses
from fractions import Fraction
from pathlib import Path

import gguf
import numpy as np
import pytest
from checkpoints import make_checkpoint

from impq_edge.conversion.layout import header_bytes
from impq_edge.conversion.tokenizer import read_tokenizer
from impq_edge.devices.memory import (
    gpu_resident_bytes,
    gpu_weight_budget_bytes,
    memory_plan,
    resident_bytes,
    weight_budget_bytes,
)
from impq_edge.devices.profile import DeviceProfile, load_device
from impq_edge.errors import AllocationError
from impq_edge.ggml.types import LADDER, TensorType
from impq_edge.impq.allocate import Request, allocate_blocks, allocate_ladder, bits_at, require_feasible
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
        assert made.problem.constraints[0].costs == ((0, one_more),) * 3


def with_gpu(spec: ModelSpec, layers: int, main_bytes: int, gpu_bytes: int) -> DeviceProfile:
    """A device whose main memory and whose GPU's memory leave exactly that much for weights."""
    device = dataclasses.replace(
        device_with(main_bytes, spec), gpu="A GPU", gpu_layers=layers, gpu_memory_bytes=1 << 34,
        gpu_reserve_bytes=1 << 20, mmap=False,
    )  # fmt: skip
    left = weight_budget_bytes(spec.hyperparameters, device, context_tokens=512, kv_type="f16")
    of_gpu = gpu_weight_budget_bytes(spec.hyperparameters, device, context_tokens=512, kv_type="f16")
    assert of_gpu is not None
    return dataclasses.replace(
        device,
        memory_bytes=device.memory_bytes - left + main_bytes,
        gpu_memory_bytes=(1 << 34) - of_gpu + gpu_bytes,
    )


def test_a_gpu_is_a_second_budget_for_its_blocks_alone(spec: ModelSpec, sizes: tuple[int, int]) -> None:
    """Of three blocks the last two are the GPU's, with the head, which is the embedding once more."""
    step = (sizes[1] - sizes[0]) // 3
    two_bits = tensor_types(spec, [TensorType.Q2_K] * 3, TensorType.Q6_K)
    device = with_gpu(spec, 3, 1 << 30, 1 << 30)
    main, gpu = HEADER_BYTES + resident_bytes(spec, two_bits, device), gpu_resident_bytes(spec, two_bits, device)
    for in_main, on_gpu, bits in (
        (0, 0, (2, 2, 2)), (1, 0, (4, 2, 2)), (0, 1, (2, 2, 4)), (1, 1, (4, 2, 4)), (0, 2, (2, 4, 4)),
        (1, 2, (4, 4, 4)), (0, 9, (2, 4, 4)), (9, 0, (4, 2, 2)),
    ):  # fmt: skip
        device = with_gpu(spec, 3, main + in_main * step, gpu + on_gpu * step)
        made = allocate(spec, device)
        assert made.player_bits == bits, (in_main, on_gpu)
        assert [constraint.name for constraint in made.problem.constraints] == ["device memory", "GPU memory"]
        plan = memory_plan(
            spec, made.tensor_types, made.predicted_file_bytes, device, context_tokens=512, kv_type="f16"
        )
        assert plan.fits and made.predicted_file_bytes <= made.budget_bytes
        assert [one.budget - one.used(made.choice) for one in made.problem.constraints] == [
            plan.free_bytes, plan.gpu_free_bytes,
        ]  # fmt: skip
    with pytest.raises(
        AllocationError, match=f"of GPU memory .* takes {gpu} there with gpu_layers at 3; lower gpu_lay"
    ):
        allocate(spec, with_gpu(spec, 3, main, gpu - 1))
    with pytest.raises(AllocationError, match=f"bytes for the weights .* takes {main};"):
        allocate(spec, with_gpu(spec, 3, main - 1, gpu))


def test_a_gpu_that_shares_memory_adds_no_budget(spec: ModelSpec, sizes: tuple[int, int]) -> None:
    shared = dataclasses.replace(
        device_with(sizes[1], spec), gpu="A GPU", gpu_layers=999, gpu_reserve_bytes=1 << 20, mmap=False
    )
    with pytest.raises(AllocationError, match="takes"):  # what the GPU needs besides is no longer there
        allocate(spec, dataclasses.replace(shared, memory_bytes=shared.memory_bytes - (sizes[1] - sizes[0])))
    roomy = dataclasses.replace(shared, memory_bytes=shared.memory_bytes + (1 << 30))
    made = allocate(spec, roomy)
    assert made.everything_fits and [one.name for one in made.problem.constraints] == ["device memory"]


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
        {"outer_type": None},
        {"types": (2, 3, 4)},
        {"types": (4, 2)},
        {"lower_bound": None},
        {"lower_bound": made.objective + 1e-6},
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
        ({"types": (2, 3, 4)}, "measure those types"),
        ({"types": (2,)}, "--types 2 is no ladder; give two or more of 2,3,4,5,6,8"),
        ({"types": (4, 2)}, "--types 4,2"),
        ({"types": (2, 7)}, "--types 2,7"),
        ({"types": (3, 4), "average_bits": Fraction(2)}, "outside 3…4, the bits of --types 3,4"),
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
    assert bits.costs == tuple((0, 2 * player.weights) for player in who)
    all_2 = tensor_types(spec, [TensorType.Q2_K] * len(who), TensorType.Q6_K, players)
    generator = np.random.default_rng(1)
    for _ in range(5):
        chosen = generator.random(len(who)) < 0.5
        kinds = [TensorType.Q4_K if four else TensorType.Q2_K for four in chosen]
        types = tensor_types(spec, kinds, TensorType.Q6_K, players)
        assert file.used(chosen.astype(int).tolist()) == data_bytes(spec, types) - data_bytes(spec, all_2)
        assert memory.used(chosen.astype(int).tolist()) == (
            resident_bytes(spec, types, roomy) - resident_bytes(spec, all_2, roomy)
        )
    assert all(low == 0 < high for low, high in (*memory.costs, *file.costs))


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


TYPES = (2, 3, 4, 5, 6, 8)


@pytest.fixture(scope="module")
def rows_of_192(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    """Rows that hold no K-quants: 2 and 3 bit are one type."""
    return read_model(make_checkpoint(tmp_path_factory.mktemp("rows") / "qwen3", "qwen3", hidden_size=192))


def ladder(
    spec: ModelSpec, players: PlayerKind, device: DeviceProfile, *, pairs: bool = True, **request: object
) -> Allocation:
    """Losses as those of rounding, later players suffering more, the embedding most."""
    wanted = Request(device=device, context_tokens=512, kv_type="f16", **{"types": TYPES, **request})  # type: ignore[arg-type]
    who = players_of(spec, players, outer=wanted.is_ladder)
    inside = sum(player.block is not None for player in who)
    losses = np.linspace(0.1, 0.4, len(who))[:, None] * 4.0 ** -np.array(wanted.types)
    interactions = np.random.default_rng(0).normal(0, 0.001, size=(inside, 100))
    covariance = interactions @ interactions.T if pairs else None
    made = allocate_ladder(spec, HEADER_BYTES, losses, covariance, "0" * 64, wanted, players)
    made.check(spec)
    return made


@pytest.mark.parametrize("model", ["llama", "qwen3"])  # one head is tied, one has weights of its own
@pytest.mark.parametrize("players", ["blocks", "sublayers", "tensors"])
def test_every_player_of_a_ladder_has_one_of_its_types(
    checkpoints: dict[str, Path], model: str, players: PlayerKind
) -> None:
    spec = read_model(checkpoints[model])
    roomy = load_device("laptop-16gb")
    most = ladder(spec, players, roomy)
    assert set(most.player_bits) == {8} and most.everything_fits and most.lower_bound is not None
    smallest = ladder(spec, players, roomy, average_bits=Fraction(2), file_budget_bytes=10**9).average_bits
    assert smallest == 2
    made = ladder(spec, players, roomy, file_budget_bytes=int(0.6 * most.predicted_file_bytes))
    who = players_of(spec, players, outer=True)
    assert len(made.player_bits) == len(who) and set(made.player_bits) <= set(TYPES) and not made.everything_fits
    assert made.outer_type is None and made.types == TYPES
    expected = {
        tensor.gguf_name: LADDER[bits]
        for player, bits in zip(who, made.player_bits, strict=True)
        for tensor in player.tensors
    }
    assert {name: kind for name, kind in made.tensor_types.items() if kind != TensorType.F32} == expected
    assert made.predicted_file_bytes == HEADER_BYTES + data_bytes(spec, made.tensor_types) <= made.budget_bytes
    assert made.lower_bound is not None and made.objective - made.lower_bound <= 1e-4 * made.objective


@pytest.mark.parametrize("layers", [1, 2, 999])
def test_what_a_ladder_costs_a_gpu(spec: ModelSpec, layers: int) -> None:
    device = with_gpu(spec, layers, 1 << 30, 1 << 30)
    made = ladder(spec, "tensors", device, average_bits=Fraction(3))
    main, gpu, _ = made.problem.constraints
    who = players_of(spec, "tensors", outer=True)
    lowest = tensor_types(spec, [LADDER[2]] * len(who), None, "tensors")
    choice = np.random.default_rng(1).integers(0, 6, size=len(who)).tolist()
    types = tensor_types(spec, [LADDER[TYPES[kind]] for kind in choice], None, "tensors")
    assert gpu.used(choice) == gpu_resident_bytes(spec, types, device) - gpu_resident_bytes(spec, lowest, device)
    assert main.used(choice) == resident_bytes(spec, types, device) - resident_bytes(spec, lowest, device)


@pytest.mark.parametrize("repacks", [False, True])
@pytest.mark.parametrize("rows", ["spec", "rows_of_192"])
def test_what_a_ladder_costs_adds_up_to_the_file(request: pytest.FixtureRequest, rows: str, repacks: bool) -> None:
    spec = request.getfixturevalue(rows)
    roomy = dataclasses.replace(load_device("laptop-16gb"), use_extra_bufts=repacks, mmap=True)
    made = ladder(spec, "tensors", roomy, average_bits=Fraction(3), file_budget_bytes=10**9)
    memory, file, bits = made.problem.constraints
    who = players_of(spec, "tensors", outer=True)
    lowest = tensor_types(spec, [LADDER[2]] * len(who), None, "tensors")
    generator = np.random.default_rng(1)
    for _ in range(5):
        choice = generator.integers(0, 6, size=len(who)).tolist()
        types = tensor_types(spec, [LADDER[TYPES[kind]] for kind in choice], None, "tensors")
        assert file.used(choice) == data_bytes(spec, types) - data_bytes(spec, lowest)
        assert memory.used(choice) == resident_bytes(spec, types, roomy) - resident_bytes(spec, lowest, roomy)
        spent = sum(p.weights * (TYPES[kind] - 2) for p, kind in zip(who, choice, strict=True) if p.block is not None)
        assert bits.used(choice) == spent


@pytest.mark.parametrize(("target", "types"), [("2", TYPES), ("7/2", TYPES), ("4.37", (3, 4, 5)), ("8", TYPES)])
def test_average_bits_of_a_ladder_are_the_blocks(spec: ModelSpec, target: str, types: tuple[int, ...]) -> None:
    """Embedding and head are free, and all three players of one size: the limit is reached to the last whole step."""
    made = ladder(spec, "blocks", load_device("laptop-16gb"), average_bits=Fraction(target), types=types)
    assert made.average_bits == sum(made.player_bits[:3]) / 3 <= Fraction(target)
    assert set(made.player_bits[3:]) == {types[-1]}
    if Fraction(target) == types[-1]:
        assert made.everything_fits


@pytest.mark.parametrize("types", [(2, 3), (3, 4, 5, 6), TYPES])
def test_a_ladder_says_the_smallest_budget_that_works(spec: ModelSpec, types: tuple[int, ...]) -> None:
    who = players_of(spec, "sublayers", outer=True)
    lowest = tensor_types(spec, [LADDER[types[0]]] * len(who), None, "sublayers")
    smallest = HEADER_BYTES + data_bytes(spec, lowest)
    roomy = load_device("laptop-16gb")
    with pytest.raises(AllocationError, match=f"everything at {types[0]} bit; .* --budget {smallest}\\."):
        ladder(spec, "sublayers", roomy, types=types, file_budget_bytes=smallest - 1)
    made = ladder(spec, "sublayers", roomy, types=types, file_budget_bytes=smallest)
    assert made.predicted_file_bytes == smallest and set(made.player_bits) == {types[0]}
    with pytest.raises(AllocationError, match=f"everything at {types[0]} bit takes {smallest};"):
        ladder(spec, "sublayers", device_with(smallest - 1, spec), types=types)
    assert ladder(spec, "sublayers", device_with(smallest, spec), types=types).choice == made.choice


def test_the_smallest_budget_where_fewer_bits_take_more_memory(rows_of_192: ModelSpec) -> None:
    """What 2 and 3 bit become, Q4_0, is repacked where the types above it are not: memory pushes the file up."""
    spec = rows_of_192
    who = players_of(spec, "tensors", outer=True)

    def sizes(inside: int, *outside: int) -> tuple[int, int]:
        kinds = [*([LADDER[inside]] * (len(who) - 2)), *(LADDER[bits] for bits in outside)]
        types = tensor_types(spec, kinds, None, "tensors")
        return HEADER_BYTES + resident_bytes(spec, types, device), HEADER_BYTES + data_bytes(spec, types)

    device = dataclasses.replace(load_device("laptop-16gb"), use_extra_bufts=True, mmap=True)
    (memory_2, file_2), (memory_4, file_4) = sizes(2, 2, 2), sizes(4, 4, 4)
    assert memory_4 < memory_2 and file_2 < file_4
    left = weight_budget_bytes(spec.hyperparameters, device, context_tokens=512, kv_type="f16")
    tight = dataclasses.replace(device, memory_bytes=device.memory_bytes - left + (memory_2 + memory_4) // 2)
    with pytest.raises(AllocationError, match="the smallest that works is --budget") as refused:
        ladder(spec, "tensors", tight, file_budget_bytes=file_2)
    smallest = int(str(refused.value).rstrip(".").split()[-1])
    assert file_2 < smallest < file_4
    assert ladder(spec, "tensors", tight, file_budget_bytes=smallest).predicted_file_bytes == smallest
    with pytest.raises(AllocationError, match="the smallest that works is --budget"):
        ladder(spec, "tensors", tight, file_budget_bytes=smallest - 1)
    none = dataclasses.replace(device, memory_bytes=device.memory_bytes - left + 1000)
    with pytest.raises(AllocationError, match="everything at the type that takes the least takes"):
        ladder(spec, "tensors", none)
    least = min(sizes(2, embedding, head)[0] for embedding in TYPES for head in TYPES)  # which count for no average
    tight = dataclasses.replace(device, memory_bytes=device.memory_bytes - left + least - 1)
    with pytest.raises(AllocationError, match="--average-bits 2 is too few for ") as refused:
        ladder(spec, "tensors", tight, average_bits=Fraction(2))
    enough = Fraction(str(refused.value).split()[-3])
    assert 2 < ladder(spec, "tensors", tight, average_bits=enough).average_bits <= enough


def test_a_ladder_is_refused_before_anything_is_measured(spec: ModelSpec) -> None:
    wanted = Request(load_device("laptop-16gb"), 512, "f16", file_budget_bytes=1000, types=TYPES)
    with pytest.raises(AllocationError, match="everything at 2 bit; the smallest that works is --budget"):
        require_feasible(spec, HEADER_BYTES, wanted, "tensors")
    require_feasible(spec, HEADER_BYTES, dataclasses.replace(wanted, file_budget_bytes=10**9), "tensors")


def test_losses_of_other_players_or_types_are_refused(spec: ModelSpec) -> None:
    wanted = Request(load_device("laptop-16gb"), 512, "f16", types=(2, 3))
    for losses in (np.zeros((3, 2)), np.zeros((4, 6)), np.full((4, 2), np.nan)):
        with pytest.raises(AllocationError, match="for 4 players at 2,3 bit; make it anew"):
            allocate_ladder(spec, HEADER_BYTES, losses, None, "0" * 64, wanted)


def test_the_ladder_of_2_and_4_is_the_papers_program(spec: ModelSpec) -> None:
    """With the paper's losses; its K has a diagonal besides."""
    roomy = load_device("laptop-16gb")
    made = finely(spec, "tensors", roomy, average_bits=Fraction(3), alpha=1.0)
    count = len(made.player_bits)
    diagonal = np.diag(np.array(made.problem.quadratic))
    losses = np.column_stack([np.linspace(0.1, 0.4, count) + diagonal, np.zeros(count)])
    wanted = Request(roomy, 512, "f16", average_bits=Fraction(3), types=(2, 4))
    same = allocate_ladder(spec, HEADER_BYTES, losses, None, "0" * 64, wanted, "tensors")
    same.check(spec)
    assert same.outer_type == TensorType.Q6_K and same.tensor_types.keys() == made.tensor_types.keys()
    assert same.objective == pytest.approx(made.objective, rel=2e-4)


@pytest.mark.parametrize("types", [(2, 3, 4), (3, 4)])
def test_interactions_are_those_at_2_bit(spec: ModelSpec, types: tuple[int, ...]) -> None:
    made = ladder(spec, "tensors", load_device("laptop-16gb"), types=types, average_bits=Fraction(7, 2))
    inside = len(players_of(spec, "tensors"))
    assert len(made.problem.quadratic) == (inside if types[0] == 2 else 0)


def test_a_ladders_record_survives_the_disk_and_notices_edits(spec: ModelSpec, tmp_path: Path) -> None:
    made = ladder(spec, "tensors", load_device("laptop-16gb"), average_bits=Fraction(3))
    made.save(tmp_path / "a.json")
    assert Allocation.load(tmp_path / "a.json") == made
    bits = list(made.player_bits)
    bits[0], bits[-1] = bits[-1], bits[0]
    for change in (
        {"player_bits": tuple(bits)},
        {"player_bits": made.player_bits[:-1]},
        {"player_bits": (7, *made.player_bits[1:])},
        {"types": (2, 4)},
        {"types": TYPES[:-1]},
        {"outer_type": TensorType.Q6_K},
        {"players": "blocks"},
        {"lower_bound": None},
        {"problem": dataclasses.replace(made.problem, quadratic=made.problem.quadratic[:-1])},
        {"problem": dataclasses.replace(made.problem, losses=made.problem.losses[:-1])},
    ):
        with pytest.raises(AllocationError):
            dataclasses.replace(made, **change).check(spec)  # type: ignore[arg-type]
