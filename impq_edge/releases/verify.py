"""Checking a release: every file against its hash, and the recipe against the files."""

import dataclasses
import os
import tempfile
from pathlib import Path
from typing import Any, Literal

from impq_edge.errors import ReleaseError
from impq_edge.records import is_there, sha256_file, shown
from impq_edge.releases.making import make_model, outputs_of
from impq_edge.releases.manifest import MANIFEST_FILE, SUMS_FILE, Manifest, Output, sums_text
from impq_edge.releases.matrix import resolve
from impq_edge.releases.naming import Layout
from impq_edge.releases.order import Order, found_from
from impq_edge.releases.telling import Say
from impq_edge.releases.within import require_within
from impq_edge.spqe.table import Progress

Kind = Literal["tampered", "missing", "extra", "rebuilt differently", "input changed"]

_OURS = frozenset({MANIFEST_FILE, SUMS_FILE})
_MAX_MORE_BYTES = 1 << 16  # of a list of sums, over what it should hold; more is not read
_HUBS = frozenset({".git", ".gitattributes", ".cache"})  # what cloning or downloading from the hub adds


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that is not as the manifest says."""

    kind: Kind
    path: str
    detail: str


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What a check of a release found."""

    directory: Path
    manifest: Manifest
    checked: int  # files whose hashes were computed
    rebuilt: int  # files that were made anew and compared
    findings: tuple[Finding, ...]

    @property
    def passed(self) -> bool:
        """Whether everything is as the manifest says."""
        return not self.findings

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "directory": str(self.directory), "release": self.manifest.name, "passed": self.passed,
            "gates_passed": self.manifest.passed, "checked": self.checked, "rebuilt": self.rebuilt,
            "findings": [dataclasses.asdict(finding) for finding in self.findings],
        }  # fmt: skip


def verify(
    directory: Path,
    *,
    rebuild: bool = False,
    trust_profile: bool = False,
    base: Path = Path(),
    scratch: Path | None = None,
    say: Say = lambda _: None,
    progress: Progress = lambda *_: None,
) -> Verdict:
    """Check every file of a release, and with ``rebuild`` that the recipe gives the same bytes.

    Parameters
    ----------
    trust_profile
        Rebuild from the sensitivity profiles of the release, without playing their games again.
    base
        Where the recipe's paths start, if it has any: the directory of its ``release.toml``.
    scratch
        Where to rebuild; a temporary directory by default. One that was interrupted is gone on with.

    Raises
    ------
    RecordError
        When there is no manifest, or it cannot be read.
    ImpqError
        When the recipe cannot be followed here.
    """
    if not directory.is_dir():
        raise ReleaseError(f"{directory} is no directory; pass that of a release.")
    if not (directory / MANIFEST_FILE).is_file():
        raise ReleaseError(
            f"{directory} has no {MANIFEST_FILE}: it is no release, or one that is not finished; run impq-edge release."
        )
    manifest = Manifest.load(directory / MANIFEST_FILE)
    findings = [*_sums(directory, manifest), *_files(directory, manifest, progress), *_extra(directory, manifest)]
    rebuilt = 0
    if rebuild:
        if scratch is not None:
            made = _rebuilt(manifest, directory, scratch, base, trust_profile, say, progress)
        else:
            with tempfile.TemporaryDirectory(prefix="impq-edge-verify-") as folder:
                made = _rebuilt(manifest, directory, Path(folder), base, trust_profile, say, progress)
        rebuilt, more = made
        findings += more
    return Verdict(directory, manifest, len(manifest.outputs), rebuilt, tuple(findings))


def _files(directory: Path, manifest: Manifest, progress: Progress) -> list[Finding]:
    found = []
    total, done = sum(output.file_bytes for output in manifest.outputs), 0
    for output in manifest.outputs:
        wrong = _wrong(directory, output)
        done += output.file_bytes
        progress("hashing, MiB", done >> 20, total >> 20)
        if wrong is not None:
            found.append(wrong)
    return found


def _wrong(directory: Path, output: Output) -> Finding | None:
    path = directory / output.path
    if not os.path.lexists(path):
        return Finding("missing", output.path, f"{output.file_bytes:,} bytes")
    # The hub's cache is made of links; what counts is that the bytes are those of the manifest.
    if not path.is_file():
        return Finding("tampered", output.path, "is no regular file")
    try:
        size = path.stat().st_size
        if size != output.file_bytes:
            return Finding("tampered", output.path, f"has {size:,} bytes, not {output.file_bytes:,}")
        sha256 = sha256_file(path)
    except OSError as error:
        return Finding("tampered", output.path, f"cannot be read: {error.strerror}")
    if sha256 != output.sha256:
        return Finding("tampered", output.path, f"has sha256 {sha256[:16]}…, not {output.sha256[:16]}…")
    return None


