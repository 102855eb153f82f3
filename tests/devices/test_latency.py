"""Predicted speeds: what follows from measured costs, from bandwidths, and costs from measured times."""

import dataclasses
import itertools
from collections.abc import Callable

import numpy as np
import pytest
from calibrated import calibrated, kernels

from impq_edge.devices.fitting import Observation, fit_speeds
from impq_edge.devices.latency import (
    GENERATED_TOKENS,
    PROMPT_TOKENS,
    generation_work,
    model_size,
    predict_speeds,
    prompt_seconds,
    prompt_work,
)
from impq_edge.devices.profile import DeviceProfile, device_names, load_device
from impq_edge.ggml.types import TensorType
from impq_edge.model.recipe import TensorTypes, tensor_types
from impq_edge.model.spec import ModelSpec
from impq_edge.validation.calibration import TYPES, plan_trials

Uniform = Callable[[ModelSpec, TensorType], TensorTypes]
KINDS = [TensorType.Q2_K, TensorType.Q3_K, TensorType.Q4_K, TensorType.Q5_K, TensorType.Q6_K, TensorType.Q8_0]


@pytest.fixture
def board(make_device: Callable[..., DeviceProfile]) -> DeviceProfile:
    return make_device(generation_bandwidth_bytes_per_s=5e9)


def test_a_token_of_an_8b_model_takes_what_its_parts_take(
    published: dict[str, ModelSpec], uniform: Uniform, board: DeviceProfile
) -> None:
    """Counted by hand for Llama-3.1-8B: 6.98e9 weights in blocks, a head of 0.525e9, 19 operations a block."""
    spec, device = published["llama-3.1-8b"], calibrated(board)
    types = uniform(spec, TensorType.Q4_K)
    work = generation_work(spec, types, device, GENERATED_TOKENS)
    assert work.weights == {TensorType.Q4_K: 32 * 218_103_808, TensorType.Q6_K: 128256 * 4096}
    assert work.attended == 32 * 32 * 128 * 64.5
    assert work.operations == pytest.approx(32 * 19, rel=0.02)
    speeds = predict_speeds(spec, types, device)
    assert speeds.basis == "formats" and speeds.generation and speeds.prompt
    weights_s = 32 * 218_103_808 * 4.5e-11 + 128256 * 4096 * 6.5625e-11
    token_s = 1 / speeds.generation.likely_tok_per_s
    assert weights_s < token_s < 1.05 * weights_s
    assert speeds.generation.low_tok_per_s == pytest.approx(speeds.generation.likely_tok_per_s / 1.1)
    assert speeds.generation.high_tok_per_s == pytest.approx(speeds.generation.likely_tok_per_s * 1.1)


def test_of_a_prompt_only_the_last_token_passes_the_last_feed_forward_and_the_head(
    published: dict[str, ModelSpec], uniform: Uniform, board: DeviceProfile
) -> None:
    spec = published["llama-3.1-8b"]
    together, alone = prompt_work(spec, uniform(spec, TensorType.Q4_K), board, 512)
    feed_forward = 3 * 4096 * 14336
    assert together.weights == {TensorType.Q4_K: 512 * (32 * 218_103_808 - feed_forward)}
    assert alone.weights == {TensorType.Q4_K: feed_forward, TensorType.Q6_K: 128256 * 4096}
    assert together.attended == 32 * 32 * 128 * 512 * 513 / 2
    halves, _ = prompt_work(spec, {}, dataclasses.replace(board, ubatch_tokens=256), 512)
    assert halves.calls == 2 and halves.operations == 2 * together.operations


def test_a_window_bounds_what_a_token_attends_to(published: dict[str, ModelSpec], board: DeviceProfile) -> None:
    spec = published["gemma2-2b"]
    near, far = (generation_work(spec, {}, board, 1, depth).attended for depth in (4000, 8000))
    assert near == 26 * 8 * 256 * 4001 and far == 13 * 8 * 256 * (4096 + 8001)


