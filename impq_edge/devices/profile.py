"""A device as numbers, each with its source: what it has, what else runs on it, and how llama.cpp is to run."""

import dataclasses
import difflib
import os
import re
from pathlib import Path
from typing import Annotated, Any, ClassVar

import pydantic

from impq_edge.data import data_path
from impq_edge.devices.speeds import MeasuredSpeeds
from impq_edge.errors import DeviceError, RecordError
from impq_edge.ggml.cache import KvType, is_quantised
from impq_edge.records import STRICT, Record, load_toml, parse, shown

PYTHON_PROCESS_BYTES = 80 * 2**20
"""Python and llama.cpp apart from the model's own buffers, rounded up.

Measured on x86-64 Linux with Python 3.11 and llama-cpp-python 0.3.36: 47 MiB resident in the process that
runs the model (41 MiB of it after importing numpy and llama_cpp), and 31 MiB of anonymous memory in a
parent process that waits for it.
"""

ISA_FEATURES = {"aarch64": {"dotprod", "i8mm"}, "x86-64": {"avx2", "avx512"}}
"""The instruction sets llama.cpp's repacking depends on; ``isa`` is written ``"aarch64+dotprod"``."""

_UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_SIZE = re.compile(r"(\d{1,9}(?:\.\d{1,6})?) ?(KiB|MiB|GiB)")
_NAME = r"^[a-z0-9][a-z0-9.-]{0,63}$"  # it becomes part of file names
_SOURCED = ("memory_bytes", "system_reserve_bytes", "python_process_bytes", "cores", "memory_bandwidth_bytes_per_s",
            "generation_bandwidth_bytes_per_s", "min_generation_tok_per_s", "min_prompt_tok_per_s",
            "max_file_bytes", "gpu_memory_bytes", "gpu_reserve_bytes")  # fmt: skip
_MEMORY_TOLERANCE = 0.15  # firmware and kernel versions move MemTotal; the sizes a board is sold in differ by 2


def _size(value: object) -> object:
    if not isinstance(value, str):
        return value
    match = _SIZE.fullmatch(value.strip())
    if match is None:
        raise ValueError('write bytes as a whole number or as text with KiB, MiB or GiB, such as "7.5 GiB"')
    return round(float(match[1]) * _UNITS[match[2]])


Bytes = Annotated[int, pydantic.BeforeValidator(_size), pydantic.Field(strict=True, gt=0, lt=2**50)]
Count = Annotated[int, pydantic.Field(strict=True, gt=0, le=2**24)]
CountOrNone = Annotated[int, pydantic.Field(strict=True, ge=0, le=2**24)]
Rate = Annotated[float, pydantic.Field(strict=True, gt=0, lt=1e15)]
Flag = Annotated[bool, pydantic.Field(strict=True)]


@dataclasses.dataclass(frozen=True)
class Identity:
    """How to recognise a machine: every text given must occur, in any case of letters."""

    __pydantic_config__: ClassVar[pydantic.ConfigDict] = STRICT

    board: str | None = None  # in /proc/device-tree/model
    cpu: str | None = None  # in a "model name" of /proc/cpuinfo


@dataclasses.dataclass(frozen=True)
class DeviceProfile(Record):
    """An edge device and how llama.cpp runs on it: on the CPU, or with the last ``gpu_layers`` on its GPU."""

    SCHEMA: ClassVar[str] = "impq-edge.device/1"

    name: Annotated[str, pydantic.Field(pattern=_NAME)]
    title: str
    memory_bytes: Bytes  # what Linux reports as MemTotal: less than nominal, firmware and kernel have had their share
    system_reserve_bytes: Bytes  # operating system and services, which the model must leave alone
    cores: Count
    threads: Count  # that llama.cpp uses
    isa: str  # an architecture of ISA_FEATURES and "+" before each feature
    memory_bandwidth_bytes_per_s: Rate  # theoretical peak
    generation_bandwidth_bytes_per_s: Rate | None = None  # file bytes × tokens/s as measured; None: not measured
    python_process_bytes: Bytes = PYTHON_PROCESS_BYTES
    context_tokens: Count = 4096
    kv_type: KvType = "f16"
    flash_attention: Flag = True
    batch_tokens: Count = 512  # llama.cpp's n_batch
    ubatch_tokens: Count = 512  # n_ubatch: tokens computed at once, which sizes the compute buffer
    mmap: Flag = True
    use_extra_bufts: Flag = False  # llama.cpp's repacking: faster, and with mmap a second copy of what it repacks
    min_generation_tok_per_s: Rate | None = None  # what a file must achieve; None: not asked for
    min_prompt_tok_per_s: Rate | None = None
    max_file_bytes: Bytes | None = None
    gpu: str | None = None  # what it is; None: there is none, or none that is used
    gpu_layers: CountOrNone = 0  # llama.cpp's n_gpu_layers: the last ones, the head first; 999: all, whatever the model
    gpu_memory_bytes: Bytes | None = None  # its own; None: it shares main memory, as on Jetson and Apple
    gpu_reserve_bytes: Bytes | None = None  # driver, kernels and, in its own memory, the desktop
    identify: Identity | None = None
    speed: MeasuredSpeeds | None = None  # what impq-edge calibrate-device adds; None: not measured
    notes: str = ""
    sources: dict[str, str] = dataclasses.field(default_factory=dict)  # field → where its number comes from

    def __post_init__(self) -> None:
        """Check what no single field can."""
        known_isa = self.architecture in ISA_FEATURES and self.isa_features <= ISA_FEATURES[self.architecture]
        for wrong, sentence in (
            (self.threads > self.cores, f"threads {self.threads} exceed cores {self.cores}"),
            (self.ubatch_tokens > self.batch_tokens, f"ubatch_tokens exceed batch_tokens {self.batch_tokens}"),
            (self.system_reserve_bytes + self.python_process_bytes >= self.memory_bytes,
             "system_reserve_bytes and python_process_bytes leave nothing of memory_bytes"),
            (is_quantised(self.kv_type) and not self.flash_attention, f"kv_type {self.kv_type} needs flash_attention"),
            (self.gpu_layers > 0 and (self.gpu is None or self.gpu_reserve_bytes is None),
             f"gpu_layers {self.gpu_layers} needs gpu, which one it is, and gpu_reserve_bytes, what its driver takes"),
            (self.gpu is None and (self.gpu_memory_bytes or self.gpu_reserve_bytes) is not None,
             "gpu_memory_bytes and gpu_reserve_bytes need gpu, which one it is"),
            (self.gpu_memory_bytes is not None and (self.gpu_reserve_bytes or 0) >= self.gpu_memory_bytes,
             "gpu_reserve_bytes leave nothing of gpu_memory_bytes"),
            (self.speed is not None and not self._ran_as_now(self.speed),
             "speed was measured with other threads, ubatch_tokens or flash_attention; run calibrate-device again"),
            (not known_isa, f"isa {self.isa!r} is not one of {_known_isas()}"),
            (bool(unknown := self.sources.keys() - {field.name for field in dataclasses.fields(self)}),
             f"sources names no field: {', '.join(sorted(unknown))}"),
        ):  # fmt: skip
            if wrong:
                raise ValueError(sentence)

    def _ran_as_now(self, speed: MeasuredSpeeds) -> bool:
        wanted = (self.threads, self.ubatch_tokens, self.flash_attention)
        return (speed.threads, speed.ubatch_tokens, speed.flash_attention) == wanted

    @property
    def architecture(self) -> str:
        """Processor architecture, ``aarch64`` or ``x86-64``."""
        return self.isa.split("+")[0]

    @property
    def isa_features(self) -> frozenset[str]:
        """Instruction set extensions beyond the architecture's base."""
        return frozenset(self.isa.split("+")[1:])