def _sums(directory: Path, manifest: Manifest) -> list[Finding]:
    """SHA256SUMS says the same as the manifest, and vouches for it."""
    path, manifest_path = directory / SUMS_FILE, directory / MANIFEST_FILE
    if not path.is_file():
        return [Finding("missing", SUMS_FILE, "nothing vouches for the manifest")]
    own = Output(MANIFEST_FILE, manifest_path.stat().st_size, sha256_file(manifest_path))
    text = sums_text([*manifest.outputs, own])
    if path.stat().st_size > len(text.encode()) + _MAX_MORE_BYTES:
        return [Finding("tampered", SUMS_FILE, "is far longer than the list of this release")]
    wanted = set(text.splitlines())
    found = set(path.read_bytes().decode("utf-8", "replace").splitlines())
    names = sorted({line.partition("  ")[2] for line in wanted ^ found})
    if not names:
        return []
    if names == [MANIFEST_FILE]:
        return [Finding("tampered", MANIFEST_FILE, f"is not the one that {SUMS_FILE} lists")]
    shown = ascii(", ".join(names))[1:121]
    return [Finding("tampered", SUMS_FILE, f"or {MANIFEST_FILE}: they disagree on {shown}")]


def _extra(directory: Path, manifest: Manifest) -> list[Finding]:
    listed = {output.path for output in manifest.outputs} | _OURS
    found = []
    for folder, folders, files in os.walk(directory):
        at = Path(folder)
        if at == directory:
            folders[:] = [name for name in folders if name not in _HUBS]
        links = [name for name in folders if (at / name).is_symlink()]  # which os.walk does not enter
        for name in sorted([*files, *links]):
            path = (at / name).relative_to(directory).as_posix()
            if path not in listed and path not in _HUBS:
                found.append(Finding("extra", path.encode("utf-8", "backslashreplace").decode(), "not of this release"))
    return sorted(found, key=lambda finding: finding.path)


def _rebuilt(
    manifest: Manifest,
    directory: Path,
    scratch: Path,
    base: Path,
    trust_profile: bool,
    say: Say,
    progress: Progress,
) -> tuple[int, list[Finding]]:
    """Follow the recipe and compare what it makes with the manifest; measurements are not repeated."""
    _require_inside(manifest.recipe, base)
    require_within(scratch)
    order = _pinned(manifest, directory.resolve() if trust_profile else None)
    matrix, layout = resolve(order, base), Layout(scratch)
    contents = {model.name: model.content_sha256 for model in manifest.models}
    devices = {entry.name: entry.sha256 for entry in manifest.inputs if entry.kind == "device"}
    findings = [
        Finding("input changed", name, "the device's profile is not that of the release")
        for name, sha256 in {cell.asked: cell.device.identity() for row in matrix.rows for cell in row.cells}.items()
        if devices.get(name) != sha256
    ]
    wanted = {output.path: output for output in manifest.outputs}
    made_paths: set[str] = set()
    for row in matrix.rows:
        say(f"Making {row.name} again in {scratch}, from {row.source.summary()}.")
        made = make_model(matrix, row, layout, say, progress)
        if made.spec.content_sha256 != contents.get(row.name):
            findings.append(Finding("input changed", row.name, "the checkpoint is not that of the release"))
        for path in outputs_of(made, layout):
            name = path.relative_to(layout.root).as_posix()
            made_paths.add(name)
            if name not in wanted:
                findings.append(Finding("rebuilt differently", name, "is not in the release"))
            elif sha256_file(path) != wanted[name].sha256:
                findings.append(Finding("rebuilt differently", name, _how(path, wanted[name])))
    released = {file.file for file in manifest.files}
    findings += [
        Finding("rebuilt differently", name, "is in the release, but the recipe does not make it")
        for name in sorted(released - made_paths)
    ]
    return len(made_paths), findings


def _require_inside(recipe: Order, base: Path) -> None:
    """Refuse a recipe, which may be anybody's, that reads outside of where its inputs are said to be.

    Raises
    ------
    ReleaseError
        Naming the path.
    """
    named = [model.model for model in recipe.models] + [device.device for device in recipe.devices]
    named += [model.profile for model in recipe.models if model.profile is not None]
    paths = [Path(found_from(base, name)) for name in named]
    paths += [base / str(text) for text in (recipe.text, recipe.game.get("calibration")) if text is not None]
    for path in paths:
        if is_there(path) and not path.resolve().is_relative_to(base.resolve()):
            raise ReleaseError(
                f"The recipe reads {shown(str(path))}, which is outside {base.resolve()}; give a directory that holds "
                "it with --inputs, if you trust this release."
            )


def _how(path: Path, wanted: Output) -> str:
    return f"{path.stat().st_size:,} bytes with sha256 {sha256_file(path)[:16]}…, not {wanted.sha256[:16]}…"


def _pinned(manifest: Manifest, trusted: Path | None) -> Order:
    """Return the recipe at the commits the release was made from, and with its profiles where they are trusted."""
    by_name = {model.model: model for model in manifest.models}
    models = []
    for asked in manifest.recipe.models:
        changes: dict[str, Any] = {}
        if (known := by_name.get(asked.model)) is not None:
            changes = {} if known.commit is None else {"revision": known.commit}
            if trusted is not None:
                changes["profile"] = str(Layout(trusted).records(known.name) / "sensitivity.json")
        models.append(dataclasses.replace(asked, **changes))
    return dataclasses.replace(manifest.recipe, models=tuple(models))
