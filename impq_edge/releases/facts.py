"""What a report tells that no record holds, computed from the records; nothing is measured, and nothing guessed."""

import dataclasses
import math

import numpy as np
from numpy.typing import NDArray

from impq_edge.devices.latency import Rate, predict_speeds
from impq_edge.devices.memory import MemoryPlan
from impq_edge.impq.allocation import average_bits
from impq_edge.model.mixes import stock_types
from impq_edge.model.players import Player
from impq_edge.model.recipe import data_bytes
from impq_edge.releases.comparison import THIS_FILE, UNQUANTISED, Comparison, Scored
from impq_edge.releases.report import difference_told, paired_difference, perplexity_told
from impq_edge.spqe.ladder import LadderProfile
from impq_edge.spqe.profile import SensitivityProfile
from impq_edge.spqe.sampling import Coalition, uniform

_MIB = 2**20
_STOCK = ("Q2_K", "Q3_K_M", "Q4_K_M")
_LARGER_STOCK = ("Q5_K_M", "Q6_K", "Q8_0")
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_SHOWN_PAIRS = 100  # rows of a heat map, beyond which players are joined into their blocks


@dataclasses.dataclass(frozen=True)
class Stock:
    """A mix that llama.cpp's own quantiser would make. Its size is known; its quality nobody measured here."""

    name: str
    file_bytes: int
    bits_per_weight: float


@dataclasses.dataclass(frozen=True)
class Prediction:
    """One number twice: as it was predicted, and as it was measured."""

    what: str
    predicted: str
    measured: str
    told: str  # what has to be known to compare them


@dataclasses.dataclass(frozen=True)
class Pairs:
    """How the players' loss increases vary together."""

    names: tuple[str, ...]
    covariance: NDArray[np.float64]  # in nats²
    are_blocks: bool  # sums over the players of a block

    @property
    def largest(self) -> float:
        """The largest absolute value between two players."""
        return float(np.abs(self.covariance - np.diag(np.diag(self.covariance))).max())

    @property
    def scale(self) -> tuple[float, str]:
        """What to multiply covariances with so that they read well, and the unit they then have."""
        exponent = 3 * math.floor(math.log10(self.largest) / 3) if self.largest else 0
        return 10.0**-exponent, f"{power_of_ten(exponent)} nats²" if exponent else "nats²"


def power_of_ten(exponent: int) -> str:
    """Return a power of ten as people write it."""
    return f"10{str(exponent).translate(_SUPERSCRIPT)}"


def stock_mixes(c: Comparison) -> list[Stock]:
    """Return the stock mixes around the files that were made, with the header that this file has."""
    spec, largest = c.profile.model, max(file.file_bytes for file in quantised(c).values())
    found: list[Stock] = []
    for name in (*_STOCK, *_LARGER_STOCK):
        if name not in _STOCK and found[-1].file_bytes > largest:
            break
        size = c.allocation.header_bytes + data_bytes(spec, stock_types(spec, name))
        found.append(Stock(name, size, 8 * size / spec.weights))
    return found


def quantised(c: Comparison) -> dict[str, Scored]:
    """Return the files but the unquantised one, which is several times as large."""
    return {name: file for name, file in c.files.items() if name != UNQUANTISED}


def players(c: Comparison) -> tuple[Player, ...]:
    """Return whom the allocation gives bits: those of the blocks, and with a ladder embedding and head."""
    who = c.profile.who
    return who[: len(c.allocation.player_bits)]


def part_of(player: Player) -> str:
    """Return which part of its block a player is, such as "attn_q"; empty for whole blocks."""
    return "" if player.block is None else player.name.removeprefix(f"blk.{player.block}").removeprefix(".")


def covariances(c: Comparison) -> Pairs | None:
    """Return C, or None where no interactions were estimated."""
    found = c.profile
    if isinstance(found, LadderProfile):
        if found.covariance is None:
            return None
        matrix = np.array(found.covariance)
    else:
        matrix = found.estimate().covariance
    inside = [player for player in found.who if player.block is not None]
    if len(inside) <= _SHOWN_PAIRS:
        return Pairs(tuple(player.name.removeprefix("blk.") for player in inside), matrix, False)
    blocks = np.array([player.block for player in inside])
    member = (blocks[:, None] == np.arange(blocks.max() + 1)).astype(float)
    return Pairs(tuple(map(str, range(member.shape[1]))), member.T @ matrix @ member, True)


def memory_groups(plan: MemoryPlan) -> dict[str, int]:
    """Return what main memory is held for in a few words, in bytes: the parts of the plan, joined."""
    shared = plan.gpu_layers > 0 and plan.gpu_memory_bytes is None
    gpu_bytes = plan.gpu_compute_bytes if shared else 0
    driver_bytes = plan.gpu_reserve_bytes if shared else 0
    return {
        "weights": plan.weights_bytes + plan.repack_bytes,
        "KV cache": plan.kv_cache_bytes,
        "compute buffers": plan.compute_bytes + plan.work_bytes + plan.output_bytes + gpu_bytes,
        "process and tokenizer": plan.process_bytes + plan.tokenizer_bytes,
        "system reserve": plan.system_reserve_bytes + driver_bytes,
    }


