"""What a release is asked to be: ``release.toml``, checked."""

import dataclasses
import os
import re
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import pydantic

from impq_edge.devices.profile import Bytes, Count, Rate, device_names
from impq_edge.errors import RecordError, ValidationError
from impq_edge.ggml.cache import KvType
from impq_edge.ggml.types import TensorType
from impq_edge.model.source import DEMO
from impq_edge.records import STRICT, Record, is_there, load_toml, parse, shown
from impq_edge.spqe.options import GameOptions
from impq_edge.validation.remote.ssh import check_host
from impq_edge.validation.validate import DEFAULT_WINDOWS

Reference = Literal["f16", "4bit"]
"""What a perplexity is compared with: the unquantised model in F16, or the same model with all blocks at 4 bit."""

_MOST_CELLS = 1000  # models × devices × contexts of one release
_MOST_PERMUTATIONS = 10**6  # of a game; the paper's is 100, and every one is drawn beforehand
_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,95}$"  # it becomes part of file names
_BITS = r"^\d{1,3}(\.\d{1,9}|/[1-9]\d{0,5})?$"
_TYPES = re.compile(r" *\d{1,2} *(, *\d{1,2} *)*")
_GAME_KEYS = frozenset(field.name for field in dataclasses.fields(GameOptions))


def _text_of_number(value: object) -> object:
    return f"{value:.9g}" if isinstance(value, int | float) and not isinstance(value, bool) else value


def _number(value: object) -> float:
    return value if isinstance(value, int | float) else 0  # what is no number is refused where its type is known


def _listed_types(game: object) -> object:
    """Take ``types`` as the command line writes them, too: "2,3,4" for [2, 3, 4]."""
    if isinstance(game, dict) and isinstance(types := game.get("types"), str) and _TYPES.fullmatch(types):
        return {**game, "types": [int(bits) for bits in types.split(",")]}
    return game


Name = Annotated[str, pydantic.Field(pattern=_NAME)]


def _destination(value: object) -> object:
    try:
        return check_host(value) if isinstance(value, str) else value
    except ValidationError:
        raise ValueError("no destination for ssh; write user@host, or a name of your ~/.ssh/config") from None


AverageBits = Annotated[str, pydantic.Field(pattern=_BITS), pydantic.BeforeValidator(_text_of_number)]
"""As a number, or as text such as "8/3"."""


@dataclasses.dataclass(frozen=True)
class Gates:
    """What every file must keep; None: not asked for."""

    __pydantic_config__: ClassVar[pydantic.ConfigDict] = STRICT

    reference: Reference | None = None  # of max_perplexity_ratio, "f16" by default
    max_perplexity_ratio: Rate | None = None
    max_kl_divergence: Rate | None = None  # nats per token, from the F16 file
    min_tokens_per_second: Rate | None = None  # of generation
    min_prompt_tokens_per_second: Rate | None = None
    max_memory: Bytes | None = None  # of the process that runs the file, without the system's reserve

    def over(self, other: "Gates") -> "Gates":
        """Return these gates, and where they say nothing the other's."""
        own = {key: value for key, value in dataclasses.asdict(self).items() if value is not None}
        return dataclasses.replace(other, **own)


@dataclasses.dataclass(frozen=True)
class OrderedModel:
    """A model of the matrix."""

    __pydantic_config__: ClassVar[pydantic.ConfigDict] = STRICT

    model: str  # "demo", a directory, or a hub id
    revision: str | None = None  # of a hub id
    name: Name | None = None  # in file names; the directory's or the hub's by default
    profile: str | None = None  # a finished sensitivity profile, a file or a shipped name: spares the game


@dataclasses.dataclass(frozen=True)
class OrderedDevice:
    """A device of the matrix, and limits of the files for it beside its memory."""

    __pydantic_config__: ClassVar[pydantic.ConfigDict] = STRICT

    device: str  # a shipped name or a TOML file
    on: Annotated[str | None, pydantic.BeforeValidator(_destination)] = None  # the device itself, as ssh takes it
    contexts: tuple[Count, ...] = ()  # instead of the release's
    kv_type: KvType | None = None
    budget: Bytes | None = None  # largest file
    average_bits: AverageBits | None = None
    min_tokens_per_second: Rate | None = None  # a limit of the allocation, not a gate
    gates: Gates = dataclasses.field(default_factory=Gates)  # instead of the release's, each


