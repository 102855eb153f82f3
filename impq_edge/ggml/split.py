"""How llama.cpp names the files of a split GGUF and the keys in them (``llama_split_path`` in src/llama.cpp)."""

import re
from pathlib import Path

SPLIT_NO, SPLIT_COUNT, SPLIT_TENSORS = "split.no", "split.count", "split.tensors.count"
MAX_FILES = 0xFFFF  # the keys are uint16

_NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)


def split_paths(path: Path, count: int) -> list[Path]:
    """Return the files that ``path``, such as ``model.gguf``, is split into; itself where there is one."""
    if count == 1:
        return [path]
    stem = path.name.removesuffix(".gguf")
    return [path.with_name(f"{stem}-{number:05d}-of-{count:05d}.gguf") for number in range(1, count + 1)]


def unsplit_path(path: Path) -> Path | None:
    """Return what the whole is called that a file by its name is a piece of; None: it is not named as a piece."""
    match = _NAME.fullmatch(path.name)
    return path.with_name(f"{match[1]}.gguf") if match else None
