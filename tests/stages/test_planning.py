"""The plan of a model on a device: what it says fits does, what it calls the most is, and its remedies help."""

import dataclasses
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from checkpoints import ARCHITECTURES

import impq_edge
from impq_edge.conversion.layout import plan_gguf
from impq_edge.conversion.tokenizer import read_tokenizer
from impq_edge.devices.memory import memory_plan
from impq_edge.devices.profile import DeviceProfile, load_device
from impq_edge.errors import AllocationError, DeviceError, ModelError
from impq_edge.ggml.types import BLOCK_TYPES, LADDER, TensorType
from impq_edge.model.mixes import STOCK_MIXES, stock_types
from impq_edge.model.recipe import tensor_types
from impq_edge.model.shapes import Shapes, find_shapes, shipped_names
from impq_edge.model.spec import implied_inventory, read_model
from impq_edge.stages.planning import Plan, Variant, plan

PI = load_device("raspberry-pi-5")
GIB = 2**30
CHAT_TEMPLATE_BYTES = 4096


def device(**changes: Any) -> DeviceProfile:
    return dataclasses.replace(PI, **changes)


def by_name(made: Plan) -> dict[str, Variant]:
    return {variant.name: variant for variant in made.variants}


def mix_of(made: Plan) -> Variant | None:
    return next((variant for variant in made.variants if variant.kind == "mix"), None)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sizes_are_those_of_the_files_that_building_lays_out(architecture: str, checkpoints: dict[str, Path]) -> None:
    directory = checkpoints[architecture]
    spec = read_model(directory)
    tokenizer = read_tokenizer(directory, spec.hyperparameters.vocabulary, spec.hyperparameters.architecture)
    made = by_name(plan(str(directory), PI, mixes=STOCK_MIXES))
    for bits, kind in BLOCK_TYPES.items():
        types = tensor_types(spec, [kind] * spec.n_blocks, TensorType.Q6_K)
        written = plan_gguf(spec, tokenizer, types, {}).file_bytes
        assert abs(made[f"{bits} bit"].file_bytes - written) < CHAT_TEMPLATE_BYTES
    for mix in STOCK_MIXES:
        written = plan_gguf(spec, tokenizer, stock_types(spec, mix), {}).file_bytes
        assert abs(made[mix].file_bytes - written) < CHAT_TEMPLATE_BYTES


@pytest.mark.parametrize("name", shipped_names())
def test_every_variant_agrees_with_itself(name: str) -> None:
    made = plan(name, "raspberry-pi-5-4gb")
    spec = find_shapes(name).spec
    assert made.fits == any(v.fits for v in made.variants) and (made.remedy is None) == made.fits
    for variant in made.variants:
        assert variant.free_bytes == variant.memory.free_bytes
        assert variant.free_bytes == made.memory_bytes - sum(variant.memory.parts().values())
        assert variant.fits == (variant.free_bytes >= 0)
        assert variant.bits_per_weight == pytest.approx(8 * variant.file_bytes / spec.weights)
        assert variant.memory.weights_bytes == variant.file_bytes
        if variant.fits:
            assert variant.largest_context_tokens >= min(made.context_tokens, spec.hyperparameters.context)
    ours = [v for v in made.variants if v.kind != "stock"]
    assert all(a.file_bytes < b.file_bytes for a, b in pairwise(ours))
    for a, b in pairwise(ours):  # fewer bytes to read for every token
        assert a.speeds.generation and b.speeds.generation
        assert a.speeds.generation.likely_tok_per_s > b.speeds.generation.likely_tok_per_s


def mixed_total_bytes(shapes: Shapes, made: Plan, target: DeviceProfile, low: int, high: int, promoted: int) -> int:
    """Work out what a mix needs, from the memory model alone."""
    spec = shapes.spec
    kinds = [LADDER[high]] * promoted + [LADDER[low]] * (spec.n_blocks - promoted)
    types = tensor_types(spec, kinds, TensorType.Q6_K)
    data = plan_file_bytes(shapes, types)
    return memory_plan(spec, types, data + made.header_bytes, target).total_bytes


