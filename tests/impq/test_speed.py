"""A slowest generation as a constraint: kept exactly, against enumeration, and refused with the number that works."""

import dataclasses
import itertools
import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from calibrated import calibrated

from impq_edge.devices.latency import predict_speeds
from impq_edge.devices.memory import resident_bytes, weight_budget_bytes
from impq_edge.devices.profile import DeviceProfile, load_device
from impq_edge.errors import AllocationError
from impq_edge.ggml.types import LADDER, TensorType
from impq_edge.impq.allocate import Request, allocate_blocks, allocate_ladder, require_feasible
from impq_edge.impq.allocation import Allocation
from impq_edge.model.players import players_of
from impq_edge.model.recipe import data_bytes, tensor_types
from impq_edge.model.spec import ModelSpec, read_model

HEADER_BYTES = 300_000
PHI, COVARIANCE = np.array([0.3, 0.1, 0.2]), np.zeros((3, 3))


@pytest.fixture(scope="module")
def spec(checkpoints: dict[str, Path]) -> ModelSpec:
    return read_model(checkpoints["llama"])


@pytest.fixture(scope="module")
def pi() -> DeviceProfile:
    """A Raspberry Pi on which Q4_K is slower than Q2_K, as where bandwidth binds."""
    return calibrated(
        dataclasses.replace(load_device("raspberry-pi-5"), use_extra_bufts=False), weight_s={TensorType.Q2_K: 2.6e-11}
    )


@pytest.fixture(scope="module")
def odd() -> DeviceProfile:
    """A Raspberry Pi on which Q2_K is the slowest of the ladder's lower types."""
    return calibrated(dataclasses.replace(load_device("raspberry-pi-5"), use_extra_bufts=False))


def with_memory(device: DeviceProfile, spec: ModelSpec, weights_bytes: int) -> DeviceProfile:
    left = weight_budget_bytes(spec.hyperparameters, device, context_tokens=512, kv_type="f16")
    return dataclasses.replace(device, memory_bytes=device.memory_bytes - left + weights_bytes)


def blocks(spec: ModelSpec, device: DeviceProfile, **request: object) -> Allocation:
    wanted = Request(device=device, context_tokens=512, kv_type="f16", **request)  # type: ignore[arg-type]
    made = allocate_blocks(spec, HEADER_BYTES, PHI, COVARIANCE, "0" * 64, wanted)
    made.check(spec)
    return made


def types_of(spec: ModelSpec, *bits: int) -> dict[str, TensorType]:
    return tensor_types(spec, [LADDER[b] for b in bits], TensorType.Q6_K)


def generation(spec: ModelSpec, device: DeviceProfile, types: dict[str, TensorType]) -> float:
    found = predict_speeds(spec, types, device).generation
    assert found
    return found.likely_tok_per_s


def test_the_speed_decides_how_many_blocks_get_4_bit(spec: ModelSpec, pi: DeviceProfile) -> None:
    """A speed just below that of some mix is met by it, one above takes a block more to 2 bit."""
    mixes = [(4, 4, 4), (4, 2, 4), (4, 2, 2), (2, 2, 2)]
    speeds = [generation(spec, pi, types_of(spec, *bits)) for bits in mixes]
    assert speeds == sorted(speeds)
    for bits, speed in zip(mixes, speeds, strict=True):
        made = blocks(spec, pi, min_generation_tok_per_s=speed * (1 - 1e-4))
        assert made.player_bits == bits and made.min_generation_tok_per_s == speed * (1 - 1e-4)
        assert made.speeds == predict_speeds(spec, made.tensor_types, pi) and made.speeds.basis == "formats"
        assert made.speeds.generation and made.speeds.generation.likely_tok_per_s >= made.min_generation_tok_per_s
    for slower, speed in zip(mixes[1:], speeds[:-1], strict=True):
        assert blocks(spec, pi, min_generation_tok_per_s=speed * (1 + 1e-4)).player_bits == slower