@pytest.mark.parametrize("name", ["llama-3.1-8b", "qwen3-4b", "gemma2-2b"])
def test_where_bandwidth_binds_fewer_bits_are_faster(
    published: dict[str, ModelSpec], uniform: Uniform, board: DeviceProfile, name: str
) -> None:
    spec = published[name]
    bound = calibrated(board, weight_s={TensorType.Q2_K: 2.625e-11})
    for device in (board, bound):
        rates = [predict_speeds(spec, uniform(spec, kind), device).generation for kind in KINDS]
        likely = [rate.likely_tok_per_s for rate in rates if rate]
        assert len(likely) == len(KINDS) and likely == sorted(likely, reverse=True)
        assert all(rate and rate.low_tok_per_s < rate.likely_tok_per_s < rate.high_tok_per_s for rate in rates)


def test_where_it_does_not_2_bit_may_be_slower(
    published: dict[str, ModelSpec], uniform: Uniform, board: DeviceProfile
) -> None:
    spec, device = published["llama-3.1-8b"], calibrated(board)
    two, four = (predict_speeds(spec, uniform(spec, kind), device).generation for kind in KINDS[::2][:2])
    assert two and four and two.likely_tok_per_s < four.likely_tok_per_s


def test_the_setting_of_repacking_chooses_its_speeds(
    published: dict[str, ModelSpec], uniform: Uniform, board: DeviceProfile
) -> None:
    spec = published["qwen3-4b"]
    device = calibrated(board)
    assert device.speed
    faster = kernels(weight_s={TensorType.Q4_K: 1e-11})
    device = dataclasses.replace(device, speed=dataclasses.replace(device.speed, repacked=faster))
    plain, repacked = (
        predict_speeds(spec, uniform(spec, TensorType.Q4_K), dataclasses.replace(device, use_extra_bufts=on)).generation
        for on in (False, True)
    )
    assert plain and repacked and repacked.likely_tok_per_s > 2 * plain.likely_tok_per_s
    one = dataclasses.replace(device, use_extra_bufts=True)
    one = dataclasses.replace(one, speed=dataclasses.replace(device.speed, repacked=None))
    assert predict_speeds(spec, uniform(spec, TensorType.Q4_K), one).basis == "bandwidth"


def test_a_type_that_was_not_measured_is_not_guessed(
    published: dict[str, ModelSpec], uniform: Uniform, board: DeviceProfile
) -> None:
    spec, device = published["qwen3-4b"], calibrated(board)
    assert predict_speeds(spec, uniform(spec, TensorType.BF16), device).basis == "bandwidth"
    bare = dataclasses.replace(device, generation_bandwidth_bytes_per_s=None, speed=None)
    assert predict_speeds(spec, uniform(spec, TensorType.Q4_K), bare).basis == "peak bandwidth"


def test_between_small_and_large_models_costs_go_from_the_ones_to_the_others(
    published: dict[str, ModelSpec], uniform: Uniform, board: DeviceProfile
) -> None:
    """No cost jumps where a model grows, and the largest measured holds beyond."""
    spec, device = published["qwen3-4b"], calibrated(board)
    types, size = uniform(spec, TensorType.Q4_K), model_size(spec)
    assert device.speed and device.speed.plain
    costs = device.speed.plain.generation
    kernels = dataclasses.replace(
        device.speed.plain,
        generation=dataclasses.replace(costs, large_weight_s={k: 3 * cost for k, cost in costs.weight_s.items()}),
    )

    def speed_of(small: float, large: float) -> float:
        sizes = {"small_weights": round(small * size), "large_weights": round(large * size)}
        speed = dataclasses.replace(device.speed, plain=kernels, **sizes)  # type: ignore[type-var]
        found = predict_speeds(spec, types, dataclasses.replace(device, speed=speed)).generation
        assert found
        return found.likely_tok_per_s

    plain = predict_speeds(spec, types, device).generation
    assert plain and speed_of(1, 10) == speed_of(5, 50) == pytest.approx(plain.likely_tok_per_s)
    assert speed_of(0.01, 0.1) == speed_of(0.1, 1) == pytest.approx(plain.likely_tok_per_s / 3, rel=0.05)
    assert speed_of(0.1, 10) == pytest.approx(plain.likely_tok_per_s / 2, rel=0.05)