def plan_file_bytes(shapes: Shapes, types: Any) -> int:
    return sum(-(-types[t.gguf_name].tensor_bytes(t.shape) // 32) * 32 for t in shapes.spec.tensors)


@pytest.mark.parametrize(
    "changes",
    [
        {"memory_bytes": 5 * GIB},
        {"memory_bytes": 6 * GIB, "mmap": True},  # repacked copies of Q4_K, none of Q2_K
        {"memory_bytes": 5 * GIB, "use_extra_bufts": False},
        {"memory_bytes": 6 * GIB, "context_tokens": 8192},
    ],
)
@pytest.mark.parametrize("types", [(2, 4), (2, 3, 4, 5, 6, 8), (3, 5)])
def test_the_mix_is_the_most_that_fits(changes: dict[str, Any], types: tuple[int, ...]) -> None:
    shapes, target = find_shapes("Llama-3.1-8B"), device(**changes)
    made = plan(shapes, target, types=types, mixes=())
    mix, blocks = mix_of(made), shapes.spec.n_blocks
    assert mix and mix.fits and mix.average_bits and made.best == mix
    low, high = next((a, b) for a, b in pairwise(types) if a < mix.average_bits < b)
    promoted = round((mix.average_bits - low) / (high - low) * blocks)
    assert mixed_total_bytes(shapes, made, target, low, high, promoted) == mix.memory.total_bytes
    assert mix.memory.total_bytes <= target.memory_bytes
    assert mixed_total_bytes(shapes, made, target, low, high, promoted + 1) > target.memory_bytes
    for variant in made.variants:
        if variant.fits:
            assert (variant.average_bits or 0) <= mix.average_bits


def test_there_is_no_mix_where_a_uniform_file_is_as_good() -> None:
    assert mix_of(plan("Llama-3.2-1B", PI)) is None
    assert mix_of(plan("Llama-3.1-8B", "raspberry-pi-zero-2w")) is None


def test_a_limit_on_files_is_kept() -> None:
    shapes = find_shapes("Llama-3.1-8B")
    made = plan(shapes, device(max_file_bytes=4 * GIB))
    mix = mix_of(made)
    assert mix and 0.98 * 4 * GIB < mix.file_bytes <= 4 * GIB
    assert not by_name(made)["4 bit"].fits and by_name(made)["4 bit"].free_bytes > 0
    made = plan(shapes, device(max_file_bytes=GIB))
    assert made.remedy and "max_file_bytes" in made.remedy and not made.fits


def test_the_largest_context_fits_and_the_next_does_not() -> None:
    def fits(name: str, context: int) -> bool:
        return by_name(plan("gemma-2-9b", PI, context_tokens=context, mixes=("Q4_K_M",)))[name].fits

    made = by_name(plan("gemma-2-9b", PI, mixes=("Q4_K_M",)))
    for name in ("4 bit", "Q4_K_M"):
        largest = made[name].largest_context_tokens
        assert 0 < largest < 8192 and fits(name, largest) and not fits(name, largest + 256)


def test_a_smaller_cache_leaves_more() -> None:
    wide, narrow = plan("Llama-3.1-8B", PI), plan("Llama-3.1-8B", PI, kv_type="q8_0")
    assert narrow.kv_type == "q8_0"
    for a, b in zip(wide.variants, narrow.variants, strict=True):
        assert b.free_bytes > a.free_bytes and b.largest_context_tokens >= a.largest_context_tokens


@pytest.mark.parametrize(("model", "context"), [("Llama-3.1-8B", 131072), ("Llama-3.1-8B", 60000), ("Qwen3-8B", 40000)])
def test_what_the_remedy_names_helps(model: str, context: int) -> None:
    made = plan(model, PI, context_tokens=context)
    assert made.remedy and not made.fits and made.best is None
    named = re.search(r"--context (\d+)", made.remedy)
    assert named and plan(model, PI, context_tokens=int(named[1])).fits
    assert ("--kv-type q8_0" in made.remedy) == plan(model, PI, context_tokens=context, kv_type="q8_0").fits
    for pattern, again in (
        (r"memory, such as ([\w-]+\d\w*)", lambda name: plan(model, name, context_tokens=context, mixes=())),
        (r"model, such as ([\w.-]*\w)", lambda name: plan(name, PI, context_tokens=context, mixes=())),
    ):
        if found := re.search(pattern, made.remedy):
            assert again(found[1]).fits, found[1]


def test_notes_tell_what_is_particular() -> None:
    shapes = find_shapes("Llama-3.2-1B")
    hyper = dataclasses.replace(
        shapes.spec.hyperparameters, hidden=576, ffn=1536, n_heads=9, n_kv_heads=3, n_blocks=30, vocabulary=49152
    )
    odd = dataclasses.replace(
        shapes, vocabulary_known=False,
        spec=dataclasses.replace(shapes.spec, hyperparameters=hyper, tensors=implied_inventory(hyper)),
    )  # fmt: skip
    notes = " ".join(plan(odd, PI, context_tokens=200_000).notes)
    for words in ("rows of 576", "--allow-fallback", "guess", "131,072", "bandwidth", "--types"):
        assert words in notes
    assert "rows of" not in " ".join(plan("Llama-3.2-1B", PI).notes)
    assert "slower" in " ".join(plan("Llama-3.1-8B", "laptop-8gb", types=(2, 3)).notes)


def test_the_record_comes_back_from_disk(tmp_path: Path) -> None:
    made = plan("Qwen3-4B", PI)
    made.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == made
    assert made.to_json()["schema"] == "impq-edge.plan/1"


def test_plan_is_a_function_of_the_package() -> None:
    assert impq_edge.plan("Qwen3-0.6B", "raspberry-pi-5", mixes=("Q4_K_M",)).variants[-1].name == "Q4_K_M"


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"types": ()}, AllocationError, "no list of widths"),
        ({"types": (4, 2)}, AllocationError, "ascending"),
        ({"types": (2, 7)}, AllocationError, "2,7"),
        ({"mixes": ("Q4_X",)}, ModelError, "'Q4_X' is not one of"),
        ({"context_tokens": 0}, DeviceError, "context of 0"),
        ({"device": "raspberry-pi-9"}, DeviceError, "raspberry-pi-5"),
        ({"model": "no-such-model"}, ModelError, "Shapes ship for"),
    ],
)
def test_bad_input(arguments: dict[str, Any], error: type[Exception], words: str) -> None:
    given: dict[str, Any] = {"model": "Qwen3-0.6B", "device": PI, **arguments}
    with pytest.raises(error, match=words):
        plan(given.pop("model"), given.pop("device"), **given)