Device = Annotated[OrderedDevice, pydantic.BeforeValidator(lambda v: {"device": v} if isinstance(v, str) else v)]
Model = Annotated[OrderedModel, pydantic.BeforeValidator(lambda v: {"model": v} if isinstance(v, str) else v)]


@dataclasses.dataclass(frozen=True)
class Order(Record):
    """Models × devices × contexts, how sensitivity is measured, and what every file must keep."""

    SCHEMA: ClassVar[str] = "impq-edge.order/1"

    name: Name  # of the release, and of its directory unless another is given
    models: tuple[Model, ...]
    devices: tuple[Device, ...]
    contexts: tuple[Count, ...] = ()  # none: every device's own
    game: Annotated[dict[str, Any], pydantic.BeforeValidator(_listed_types)] = dataclasses.field(
        default_factory=dict
    )  # the fields of GameOptions
    encode: Literal["rtn", "imatrix", "gptq"] | None = None
    alpha: float | None = None
    head_type: TensorType = TensorType.Q6_K
    allow_fallback: Annotated[bool, pydantic.Field(strict=True)] = False
    text: str | None = None  # evaluation text; the one that ships by default
    windows: Count = DEFAULT_WINDOWS
    gates: Gates = dataclasses.field(default_factory=Gates)

    def __post_init__(self) -> None:
        """Check what no single field can."""
        unknown = sorted(self.game.keys() - _GAME_KEYS)
        settings = [len(device.contexts or self.contexts) or 1 for device in self.devices]
        for wrong, sentence in (
            (not self.models or not self.devices, "a release needs at least one of models and one of devices"),
            (bool(unknown), f"game has no setting {', '.join(map(shown, unknown))}"),
            (len(self.models) * sum(settings) > _MOST_CELLS, f"that is more than {_MOST_CELLS} files"),
            (_number(self.game.get("permutations")) > _MOST_PERMUTATIONS,
             f"game.permutations is more than {_MOST_PERMUTATIONS}"),
            (any(d.gates.reference for d in self.devices), "gates.reference is the same for all devices"),
        ):  # fmt: skip
            if wrong:
                raise ValueError(sentence)

    @property
    def reference(self) -> Reference:
        """What perplexities are compared with."""
        return self.gates.reference or "f16"

    def gates_of(self, device: OrderedDevice) -> Gates:
        """Return what the files for a device must keep."""
        return device.gates.over(self.gates)

    def game_options(self, base: Path) -> GameOptions:
        """Return how sensitivity is measured; a text of it is looked for from ``base``.

        Raises
        ------
        SensitivityError
            When the options mean nothing.
        """
        found = parse(GameOptions, self.game, Path("[game]"))
        return found if found.calibration is None else dataclasses.replace(found, calibration=base / found.calibration)


def load_order(path: Path) -> Order:
    """Read a ``release.toml``.

    Raises
    ------
    RecordError
        When it is no TOML, a key is unknown, or a value does not fit.
    """
    return parse(Order, load_toml(path), path)


def found_from(base: Path, name: str) -> str:
    """Return a model, device or profile as the stages take it: paths are meant from where the order lies.

    A name that ships stays one, and so does what nothing lies at, such as a hub id.
    """
    if name == DEMO or name in device_names():
        return name
    path = base / name
    is_path = is_there(path) or name.endswith((".toml", ".json")) or name.startswith(("." + os.sep, ".." + os.sep))
    return str(path) if is_path and not name.startswith(os.sep) else name


def fraction(bits: str | None) -> Fraction | None:
    """Return average bits as an exact number."""
    return None if bits is None else Fraction(bits)


def require_distinct(names: dict[str, str], what: str) -> None:
    """Refuse two things of one name, also where only capitals tell them apart: some file systems do not.

    Raises
    ------
    RecordError
        Naming both.
    """
    seen: dict[str, str] = {}
    for asked, name in names.items():
        other = seen.setdefault(name.casefold(), asked)
        if other != asked:
            raise RecordError(f"The {what} {other} and {asked} are both called {name}; name one of them otherwise.")
