"""Publishing a release on the model hub: one commit of exactly the manifest's files."""

from pathlib import Path

from impq_edge.errors import ReleaseError
from impq_edge.model.hub import is_repository_name
from impq_edge.records import shown
from impq_edge.releases.manifest import MANIFEST_FILE, SUMS_FILE, Manifest
from impq_edge.releases.telling import Say
from impq_edge.releases.verify import verify


def require_repository(repository: str) -> None:
    """Refuse what is no name of a repository, before anything is made for it."""
    try:
        import huggingface_hub  # noqa: F401
    except ModuleNotFoundError:
        raise ReleaseError("--push-to-hub needs huggingface_hub; pip install 'impq-edge[workstation]'.") from None
    if not is_repository_name(repository):
        raise ReleaseError(f"--push-to-hub {shown(repository)} is no repository; write it like owner/name.")


def push(directory: Path, repository: str, *, private: bool = False, say: Say = lambda _: None) -> str:
    """Upload a whole, unchanged release whose gates hold, and return the address of the commit.

    The hub's token, endpoint and offline mode are honoured. A file that the hub has already is not sent again, so that
    a push that broke off goes on.

    Raises
    ------
    ReleaseError
        When a gate failed, a file is not as it was made, or the hub refuses or cannot be reached.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, errors

    require_repository(repository)
    manifest = _publishable(directory)
    names = sorted({*(output.path for output in manifest.outputs), MANIFEST_FILE, SUMS_FILE})
    size_bytes = sum(output.file_bytes for output in manifest.outputs)
    say(f"Pushing {len(names)} files, {size_bytes / 2**20:,.1f} MiB, to {repository}.")
    api = HfApi()
    try:
        api.create_repo(repository, private=private or None, exist_ok=True)  # None: as the organisation has it
        done = api.create_commit(
            repository,
            [CommitOperationAdd(path_in_repo=name, path_or_fileobj=directory / name) for name in names],
            commit_message=f"Release {manifest.name}",
        )
    # HTTPError is the base of the transport errors of the HTTP client that the hub library happens to use; uploads
    # wrap what went wrong in a RuntimeError or ValueError of their own.
    except (errors.HTTPError, OSError, RuntimeError, ValueError) as error:  # type: ignore[attr-defined, unused-ignore]
        raise ReleaseError(_explain(error, repository)) from error
    return str(done.commit_url)


def _publishable(directory: Path) -> Manifest:
    verdict = verify(directory)
    if not verdict.passed:
        first = verdict.findings[0]
        raise ReleaseError(
            f"{directory} is not as it was made: {first.path} is {first.kind}, {first.detail}; nothing was pushed."
        )
    for file in verdict.manifest.files:
        for taker in file.takers:
            for gate in taker.gates:
                if gate.status == "failed":
                    raise ReleaseError(f"{file.file} fails {gate.name} for {taker.device}; nothing was pushed.")
    return verdict.manifest


def _explain(error: BaseException, repository: str) -> str:
    from huggingface_hub import errors

    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, errors.HfHubHTTPError):
        cause = cause.__cause__
    if isinstance(cause, errors.HfHubHTTPError):
        status = cause.response.status_code
        if status in (401, 403):
            return (
                f"The hub does not let this account write to {repository} (status {status}); run 'hf auth login' with "
                "a token that may, or set HF_TOKEN."
            )
        return f"The hub answered with status {status} for {repository}; run the same command again later."
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return (
        f"The release could not be pushed to {repository} ({lines[0].rstrip('.')}); check the network and HF_ENDPOINT "
        "and run the same command again."
    )
