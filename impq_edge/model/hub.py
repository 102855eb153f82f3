"""The model hub, through ``huggingface_hub``: what to fetch from it, and what its errors mean in one sentence.

Its cache, tokens, ``HF_HUB_OFFLINE``, ``HF_HOME`` and ``HF_ENDPOINT`` work as in every other tool that uses
that library.
"""

import contextlib
import errno
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from impq_edge.errors import ModelError
from impq_edge.records import is_plain_name, shown, shown_text

_LICENCES = ("LICENSE*", "NOTICE*")
_FILES = ("README.md", "*.json", "tokenizer.model", "merges.txt", "*.jinja", "model*.safetensors", *_LICENCES)
_COMMIT = re.compile(r"[0-9A-Za-z][0-9A-Za-z._-]{0,127}")
_SENSELESS = (ValueError, TypeError, LookupError, AttributeError, AssertionError, RecursionError)
"""What the library raises at answers that are not the hub's; it checks few of them."""

_NOT_FILES = ("*/*",)  # folders hold other exports of the same weights


def is_repository_name(name: str) -> bool:
    """Whether ``name`` has the form ``owner/name``; a bare name is far likelier a mistyped path."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined, unused-ignore]

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name


def cache_directory() -> Path:
    """Return where downloads are kept, for every tool that uses the hub."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE).absolute()


def plan(repository: str, revision: str | None) -> list[Any]:
    """Ask which files make up a checkpoint and which of them the cache lacks.

    Returns
    -------
        ``huggingface_hub.DryRunFileInfo`` of every file.

    Raises
    ------
    ModelError
        When the repository or revision is unknown, access is refused, or the hub cannot be reached.
    """
    files: list[Any] = _ask(repository, revision, lambda _: None, dry_run=True)
    for file in files:
        plain = is_plain_name(file.filename) and _COMMIT.fullmatch(str(file.commit_hash))
        if not plain or type(file.file_size) is not int or file.file_size < 0:
            raise _senseless(repository, f"a file {shown(file.filename)} of {shown(file.file_size)} bytes")
    return files


def download(repository: str, revision: str | None, advance: Callable[[int], None]) -> Path:
    """Download what the cache lacks and return the directory of the snapshot.

    Raises
    ------
    ModelError
        As for :func:`plan`, or when the disk is full or the download breaks off.
    """
    return Path(_ask(repository, revision, advance))