def device_names() -> tuple[str, ...]:
    """Return the names of the shipped devices, sorted."""
    return tuple(sorted(path.stem for path in data_path("devices").glob("*.toml")))


def load_device(name_or_path: str) -> DeviceProfile:
    """Load a shipped device by name, or a user's TOML by its path.

    Parameters
    ----------
    name_or_path
        A name of :func:`device_names`; or a path, told by a path separator or the ending ``.toml``.

    Raises
    ------
    DeviceError
        When no device has that name, the file is malformed, or a shipped number has no source.
    """
    path = _path_of(name_or_path)
    profile, given = _parse(path)
    if name_or_path not in device_names():
        return profile
    unsourced = [key for key in _SOURCED if key in given and not profile.sources.get(key)]
    if unsourced:
        raise DeviceError(f"{path}: {', '.join(unsourced)} has no entry in [sources]; say where the number is from.")
    return profile


def load_uncalibrated(name_or_path: str) -> tuple[DeviceProfile, dict[str, Any]]:
    """Load a device without its measured speeds, which may be those of other settings, and its TOML's other fields."""
    return _parse(_path_of(name_or_path), leave_out="speed")


def is_this_machine(profile: DeviceProfile, root: Path = Path("/")) -> bool:
    """Tell whether this process runs on the device, by what the profile says identifies it and by its memory.

    Parameters
    ----------
    root
        Where ``proc`` is.
    """
    identity = profile.identify
    if identity is None or (identity.board is None and identity.cpu is None):
        return False
    # Boards of one model are sold with several sizes of memory, so memory decides between their profiles.
    total = re.search(r"^MemTotal:\s+(\d+) kB", _text(root / "proc/meminfo"), re.MULTILINE)
    if total is None or abs(int(total[1]) * 1024 / profile.memory_bytes - 1) > _MEMORY_TOLERANCE:
        return False
    cpus = "\n".join(re.findall(r"^model name\s*:(.*)$", _text(root / "proc/cpuinfo"), re.MULTILINE))
    places = ((identity.board, _text(root / "proc/device-tree/model")), (identity.cpu, cpus))
    return all(wanted.lower() in found.lower() for wanted, found in places if wanted is not None)


def _path_of(name_or_path: str) -> Path:
    if name_or_path.endswith(".toml") or os.sep in name_or_path or (os.altsep or os.sep) in name_or_path:
        return Path(name_or_path)
    if name_or_path not in device_names():
        near = difflib.get_close_matches(name_or_path, device_names(), n=3, cutoff=0.4) or device_names()
        raise DeviceError(
            f"No device is called {shown(name_or_path)}; use one of {', '.join(near)}, or the path of a TOML."
        )
    return data_path("devices", f"{name_or_path}.toml")


def _parse(path: Path, leave_out: str = "") -> tuple[DeviceProfile, dict[str, Any]]:
    try:
        given = load_toml(path)
        given.pop(leave_out, None)
        return parse(DeviceProfile, given, path), given
    except RecordError as error:
        raise DeviceError(str(error)) from None


def _known_isas() -> str:
    return ", ".join("".join([name, *(f"[+{f}]" for f in sorted(features))]) for name, features in ISA_FEATURES.items())


def _text(path: Path) -> str:
    """Read a file of /proc, or nothing on a system that has none or hides it, as Android does."""
    try:
        return path.read_text("utf-8", errors="replace")
    except OSError:
        return ""
