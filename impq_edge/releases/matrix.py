"""An order's matrix: every model with what its files are for, each a device and a context."""

import dataclasses
import re
from pathlib import Path

from impq_edge.conversion.encoder import EncodeOptions
from impq_edge.data import data_path
from impq_edge.devices.profile import DeviceProfile, load_device
from impq_edge.errors import AllocationError, ReleaseError
from impq_edge.impq.allocate import Request
from impq_edge.model.source import Source, find
from impq_edge.model.spec import ModelSpec
from impq_edge.records import shown
from impq_edge.releases.agreement import agreed, require_measurable, require_same_model
from impq_edge.releases.order import Gates, Order, OrderedDevice, OrderedModel, found_from, fraction, require_distinct
from impq_edge.spqe.ladder import LadderProfile
from impq_edge.spqe.options import GameOptions
from impq_edge.spqe.profile import SensitivityProfile
from impq_edge.spqe.table import Progress
from impq_edge.stages import (
    allocation_request,
    chooses,
    load_profile,
    measured_types,
    open_model,
    require_allocatable,
    require_no_program,
    require_rows,
)

Profile = SensitivityProfile | LadderProfile
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")


@dataclasses.dataclass(frozen=True)
class Cell:
    """One device at one context: what one file, or a share in one, is for."""

    asked: str  # the device, as the order names it
    on: str | None  # the device itself, as ssh takes it
    device: DeviceProfile
    request: Request
    gates: Gates

    @property
    def key(self) -> str:
        """A name for its records; device names hold nothing that leads elsewhere."""
        return f"{self.device.name}-{self.request.context_tokens}"


@dataclasses.dataclass(frozen=True)
class Row:
    """One model and its cells."""

    ordered: OrderedModel
    source: Source
    given: Path | None  # a finished profile
    found: Profile | None  # what it holds
    cells: tuple[Cell, ...]

    @property
    def name(self) -> str:
        """What the model's files are named after."""
        return self.source.name


@dataclasses.dataclass(frozen=True)
class Matrix:
    """Everything an order names, found; nothing downloaded yet."""

    order: Order
    base: Path  # where the order's paths start
    game: GameOptions
    encoding: EncodeOptions
    text: Path
    rows: tuple[Row, ...]


def resolve(order: Order, base: Path) -> Matrix:
    """Find everything that an order names, and refuse what could only fail later.

    Raises
    ------
    ImpqError
        One sentence for what cannot be used.
    """
    game, encoding = agreed(order.game_options(base), order.encode)
    text = data_path("demo", "evaluation.txt") if order.text is None else base / order.text
    sources = {asked.model: _source(asked, base) for asked in order.models}
    require_distinct({asked: source.name for asked, source in sources.items()}, "models")
    if len(sources) < len(order.models):
        raise ReleaseError("A model is named twice; leave one out, or give the other as another directory.")
    devices = {asked.device: load_device(found_from(base, asked.device)) for asked in order.devices}
    require_distinct({asked: device.name for asked, device in devices.items()}, "devices")
    if len(devices) < len(order.devices):
        raise ReleaseError("A device is named twice; give it once, with a list of contexts.")
    require_distinct(
        {f"{m} for {d}": f"{s.name}-{t.name}" for m, s in sources.items() for d, t in devices.items()}, "files of"
    )
    rows = []
    for asked in order.models:
        given = None if asked.profile is None else Path(found_from(base, asked.profile))
        found = None if given is None else load_profile(given)
        if game.is_played_in_rounds if found is None else chooses(found, game.method):
            require_no_program(order.alpha)
        types = game.types if found is None or game.is_ladder else measured_types(found)
        cells = tuple(
            cell for d in order.devices for cell in _cells(order, d, devices[d.device], types)
        )  # fmt: skip
        for cell in cells:
            require_measurable(text, order.windows, cell.request)
        rows.append(Row(asked, sources[asked.model], given, found, cells))
    return Matrix(order, base, game, encoding, text, tuple(rows))


def open_row(matrix: Matrix, row: Row, progress: Progress) -> tuple[Row, Path, ModelSpec]:
    """Fetch a model, and refuse what no allocation can meet before a game is played for it."""
    directory, spec = open_model(row.source, progress=progress)
    source = dataclasses.replace(row.source, directory=directory, content_sha256=spec.content_sha256)
    row = dataclasses.replace(row, source=source)
    require_rows(spec, matrix.order.allow_fallback)
    if row.given is not None and row.found is not None:
        require_same_model(row.found, spec, row.given)
    for cell in row.cells:
        try:
            require_allocatable(row.source, spec, cell.request, matrix.game.player_kind)
        except AllocationError as error:
            raise AllocationError(f"{row.name} for {cell.device.name}: {error}") from None
    return row, directory, spec


def _source(asked: OrderedModel, base: Path) -> Source:
    source = find(found_from(base, asked.model), asked.revision)
    name = asked.name or source.name
    if _NAME.fullmatch(name) is None:
        raise ReleaseError(
            f"The model {shown(name)} has a name that file names should not have; give it one of letters, digits, "
            "dots, dashes and underscores, with name = in [[models]]."
        )
    return dataclasses.replace(source, name=name)


def _cells(order: Order, asked: OrderedDevice, device: DeviceProfile, types: tuple[int, ...]) -> list[Cell]:
    contexts: tuple[int | None, ...] = asked.contexts or order.contexts or (None,)
    return [
        Cell(
            asked.device,
            asked.on,
            device,
            allocation_request(
                device, context_tokens=context, kv_type=asked.kv_type, budget_bytes=asked.budget,
                average_bits=fraction(asked.average_bits), min_generation_tok_per_s=asked.min_tokens_per_second,
                alpha=order.alpha, outer_type=order.head_type, types=types,
            ),
            order.gates_of(asked),
        )
        for context in dict.fromkeys(contexts)
    ]  # fmt: skip
