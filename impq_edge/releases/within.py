"""Links in an output directory: what is written through one would lie elsewhere."""

import os
from pathlib import Path

from impq_edge.errors import ReleaseError
from impq_edge.records import shown

_OURS = frozenset({"records", ".work", "encoded"})
"""Folders that a build or a release makes; others are not ours to look into."""


def require_within(directory: Path) -> None:
    """Refuse a directory from somebody else in which what is written would leave it.

    Files are written under another name and renamed, which replaces a link; but a folder, or a journal that is
    appended to, would be followed.

    Raises
    ------
    ReleaseError
        Naming the link.
    """
    root = directory.resolve()
    for folder, folders, files in os.walk(directory):
        at = Path(folder)
        for name in sorted([*folders, *files]):
            path = at / name
            if path.is_symlink() and not path.resolve().is_relative_to(root):
                raise ReleaseError(
                    f"{shown(str(path))} leads out of {directory}; remove that link, or choose another directory."
                )
        if at == directory:
            folders[:] = [name for name in folders if name in _OURS]
