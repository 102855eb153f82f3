"""No name in any input leads out of the output directory; a tree of canaries tells."""

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fuzz.release_inputs import ODD_NAMES, manifest
from hypothesis import given
from hypothesis import strategies as st

import impq_edge
from impq_edge import console, stages
from impq_edge.conversion.artifact import Artifact
from impq_edge.conversion.encoder import EncodeOptions
from impq_edge.devices.profile import load_device
from impq_edge.errors import ImpqError, ModelError, RecordError, ReleaseError
from impq_edge.impq.allocation import Allocation
from impq_edge.records import atomic_path, is_plain_name, parse, read_text
from impq_edge.releases.manifest import Manifest
from impq_edge.releases.naming import Layout, file_name
from impq_edge.releases.order import load_order
from impq_edge.releases.release import release
from impq_edge.releases.verify import verify
from impq_edge.releases.within import require_within
from impq_edge.spqe.options import GameOptions
from impq_edge.spqe.profile import SensitivityProfile

ORDER = """
name = "small"
encode = "rtn"
windows = 1
contexts = [256]
models = [{ model = "checkpoint", name = "Small", profile = "profile.json" }]
devices = [{ device = "laptop-16gb", average_bits = 3 }]
game = { method = "impq", permutations = 1, tokens = 512 }
"""
GAME = GameOptions(method="impq", permutations=1, tokens=512, backend_settings={"encode": "rtn"}, compute="cpu")


@pytest.fixture(scope="module")
def inputs(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, its profile, an allocation and an order."""
    folder = tmp_path_factory.mktemp("inputs")
    shutil.copytree(checkpoints["qwen3"], folder / "checkpoint")
    found = stages.profile(str(folder / "checkpoint"), out=folder / "profile.json", game=GAME)
    stages.allocate(
        found, device="laptop-16gb", context_tokens=256, average_bits=3, method="impq", out=folder / "allocation.json"
    )
    (folder / "release.toml").write_text(ORDER)
    return folder


@pytest.fixture
def place(inputs: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of the inputs, deep in a tree of canaries that must be afterwards as it was."""
    canaries = [tmp_path / "a" / "canary", tmp_path / "canary", tmp_path / "a" / "b" / "x.gguf"]
    for path in canaries:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("alive")
    folder = Path(shutil.copytree(inputs, tmp_path / "a" / "b" / "c"))
    before = tree(tmp_path, folder)
    yield folder
    assert tree(tmp_path, folder) == before, "something was written outside"


def tree(root: Path, left_out: Path) -> dict[str, str]:
    found = {}
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if Path(folder, name) != left_out]
        for name in [*folders, *files]:
            path = Path(folder, name)
            found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
    return found


def renamed(path: Path, *keys: str, to: str) -> None:
    data = json.loads(path.read_text())
    at = data
    for key in keys[:-1]:
        at = at[key]
    at[keys[-1]] = to
    path.write_text(json.dumps(data))


LEADING_OUT = [name for name in ODD_NAMES if not is_plain_name(name)]


@pytest.mark.parametrize("name", LEADING_OUT, ids=ascii)
def test_no_record_carries_a_name_that_is_none_for_a_file(place: Path, name: str) -> None:
    renamed(place / "profile.json", "model", "name", to=name)
    with pytest.raises(RecordError):
        SensitivityProfile.load(place / "profile.json")
    for key in ("model_name", "device"):
        shutil.copy(place / "allocation.json", place / "copy.json")
        renamed(place / "copy.json", key, to=name)
        with pytest.raises(RecordError):
            Allocation.load(place / "copy.json")
    for kind in ("name", "models"):
        made = manifest().to_json()
        (made if kind == "name" else made["models"][0])["name"] = name
        (place / "manifest.json").write_text(json.dumps(made))
        with pytest.raises(RecordError):
            Manifest.load(place / "manifest.json")


def test_build_and_release_write_nowhere_else_by_a_foreign_profile(place: Path) -> None:
    renamed(place / "profile.json", "model", "name", to="../../canary")
    with pytest.raises(RecordError, match="no name for a file"):
        impq_edge.build(
            "laptop-16gb", model=str(place / "checkpoint"), out=place / "out", game=GAME,
            sensitivity=place / "profile.json", context_tokens=256, average_bits=3, windows=1,
        )  # fmt: skip
    with pytest.raises(RecordError, match="no name for a file"):
        release(load_order(place / "release.toml"), out=place / "out", base=place)
    assert not (place / "out").exists()


def test_records_lie_where_the_order_says_whatever_a_profile_calls_the_model(place: Path) -> None:
    renamed(place / "profile.json", "model", "name", to="Other")
    made = release(load_order(place / "release.toml"), out=place / "out", base=place)
    for output in made.outputs:
        assert output.path.startswith(("records/Small/", "records/devices/", "README.md", "report.html", "Other-")), (
            output.path
        )


@pytest.mark.parametrize("name", ["-rf", "a\nb", "\x1b]0;x\x07", "\u202egpj.exe", ".hidden", "x" * 200], ids=ascii)
def test_a_directory_with_such_a_name_is_no_model(place: Path, name: str) -> None:
    (place / "checkpoint").rename(place / name)
    with pytest.raises(ModelError, match="files are to be called after it"):
        impq_edge.convert(str(place / name), out=place / "out.gguf", type="q4_k", encode=EncodeOptions("rtn"))
    assert not (place / "out.gguf").exists()


