"""The study's tables as Markdown. A dash is a gap: nothing was measured there."""

import math
from collections.abc import Callable, Iterable, Sequence

from impq_edge.study.contests import BEST_ISOLATED, CALIBRATION, Game
from impq_edge.study.finer import Finer
from impq_edge.study.regret import EVERY_MODEL, Regret
from impq_edge.study.tables import (
    EVERY_TEXT,
    EVERYTHING,
    LOW_SCOPE,
    PUBLISHED,
    REFERENCES,
    Aim,
    PlayerSize,
    Quality,
    Same,
    Win,
)
from impq_edge.study.tally import TIE_NATS, Mean, Tally
from impq_edge.study.transfer import Lent, Transfer

GAP = "–"

OF_CONTESTS = (
    "A contest is one cell (model, backend, players, calibration text, seed) at one average of bits on one held-out "
    "text. Equal is the same allocation. Clear is by more than two standard errors of the windows' paired differences. "
    "The p-values are of exact two-sided sign tests, ties left out. Contests of one game (model, backend, players) "
    "share a model and its quantised weights, those of one cell also the answers that both held-out texts examine: "
    "they are not independent, and their p-value is too small. In the columns of games each game has one vote, the "
    "sign of its median difference."
)
OF_ERRORS = (
    "Perplexity is the geometric mean over calibration texts and seeds; ± is one standard error over those cells, "
    "none where there is one cell."
)

Cells = Sequence[str]


def _table(header: Cells, rows: Iterable[Cells], texts: int = 1) -> str:
    """Lay out a table whose first columns are text and whose others are numbers."""
    rule = ["---"] * texts + ["---:"] * (len(header) - texts)
    return "".join(f"| {' | '.join(row)} |\n" for row in (header, rule, *rows))


def _number(value: float | None, digits: int = 4) -> str:
    """Return a number to some significant digits, without an exponent."""
    if value is None:
        return GAP
    whole = len(f"{abs(value):.0f}") if abs(value) >= 1 else 0
    return _minus(f"{value:,.{max(0, digits - whole) if value else 0}f}")


def _with_error(value: float | None, stderr: float | None) -> str:
    """Return a value to the second digit of its error."""
    if value is None:
        return GAP
    if not stderr:
        return _number(value)
    places = max(0, 1 - int(f"{stderr:e}".partition("e")[2]))
    return _minus(f"{value:,.{min(places, 5)}f} ± {stderr:,.{min(places, 5)}f}")


def _percent(share: float | None) -> str:
    """Return a change to a tenth of a percent, smaller ones to a hundredth; nothing but zero is 0 %."""
    if share is None:
        return GAP
    if abs(share) < 5e-5:
        return "0 %" if abs(share) < TIE_NATS else ("> −0.01 %" if share < 0 else "< +0.01 %")
    return _minus(f"{100 * share:+.{1 if abs(share) >= 0.01 else 2}f} %")


def _percent_with_error(nats: Mean) -> str:
    """Return a mean difference of log perplexities as a relative change."""
    if nats.value is None:
        return GAP
    change = _percent(math.expm1(nats.value))
    if not nats.stderr:
        return change
    error = 100 * math.exp(nats.value) * nats.stderr
    return f"{change} ± {error:.{1 if error >= 0.1 else 2}f}"


def _minus(text: str) -> str:
    return text.replace("-", "−")


def _p(p: float | None) -> str:
    if p is None:
        return GAP
    return "< 1e−12" if p < 1e-12 else _minus(f"{p:.2g}")


def perplexities(rows: Sequence[Quality]) -> str:
    """Return perplexity ± its standard error by method and average bits, a table per game and held-out text."""
    return f"{OF_ERRORS}\n\n" + _by_game(
        rows, lambda row: _with_error(row.perplexity, row.perplexity_stderr), lambda row: row.perplexity
    )


def divergences(rows: Sequence[Quality]) -> str:
    """Return the KL divergence to the unquantised model likewise."""
    told = "Mean KL divergence to the unquantised model, nats per token; ± is one standard error over cells.\n\n"
    return told + _by_game(rows, lambda row: _with_error(row.kl.value, row.kl.stderr), lambda row: row.kl.value)


