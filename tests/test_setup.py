"""The set-up scripts: the right llama.cpp for a processor, exact versions, and no harm when they are refused."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
SCRIPTS = ROOT / "scripts"

SKYLAKE = "flags\t\t: fpu sse sse2 ssse3 sse4_1 sse4_2 avx f16c fma bmi1 bmi2 avx2 avx512f avx512bw amx_tile amx_int8\n"
SANDY_BRIDGE = "processor\t: 0\nflags\t\t: fpu sse sse2 ssse3 sse4_1 sse4_2 avx\n"
PI_4 = "processor\t: 0\nFeatures\t: fp asimd evtstrm crc32 cpuid\n"
PI_5 = (
    "processor\t: 0\nFeatures\t: fp asimd evtstrm aes crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp\n"
)
ORIN_SUCCESSOR = "Features\t: fp asimd atomics fphp asimdhp asimddp sve sve2 i8mm bf16\n"

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="the scripts need bash")


def run(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        stdin=subprocess.DEVNULL,
    )


def flags(cpuinfo: str, machine: str, directory: Path) -> dict[str, str]:
    (directory / "cpuinfo").write_text(cpuinfo)
    done = run(SCRIPTS / "llama-flags", directory / "cpuinfo", machine)
    assert done.returncode == 0, done.stderr
    return dict(part.removeprefix("-D").split("=") for part in done.stdout.split())


def test_x86_switches_every_instruction_set_up_to_avx2_by_name(tmp_path: Path) -> None:
    names = {"GGML_SSE42", "GGML_AVX", "GGML_AVX2", "GGML_FMA", "GGML_F16C", "GGML_BMI2"}
    assert flags(SKYLAKE, "x86_64", tmp_path) == {"GGML_NATIVE": "OFF"} | dict.fromkeys(names, "ON")
    old = flags(SANDY_BRIDGE, "x86_64", tmp_path)
    assert {name for name, value in old.items() if value == "ON"} == {"GGML_SSE42", "GGML_AVX"}
    assert old.keys() == names | {"GGML_NATIVE"}


@pytest.mark.parametrize(
    ("cpuinfo", "architecture"),
    [(PI_4, None), (PI_5, "armv8.2-a+dotprod"), (ORIN_SUCCESSOR, "armv8.2-a+dotprod+i8mm")],
)
def test_arm_names_the_dot_product_exactly_where_it_exists(
    cpuinfo: str, architecture: str | None, tmp_path: Path
) -> None:
    found = flags(cpuinfo, "aarch64", tmp_path)
    assert found["GGML_NATIVE"] == "OFF"
    assert found.get("GGML_CPU_ARM_ARCH") == architecture


def test_unknown_processors_are_left_to_the_compiler(tmp_path: Path) -> None:
    assert flags("isa : rv64imafdcv\n", "riscv64", tmp_path) == {"GGML_NATIVE": "ON"}
    assert run(SCRIPTS / "llama-flags", tmp_path / "missing", "x86_64").stdout == "-DGGML_NATIVE=ON\n"


def test_a_cached_wheel_is_used_and_another_build_is_kept_apart(tmp_path: Path) -> None:
    def where(**environment: str) -> Path:
        done = run(SCRIPTS / "llama-wheel", "--where", XDG_CACHE_HOME=str(tmp_path), **environment)
        assert done.returncode == 0, done.stderr
        return Path(done.stdout.strip())

    plain = where(CMAKE_ARGS="")
    assert plain.is_relative_to(tmp_path)
    assert not plain.exists()
    assert len({plain, where(CMAKE_ARGS="-DGGML_CUDA=ON"), where(CMAKE_ARGS="", CFLAGS="-O1")}) == 3
    assert where(CMAKE_ARGS="") == plain

    plain.mkdir(parents=True)
    wheel = plain / "llama_cpp_python-0-py3-none-any.whl"
    wheel.touch()
    done = run(SCRIPTS / "llama-wheel", XDG_CACHE_HOME=str(tmp_path), CMAKE_ARGS="")
    assert done.stdout.splitlines() == [str(wheel)], done.stderr


def test_with_venv_needs_a_command_and_explains_itself() -> None:
    assert run(SCRIPTS / "with-venv").returncode == 2
    told = run(SCRIPTS / "with-venv", "--help")
    assert told.returncode == 0
    for word in ("IMPQ_EXTRAS", "PYTHON", "PIP_EXTRA_INDEX_URL", "CMAKE_ARGS"):
        assert word in told.stdout


@pytest.mark.parametrize("name", ["carry-wheels", "validate_on_device.sh"])
def test_scripts_for_a_device_explain_themselves(name: str) -> None:
    assert run(SCRIPTS / name).returncode == 2
    told = run(SCRIPTS / name, "--help")
    assert told.returncode == 0
    assert "aarch64" in told.stdout and "--on" in told.stdout


def test_wheels_for_a_machine_that_nothing_here_compiles_for(tmp_path: Path) -> None:
    done = run(SCRIPTS / "carry-wheels", "riscv64", tmp_path, PYTHON=sys.executable)
    assert done.returncode == 1
    assert "no compiler here for riscv64; build llama-cpp-python on such a machine" in done.stderr
    assert not list(tmp_path.iterdir())
    for wrong in (("--python", "2.7"), ("--glibc", "musl")):
        assert "is no version" in run(SCRIPTS / "carry-wheels", *wrong, "aarch64", tmp_path).stderr


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    copy = tmp_path / "a checkout"
    shutil.copytree(SCRIPTS, copy / "scripts")
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, copy)
    return copy


def test_with_venv_leaves_an_environment_of_somebody_else_alone(checkout: Path) -> None:
    theirs = checkout / ".venv" / "theirs"
    theirs.parent.mkdir()
    theirs.touch()
    done = run(checkout / "scripts/with-venv", "true", IMPQ_EXTRAS="", XDG_CACHE_HOME=str(checkout))
    assert done.returncode == 1
    assert "was not made by this script; move it away" in done.stderr
    assert theirs.exists()


def test_with_venv_names_a_python_that_is_missing(checkout: Path) -> None:
    done = run(checkout / "scripts/with-venv", "true", PYTHON="python3.99")
    assert done.returncode == 1
    assert "python3.99 is not installed" in done.stderr
    assert not (checkout / ".venv").exists()


def pins() -> dict[str, str]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    found = dict(line.split("==") for line in lines)
    assert len(found) == len(lines)
    return found


def test_constraints_pin_every_dependency_within_its_bounds() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    for requirement in map(Requirement, (line for group in groups for line in group)):
        if requirement.name == project["name"]:  # an extra made of other extras
            continue
        version = pins()[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement} excludes {version}"


def test_constraints_name_versions_only() -> None:
    text = (ROOT / "constraints.txt").read_text()
    assert not re.search(r"://|^-|@|\+", text, re.MULTILINE)
    assert all(name == canonicalize_name(name) for name in pins())


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_scripts_are_clean() -> None:
    scripts = [
        path
        for path in (*SCRIPTS.iterdir(), ROOT / ".ci/run")
        if path.is_file() and path.read_bytes().startswith((b"#!/usr/bin/env bash", b"# shellcheck shell=bash"))
    ]
    assert len(scripts) >= 5
    done = run("shellcheck", "--external-sources", "--source-path", ROOT, *scripts)
    assert done.returncode == 0, done.stdout
