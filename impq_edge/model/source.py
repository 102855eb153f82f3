"""Where a checkpoint comes from: the model that ships with the package, a directory, or the hub."""

import dataclasses
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from impq_edge.data import data_path
from impq_edge.errors import ModelError
from impq_edge.model import hub
from impq_edge.records import shown

DEMO = "demo"
"""The name of the trained model that ships with the package."""

_DEMO_DIRECTORY = ("demo", "tiny-llama3")
_REVISION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._/+-]{0,199}")  # it becomes a path in the hub's cache
_NAME_SHOWN = 400  # characters
_COMMIT_SHOWN = 12  # hexadecimal digits of a commit in messages


@dataclasses.dataclass(frozen=True)
class Source:
    """A checkpoint that was found, and what of it still has to be downloaded."""

    model: str  # as asked for: "demo", a directory, or a hub id
    name: str  # what reports and file names call it
    directory: Path | None  # where it is on this machine; None: :func:`fetch` has to ask the hub
    revision: str | None = None  # branch, tag or commit asked for
    commit: str | None = None  # the hub's commit, None for a directory
    cached_bytes: int = 0  # in the hub's cache already
    download_bytes: int = 0
    content_sha256: str | None = None  # what its files must hold, once they were read
    cache_only: bool = False  # the hub did not answer for it, and the cached commit stands in

    def summary(self) -> str:
        """Say in one line where the checkpoint is and what fetching it costs."""
        if self.model == DEMO:
            return f"the model that ships with impq-edge ({self.name})"
        if self.commit is None:
            return f"the checkpoint in {self.directory}"
        where = f"{self.model} at {self.commit[:_COMMIT_SHOWN]}"
        if self.cache_only:
            return f"{where}, from the cache alone (no answer from the hub)"
        if not self.download_bytes:
            return f"{where}, from the cache"
        kept = f", {_size(self.cached_bytes)} in the cache" if self.cached_bytes else ""
        return f"{where}: {_size(self.download_bytes)} to download{kept}"


def find(model: str, revision: str | None = None) -> Source:
    """Find a checkpoint, without downloading weights.

    Parameters
    ----------
    model
        :data:`DEMO`, a directory laid out as on the hub, or a hub id such as ``org/name``.
    revision
        Branch, tag or commit of a hub id; its main branch by default.

    Raises
    ------
    ModelError
        When the name is none of the three, or the hub's model is unknown, gated, not in safetensors,
        or neither reachable nor cached.
    """
    if revision is not None and (not _REVISION.fullmatch(revision) or ".." in revision):
        raise ModelError(f"Revision {shown(revision)} is none; pass a branch, tag or commit.")
    directory = demo_directory() if model == DEMO else _directory(model)
    if directory is None:
        return _find_on_hub(model, revision)
    if revision is not None:
        raise ModelError(
            f"Revision {revision!r} was given, but {shown(model)} is not a hub id; leave the revision out."
        )
    return Source(model=model, name=directory.resolve().name, directory=directory)


def demo_directory() -> Path:
    """Return the directory of the model that ships."""
    return data_path(*_DEMO_DIRECTORY)


def fetch(source: Source, advance: Callable[[int], None] = lambda _: None) -> Path:
    """Download what is missing of a checkpoint and return its directory.

    Parameters
    ----------
    source
        What :func:`find` returned.
    advance
        Told the number of bytes that arrived since its last call, from several threads in turn.

    Raises
    ------
    ModelError
        When the disk is too small, access is refused, or the download breaks off. Files that
        arrived whole stay in the cache, and the next call goes on from there.
    """
    if source.directory is not None:
        return source.directory
    _require_space(source)
    return hub.download(source.model, source.commit, advance)  # the one that was told of


def checkpoint(model: str, revision: str | None = None, advance: Callable[[int], None] = lambda _: None) -> Path:
    """Return the directory of a checkpoint, downloaded if need be: :func:`find`, then :func:`fetch`."""
    return fetch(find(model, revision), advance)


def _directory(model: str) -> Path | None:
    """Return the directory that ``model`` names, or None where it has the form of a hub id."""
    path = Path(model)
    try:
        if model and path.is_dir():
            return path
        if model and path.exists():
            raise ModelError(
                f"{shown(model)} is a file; pass the directory of a checkpoint, or a hub id such as org/name."
            )
    except OSError as error:
        raise ModelError(
            f"{shown(model, _NAME_SHOWN)} cannot be read: {error.strerror}; pass a directory or a hub id."
        ) from None
    _require_hub_library(model)
    if not hub.is_repository_name(model):
        raise ModelError(
            f"{shown(model)} is neither a directory nor a hub id; pass a checkpoint's directory, org/name, or {DEMO!r}."
        )
    return None


def _require_hub_library(model: str) -> None:
    try:
        import huggingface_hub  # noqa: F401
    except ModuleNotFoundError:
        raise ModelError(
            f"{shown(model)} is no directory, and hub ids need huggingface_hub; pip install 'impq-edge[workstation]'."
        ) from None


def _find_on_hub(repository: str, revision: str | None) -> Source:
    name = repository.rpartition("/")[2]
    try:
        files = hub.plan(repository, revision)
    except ModelError:
        cached = hub.cached(repository, revision)
        if cached is None:
            raise
        return Source(repository, name, cached, revision, commit=cached.name, cache_only=True)
    _require_checkpoint(repository, [file.filename for file in files])
    missing = sum(file.file_size for file in files if file.will_download)
    return Source(
        model=repository,
        name=name,
        directory=None,
        revision=revision,
        commit=files[0].commit_hash,
        cached_bytes=sum(file.file_size for file in files) - missing,
        download_bytes=missing,
    )


def _require_checkpoint(repository: str, files: list[str]) -> None:
    for file, found in (
        ("config.json", "config.json" in files),
        ("model*.safetensors", any(name.endswith(".safetensors") for name in files)),
    ):
        if not found:
            raise ModelError(
                f"{repository} has no {file}: it is not an unquantised Transformers checkpoint in safetensors; "
                "choose another repository, or convert it with transformers' save_pretrained in a place you trust."
            )


def _require_space(source: Source) -> None:
    cache = hub.cache_directory()
    existing = next(path for path in (cache, *cache.parents) if path.exists())
    free_bytes = shutil.disk_usage(existing).free
    if source.download_bytes > free_bytes:
        raise ModelError(
            f"{source.model} needs {_size(source.download_bytes)} more in {cache}, which has {_size(free_bytes)} "
            "free; free some space, or set HF_HOME to a directory on a larger disk."
        )


def _size(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.1f} GiB" if size_bytes >= 2**30 else f"{size_bytes / 2**20:.1f} MiB"
