"""The record of a release: its recipe, every input and output by hash, and what was predicted and measured."""

import dataclasses
import platform
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Annotated, ClassVar, Literal

import pydantic

import impq_edge
from impq_edge.devices.latency import Speeds
from impq_edge.records import STRICT, PlainName, Record, sha256_file, shown
from impq_edge.releases.gates import Gate
from impq_edge.releases.order import Name, Order, Reference

MANIFEST_FILE, SUMS_FILE, CARD_FILE, ORDER_FILE = "manifest.json", "SHA256SUMS", "README.md", "release.toml"
PAGE_FILE = "report.html"
COMMAND = f"impq-edge release {ORDER_FILE}"
"""That makes a release again where its papers lie; nobody's own paths are published."""

_PACKAGES = (
    "accelerate", "gguf", "gptqmodel", "hqq", "huggingface_hub", "llama-cpp-python", "numpy", "optimum-quanto",
    "qpsolvers", "safetensors", "scipy", "tokenizers", "torch", "transformers",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Input:
    """Something the release was made from."""

    __pydantic_config__: ClassVar[pydantic.ConfigDict] = STRICT

    kind: Literal["model", "device", "calibration text", "evaluation text", "sensitivity profile"]
    name: str  # as it was asked for
    sha256: str  # of a model its content, of a device and a profile its record
    commit: str | None = None  # of a model from the hub


@dataclasses.dataclass(frozen=True)
class Output:
    """A file of the release."""

    __pydantic_config__: ClassVar[pydantic.ConfigDict] = STRICT

    path: str  # from the release's directory, with "/"
    file_bytes: Annotated[int, pydantic.Field(ge=0, lt=2**62)]
    sha256: str

    def __post_init__(self) -> None:
        if not is_plain_path(self.path):
            raise ValueError(f"{shown(self.path)} is no path inside a release")


@dataclasses.dataclass(frozen=True)
class Predicted:
    """What was known of a file before it was run."""

    __pydantic_config__: ClassVar[pydantic.ConfigDict] = STRICT

    file_bytes: int
    memory_bytes: int  # of the process, at the whole context
    perplexity_ratio_to_4bit: float | None  # where sensitivity was measured as a loss
    kl_divergence_over_4bit: float | None  # nats per token, where it was measured as a KL divergence
    kl_divergence: float | None  # nats per token, of a ladder
    speeds: Speeds | None


@dataclasses.dataclass(frozen=True)
class Measured:
    """What a file did; speeds are the device's only where it says so."""

    __pydantic_config__: ClassVar[pydantic.ConfigDict] = STRICT

    file_bytes: int
    memory_bytes: int  # peak of the process, with the context filled as far as the report says
    perplexity: float | None
    perplexity_stderr: float | None
    perplexity_ratio_to_f16: float
    perplexity_ratio_to_4bit: float
    kl_divergence: float  # nats per token, from F16
    kl_divergence_stderr: float
    kl_divergence_over_4bit: float
    generation_tok_per_s: float
    prompt_tok_per_s: float
    on_device: bool  # else on the machine that made the release
    over_ssh: bool = False  # on the device, which is another machine than the one that made the release


@dataclasses.dataclass(frozen=True)
class Taker:
    """A device and a context that a file is for."""

    __pydantic_config__: ClassVar[pydantic.ConfigDict] = STRICT

    device: str
    title: str
    context_tokens: int
    kv_type: str
    run: str  # how llama.cpp is told
    records: str  # folder of its allocation, validation and report
    allocation_sha256: str  # identity of the record
    predicted: Predicted
    measured: Measured
    gates: tuple[Gate, ...]
    budget_bytes: int | None = None  # what the device leaves a process; None: of an older release
    counted_bytes: int | None = None  # of its memory, what the gate compares; None: of an older release

    @property
    def passed(self) -> bool:
        """Whether every gate holds."""
        return all(gate.status == "passed" for gate in self.gates)


@dataclasses.dataclass(frozen=True)
class ReleasedFile:
    """A GGUF of the release."""

    __pydantic_config__: ClassVar[pydantic.ConfigDict] = STRICT

    file: PlainName
    model: str
    sha256: str
    file_bytes: int
    bits_per_weight: float
    average_bits: float  # nominal, of the blocks
    takers: tuple[Taker, ...]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A model as it is without this release: unquantised, or with all blocks at 4 or 2 bit."""

    __pydantic_config__: ClassVar[pydantic.ConfigDict] = STRICT

    what: Literal["F16", "4 bit", "2 bit"]
    file_bytes: int
    sha256: str
    perplexity: float | None  # None: not finite
    kl_divergence: float


@dataclasses.dataclass(frozen=True)
class ReleasedModel:
    """A model of the release."""

    __pydantic_config__: ClassVar[pydantic.ConfigDict] = STRICT

    name: Name
    model: str  # as it was asked for
    commit: str | None
    content_sha256: str
    weights: int
    license: str | None  # as its card tells
    license_name: str | None
    license_link: str | None
    base_models: tuple[str, ...]  # hub ids: itself where it is from the hub, else what its card names
    languages: tuple[str, ...]
    seed: int  # of the game's draws
    sensitivity_sha256: str  # identity of the record
    evaluations: int
    compared: tuple[Comparison, ...]


@dataclasses.dataclass(frozen=True)
class Manifest(Record):
    """Everything a release is made from, is, and was measured to be."""

    SCHEMA: ClassVar[str] = "impq-edge.release/1"

    name: Name
    command: str
    recipe: Order
    machine: str  # that made and measured it
    versions: dict[str, str]
    reference: Reference  # of the gate on perplexity
    inputs: tuple[Input, ...]
    models: tuple[ReleasedModel, ...]
    files: tuple[ReleasedFile, ...]
    outputs: tuple[Output, ...]  # all files but this one and the list of sums
    passed: bool  # every gate holds

    def __post_init__(self) -> None:
        if self.passed != all(taker.passed for file in self.files for taker in file.takers):
            raise ValueError(f"passed is {self.passed}, which contradicts the gates")


def is_plain_path(path: str) -> bool:
    """Whether a path with "/" stays inside the directory it starts from, and is one line."""
    pure = PurePosixPath(path)
    plain = path.isprintable() and "\\" not in path and str(pure) == path and path != "."
    return plain and not pure.is_absolute() and ".." not in pure.parts


def output_of(root: Path, path: Path) -> Output:
    """Describe a file of a release."""
    return Output(path.relative_to(root).as_posix(), path.stat().st_size, sha256_file(path))


def versions_here() -> dict[str, str]:
    """Return the versions of what a release is made with."""
    found = {"impq-edge": impq_edge.__version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def sums_text(outputs: list[Output]) -> str:
    """Return SHA256SUMS as ``sha256sum --check`` reads it."""
    return "".join(f"{o.sha256}  {o.path}\n" for o in sorted(outputs, key=lambda o: o.path))
