"""Everything that the report of one file tells, whichever page or pipeline it is for."""

import dataclasses

from impq_edge.conversion.artifact import Artifact
from impq_edge.devices.memory import MemoryPlan
from impq_edge.devices.profile import DeviceProfile
from impq_edge.impq.allocation import Allocation
from impq_edge.releases.gates import Gate
from impq_edge.releases.lent import BackendLosses
from impq_edge.spqe.ladder import LadderProfile
from impq_edge.spqe.profile import SensitivityProfile
from impq_edge.validation.report import ValidationReport
from impq_edge.validation.results import Divergence

Measured = tuple[Artifact, ValidationReport]

THIS_FILE, UNQUANTISED = "this file", "the unquantised model in F16"
"""Names of files in a :class:`Comparison`, beside those of :func:`all_at`."""


def all_at(bits: int) -> str:
    """Return the name of the file whose blocks all have so many bits."""
    return f"all blocks at {bits} bit"


@dataclasses.dataclass(frozen=True)
class Scored:
    """A file, and how it did on the evaluation text."""

    sha256: str
    file_bytes: int
    bits_per_weight: float
    perplexity: float | None  # None: not finite
    perplexity_stderr: float | None
    window_nlls: tuple[float, ...]  # nats per token
    divergence: Divergence | None = None  # from the unquantised model; None: not measured
    prompt: tuple[float, float] | None = None  # tokens per second and their standard deviation; None: not timed
    generation: tuple[float, float] | None = None

    @staticmethod
    def of(artifact: Artifact, report: ValidationReport) -> "Scored":
        """Return what a report tells of a file."""
        return Scored(
            artifact.sha256, artifact.file_bytes, artifact.bits_per_weight, report.perplexity,
            report.perplexity_stderr, report.window_nlls, report.divergence, *speeds_of(report),
        )  # fmt: skip


def speeds_of(report: ValidationReport) -> tuple[tuple[float, float], tuple[float, float]]:
    """Return prompt and generation, each as tokens per second and their standard deviation."""
    return (
        (report.prompt_tok_per_s, report.prompt_sd_tok_per_s),
        (report.generation_tok_per_s, report.generation_sd_tok_per_s),
    )


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Everything the report tells."""

    device: DeviceProfile
    profile: SensitivityProfile | LadderProfile
    allocation: Allocation
    mix: Measured
    files: dict[str, Scored]  # by a name for people: this one first, and others that it is compared with
    plan: MemoryPlan
    backend_losses: BackendLosses | None = None  # where the profile's backend is not what ships
    gates: tuple[Gate, ...] = ()  # of the release that the file belongs to
    validated_on: str = "the machine that validated"
    overview: str = ""  # address of the release's page, from this one's

    @property
    def at_4_bit(self) -> Scored:
        """The file that losses are compared with."""
        return self.files[all_at(4)]

    @property
    def passed(self) -> bool:
        """Whether the file is as it should be, by the gates of its release or by its validation."""
        return all(gate.status == "passed" for gate in self.gates) if self.gates else self.mix[1].passed

    @property
    def verdict(self) -> str:
        """Whether it passed, in words."""
        failed = [gate.name for gate in self.gates if gate.status == "failed"]
        if failed:
            return f"gates failed: {', '.join(failed)}"
        return "all gates passed" if self.gates else f"validation {'passed' if self.passed else 'failed'}"
