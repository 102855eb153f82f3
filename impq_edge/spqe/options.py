"""What may be asked of a run of SPQE, and the refusal of what means nothing."""

import dataclasses
import math
import re
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, get_args

from impq_edge.errors import SensitivityError
from impq_edge.impq.allocate import bits_at
from impq_edge.impq.allocation import PUBLISHED_TYPES, Objective
from impq_edge.model.calibration import DEFAULT_CALIBRATION_TOKENS, DEFAULT_WINDOW_TOKENS
from impq_edge.model.players import PLAYER_KINDS, PlayerKind, players_of
from impq_edge.model.spec import ModelSpec
from impq_edge.spqe.estimate import Estimate
from impq_edge.spqe.ladder import check_types
from impq_edge.spqe.run import COMPUTE_DTYPES, Answer
from impq_edge.spqe.sampling import ESTIMATORS, Estimator
from impq_edge.spqe.stopping import order_answer

Method = Literal["rounds", "impq"]
"""A design and rounds at the budgets, of which the best that was measured is taken; or the paper's game and program."""

METHODS: tuple[Method, ...] = get_args(Method)
OBJECTIVES: tuple[Objective, ...] = get_args(Objective)

DEFAULT_METHOD: Method = "rounds"

DEFAULT_PERMUTATIONS = 8  # a CPU's worth for the demo; the paper's setting is 100
DEFAULT_PERMUTATIONS_OF_TENSORS = 3  # in rounds: every tensor alone at either width, and as many again near the budget
DEFAULT_TOKENS = 4096

_BITS = re.compile(r"\d(?:\.\d{1,9}|/[1-9]\d{0,5})?", re.ASCII)


