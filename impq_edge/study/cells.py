"""One cell of the study as a record: a game, every method's answers, and how each did on texts it had not seen."""

import bz2
import dataclasses
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar, Self

import pydantic

from impq_edge.errors import RecordError
from impq_edge.records import STRICT, Record, atomic_path, from_text, read_text

DIGITS = 7
"""Significant digits kept of a measured number; a loss differs from a rounded one by less than 1e-6 nats."""

FEWER_DIGITS = {"losses": 5, "kl": 5, "divergence": 5, "scores": 5, "loss_se": 3, "kl_se": 3}
"""Of what is only counted, ranked or shown: a window's loss below 10 nats keeps 0.0001, a thousandth of its spread."""

_MAX_TEXT_BYTES = 1 << 27  # a cell is below 1 MB; a small file can unpack to anything


@dataclasses.dataclass(frozen=True)
class Answer:
    """What one method chose for one average of bits."""

    __pydantic_config__: ClassVar[pydantic.ConfigDict] = STRICT

    method: str
    average_bits: float
    coalition: str  # a digit, 2 or 4, for every player
    evaluations: int  # that the method needed for all its averages together
    loss: float  # on the calibration text, nats per token
    divergence: float  # KL to the unquantised model on the calibration text, nats per token


@dataclasses.dataclass(frozen=True)
class Exam:
    """A coalition on a text that no method has seen."""

    __pydantic_config__: ClassVar[pydantic.ConfigDict] = STRICT

    loss: float  # nats per token
    loss_se: float
    kl: float  # to the unquantised model, nats per token
    kl_se: float
    losses: tuple[float, ...]  # of every window, in the text's order


@dataclasses.dataclass(frozen=True)
class Unquantised:
    """The unquantised model on a held-out text."""

    __pydantic_config__: ClassVar[pydantic.ConfigDict] = STRICT

    loss: float  # nats per token
    loss_se: float | None = None