def test_where_2_bit_is_slower_the_speed_asks_for_more_bits(spec: ModelSpec, odd: DeviceProfile) -> None:
    two, four = (generation(spec, odd, types_of(spec, *[bits] * 3)) for bits in (2, 4))
    assert two < four
    least = HEADER_BYTES + data_bytes(spec, types_of(spec, 2, 2, 2))
    most = HEADER_BYTES + data_bytes(spec, types_of(spec, 4, 4, 4))
    room = with_memory(odd, spec, (least + most) // 2)
    assert blocks(spec, room).player_bits == (4, 2, 2)
    mixed = generation(spec, odd, types_of(spec, 4, 2, 2))
    assert blocks(spec, room, min_generation_tok_per_s=0.99 * mixed).player_bits == (4, 2, 2)
    with pytest.raises(AllocationError, match="with what of random-llama fits its memory; ") as refused:
        blocks(spec, room, min_generation_tok_per_s=four * 0.999)
    told = str(refused.value)
    bytes_more = int(told.split(" needs ")[1].split(maxsplit=1)[0])
    step = (most - least) // 3
    assert bytes_more == 3 * step - (most - least) // 2
    enough = dataclasses.replace(room, memory_bytes=room.memory_bytes + bytes_more)
    assert blocks(spec, enough, min_generation_tok_per_s=four * 0.999).player_bits == (4, 4, 4)
    assert_the_number_told_works(spec, room, told)


def assert_the_number_told_works(spec: ModelSpec, device: DeviceProfile, told: str, **request: object) -> None:
    number = told.removesuffix(" or less.").rstrip(".").split()[-1]
    works = float(number)
    made = blocks(spec, device, min_generation_tok_per_s=works, **request)
    assert made.speeds and made.speeds.generation and made.speeds.generation.likely_tok_per_s >= works
    with pytest.raises(AllocationError, match="generates at most"):
        blocks(spec, device, min_generation_tok_per_s=works * (1 + 2e-5), **request)


def test_what_no_types_reach_is_told_with_what_they_do(spec: ModelSpec, pi: DeviceProfile, odd: DeviceProfile) -> None:
    for device in (pi, odd):
        with pytest.raises(AllocationError, match="whatever the types; --min-tokens-per-second 100000 ") as refused:
            blocks(spec, device, min_generation_tok_per_s=1e5)
        assert_the_number_told_works(spec, device, str(refused.value))
        wanted = Request(device, 512, "f16", min_generation_tok_per_s=1e5)
        with pytest.raises(AllocationError, match="whatever the types"):  # before anything expensive is done
            require_feasible(spec, HEADER_BYTES, wanted)


def test_average_bits_may_be_what_is_in_the_way(spec: ModelSpec, odd: DeviceProfile) -> None:
    four = generation(spec, odd, types_of(spec, 4, 4, 4))
    with pytest.raises(AllocationError, match="at --average-bits 3, where more bits would be faster") as refused:
        blocks(spec, odd, min_generation_tok_per_s=0.999 * four, average_bits=Fraction(3))
    assert_the_number_told_works(spec, odd, str(refused.value), average_bits=Fraction(3))


def test_a_budget_is_told_the_smallest_that_keeps_the_speed(spec: ModelSpec, odd: DeviceProfile) -> None:
    four = 0.999 * generation(spec, odd, types_of(spec, 4, 4, 4))
    with pytest.raises(AllocationError, match="the smallest that works is --budget") as refused:
        blocks(spec, odd, min_generation_tok_per_s=four, file_budget_bytes=1_000_000)
    smallest = int(str(refused.value).rstrip(".").split()[-1])
    made = blocks(spec, odd, min_generation_tok_per_s=four, file_budget_bytes=smallest)
    assert made.predicted_file_bytes == smallest


def test_a_device_nobody_measured_promises_nothing(spec: ModelSpec, odd: DeviceProfile) -> None:
    laptop = load_device("laptop-16gb")
    with pytest.raises(AllocationError, match=r"never measured.* run impq-edge calibrate-device on it"):
        blocks(spec, laptop, min_generation_tok_per_s=1.0)
    assert blocks(spec, laptop).speeds is not None  # which is no promise
    assert odd.speed and odd.speed.plain
    kernels = odd.speed.plain
    few = {kind: cost for kind, cost in kernels.generation.weight_s.items() if kind != TensorType.Q2_K}
    kernels = dataclasses.replace(kernels, generation=dataclasses.replace(kernels.generation, weight_s=few))
    lacking = dataclasses.replace(odd, speed=dataclasses.replace(odd.speed, plain=kernels))
    with pytest.raises(AllocationError, match="lack q2_k; run impq-edge calibrate-device on it again"):
        blocks(spec, lacking, min_generation_tok_per_s=1.0)


def test_a_measured_bandwidth_will_do(spec: ModelSpec) -> None:
    device = load_device("raspberry-pi-5")
    speed = generation(spec, device, types_of(spec, 4, 2, 2))
    made = blocks(spec, device, min_generation_tok_per_s=0.9999 * speed)
    assert made.player_bits == (4, 2, 2) and made.speeds and made.speeds.basis == "bandwidth"


@pytest.mark.parametrize("speed", [0.0, -1.0, math.nan, math.inf])
def test_what_is_no_speed_is_refused(spec: ModelSpec, pi: DeviceProfile, speed: float) -> None:
    with pytest.raises(AllocationError, match="is not a speed"):
        blocks(spec, pi, min_generation_tok_per_s=speed)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("name", ["pi", "odd"])
def test_a_ladder_is_the_best_of_all_choices(
    spec: ModelSpec, name: str, seed: int, request: pytest.FixtureRequest
) -> None:
    """Three blocks and a tied embedding at three types: 81 choices, under memory and speed at once."""
    device, types = request.getfixturevalue(name), ((2, 3, 4), (2, 4, 6), (3, 5, 8))[seed % 3]
    generator = np.random.default_rng(seed)
    who = players_of(spec, "blocks", outer=True)
    losses = np.sort(generator.random((len(who), 3)), axis=1)[:, ::-1].copy()
    choices = list(itertools.product(range(3), repeat=len(who)))
    stored = {c: tensor_types(spec, [LADDER[types[kind]] for kind in c], None) for c in choices}
    memory = {c: HEADER_BYTES + resident_bytes(spec, stored[c], device) for c in choices}
    speeds = {c: generation(spec, device, stored[c]) for c in choices}
    tight = with_memory(device, spec, int(np.quantile(list(memory.values()), 0.6)))
    limit = float(np.quantile(list(speeds.values()), generator.choice([0.2, 0.5, 0.8])))
    fitting = weight_budget_bytes(spec.hyperparameters, tight, context_tokens=512, kv_type="f16")
    allowed = [c for c in choices if memory[c] <= fitting and speeds[c] >= limit * (1 + 1e-7)]
    wanted = Request(tight, 512, "f16", types=types, min_generation_tok_per_s=limit * (1 + 1e-7))
    if not allowed:
        with pytest.raises(AllocationError, match="generates at most"):
            allocate_ladder(spec, HEADER_BYTES, losses, None, "0" * 64, wanted)
        return
    made = allocate_ladder(spec, HEADER_BYTES, losses, None, "0" * 64, wanted)
    made.check(spec)
    assert speeds[made.choice] >= limit and memory[made.choice] <= fitting
    best = min(sum(row[kind] for row, kind in zip(losses, c, strict=True)) for c in allowed)
    assert made.objective == pytest.approx(best, rel=1e-4)


def test_costs_add_up_to_the_time_of_a_token(spec: ModelSpec, odd: DeviceProfile) -> None:
    types, generator = (2, 3, 4, 5, 6, 8), np.random.default_rng(0)
    who = players_of(spec, "tensors", outer=True)
    losses = np.sort(generator.random((len(who), 6)), axis=1)[:, ::-1].copy()
    wanted = Request(odd, 512, "f16", types=types, min_generation_tok_per_s=1.0)
    made = allocate_ladder(spec, HEADER_BYTES, losses, None, "0" * 64, wanted, "tensors")
    (time,) = (constraint for constraint in made.problem.constraints if constraint.name == "generation time")
    lowest = 1 / generation(spec, odd, tensor_types(spec, [LADDER[2]] * len(who), None, "tensors"))
    for _ in range(5):
        choice = generator.integers(0, 6, size=len(who)).tolist()
        found = tensor_types(spec, [LADDER[types[kind]] for kind in choice], None, "tensors")
        rounding_s = 2e-9 * len(who)
        assert abs(1e-9 * time.used(choice) - (1 / generation(spec, odd, found) - lowest)) < rounding_s


def test_the_record_keeps_its_promise_and_notices_edits(spec: ModelSpec, pi: DeviceProfile, tmp_path: Path) -> None:
    speed = generation(spec, pi, types_of(spec, 4, 2, 2)) * 0.9999
    made = blocks(spec, pi, min_generation_tok_per_s=speed)
    made.save(tmp_path / "a.json")
    assert Allocation.load(tmp_path / "a.json") == made
    others = [c for c in made.problem.constraints if c.name != "generation time"]
    for change in (
        {"min_generation_tok_per_s": 2 * speed},
        {"speeds": None},
        {"problem": dataclasses.replace(made.problem, constraints=tuple(others))},
    ):
        with pytest.raises(AllocationError, match="promise of a speed"):
            dataclasses.replace(made, **change).check(spec)  # type: ignore[arg-type]