def differences(rows: Sequence[Quality], ours: str) -> str:
    """Return perplexity relative to ours, the errors paired cell by cell."""
    told = f"Perplexity relative to that of {ours}, paired cell by cell; + is worse than {ours}.\n\n"
    return told + _by_game(
        [r for r in rows if r.method not in REFERENCES], lambda r: _percent_with_error(r.against_ours)
    )


def _by_game(
    rows: Sequence[Quality], shown: Callable[[Quality], str], value: Callable[[Quality], float | None] | None = None
) -> str:
    """Lay out every game and text; where ``value`` is given, the lowest of a column is bold."""
    found: dict[tuple[Game, str], list[Quality]] = {}
    for row in rows:
        found.setdefault((row.game, row.text), []).append(row)
    return "\n".join(f"#### {game}: {text}\n\n{_grid(at, shown, value)}" for (game, text), at in found.items())


def _grid(
    rows: Sequence[Quality], shown: Callable[[Quality], str], value: Callable[[Quality], float | None] | None
) -> str:
    """Lay out a game: methods down, average bits across."""
    methods = [row for row in rows if row.method not in REFERENCES]
    averages = sorted({row.average_bits for row in methods if row.average_bits is not None})
    lowest = {
        bits: min((v for row in methods if row.average_bits == bits and (v := value(row)) is not None), default=None)
        for bits in averages
        if value
    }
    lines = []
    for name in dict.fromkeys(row.method for row in methods):
        at = {row.average_bits: row for row in methods if row.method == name}
        cells = []
        for row in (at[bits] for bits in averages):
            is_best = value is not None and value(row) is not None and value(row) == lowest[row.average_bits or 0]
            cells.append(f"**{shown(row)}**" if is_best else shown(row))
        spent = max((row.evaluations for row in at.values() if row.evaluations is not None), default=None)
        lines.append([name, _span({row.log_perplexity.cells for row in at.values()}), _number(spent, 1), *cells])
    ends = "; ".join(f"{row.method}: {shown(row)}" for row in rows if row.method in REFERENCES)
    header = ["method", "cells", "evaluations", *(f"{bits:g} bits" for bits in averages)]
    return _table(header, lines) + (f"\n{ends}.\n" if ends else "")


def _span(counts: Iterable[int]) -> str:
    low, high = min(counts), max(counts)
    return f"{low}" if low == high else f"{low}–{high}"


def wins(rows: Sequence[Win]) -> str:
    """Return ours against every other method: over all contests, at few bits, by bits, by game and by text."""
    if not rows:
        return "No other method to compare with.\n"
    ours = rows[0].method
    pooled = [row for row in rows if row.text == EVERY_TEXT]
    averages = [scope for scope in dict.fromkeys(row.scope for row in pooled) if scope.endswith("bits")]
    games = [scope for scope in dict.fromkeys(row.scope for row in pooled) if scope not in {EVERYTHING, *averages}]
    averages.remove(LOW_SCOPE)
    rivals = [BEST_ISOLATED, "singles", PUBLISHED, "evolution"]
    texts = [text for text in dict.fromkeys(row.text for row in rows) if text != EVERY_TEXT]
    return "\n".join([
        f"{OF_CONTESTS}\n", f"#### {ours} against each, all contests\n", _tallies(pooled, EVERYTHING),
        f"#### {ours} against each, {LOW_SCOPE}\n", _tallies(pooled, LOW_SCOPE),
        "#### By average bits: median change of perplexity, contests lower / equal / higher\n",
        _across(pooled, list(dict.fromkeys(row.against for row in pooled)), averages, flip=False),
        "#### By game\n", _across(pooled, [name for name in rivals if name != ours], games, flip=True),
        *(part for text in texts for part in (
            f"#### On {text} alone\n", _tallies([row for row in rows if row.text == text], EVERYTHING))),
    ])  # fmt: skip


_TALLY = ("contests", "lower", "equal", "higher", "clearly lower", "clearly higher", "median change", "p",
          "games lower / equal / higher", "p, games")  # fmt: skip


def _tallies(rows: Sequence[Win], scope: str) -> str:
    return _table(["against", *_TALLY], ([row.against, *_tally(row.tally)] for row in rows if row.scope == scope))


