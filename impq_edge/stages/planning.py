"""The stage that plans: a model's shapes and a device in; what fits there, and how fast it will be, out.

Nothing is downloaded but shapes and nothing is measured: bytes are those of :mod:`impq_edge.conversion.layout` and
:mod:`impq_edge.devices.memory`, speeds those of :mod:`impq_edge.devices.latency`.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import ClassVar, Literal

import pydantic

from impq_edge.conversion.layout import estimated_header_bytes
from impq_edge.devices.latency import Speeds, predict_speeds
from impq_edge.devices.memory import (
    MemoryPlan,
    largest_context_tokens,
    largest_gpu_layers,
    memory_plan,
)
from impq_edge.devices.profile import DeviceProfile, device_names, load_device
from impq_edge.errors import AllocationError
from impq_edge.ggml.cache import KvType
from impq_edge.ggml.types import LADDER, TensorType
from impq_edge.model.mixes import stock_types
from impq_edge.model.recipe import TensorTypes, data_bytes, describe_fallbacks, fallbacks, tensor_types
from impq_edge.model.shapes import Shapes, find_shapes, shipped_names
from impq_edge.records import STRICT, Record

SHOWN_MIXES = ("Q2_K", "Q3_K_M", "Q4_K_S", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0")
"""The stock mixes a plan is compared with unless others are asked for."""

_TYPES = (2, 4)
_BASES = {
    "formats": "what each block format was measured at on the device",
    "bandwidth": "the bandwidth measured on the device",
    "peak bandwidth": "the memory's theoretical bandwidth, of which devices reach very different shares",
}


@dataclasses.dataclass(frozen=True)
class Variant:
    """One file the model could be stored in, and what becomes of it on the device."""

    __pydantic_config__: ClassVar[pydantic.ConfigDict] = STRICT

    name: str
    kind: Literal["uniform", "mix", "stock"]
    average_bits: float | None  # nominal, of the blocks; None: a stock mix
    file_bytes: int
    bits_per_weight: float
    memory: MemoryPlan
    free_bytes: int  # negative: what is missing
    fits: bool  # into memory, and below the device's limit on files
    largest_context_tokens: int  # 0: none fits
    speeds: Speeds


@dataclasses.dataclass(frozen=True)
class Plan(Record):
    """What a device holds of a model, and how fast it will be."""

    SCHEMA: ClassVar[str] = "impq-edge.plan/1"

    model: str
    origin: str  # where the shapes come from
    weights: int  # their number
    device: str
    context_tokens: int
    kv_type: KvType
    memory_bytes: int
    max_file_bytes: int | None
    outer_type: TensorType  # of embedding and head in all but the stock mixes
    header_bytes: int
    variants: tuple[Variant, ...]  # by bits: every block at one width, and the mix that fits; then the stock mixes
    notes: tuple[str, ...]  # sentences on what is particular here
    remedy: str | None  # None unless nothing fits: a sentence on what would help

    @property
    def fits(self) -> bool:
        """Whether any file does."""
        return any(variant.fits for variant in self.variants)

    @property
    def best(self) -> Variant | None:
        """The file of the most nominal bits that fits, of those this project would build."""
        ours = [v for v in self.variants if v.fits and v.average_bits is not None]
        return max(ours, key=lambda variant: variant.average_bits or 0, default=None)


def plan(
    model: str | Shapes,
    device: DeviceProfile | str,
    *,
    context_tokens: int | None = None,
    kv_type: KvType | None = None,
    revision: str | None = None,
    types: Sequence[int] = _TYPES,
    outer_type: TensorType | str = TensorType.Q6_K,
    mixes: Sequence[str] = SHOWN_MIXES,
) -> Plan:
    """Tell what a device holds of a model, and how fast it will be.

    Parameters
    ----------
    model
        As for :func:`~impq_edge.model.shapes.find_shapes`, or what that returned.
    device
        A shipped name, a TOML file, or a loaded profile.
    context_tokens, kv_type
        What the KV cache must hold and how; the device's own defaults when None.
    revision
        Of a hub id.
    types
        Widths of the blocks, ascending: each is planned for all blocks, and two neighbours for the mix that fits.
    outer_type
        Type of embedding and head.
    mixes
        Stock mixes to compare with, of :data:`~impq_edge.model.mixes.STOCK_MIXES`.

    Raises
    ------
    ModelError
        When the model is unknown, unreachable or not supported, or a mix is unknown.
    DeviceError
        When the device is unknown, or the context or cache type is impossible.
    AllocationError
        When ``types`` is no list of widths.
    """
    shapes = find_shapes(model, revision) if isinstance(model, str) else model
    target = load_device(device) if isinstance(device, str) else device
    widths, outer = _checked(types, outer_type)
    planner = _Planner(shapes, target, context_tokens, kv_type, outer)
    uniform = [planner.variant(f"{bits} bit", "uniform", bits, planner.types([bits])) for bits in widths]
    mix = planner.mix(widths)
    stock = [planner.variant(name, "stock", None, stock_types(shapes.spec, name)) for name in mixes]
    ours = sorted([*uniform, *([mix] if mix else [])], key=lambda variant: variant.average_bits or 0)
    variants = (*ours, *stock)
    return Plan(
        model=shapes.spec.name,
        origin=shapes.origin,
        weights=shapes.spec.weights,
        device=target.name,
        context_tokens=variants[0].memory.context_tokens,
        kv_type=kv_type or target.kv_type,
        memory_bytes=target.memory_bytes,
        max_file_bytes=target.max_file_bytes,
        outer_type=outer,
        header_bytes=planner.header_bytes,
        variants=variants,
        notes=tuple(_notes(shapes, target, variants, widths, outer)),
        remedy=None if any(v.fits for v in variants) else planner.remedy(min(variants, key=_needed)),
    )


def _checked(types: Sequence[int], outer_type: TensorType | str) -> tuple[tuple[int, ...], TensorType]:
    widths = tuple(types)
    if not widths or list(widths) != sorted(set(widths)) or not set(widths) <= set(LADDER):
        raise AllocationError(
            f"--types {','.join(map(str, widths))} is no list of widths; give some of "
            f"{','.join(map(str, LADDER))}, ascending."
        )
    return widths, TensorType(outer_type)


def _needed(variant: Variant) -> int:
    return variant.memory.total_bytes


class _Planner:
    """A model on a device in one setting."""

    def __init__(
        self,
        shapes: Shapes,
        device: DeviceProfile,
        context: int | None,
        kv_type: KvType | None,
        outer: TensorType = TensorType.Q6_K,
    ) -> None:
        self._spec, self._device, self._outer = shapes.spec, device, outer
        self._context, self._kv_type = context, kv_type
        self.header_bytes = estimated_header_bytes(shapes.spec, shapes.vocabulary)

    def types(self, block_bits: Sequence[int]) -> dict[str, TensorType]:
        """Return the tensors' types with blocks at these widths, the last of them for all blocks that are left."""
        bits = [*block_bits, *[block_bits[-1]] * (self._spec.n_blocks - len(block_bits))]
        return tensor_types(self._spec, [LADDER[width] for width in bits], self._outer)

    def variant(
        self, name: str, kind: Literal["uniform", "mix", "stock"], average_bits: float | None, types: TensorTypes
    ) -> Variant:
        spec, device = self._spec, self._device
        file_bytes = self.header_bytes + data_bytes(spec, types)
        memory = self._memory(types, file_bytes, self._kv_type)
        allowed = device.max_file_bytes is None or file_bytes <= device.max_file_bytes
        return Variant(
            name=name,
            kind=kind,
            average_bits=average_bits,
            file_bytes=file_bytes,
            bits_per_weight=8 * file_bytes / spec.weights,
            memory=memory,
            free_bytes=memory.free_bytes,
            fits=memory.fits and allowed,
            largest_context_tokens=largest_context_tokens(spec, types, file_bytes, device, kv_type=self._kv_type),
            speeds=predict_speeds(spec, types, device, kv_type=self._kv_type),
        )

    def mix(self, widths: tuple[int, ...]) -> Variant | None:
        """Return the mix of the most bits that fits: some blocks one width up; None where a uniform file is as good.

        All blocks are of one size, so that their number decides; but the last ones may lie in another memory than the
        first, so that both ends are filled.
        """
        steps = [step for step in itertools.pairwise(widths) if self._holds(self.types([step[0]]))]
        if not steps or self._holds(self.types([widths[-1]])):
            return None
        (low, high), blocks = steps[-1], self._spec.n_blocks

        def mixed(first: int, last: int) -> TensorTypes:
            return self.types([high] * first + [low] * (blocks - first - last) + [high] * last)

        first = self._most(blocks, lambda number: mixed(number, 0))
        last = self._most(blocks - first, lambda number: mixed(first, number))
        if first + last == 0:
            return None
        average = low + (high - low) * (first + last) / blocks
        return self.variant(f"{average:.2f} bit mix", "mix", average, mixed(first, last))

    def _most(self, limit: int, types: Callable[[int], TensorTypes]) -> int:
        """Return the largest number up to ``limit`` with which the types are held, which those with 0 are."""
        low, high = 0, limit
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self._holds(types(middle)) else (low, middle - 1)
        return low

    def _holds(self, types: TensorTypes) -> bool:
        file_bytes, limit = self.header_bytes + data_bytes(self._spec, types), self._device.max_file_bytes
        return (limit is None or file_bytes <= limit) and self._memory(types, file_bytes, self._kv_type).fits

    def _memory(self, types: TensorTypes, file_bytes: int, kv_type: KvType | None) -> MemoryPlan:
        return memory_plan(
            self._spec, types, file_bytes, self._device, context_tokens=self._context, kv_type=kv_type
        )  # fmt: skip

    def remedy(self, smallest: Variant) -> str:
        """Say what is missing for the smallest file, and what would help."""
        device, memory = self._device, smallest.memory
        at = f"even at {smallest.name}" if smallest.kind == "uniform" else f"even as {smallest.name}"
        if memory.fits:
            assert device.max_file_bytes is not None
            return (
                f"{self._spec.name} takes {smallest.file_bytes} bytes {at}, and {device.name} allows "
                f"files of {device.max_file_bytes}; raise max_file_bytes, or choose a smaller model."
            )
        ways = [f"--context {smallest.largest_context_tokens}"] if smallest.largest_context_tokens else []
        if memory.kv_type == "f16" and device.flash_attention and self._fits_with("q8_0", smallest):
            ways.insert(0, "--kv-type q8_0")
        if memory.free_bytes >= 0:  # what is full is the GPU's own memory
            layers = largest_gpu_layers(
                self._spec, self._types_of(smallest), smallest.file_bytes, device, context_tokens=self._context,
                kv_type=self._kv_type,
            )  # fmt: skip
            ways.append(f"gpu_layers {layers} in the device's profile")
        larger = self._smallest_device_for(smallest)
        ways.append(f"a device with more memory, such as {larger}" if larger else "a device with more memory")
        smaller = self._largest_model()
        ways.append(f"a smaller model, such as {smaller}" if smaller else "a smaller model")
        held, there, where = memory.total_bytes, memory.memory_bytes, "memory"
        if memory.free_bytes >= 0:
            held, there, where = sum(memory.gpu_parts().values()), memory.gpu_memory_bytes or 0, "GPU memory"
        return (
            f"{self._spec.name} does not fit {device.name} {at}: it needs {held / 2**30:.2f} GiB of {where} and there "
            f"are {there / 2**30:.2f}; use {', or '.join(ways)}."
        )

    def _smallest_device_for(self, variant: Variant) -> str | None:
        """Return the shipped device with the least memory that holds the file at this context."""
        devices = sorted(map(load_device, device_names()), key=lambda device: device.memory_bytes)
        context, types = variant.memory.context_tokens, self.types([_TYPES[0]])
        for device in devices:
            found = memory_plan(self._spec, types, variant.file_bytes, device, context_tokens=context)
            if found.fits:
                return device.name
        return None

    def _largest_model(self) -> str | None:
        """Return the largest of the models whose shapes ship that this device holds at 2 bit."""
        for shapes in sorted(map(find_shapes, shipped_names()), key=lambda shapes: -shapes.spec.weights):
            planner = _Planner(shapes, self._device, self._context, self._kv_type)
            if planner._holds(planner.types([_TYPES[0]])):
                return shapes.spec.name
        return None

    def _fits_with(self, kv_type: KvType, variant: Variant) -> bool:
        return self._memory(self._types_of(variant), variant.file_bytes, kv_type).fits

    def _types_of(self, variant: Variant) -> TensorTypes:
        """Return the types of a variant that is no mix."""
        bits = variant.average_bits
        return stock_types(self._spec, variant.name) if bits is None else self.types([int(bits)])