def test_shipped_devices_reach_a_share_of_their_peak_within_the_range(
    published: dict[str, ModelSpec], uniform: Uniform
) -> None:
    spec = published["qwen3-4b"]
    types, compared = uniform(spec, TensorType.Q4_K), 0
    for device in map(load_device, device_names()):
        if device.generation_bandwidth_bytes_per_s is None:
            continue
        known = predict_speeds(spec, types, device).generation
        guessed = predict_speeds(
            spec, types, dataclasses.replace(device, generation_bandwidth_bytes_per_s=None)
        ).generation
        assert known and guessed
        assert guessed.low_tok_per_s < known.likely_tok_per_s < guessed.high_tok_per_s
        compared += 1
    assert compared >= 2


@pytest.mark.parametrize("flash_attention", [True, False])
def test_costs_are_found_again_from_the_times_they_make(board: DeviceProfile, flash_attention: bool) -> None:
    device = dataclasses.replace(board, flash_attention=flash_attention)
    true = kernels()
    observations = [
        Observation(
            trial.spec, trial.types, PROMPT_TOKENS, 32,
            *(generation_work(trial.spec, trial.types, device, 32, depth).seconds(true, true.generation)
              for depth in (0, PROMPT_TOKENS)),
            prompt_seconds(true, *prompt_work(trial.spec, trial.types, device, PROMPT_TOKENS)),
        )
        for trial in plan_trials(TYPES, 12_000_000, 4096)
    ]  # fmt: skip
    slower = dataclasses.replace(true.generation, weight_s=dict.fromkeys(TYPES, 1e-10))
    large = [
        Observation(t.spec, t.types, 0, 32, generation_work(t.spec, t.types, device, 32).seconds(true, slower))
        for t in plan_trials(TYPES, 12_000_000, 4096, large_weights=128_000_000)
        if t.large
    ]
    found = fit_speeds(observations, large, device, spread=0.04)
    assert found.generation.large_weight_s == pytest.approx(slower.weight_s, rel=1e-4)
    assert found.generation_error < 1e-6 and found.prompt_error < 1e-6
    assert found.operation_s == pytest.approx(true.operation_s, rel=1e-3)
    for costs, wanted in ((found.generation, true.generation), (found.prompt, true.prompt)):
        for name in ("call_s", "element_s", "attention_s", "score_s", "softcap_s", "logit_s"):
            assert getattr(costs, name) == pytest.approx(getattr(wanted, name), rel=1e-3)
        assert costs.weight_s == pytest.approx({kind: wanted.weight_s[kind] for kind in TYPES}, rel=1e-4)


def test_noise_in_the_times_shows_in_the_errors_and_hardly_in_predictions(
    board: DeviceProfile, published: dict[str, ModelSpec], uniform: Uniform
) -> None:
    generator, true = np.random.default_rng(0), kernels()
    observations = []
    for trial in plan_trials(TYPES, 12_000_000, 4096):
        noise = generator.normal(1, 0.03, size=3)
        works = [generation_work(trial.spec, trial.types, board, 32, depth) for depth in (0, PROMPT_TOKENS)]
        prompt_s = prompt_seconds(true, *prompt_work(trial.spec, trial.types, board, PROMPT_TOKENS))
        times = [*(work.seconds(true, true.generation) for work in works), prompt_s]
        observations.append(Observation(trial.spec, trial.types, PROMPT_TOKENS, 32, *(noise * times)))
    found = fit_speeds(observations, [], board, spread=0.03)
    assert 0.01 < found.generation_error < 0.03 and 0.005 < found.prompt_error < 0.03
    device = calibrated(board)
    assert device.speed
    fitted = dataclasses.replace(device, speed=dataclasses.replace(device.speed, plain=found))
    for spec, kind in itertools.product(published.values(), KINDS):
        types = tensor_types(spec, [kind] * spec.n_blocks, TensorType.Q6_K)
        exact, close = predict_speeds(spec, types, device), predict_speeds(spec, types, fitted)
        for one, other in ((exact.generation, close.generation), (exact.prompt, close.prompt)):
            assert one and other and other.likely_tok_per_s == pytest.approx(one.likely_tok_per_s, rel=0.15)
