"""Files that ship with the package: device profiles, sensitivity profiles and the demo."""

from pathlib import Path


def data_path(*parts: str) -> Path:
    """Return where a shipped file or directory is: within the installed package, else in the checkout around it."""
    here = Path(__file__).parent
    packaged = here.joinpath(*parts)
    return packaged if packaged.exists() else here.parents[1].joinpath(*parts)