@dataclasses.dataclass(frozen=True)
class Cell(Record):
    """A game (model, backend, players), a calibration text and a seed, with all that was measured of it.

    Raises
    ------
    RecordError
        When parts of it are not of the same players, texts or windows, or a coalition was not examined.
    """

    SCHEMA: ClassVar[str] = "impq-edge.study/1"

    model: str
    backend: str
    backend_settings: dict[str, Any]
    players: str
    text: str  # of the calibration
    seed: int
    tokens: int  # of the calibration
    window_tokens: int
    device: str
    versions: dict[str, str]
    player_names: tuple[str, ...]
    player_weights: tuple[int, ...]
    scores: dict[str, tuple[float, ...]]  # per metric, a number for every player
    answers: tuple[Answer, ...]
    exams: dict[str, dict[str, Exam]]  # coalition, then held-out text
    unquantised: dict[str, Unquantised]  # held-out text
    seconds: float

    def __post_init__(self) -> None:
        n_players, all_players = len(self.player_names), "players; make the cell anew."
        if not n_players or len(self.player_weights) != n_players:
            raise RecordError(
                f"The cell {self.name} has {len(self.player_weights)} weights of {n_players} {all_players}"
            )
        for metric, scores in self.scores.items():
            if len(scores) != n_players:
                raise RecordError(
                    f"The cell {self.name} has {len(scores)} scores {metric!r} of {n_players} {all_players}"
                )
        for coalition in self.exams:
            if len(coalition) != n_players or not set(coalition) <= {"2", "4"}:
                raise RecordError(
                    f"The cell {self.name} has a coalition {coalition!r}, which is no 2 or 4 for each of {n_players} "
                    f"{all_players}"
                )
        self._check_answers()
        self._check_exams()

    def _check_answers(self) -> None:
        asked = Counter((answer.method, answer.average_bits) for answer in self.answers)
        for (method, average_bits), times in asked.items():
            if times > 1:
                raise RecordError(
                    f"The cell {self.name} has {times} answers of {method!r} at {average_bits:g} bits instead of one; "
                    "make the cell anew."
                )
        for coalition in (*self.uniform.values(), *(answer.coalition for answer in self.answers)):
            if coalition not in self.exams:
                raise RecordError(f"The cell {self.name} has no exam of {coalition!r}; make the cell anew.")

    def _check_exams(self) -> None:
        windows: dict[str, int] = {}
        for coalition, exams in self.exams.items():
            if exams.keys() != self.unquantised.keys():
                raise RecordError(
                    f"The cell {self.name} examined {coalition!r} on {sorted(exams)} and the unquantised model on "
                    f"{sorted(self.unquantised)}; make the cell anew."
                )
            for text, exam in exams.items():
                if not exam.losses or len(exam.losses) != windows.setdefault(text, len(exam.losses)):
                    raise RecordError(
                        f"The cell {self.name} has {len(exam.losses)} windows of {text!r} for {coalition!r} instead of "
                        f"{windows[text] or 'at least one'}; make the cell anew."
                    )

    @property
    def name(self) -> str:
        """The cell's name, also of its file."""
        return cell_name(self.model, self.backend, self.players, self.text, self.seed)

    @property
    def uniform(self) -> dict[int, str]:
        """The coalitions of equal bits."""
        return {bits: str(bits) * len(self.player_names) for bits in (2, 4)}

    def average_bits(self, coalition: str) -> float:
        """Return the weighted mean of a coalition's nominal bits."""
        spent = sum(int(bits) * weight for bits, weight in zip(coalition, self.player_weights, strict=True))
        return spent / sum(self.player_weights)

    def to_json(self) -> dict[str, Any]:
        """Return the cell as plain JSON values, rounded as a file holds them."""
        return {key: _rounded(value, FEWER_DIGITS.get(key, DIGITS)) for key, value in super().to_json().items()}

    def save(self, path: Path) -> None:
        """Write the cell to ``path``, packed where that ends in ``.bz2``: the same cell, the same bytes."""
        text = json.dumps(self.to_json(), separators=(",", ":"), ensure_ascii=False) + "\n"
        content = text.encode()
        with atomic_path(path) as temporary:
            temporary.write_bytes(bz2.compress(content) if path.suffix == ".bz2" else content)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a cell written by :meth:`save`.

        Raises
        ------
        RecordError
            When the file is missing, not what it should be, or has a wrong field.
        """
        return from_text(_unpacked(path) if path.suffix == ".bz2" else read_text(path), path, cls)


def _rounded(value: Any, digits: int) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{digits}g}")
    if isinstance(value, list):
        return [_rounded(one, digits) for one in value]
    if isinstance(value, dict):
        return {key: _rounded(one, FEWER_DIGITS.get(key, digits)) for key, one in value.items()}
    return value


def _unpacked(path: Path) -> str:
    try:
        with bz2.open(path) as file:
            content = file.read(_MAX_TEXT_BYTES + 1)
        if len(content) > _MAX_TEXT_BYTES:
            raise RecordError(f"{path} unpacks to more than {_MAX_TEXT_BYTES} bytes, which no cell is; choose another.")
        return content.decode("utf-8")
    except FileNotFoundError:
        raise RecordError(f"{path} does not exist; check the path.") from None
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise RecordError(f"{path} cannot be unpacked ({error}); make the cell anew.") from None


def cell_name(model: str, backend: str, players: str, text: str, seed: int) -> str:
    """Return the name of a cell, also of its file."""
    return f"{model}-{backend}-{players}-{text}-{seed}"


def path_of(folder: Path, name: str) -> Path:
    """Return where a folder keeps the cell of a name."""
    return folder / f"{name}.json.bz2"


def cell_path(folder: Path, cell: Cell) -> Path:
    """Return where a folder keeps a cell."""
    return path_of(folder, cell.name)


def load_cells(folder: Path) -> tuple[Cell, ...]:
    """Read every cell of a folder, in the order of their names.

    Raises
    ------
    RecordError
        When there is none, one cannot be read, or two are of the same game, text and seed.
    """
    paths = sorted(path for path in folder.glob("*") if path.name.endswith((".json", ".json.bz2")))
    cells = sorted((Cell.load(path) for path in paths), key=lambda cell: (cell.name, cell.seed))
    if not cells:
        raise RecordError(f"{folder} holds no cell of the study; give the folder that holds the .json.bz2 files.")
    require_distinct(cells)
    return tuple(cells)


def require_distinct(cells: Iterable[Cell]) -> None:
    """Refuse to count a cell twice.

    Raises
    ------
    RecordError
        When two cells have a name.
    """
    for name, times in Counter(cell.name for cell in cells).items():
        if times > 1:
            raise RecordError(f"There are {times} cells {name} instead of one; keep the one that is meant.")