def cached(repository: str, revision: str | None) -> Path | None:
    """Return the snapshot as far as it can be had without the hub, or None when it is not complete."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(_snapshot(repository, revision, local_files_only=True))
    except LocalEntryNotFoundError:
        return None


def headers(repository: str, revision: str | None) -> tuple[Path, dict[str, dict[str, tuple[str, tuple[int, ...]]]]]:
    """Fetch what tells a checkpoint's shapes: ``config.json`` and the headers of its safetensors files.

    Returns
    -------
        The path of ``config.json`` in the hub's cache; and by file and tensor, the type and shape of every tensor.

    Raises
    ------
    ModelError
        As for :func:`plan`, or when there is no config.json, no safetensors file, or one without a proper header.
    """
    from huggingface_hub import errors, get_safetensors_metadata, hf_hub_download

    try:
        with _no_progress_bars():
            config = Path(hf_hub_download(repository, "config.json", revision=revision))
            found = get_safetensors_metadata(repository, revision=revision)
    except (errors.NotASafetensorsRepoError, errors.SafetensorsParsingError, errors.EntryNotFoundError) as error:
        if isinstance(error, errors.LocalEntryNotFoundError):  # of that base, but it says that the hub did not answer
            raise ModelError(_explain(error, repository, revision)) from error
        raise ModelError(
            f"{repository} is not an unquantised Transformers checkpoint in safetensors with a config.json; choose "
            "another repository."
        ) from error
    except (errors.HTTPError, OSError) as error:  # type: ignore[attr-defined, unused-ignore]
        raise ModelError(_explain(error, repository, revision)) from error
    except _SENSELESS as error:
        raise _senseless(repository, shown_text(str(error))) from error
    return config, {
        file: {name: (info.dtype, tuple(info.shape)) for name, info in header.tensors.items()}
        for file, header in found.files_metadata.items()
    }


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    from huggingface_hub.utils import (  # type: ignore[attr-defined, unused-ignore]
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    shown = not are_progress_bars_disabled()
    if shown:
        disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            enable_progress_bars()


def _ask(repository: str, revision: str | None, advance: Callable[[int], None], **options: Any) -> Any:
    from huggingface_hub import errors

    try:
        return _snapshot(repository, revision, tqdm_class=_byte_counter(advance), **options)
    # HTTPError is the base of the transport errors of the HTTP client that the hub library happens to use.
    except (errors.HTTPError, OSError) as error:  # type: ignore[attr-defined, unused-ignore]
        raise ModelError(_explain(error, repository, revision)) from error
    except _SENSELESS as error:
        raise _senseless(repository, shown_text(str(error))) from error


def _senseless(repository: str, what: str) -> ModelError:
    return ModelError(f"What the hub says of {repository} makes no sense ({what}); check HF_ENDPOINT.")


def _snapshot(repository: str, revision: str | None, **options: Any) -> Any:
    from huggingface_hub import snapshot_download

    return snapshot_download(
        repository,
        revision=revision,
        allow_patterns=list(_FILES),
        ignore_patterns=list(_NOT_FILES),
        **options,
    )


def _explain(error: BaseException, repository: str, revision: str | None) -> str:
    """Say in one sentence what a failed request means and what to do about it."""
    from huggingface_hub import errors

    while isinstance(error, errors.DryRunError | errors.LocalEntryNotFoundError) and error.__cause__:
        error = error.__cause__
    named = f"{repository} at {revision}" if revision else repository
    sentences: dict[type[BaseException], str] = {  # a class before the one it derives from
        errors.GatedRepoError: f"{repository} is gated: accept its conditions on its page of the hub, then run "
        "'hf auth login' with that account or set HF_TOKEN.",
        errors.RevisionNotFoundError: f"{repository} has no revision {revision!r}; pass one of its branches, tags "
        "or commits.",
        errors.RepositoryNotFoundError: _unknown(repository),
        errors.OfflineModeIsEnabled: f"{named} is not complete in the cache and HF_HUB_OFFLINE is set; unset it, or "
        "pass a directory.",
    }
    for kind, sentence in sentences.items():
        if isinstance(error, kind):
            return sentence
    if isinstance(error, errors.HfHubHTTPError):
        return _explain_status(error.response.status_code, repository)
    if isinstance(error, OSError) and error.errno is not None:
        return _explain_disk(error, repository)
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return (
        f"The hub did not deliver {named} ({shown_text(lines[0].rstrip('.'))}); check the network and HF_ENDPOINT and "
        "run the same command again, or pass a directory."
    )


def _unknown(repository: str) -> str:
    return (
        f"{repository!r} is neither a directory here nor a model on the hub that this account may see; check the "
        "spelling, or run 'hf auth login' if it is private."
    )


def _explain_status(status: int, repository: str) -> str:
    if status == 401:  # the hub does not tell a missing model from a private one, nor from a stale token
        return _unknown(repository)
    if status == 403:
        return (
            f"The hub forbids this account's token to read {repository} (status 403); run 'hf auth login' with a "
            "token that may, or unset HF_TOKEN."
        )
    if status == 429:
        return (
            f"The hub limits how often it may be asked and refused {repository} (status 429); wait some minutes, "
            "or run 'hf auth login'."
        )
    return f"The hub answered with status {status} for {repository}; run the same command again later."


def _explain_disk(error: OSError, repository: str) -> str:
    if error.errno == errno.ENOSPC:
        return (
            f"The disk became full while {repository} was downloaded; free some space and run the same command again."
        )
    where = error.filename or cache_directory()
    return f"The hub's cache cannot be used at {where}: {error.strerror}; set HF_HOME to another directory."


def _byte_counter(advance: Callable[[int], None]) -> type[Any]:
    """Make a progress bar class that shows nothing and tells ``advance`` what the byte bars count.

    The hub library counts the same bytes with several bars (received, written); the furthest is told.
    """
    from huggingface_hub.utils import tqdm  # type: ignore[attr-defined, unused-ignore]

    lock = threading.Lock()
    told_bytes = 0

    class ByteCounter(tqdm):  # type: ignore[misc, unused-ignore]
        def __init__(self, *args: Any, **options: Any) -> None:
            self.counts_bytes = options.get("unit") == "B"
            self.counted = 0
            super().__init__(*args, **{**options, "disable": True})  # type: ignore[no-untyped-call, unused-ignore]

        def update(self, n: float | None = 1) -> None:
            nonlocal told_bytes
            with lock:
                self.counted += int(n or 0)
                step = self.counted - told_bytes
                if self.counts_bytes and step > 0:
                    told_bytes += step
                    advance(step)

    return ByteCounter
