"""What only callers other than a model's validation see of the header; tests/validation/test_file.py has the rest."""

from pathlib import Path

import gguf
import numpy as np
import pytest

from impq_edge.errors import ConversionError, ImpqError, ValidationError
from impq_edge.ggml.header import read_header


def write(path: Path, **lists: list[object]) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    for key, values in lists.items():
        writer.add_array(key, values)
    writer.add_tensor("a", np.ones(3, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_lists_are_kept_where_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path / "x.gguf", tags=["a", "", "ü"], other=["b"], numbers=[1, 2])
    assert read_header(path, ValidationError).lists == {}
    found = read_header(path, ValidationError, lists=("tags", "numbers", "missing"))
    assert found.lists == {"tags": ("a", "", "ü")}
    assert found.keys == {"general.architecture": "llama"}


@pytest.mark.parametrize(
    ("values", "said"),
    [(["x"] * ((1 << 14) + 1), "lists 16385 items, more than 16384"), (["x" * 65_537], "claims 65537 bytes of text")],
)
def test_kept_lists_are_bounded(tmp_path: Path, values: list[object], said: str) -> None:
    path = write(tmp_path / "x.gguf", tags=values)
    read_header(path, ValidationError)
    with pytest.raises(ValidationError, match=said):
        read_header(path, ValidationError, lists=("tags",))


@pytest.mark.parametrize("error", [ConversionError, ValidationError])
def test_the_caller_s_error_is_raised(tmp_path: Path, error: type[ImpqError]) -> None:
    (tmp_path / "cut").write_bytes(write(tmp_path / "x.gguf").read_bytes()[:50])
    for name in ("cut", "none", "."):
        with pytest.raises(error):
            read_header(tmp_path / name, error)


def test_no_tensors_are_no_error_here(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert read_header(tmp_path / "x.gguf", ValidationError).tensors == ()