def predictions(c: Comparison) -> list[Prediction]:
    """Return what was predicted before the file existed, against what was measured of it."""
    artifact, report = c.mix
    needed = c.plan.total_bytes - c.plan.system_reserve_bytes
    filled = f"{report.filled_tokens:,} of {c.plan.context_tokens:,} tokens of context filled"
    rows = [
        Prediction("file", f"{artifact.predicted_file_bytes:,} bytes", f"{artifact.file_bytes:,} bytes", _exactly(c)),
        Prediction(
            "memory of the process", f"{needed / _MIB:,.1f} MiB", f"{report.peak_rss_bytes / _MIB:,.1f} MiB",
            f"planned for {c.device.title} and all of the context, measured as the peak on "
            f"{c.validated_on}, with {filled}",
        ),
        *_quality(c),
    ]  # fmt: skip
    speeds = c.allocation.speeds or predict_speeds(c.profile.model, c.allocation.tensor_types, c.device)
    told = f"predicted for {c.device.title}, measured on {c.validated_on}"
    for what, rate, mean, deviation in (
        ("prompt", speeds.prompt, report.prompt_tok_per_s, report.prompt_sd_tok_per_s),
        ("generation", speeds.generation, report.generation_tok_per_s, report.generation_sd_tok_per_s),
    ):
        rows.append(Prediction(f"{what} speed", rate_told(rate), f"{mean:,.1f} ± {deviation:,.1f} tok/s", told))
    return rows


def rate_told(rate: Rate | None) -> str:
    """Return a predicted speed with its range."""
    if rate is None:
        return "not known"
    low, likely, high = (
        f"{x:,.0f}" if x >= 100 else f"{x:.3g}"
        for x in (rate.low_tok_per_s, rate.likely_tok_per_s, rate.high_tok_per_s)
    )
    return f"{likely} tok/s ({low} to {high})"


def _exactly(c: Comparison) -> str:
    off = c.mix[0].file_bytes - c.mix[0].predicted_file_bytes
    return "to the byte" if off == 0 else f"{off:+,} bytes"


def _quality(c: Comparison) -> list[Prediction]:
    file, reference = c.files[THIS_FILE], c.at_4_bit
    if isinstance(c.profile, LadderProfile):
        told = "the sum of the players' own, which were measured one at a time, on the calibration text"
        return [_divergence(c, c.allocation.objective, told)]
    if c.allocation.everything_fits:
        return []
    if c.profile.settings.objective == "divergence":
        at_4_bit = c.profile.losses[uniform(4, c.profile.n_players)]
        return [_divergence(c, at_4_bit + c.allocation.objective, "of the blocks alone, on the calibration text")]
    basis = "measured" if c.allocation.evidence and c.allocation.evidence.is_measured else "predicted"
    rows = [
        Prediction(
            "loss beyond all blocks at 4 bit", f"{c.allocation.objective:+.4f}", difference_told(file, reference),
            f"nats/token; {basis} on the calibration text against measured on {c.mix[1].text}",
        )
    ]  # fmt: skip
    if reference.perplexity is not None:
        ratio = math.exp(min(c.allocation.objective, 100.0))
        told = f"{reference.perplexity:.3f} at 4 bit × e^{c.allocation.objective:.4f}"
        rows.append(Prediction("perplexity", f"{reference.perplexity * ratio:.3f}", perplexity_told(file), told))
    return rows


def _divergence(c: Comparison, predicted: float, told: str) -> Prediction:
    measured = c.files[THIS_FILE].divergence
    return Prediction(
        "KL divergence from the unquantised model",
        f"{predicted:.4f}",
        f"{measured.kld_mean:.4f} ± {measured.kld_stderr:.4f}" if measured else "not measured",
        f"nats/token; {told}",
    )


@dataclasses.dataclass(frozen=True)
class Point:
    """A file that was made, by size and quality."""

    name: str
    file_bytes: int
    difference: float  # of its loss to all blocks at 4 bit, nats per token
    stderr: float  # NaN where there was one window
    perplexity: float


def points(c: Comparison) -> list[Point]:
    """Return the files whose quality is a number, each once; none where the 4-bit file's is not."""
    reference = c.at_4_bit
    found: dict[str, Point] = {}
    for name, file in quantised(c).items():
        if file.perplexity is not None and reference.perplexity is not None and file.sha256 not in found:
            difference, stderr = paired_difference(file.window_nlls, reference.window_nlls)
            found[file.sha256] = Point(name, file.file_bytes, difference, stderr, file.perplexity)
    return list(found.values())


@dataclasses.dataclass(frozen=True)
class Tried:
    """One assignment of bits whose loss was measured."""

    bits: Coalition
    average_bits: float
    increase: float  # over all at 4 bit, nats per token
    fits: bool
    is_chosen: bool


def coalitions(c: Comparison, found: SensitivityProfile) -> list[Tried]:
    """Return everything that the game evaluated, in its order."""
    losses, who, allocation = found.losses, found.who, c.allocation
    none = losses[uniform(4, len(who))]
    return [
        Tried(
            bits, average_bits(who, bits), loss - none,
            allocation.problem.is_feasible([bit // 2 - 1 for bit in bits]), bits == allocation.player_bits,
        )
        for bits, loss in losses.items()
    ]  # fmt: skip
