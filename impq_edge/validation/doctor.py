"""Whether this machine can run what it has installed, and what to do where it cannot."""

import dataclasses
import platform
import re
import sys
from importlib import metadata
from pathlib import Path
from typing import ClassVar

import pydantic

from impq_edge.errors import ValidationError
from impq_edge.records import STRICT, Record, scratch_directory
from impq_edge.validation.file import read_facts
from impq_edge.validation.process import run_child
from impq_edge.validation.report import Status
from impq_edge.validation.results import Build
from impq_edge.validation.sample import write_sample
from impq_edge.validation.settings import RunSettings
from impq_edge.validation.validate import available_threads

PACKAGES = {
    "": ("llama-cpp-python", "gguf", "numpy", "pydantic", "pyyaml", "jinja2", "rich", "typer"),
    "spqe": (
        "torch",
        "transformers",
        "accelerate",
        "tokenizers",
        "safetensors",
        "huggingface_hub",
        "optimum-quanto",
        "hqq",
        "qpsolvers",
        "scipy",
    ),
    "report": ("matplotlib",),
    "workstation": ("gptqmodel",),
    "cluster": ("ray",),
}
"""Extra of ``pyproject.toml`` ("": the base install) → what it adds."""

_CPUINFO = Path("/proc/cpuinfo")
# What the processor calls an instruction set, what llama.cpp calls it, and the flag that builds it in.
_INSTRUCTION_SETS = (
    ("avx2", "AVX2", "-DGGML_NATIVE=OFF"),
    ("asimddp", "DOTPROD", "-DGGML_NATIVE=OFF -DGGML_CPU_ARM_ARCH=armv8.2-a+dotprod"),
)
_PROBE_CONTEXT_TOKENS = 256


@dataclasses.dataclass(frozen=True)
class Package:
    """One dependency and its version here."""

    __pydantic_config__: ClassVar[pydantic.ConfigDict] = STRICT

    name: str
    extra: str  # that asks for it, "" for the base install
    version: str | None  # None: not installed


@dataclasses.dataclass(frozen=True)
class Probe:
    """One real decode in a child process."""

    __pydantic_config__: ClassVar[pydantic.ConfigDict] = STRICT

    use_extra_bufts: bool
    status: Status
    detail: str


@dataclasses.dataclass(frozen=True)
class DoctorReport(Record):
    """What runs here, and one sentence with a remedy for each thing that does not."""

    SCHEMA: ClassVar[str] = "impq-edge.doctor/1"

    python: str
    machine: str
    packages: tuple[Package, ...]
    build: Build | None  # None: llama.cpp cannot be loaded
    cpu_features: tuple[str, ...]  # as the processor advertises them; empty where the system does not say
    threads: int
    probes: tuple[Probe, ...]
    problems: tuple[str, ...]


def examine(gguf: Path | None = None, *, timeout_s: float = 120.0) -> DoctorReport:
    """Look at the installation and try llama.cpp, each trial in a child process.

    Parameters
    ----------
    gguf
        A file to try; None: a small one of random Q4_K weights is made for the purpose.
    timeout_s
        How long each trial may take.

    Raises
    ------
    ValidationError
        When ``gguf`` is no sound GGUF.
    """
    if gguf is not None:
        read_facts(gguf)
    packages = _packages()
    features = cpu_features()
    problems = [
        f"{package.name} is not installed; install impq-edge again."
        for package in packages
        if not package.extra and package.version is None
    ]
    build: Build | None = None
    try:
        build = Build(**run_child({"kind": "describe"}, timeout_s=timeout_s))
        problems += _unused(features, build.system_info)
    except ValidationError as error:
        problems.append(str(error))
    probes = _probes(gguf, timeout_s)
    problems += [probe.detail for probe in probes if probe.status == "failed"]
    return DoctorReport(
        python=sys.version.split()[0],
        machine=f"{platform.system()} {platform.machine()}",
        packages=packages,
        build=build,
        cpu_features=features,
        threads=available_threads(),
        probes=probes,
        problems=tuple(problems),
    )


def _packages() -> tuple[Package, ...]:
    return tuple(Package(name, extra, _version(name)) for extra, names in PACKAGES.items() for name in names)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)  # without importing it
    except metadata.PackageNotFoundError:
        return None


def cpu_features() -> tuple[str, ...]:
    """Return the instruction sets of this processor as Linux names them; empty on other systems."""
    if not _CPUINFO.exists():
        return ()
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", _CPUINFO.read_text(), re.MULTILINE)
    return tuple(found[1].split()) if found else ()


def _unused(features: tuple[str, ...], system_info: str) -> list[str]:
    """Name what the processor has and this llama.cpp was not built for: it runs, but slowly."""
    return [
        f"llama.cpp was built without {name}, which this processor has, and is slow; rebuild it with "
        f'CMAKE_ARGS="{flags}" pip install --force-reinstall --no-deps --no-binary llama-cpp-python llama-cpp-python.'
        for feature, name, flags in _INSTRUCTION_SETS
        if feature in features and not re.search(rf"\b{name} = 1\b", system_info)
    ]


def _probes(gguf: Path | None, timeout_s: float) -> tuple[Probe, ...]:
    with scratch_directory() as folder:
        sample = folder / "random weights"
        if gguf is None:
            write_sample(sample)
        return tuple(_probe(gguf or sample, bufts, timeout_s) for bufts in (True, False))


def _probe(gguf: Path, use_extra_bufts: bool, timeout_s: float) -> Probe:
    settings = RunSettings(_PROBE_CONTEXT_TOKENS, available_threads(), use_extra_bufts=use_extra_bufts)
    job = {"kind": "decode", "file": str(gguf), "settings": dataclasses.asdict(settings)}
    try:
        decoded = run_child(job, timeout_s=timeout_s)["tokens"]
    except ValidationError as error:
        return Probe(use_extra_bufts, "failed", str(error))
    return Probe(use_extra_bufts, "passed", f"{decoded} tokens of {gguf.name} decoded")
