"""Cards are written by anybody: what is sound is taken as gguf-py takes it, and nothing stops a build."""

import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from gguf.metadata import Metadata

from impq_edge.conversion.card import CARD_BYTES, BaseModel, ModelCard, key_bytes, read_card

SOUND = """---
license: other
license_name: llama3.2
license_link: https://example.org/LICENSE
language:
- en
- no
- de
base_model:
- meta-llama/Llama-3.2-1B-Instruct
- https://huggingface.co/some-org/merged-v1.5
tags:
- llama-3
- chat
pipeline_tag: text-generation
model-index:
- name: x
  results: []
---
# A model
"""


def read(directory: Path, text: str | bytes) -> tuple[ModelCard, str]:
    directory.joinpath("README.md").write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_card(directory)


def head(text: str) -> str:
    return f"---\n{text}\n---\n"


def test_a_sound_card(tmp_path: Path) -> None:
    found, said = read(tmp_path, SOUND)
    assert said == ""
    assert found == ModelCard(
        license="other",
        license_name="llama3.2",
        license_link="https://example.org/LICENSE",
        base_models=(
            BaseModel(
                "Llama 3.2 1B Instruct", None, "Meta Llama", "https://huggingface.co/meta-llama/Llama-3.2-1B-Instruct"
            ),
            BaseModel("Merged v1.5", "v1.5", "Some Org", "https://huggingface.co/some-org/merged-v1.5"),
        ),
        tags=("llama-3", "chat", "text-generation"),
        languages=("en", "no", "de"),
    )


def test_it_is_what_gguf_py_reads(tmp_path: Path) -> None:
    found, _ = read(tmp_path, SOUND)
    theirs = Metadata.load(model_path=tmp_path)
    assert (found.license, found.license_name, found.license_link) == (
        theirs.license, theirs.license_name, theirs.license_link
    )  # fmt: skip
    assert [list(found.tags), list(found.languages)] == [theirs.tags, theirs.languages]
    ours = [{key: value for key, value in vars(model).items() if value} for model in found.base_models]
    assert ours == theirs.base_models


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("license: mit", {"license": "mit"}),
        ("license:\n- mit\n- apache-2.0", {"license": "mit,apache-2.0"}),
        ("license: 1.0", {"license": "1.0"}),
        ("license: null", {}),
        ("license: ''", {}),
        ("license: {a: b}", {}),
        ("license: \"a\\nb\"", {}),
        ('license: "\\uD800"', {}),
        (f"license: {'x' * 257}", {}),
        ("license: &a mit", {"license": "mit"}),
        ("license: !!python/object/apply:os.getcwd []", {}),
        ("license: !!int seven", {"license": "seven"}),
        ("\tlicense: mit".strip(), {"license": "mit"}),
        ("tags:\n\t- a", {"tags": ("a",)}),
        ("tags: [a, [b], {c: d}, a, 2001-02-30]", {"tags": ("a", "2001-02-30")}),
        ("language: no", {"languages": ("no",)}),
        ("base_model: some/thing", {"base_models": (
            BaseModel("Thing", None, "Some", "https://huggingface.co/some/thing"),)}),
        ("base_model: /home/me/model", {}),
        ("base_model: ../model", {}),
        ("base_model: [1]", {"base_models": (BaseModel("1", "1"),)}),
        ("", {}),
    ],
)  # fmt: skip
def test_values_of_every_kind(tmp_path: Path, text: str, expected: dict[str, Any]) -> None:
    assert read(tmp_path, head(text)) == (ModelCard(**expected), "")


@pytest.mark.parametrize("text", ["", "# No head\n---\nlicense: mit\n---\n", "\n", "--- \n---\n"])
def test_a_card_without_a_head_says_nothing(tmp_path: Path, text: str) -> None:
    assert read(tmp_path, text) == (ModelCard(), "")


def test_line_ends_and_marks_do_not_matter(tmp_path: Path) -> None:
    for text in ("\ufeff---\r\nlicense: mit\r\n--- \r\nrest", "---\nlicense: mit\n---"):
        assert read(tmp_path, text) == (ModelCard(license="mit"), "")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("---\nlicense: mit\n", "has no end within"),
        ("---\n" + "x: y\n" * 70_000 + "---\n", "has no end within"),
        (head("license: [mit"), "cannot be read"),
        (head("- a\n- b"), "no list of keys and values"),
        (head("just words"), "no list of keys and values"),
        (b"---\nlicense: \xff\n---\n", "cannot be read"),
        (head("a: " + "[" * 5000), "cannot be read"),
        (head("a: " + "{a: " * 2000), "cannot be read"),
        (head("{a: b}: {[]: c}\n? {x: y}\n: z"), "cannot be read"),
        (head("a: &a [x]\nlicense: *a"), "aliases"),
        (head("\0"), "cannot be read"),
    ],
)
def test_a_malformed_card_is_one_sentence(tmp_path: Path, text: str | bytes, said: str) -> None:
    found, sentence = read(tmp_path, text)
    assert found == ModelCard()
    assert said in sentence and "\n" not in sentence and sentence.endswith("tells neither licence nor origin.")
    assert str(tmp_path) in sentence and len(sentence) < len(str(tmp_path)) + 250


def test_laughter_takes_no_memory(tmp_path: Path) -> None:
    """Nested merges, by which a kilobyte becomes gigabytes elsewhere."""
    lines = ["a0: &a0 {x: y}"] + [f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 10)}]}}" for n in range(1, 12)]
    tracemalloc.start()
    read(tmp_path, head("\n".join(lines)))
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 4 << 20


def test_what_does_not_fit_is_left_out_and_told(tmp_path: Path) -> None:
    tags = "tags: [" + ", ".join(f"tag-{n:04}" for n in range(200)) + "]\n"
    names = "base_model: [" + ", ".join(f"org/model-{n}" for n in range(40)) + "]\n"
    language = "language: [" + ", ".join(f"l{n:02}" for n in range(99)) + "]\n"
    found, said = read(tmp_path, head(tags + "license: mit\nlanguage: en"))
    assert found.license == "mit" and found.languages == ("en",)
    assert found.tags == tuple(f"tag-{n:04}" for n in range(len(found.tags)))
    size = sum(key_bytes(key, value) for key, value in found.keys().items())
    assert CARD_BYTES - 24 < size <= CARD_BYTES
    assert said.endswith(f"for the GGUF, which takes {CARD_BYTES}; some of its tags are left out.")
    found, said = read(tmp_path, head(tags + names + language + "license: mit"))
    assert found.license == "mit" and found.base_models and not found.tags and not found.languages
    assert said.endswith("some of its tags, languages, base_models are left out.")


def test_no_directory_no_card(tmp_path: Path) -> None:
    assert read_card(tmp_path) == (ModelCard(), "")
    (tmp_path / "README.md").mkdir()
    assert read_card(tmp_path) == (ModelCard(), "")


def test_no_mutated_card_raises(tmp_path: Path) -> None:
    sound = SOUND.encode()
    for position in range(0, len(sound), 2):
        for replaced in (b"\xff", b"\0", b"[", b":", b"&", b"\n"):
            found, said = read(tmp_path, sound[:position] + replaced + sound[position + 1 :])
            assert isinstance(found, ModelCard) and "\n" not in said