def _tally(found: Tally) -> list[str]:
    def share(count: int) -> str:
        return f"{100 * count / found.contests:.1f} %" if found.contests else GAP

    counts = (found.lower, found.equal, found.higher, found.clear_lower, found.clear_higher)
    return [
        f"{found.contests:,}", *map(share, counts), _percent(found.median_change), _p(found.p),
        f"{found.games_lower} / {found.games_equal} / {found.games_higher}", _p(found.games_p),
    ]  # fmt: skip


def _across(rows: Sequence[Win], rivals: Sequence[str], scopes: Sequence[str], *, flip: bool) -> str:
    at = {(row.against, row.scope): _short(row.tally) for row in rows}
    if flip:
        return _table(["game", *rivals], ([scope, *(at.get((r, scope), GAP) for r in rivals)] for scope in scopes))
    return _table(["against", *scopes], ([r, *(at.get((r, scope), GAP) for scope in scopes)] for r in rivals))


def _short(found: Tally) -> str:
    if not found.contests:
        return GAP
    return f"{_percent(found.median_change)} ({found.lower}/{found.equal}/{found.higher})"


def aims(rows: Sequence[Aim]) -> str:
    """Return the aims with what was reached."""
    header = ["aim", "of", "reached", "aimed at", "met", *_TALLY]
    lines = []
    for row in rows:
        shown = _percent if "change" in row.aim else _share
        limit = ("at least " if "lower" in row.aim else "at most ") + shown(row.limit)
        met = GAP if row.passed is None else ("yes" if row.passed else "**no**")
        scope = "all models" if row.scope == EVERYTHING else row.scope
        lines.append([row.aim, scope, shown(row.value), limit, met, *_tally(row.tally)])
    return f"{OF_CONTESTS}\n\n" + _table(header, lines, texts=2)


def _share(share: float | None) -> str:
    return GAP if share is None else f"{100 * share:.1f} %"


def regrets(rows: Sequence[Regret]) -> str:
    """Return evaluations and the median loss above the best known allocation, a table per judge."""
    models = list(dict.fromkeys(row.model for row in rows))
    told = (
        "Perplexity above that of the best allocation known of the same cell for as many or fewer bits, in the median; "
        "in brackets a 95 % interval (cells drawn anew). Evaluations are for all averages together. A method is "
        "judged by the calibration loss, which it minimises, and by held-out texts, where the best known was chosen "
        "with hindsight.\n\n"
    )
    parts = []
    for judged in dict.fromkeys(row.judged for row in rows):
        at = {(row.method, row.model): row for row in rows if row.judged == judged}
        lines = []
        for method in dict.fromkeys(row.method for row in rows if row.judged == judged):
            every = at[method, EVERY_MODEL]
            share = every.at_best / every.contests if every.contests else None
            found = [_regret(at[method, model]) for model in models]
            lines.append([method, _number(every.evaluations, 1), _share(share), *found])
        names = ["all models" if model == EVERY_MODEL else model for model in models]
        on = "the calibration text" if judged == CALIBRATION else "held-out texts"
        parts.append(f"#### Judged on {on}\n\n" + _table(["method", "evaluations", "at the best known", *names], lines))
    return told + "\n".join(parts)


def _regret(row: Regret) -> str:
    if row.low_nats is None or row.high_nats is None:
        return _percent(row.median_change)
    low, high = (f"{100 * math.expm1(nats):.2f}" for nats in (row.low_nats, row.high_nats))
    return f"{_percent(row.median_change)} [{low}, {high}]"


def interactions(rows: Sequence[Same]) -> str:
    """Return which variants choose alike, and which is better where they do not."""
    lines = [
        [row.method, row.other, f"{row.allocations:,}", _same(row), *_tally(row.tally)]
        for row in rows
        if row.scope == EVERYTHING
    ]
    at = {(row.scope, row.method, row.other): f"{_same(row)}; {_short(row.tally)}" for row in rows}
    pairs = [pair for pair in dict.fromkeys((row.method, row.other) for row in rows) if PUBLISHED in pair]
    games = [scope for scope in dict.fromkeys(row.scope for row in rows) if scope != EVERYTHING]
    return "\n".join([
        f"{OF_CONTESTS}\n", _table(["method", "against", "allocations", "the same", *_TALLY], lines, texts=2),
        "#### By game: the same allocations; median change of perplexity, contests lower / equal / higher\n",
        _table(["game", *(" against ".join(pair) for pair in pairs)],
               ([game, *(at[game, *pair] for pair in pairs)] for game in games)),
    ])  # fmt: skip