def _notes(
    shapes: Shapes, device: DeviceProfile, variants: Sequence[Variant], widths: tuple[int, ...], outer: TensorType
) -> list[str]:
    spec, notes = shapes.spec, []
    if not shapes.vocabulary_known:
        notes.append("The size of the vocabulary's strings is a guess from their number: some megabytes either way.")
    found = [describe_fallbacks(f) for bits in widths if (f := fallbacks(spec, LADDER[bits], outer))]
    notes += [f"{sentence} Building it needs --allow-fallback." for sentence in dict.fromkeys(found)]
    context = variants[0].memory.context_tokens
    if context > spec.hyperparameters.context:
        notes.append(
            f"A context of {context:,} tokens is more than the {spec.hyperparameters.context:,} that {spec.name} was "
            "made for."
        )
    if widths == _TYPES and any(v.fits and v.average_bits == _TYPES[-1] for v in variants):
        notes.append(
            f"{device.name} holds all blocks at 4 bit; --types 2,3,4,5,6,8 tells how much wider they could be."
        )
    wanted = device.min_generation_tok_per_s
    slow = [
        v.name for v in variants
        if v.fits and wanted and v.speeds.generation and v.speeds.generation.likely_tok_per_s < wanted
    ]  # fmt: skip
    basis = variants[0].speeds.basis
    alone = " of the processor alone, without its GPU," if device.gpu_layers else ""
    notes.append(f"Speeds are those{alone} of an empty context, predicted from {_BASES.get(basis, basis)}.")
    if slow:
        notes.append(f"Likely slower than the {wanted:g} tokens/s that {device.name} asks for: {', '.join(slow)}.")
    return notes
