import re
import tomllib
from pathlib import Path

import pytest

from impq_edge.errors import ValidationError
from impq_edge.validation.doctor import PACKAGES, DoctorReport, _unused, cpu_features, examine


def test_the_packages_looked_for_are_the_declared_dependencies() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]

    declared = {"": project["dependencies"]} | project["optional-dependencies"]
    for extra, packages in PACKAGES.items():
        names = [re.split(r"[\[<>=~! ]", requirement)[0] for requirement in declared[extra]]
        assert list(packages) == [name for name in names if name != project["name"]]


def test_without_a_file_random_weights_are_decoded() -> None:
    report = examine()
    assert [(probe.use_extra_bufts, probe.status) for probe in report.probes] == [(True, "passed"), (False, "passed")]
    assert report.build is not None
    assert "CPU" in report.build.system_info
    assert all(package.version for package in report.packages if not package.extra)
    assert report.threads >= 1


def test_a_file_is_decoded_with_and_without_repacking(demo_gguf: Path, tmp_path: Path) -> None:
    report = examine(demo_gguf)
    assert [(probe.use_extra_bufts, probe.status) for probe in report.probes] == [(True, "passed"), (False, "passed")]
    report.save(tmp_path / "doctor.json")
    assert DoctorReport.load(tmp_path / "doctor.json") == report


def test_an_unfit_library_is_a_problem_with_a_remedy(
    demo_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "llama_cpp").mkdir()
    (tmp_path / "llama_cpp" / "__init__.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGILL)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    report = examine(demo_gguf)
    assert report.build is None
    assert {probe.status for probe in report.probes} == {"failed"}
    assert len(report.problems) == 3
    assert all("GGML_NATIVE=OFF" in problem for problem in report.problems)


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="does not exist"):
        examine(tmp_path / "none.gguf")


def test_an_instruction_set_left_out_of_the_build_is_told() -> None:
    assert _unused(("sse2", "avx2"), "CPU : SSE3 = 1 | AVX2 = 1 | ") == []
    assert _unused(("sse2",), "CPU : SSE3 = 1 | ") == []
    (told,) = _unused(("asimd", "asimddp"), "CPU : NEON = 1 | ")
    assert "without DOTPROD" in told
    assert "armv8.2-a+dotprod" in told


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="/proc/cpuinfo is Linux's")
def test_the_processor_s_features_are_words() -> None:
    assert len(cpu_features()) > 1
    assert all(re.fullmatch(r"[\w.]+", feature) for feature in cpu_features())