@pytest.mark.parametrize("where", ["records", ".work", "encoded", "records/Small", "sensitivity.json.journal"])
@pytest.mark.parametrize("target", ["folder", "nothing"])
def test_links_in_the_output_directory_are_not_followed(place: Path, where: str, target: str) -> None:
    out = place / "out"
    (out / where).parent.mkdir(parents=True)
    outside = place.parent / "elsewhere" if target == "folder" else place.parent / "dangling"
    (out / where).symlink_to(outside)
    order = load_order(place / "release.toml")
    for run in (
        lambda: release(order, out=out, base=place),
        lambda: impq_edge.build("laptop-16gb", model=str(place / "checkpoint"), out=out, context_tokens=256),
    ):
        with pytest.raises(ReleaseError, match="leads out of"):
            run()
    assert not outside.exists()


def test_links_that_stay_within_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "records").symlink_to("disk")
    require_within(tmp_path)


def test_a_temporary_name_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("alive")
    (tmp_path / f".report.md.{os.getpid()}.tmp").symlink_to(victim)
    with atomic_path(tmp_path / "report.md") as temporary:
        temporary.write_text("a report")
    assert victim.read_text() == "alive" and (tmp_path / "report.md").read_text() == "a report"


@pytest.mark.parametrize(
    "change",
    [
        lambda m, out: m["recipe"]["models"][0].update(model=str(out / "checkpoint")),
        lambda m, out: m["recipe"]["models"][0].update(profile=str(out / "profile.json")),
        lambda m, out: m["recipe"].update(text=str(out / "text")),
        lambda m, out: m["recipe"].update(text="../text"),
        lambda m, out: m["recipe"]["game"].update(calibration="inside/../../text"),
        lambda m, out: m["recipe"]["game"].update(calibration="link"),
        lambda m, out: m["recipe"]["devices"][0].update(device=str(out / "device.toml")),
    ],
)
def test_a_recipe_reads_nothing_outside_of_its_inputs(
    tmp_path: Path, change: Callable[[dict[str, object], Path], None]
) -> None:
    base, folder = tmp_path / "inputs", tmp_path / "release"
    (base / "inside").mkdir(parents=True)
    (tmp_path / "checkpoint").mkdir()
    for name in ("text", "device.toml", "profile.json"):
        (tmp_path / name).write_text("secret")
    (base / "link").symlink_to(tmp_path / "text")
    folder.mkdir()
    made = manifest().to_json()
    change(made, tmp_path)
    (folder / "manifest.json").write_text(json.dumps(made))
    with pytest.raises(ReleaseError, match="outside"):
        verify(folder, rebuild=True, base=base)


def test_a_list_of_sums_is_never_read_whole_where_it_is_too_long(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps(manifest().to_json()))
    with (tmp_path / "SHA256SUMS").open("wb") as file:
        file.truncate(1 << 40)  # takes no room on the disk
    assert "far longer" in {
        finding.detail.removeprefix("is ").partition(" than")[0] for finding in verify(tmp_path).findings
    }


@pytest.mark.parametrize("name", ["a\0b", "x" * 300, "x" * 5000, "\udcff"], ids=ascii)
def test_paths_that_are_none_end_in_a_sentence(tmp_path: Path, name: str) -> None:
    with pytest.raises(RecordError):
        read_text(tmp_path / name)
    with pytest.raises(ImpqError):
        stages.load_profile(name)
    with pytest.raises(ImpqError):
        stages.open_model(name)
    with pytest.raises(ImpqError):
        load_device(str(tmp_path / name))


@given(st.text(max_size=140))
def test_what_is_a_plain_name_stays_where_it_is_put(name: str) -> None:
    if not is_plain_name(name):
        return
    root = Path("/out/put")
    for path in (Layout(root).cell(name, name), Layout(root).kept(name), root / f"{name}-device.gguf"):
        assert os.path.normpath(path) == str(path) and path.is_relative_to(root)
    assert len(os.fsencode(f"{name}-{'d' * 64}-IMPQ-4.50bpw.gguf.json")) <= 255
    assert "\n" not in name and not name.startswith("-")


@given(st.text())
def test_nothing_that_is_printed_moves_the_terminal(text: str) -> None:
    shown = console._visible(text)
    assert not any((char < " " and char not in "\n\t") or "\x7f" <= char <= "\x9f" for char in shown)
    assert not set(shown) & set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
    shown.encode()


def test_an_artifact_names_files_beside_it_alone() -> None:
    sound = Artifact("a.gguf", "0" * 64, 1, 1, "0" * 64, None, {}, {}, 4.5)
    for name in ("../a.gguf", "/a.gguf", "a/b", "a\0"):
        data = {key: value for key, value in sound.to_json().items() if key != "schema"} | {"artifact": name}
        with pytest.raises(RecordError):
            parse(Artifact, data, Path("a.json"))


def test_the_name_of_a_file_is_that_of_model_and_device(inputs: Path) -> None:
    allocation = Allocation.load(inputs / "allocation.json")
    assert "/" not in file_name(dataclasses.replace(allocation, model_name="A model"))