def _same(row: Same) -> str:
    return _share(row.same / row.allocations if row.allocations else None)


def transfers(rows: Sequence[Transfer], lent: Sequence[Lent]) -> str:
    """Return rank correlations between backends, and what lent allocations lose."""
    lines = []
    for row in rows:
        values = (GAP if v is None else _minus(f"{v:.3f}") for v in (row.median, row.lowest, row.highest))
        other = "itself" if row.other == row.backend else row.other
        lines.append([row.model, row.players, row.score, row.backend, other, str(row.pairs), *values])
    header = ["model", "players", "score", "backend", "other", "pairs of cells", "median", "lowest", "highest"]
    told = (
        "Spearman's rank correlation of the players' scores, for the same model, players, calibration text and seed. "
        "A backend with itself: other seeds and calibration texts, the most that can be expected."
    )
    return f"{told}\n\n" + _table(header, lines, texts=5) + (f"\n{_lent(lent)}" if lent else "")


def _lent(rows: Sequence[Lent]) -> str:
    texts = sorted({row.text for row in rows})
    found: dict[tuple[str, ...], dict[str, Lent]] = {}
    for row in rows:
        found.setdefault((row.model, row.players, row.method, row.chosen_on, row.used_on), {})[row.text] = row
    lines = []
    for which, at in found.items():
        known = next(f"{row.known} of {row.allocations}" for row in at.values())
        lines.append([*which, known, *(_percent_with_error(at[text].loss) if text in at else GAP for text in texts)])
    header = ["model", "players", "method", "chosen on", "used on", "known", *texts]
    told = (
        "Perplexity when a choice made on one backend is used on another, against the method's own choice there; only "
        "of choices that were examined there too, which favours small losses."
    )
    return f"{told}\n\n" + _table(header, lines, texts=5)


def player_sizes(rows: Sequence[PlayerSize]) -> str:
    """Return kinds of players at equal average bits: perplexity, and in brackets against blocks."""
    if not rows:
        return "No model and backend were played with several kinds of players.\n"
    averages = sorted({row.average_bits for row in rows})
    found: dict[tuple[str, ...], dict[float, PlayerSize]] = {}
    for row in rows:
        found.setdefault((row.model, row.backend, row.text, row.method, row.players), {})[row.average_bits] = row
    lines = [
        [*which, *(_size(at[bits]) if bits in at else GAP for bits in averages)] for which, at in sorted(found.items())
    ]
    header = ["model", "backend", "text", "method", "players", *(f"{bits:g} bits" for bits in averages)]
    told = f"{OF_ERRORS} Best of all is, in each cell, the answer with the lowest calibration loss.\n\n"
    return told + _table(header, lines, texts=5)


def finer(rows: Sequence[Finer]) -> str:
    """Return finer players against blocks, contest by contest."""
    if not rows:
        return "No model and backend were played with several kinds of players.\n"
    header = [
        "players", "method", "against, with blocks", "model", "text", "contests", "evaluations", "lower", "equal",
        "median change of perplexity", "KL divergence lower", "median change of it",
    ]  # fmt: skip
    lines = [
        [
            row.players, row.method, row.against, row.model, row.text, f"{row.contests:,}",
            " to ".join(f"{count:,}" for count in dict.fromkeys(row.evaluations)), f"{row.lower:,}", f"{row.equal:,}",
            _percent(row.change), f"{row.kl_lower:,}", _percent(row.kl_change),
        ]
        for row in rows
    ]  # fmt: skip
    told = "Held-out texts; the same model, backend, calibration text and seed at the same average of bits.\n\n"
    return told + _table(header, lines, texts=5)


def _size(row: PlayerSize) -> str:
    against = f" ({_percent_with_error(row.against_blocks)})" if row.against_blocks.cells else ""
    return _perplexity(row.log_perplexity) + against


def _perplexity(log: Mean) -> str:
    if log.value is None:
        return GAP
    return _with_error(math.exp(log.value), None if log.stderr is None else math.exp(log.value) * log.stderr)