@dataclasses.dataclass(frozen=True)
class GameOptions:
    """How sensitivity is measured; the defaults are a CPU's worth for the demo model."""

    backend: str = "kquant"
    backend_settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # the library's defaults otherwise
    players: PlayerKind | None = None  # see player_kind
    method: Method | None = None  # DEFAULT_METHOD where types are the published ones; see is_played_in_rounds
    objective: Objective | None = None  # what v is: the published loss, or in rounds by default the divergence
    estimator: Estimator | None = None  # of --method impq, permutations by default; rounds take complement pairs
    permutations: int | None = None  # M, or as many evaluations in other draws or in rounds; see walks
    curve: str | None = None  # average bits that rounds are played at; 2.25 to 3.75, or a device's budgets, by default
    types: tuple[int, ...] = PUBLISHED_TYPES  # others: a ladder is measured, and embedding and head are players too
    tokens: int = DEFAULT_TOKENS  # per evaluation
    calibration_tokens: int = DEFAULT_CALIBRATION_TOKENS  # of the same text, for encoders that want to know the inputs
    window_tokens: int = DEFAULT_WINDOW_TOKENS
    calibration: Path | None = None  # a UTF-8 text; the one that ships by default
    seed: int = 0
    compute: str | None = None  # "cuda" or "cpu"; CUDA when there is one by default
    until_stable: str | None = None  # "order", average bits such as "2.5,3" whose allocations must settle, "allocation"
    time_limit_s: float | None = None
    workers: int = 0  # 0: this process alone
    ray_address: str | None = None

    def __post_init__(self) -> None:
        for flag, value, known in (
            ("--players", self.player_kind, PLAYER_KINDS),
            ("--method", self.method or DEFAULT_METHOD, METHODS),
            ("--objective", self.objective or "loss", OBJECTIVES),
            ("--estimator", self.estimator or "permutations", ESTIMATORS),
            ("--compute", self.compute or "cpu", COMPUTE_DTYPES),
        ):
            if value not in known:
                raise SensitivityError(f"{flag} {value!r} is unknown; choose one of {', '.join(known)}.")
        if self.until_stable not in (None, "order", "allocation"):
            _average_bits(self.until_stable)
        self._require_method()
        if self.window_tokens < 2:
            raise SensitivityError(f"A window of {self.window_tokens} tokens has nothing to predict; give 2 or more.")
        for flag, tokens in (("--tokens", self.tokens), ("--calibration-tokens", self.calibration_tokens)):
            if tokens < self.window_tokens:
                raise SensitivityError(
                    f"{flag} {tokens} is less than one window of {self.window_tokens}; ask for more tokens."
                )
        if self.walks < (0 if self.is_ladder else 1):
            raise SensitivityError(
                f"--permutations {self.permutations} is too few; ask for 1 or more (the paper: 100)."
            )
        if self.is_ladder:
            self._require_ladder()
        if self.seed < 0:
            raise SensitivityError(f"--seed {self.seed} is negative; give 0 or more.")
        if self.workers < 0:
            raise SensitivityError(f"--workers {self.workers} is negative; give 0 for this process alone, or more.")
        if self.ray_address is not None and not self.workers:
            raise SensitivityError(f"--ray-address {self.ray_address} needs --workers; give 1 or more.")
        if self.time_limit_s is not None and not 0 < self.time_limit_s < math.inf:
            raise SensitivityError(f"--time-limit {self.time_limit_s:g} s is no time; give more than 0.")

    @property
    def is_ladder(self) -> bool:
        """Whether more is asked for than the published 2 and 4 bit."""
        return self.types != PUBLISHED_TYPES

    @property
    def is_played_in_rounds(self) -> bool:
        """Whether the game is played in rounds, and the allocation chosen from what was measured."""
        return not self.is_ladder and (self.method or DEFAULT_METHOD) == "rounds"

    @property
    def measured_objective(self) -> Objective:
        """What v is. On divergences the same search found the better files (docs/study.md); the paper's is the loss."""
        return self.objective or ("divergence" if self.is_played_in_rounds else "loss")

    @property
    def player_kind(self) -> PlayerKind:
        """What drops to 2 bit together; the paper: blocks.

        Rounds with K-quants take tensors, which gave the better files at equal bytes; on other backends only blocks
        were compared (docs/study.md).
        """
        return self.players or ("tensors" if self.is_played_in_rounds and self.backend == "kquant" else "blocks")

    @property
    def targets(self) -> tuple[Fraction, ...] | None:
        """Average bits at which rounds were asked for; None where they were not."""
        return None if self.curve is None else tuple(_average_bits(self.curve, "--curve"))

    @property
    def walks(self) -> int:
        """M: what was asked for, else a CPU's worth; none for a ladder, which needs the game for interactions alone."""
        if self.permutations is not None:
            return self.permutations
        if self.is_ladder:
            return 0
        of_tensors = self.is_played_in_rounds and self.player_kind == "tensors"
        return DEFAULT_PERMUTATIONS_OF_TENSORS if of_tensors else DEFAULT_PERMUTATIONS

    def _require_method(self) -> None:
        """Refuse options of the one method with the other."""
        if self.is_ladder:
            if self.objective == "divergence":
                raise SensitivityError(
                    f"--objective divergence is for the game, and a ladder of {','.join(map(str, self.types))} bit "
                    "measures divergences in any case; leave it out."
                )
            if self.method == "rounds":
                raise SensitivityError(
                    f"--method rounds chooses between 2 and 4 bit; leave it out with --types "
                    f"{','.join(map(str, self.types))}, which are allocated by a program of their own."
                )
        elif self.is_played_in_rounds:
            if self.until_stable is not None:
                raise SensitivityError(
                    f"--until-stable {self.until_stable} is for --method impq; rounds end with the evaluations of "
                    "--permutations: leave it out, or choose that method."
                )
            if self.estimator not in (None, "stratified"):
                raise SensitivityError(
                    f"--estimator {self.estimator} is for --method impq; rounds begin with complement pairs: leave it "
                    "out, or choose that method."
                )
        if self.curve is not None:
            if not self.is_played_in_rounds:
                raise SensitivityError(f"--curve {self.curve} is for --method rounds; leave it out, or choose that.")
            _average_bits(self.curve, "--curve")

    def _require_ladder(self) -> None:
        check_types(self.types)
        if self.backend != "kquant":
            raise SensitivityError(
                f"--types {','.join(map(str, self.types))} are widths of K-quants; give them with --backend kquant, "
                f"not {self.backend}."
            )
        if self.walks:
            return
        for flag, value in (
            ("--until-stable", self.until_stable),
            ("--time-limit", self.time_limit_s),
            ("--workers", self.workers),
        ):
            if value:
                raise SensitivityError(
                    f"{flag} is for the game, which a ladder needs for interactions alone; give --permutations 1 or "
                    f"more, or leave {flag} out."
                )


def stability_answer(until_stable: str, spec: ModelSpec, players: PlayerKind) -> Answer:
    """Return what must stop changing: the order of the players, or the allocations at average bits."""
    if until_stable == "order":
        return order_answer
    targets, who = _average_bits(until_stable), players_of(spec, players)

    def allocations(found: Estimate) -> tuple[tuple[int, ...], ...]:
        return tuple(bits_at(who, found.phi, found.covariance, target) for target in targets)

    return allocations


def _average_bits(text: str, flag: str = "--until-stable") -> list[Fraction]:
    parts = [part.strip() for part in text.split(",")]
    targets = [Fraction(part) for part in parts if _BITS.fullmatch(part)]
    if len(targets) < len(parts) or not all(2 <= target <= 4 for target in targets):
        what = "neither 'order' nor average bits" if flag == "--until-stable" else "no list of average bits"
        raise SensitivityError(f"{flag} {text!r} is {what} from 2 to 4; write it like 2.5,3.")
    return targets
