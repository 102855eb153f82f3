from pathlib import Path

import numpy as np
import pytest

from impq_edge.errors import ModelError
from impq_edge.model.calibration import read_windows

TEXT = "It was a dark night, and the wind had risen. " * 200


@pytest.mark.parametrize(("architecture", "bos"), [("llama", 8184), ("gemma2", 2), ("qwen3", None)])
def test_bos_replaces_the_first_token_where_the_vocabulary_adds_one(
    checkpoints: dict[str, Path], tmp_path: Path, architecture: str, bos: int | None
) -> None:
    from tokenizers import Tokenizer

    path = tmp_path / "t.txt"
    path.write_text(TEXT)
    windows = read_windows(checkpoints[architecture], path, 512, 128).tokens
    tokenizer = Tokenizer.from_file(str(checkpoints[architecture] / "tokenizer.json"))
    plain = np.array(tokenizer.encode(TEXT, add_special_tokens=False).ids[:512]).reshape(4, 128)
    assert np.array_equal(windows[:, 1:], plain[:, 1:])
    assert set(windows[:, 0]) == ({bos} if bos is not None else set(plain[:, 0]))


def test_text_and_settings_that_make_no_window(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_text("too short")
    with pytest.raises(ModelError, match="less than one window of 128"):
        read_windows(checkpoints["llama"], path, 512, 128)
    with pytest.raises(ModelError, match="--tokens 100"):
        read_windows(checkpoints["llama"], path, 100, 128)


def test_newlines_are_kept_as_they_are(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    hashes = set()
    for newline in ("\n", "\r\n"):
        path = tmp_path / "t.txt"
        path.write_bytes(TEXT.replace(". ", f".{newline}").encode())
        hashes.add(read_windows(checkpoints["llama"], path, 512, 128).text_sha256)
    assert len(hashes) == 2
