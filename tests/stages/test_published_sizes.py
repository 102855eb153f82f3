"""Planned sizes of the models that ship against files that others have published, each with its source.

Numbers of bytes are those that the hub gives for a file, as public catalogues of GGUFs repeat them beside its SHA-256
(the first digits of which are here); the others are what a page shows. A published file's metadata may hold a chat
template and say which importance matrix was used: some kilobytes.
"""

import dataclasses

import pytest

from impq_edge.conversion.layout import estimated_header_bytes
from impq_edge.model.mixes import stock_types
from impq_edge.model.recipe import data_bytes
from impq_edge.model.shapes import find_shapes, shipped_names

TOLERANCE = 0.01
HUB = "https://huggingface.co"


@dataclasses.dataclass(frozen=True)
class File:
    model: str
    mix: str
    size_bytes: int
    source: str  # repository, and the beginning of the SHA-256


@dataclasses.dataclass(frozen=True)
class Page:
    model: str
    sizes: dict[str, float]  # mix → 1e9 bytes, as shown
    source: str


FILES = [
    File("Llama-3.2-1B", "Q4_K_M", 807_694_464, f"{HUB}/bartowski/Llama-3.2-1B-Instruct-GGUF 6f85a640"),
    File("Llama-3.2-3B", "Q4_K_M", 2_019_377_696, f"{HUB}/bartowski/Llama-3.2-3B-Instruct-GGUF 6c1a2b41"),
    File("Llama-3.1-8B", "Q4_K_M", 4_920_739_232, f"{HUB}/bartowski/Meta-Llama-3.1-8B-Instruct-GGUF 7b064f58"),
    File("gemma-2-2b", "Q4_K_M", 1_708_582_752, f"{HUB}/bartowski/gemma-2-2b-it-GGUF e0aee850"),
    File("gemma-2-9b", "Q4_K_M", 5_761_057_728, f"{HUB}/bartowski/gemma-2-9b-it-GGUF 13b2a7b4"),
    File("Qwen3-0.6B", "Q3_K_M", 347_127_488, f"{HUB}/unsloth/Qwen3-0.6B-GGUF 30bb9f92"),
    File("Qwen3-0.6B", "Q4_K_M", 396_705_472, f"{HUB}/unsloth/Qwen3-0.6B-GGUF ac2d9771"),
    File("Qwen3-0.6B", "Q5_K_M", 444_415_680, f"{HUB}/unsloth/Qwen3-0.6B-GGUF 03c6e212"),
    File("Qwen3-0.6B", "Q8_0", 639_446_688, f"{HUB}/Qwen/Qwen3-0.6B-GGUF 9465e63a"),
    File("Qwen3-1.7B", "Q3_K_M", 939_539_008, f"{HUB}/unsloth/Qwen3-1.7B-GGUF 8070f21b"),
    File("Qwen3-1.7B", "Q4_K_M", 1_107_409_472, f"{HUB}/unsloth/Qwen3-1.7B-GGUF b139949c"),
    File("Qwen3-1.7B", "Q5_K_M", 1_257_880_128, f"{HUB}/unsloth/Qwen3-1.7B-GGUF b0949de5"),
    File("Qwen3-1.7B", "Q8_0", 1_834_426_016, f"{HUB}/Qwen/Qwen3-1.7B-GGUF 061b54da"),
    File("Qwen3-4B", "Q3_K_M", 2_075_618_592, f"{HUB}/unsloth/Qwen3-4B-GGUF e78ff54a"),
    File("Qwen3-4B", "Q4_K_M", 2_497_280_256, f"{HUB}/Qwen/Qwen3-4B-GGUF 7485fe6f"),
    File("Qwen3-4B", "Q5_K_M", 2_889_513_184, f"{HUB}/Qwen/Qwen3-4B-GGUF aca59686"),
    File("Qwen3-4B", "Q8_0", 4_280_404_704, f"{HUB}/Qwen/Qwen3-4B-GGUF 8c2f07f2"),
    File("Qwen3-8B", "Q4_K_M", 5_027_783_488, f"{HUB}/Qwen/Qwen3-8B-GGUF d98cdcbd"),
]
PAGES = [
    Page(
        "Llama-3.2-1B",
        {"Q4_K_S": 0.78, "Q4_K_M": 0.81, "Q5_K_S": 0.89, "Q5_K_M": 0.91, "Q6_K": 1.02, "Q8_0": 1.32, "F16": 2.48},
        f"{HUB}/bartowski/Llama-3.2-1B-Instruct-GGUF",
    ),
    Page(
        "Llama-3.2-3B",
        {"Q2_K": 1.36, "Q3_K_S": 1.54, "Q3_K_M": 1.69, "Q3_K_L": 1.82, "Q4_0": 1.92, "Q4_K_S": 1.93, "Q4_K_M": 2.02,
         "Q5_0": 2.27},
        f"{HUB}/QuantFactory/Llama-3.2-3B-GGUF/tree/main",
    ),
    Page(
        "Llama-3.2-3B",
        {"Q5_K_M": 2.32, "Q6_K": 2.64, "Q8_0": 3.42, "F16": 6.43},
        f"{HUB}/osllmai-community/Llama-3.2-3B-Instruct-GGUF/tree/main",
    ),
    Page(
        "gemma-2-2b",
        {"Q2_K": 1.23, "Q3_K_S": 1.36, "Q3_K_M": 1.46, "Q3_K_L": 1.55, "Q4_K_S": 1.64, "Q4_K_M": 1.71, "Q5_K_S": 1.88,
         "Q5_K_M": 1.92, "Q6_K": 2.15, "Q8_0": 2.78, "F16": 5.24},
        f"{HUB}/lm-kit/gemma-2-2b-gguf/tree/main",
    ),
    Page(
        "gemma-2-9b",
        {"Q2_K": 3.81, "Q3_K_S": 4.34, "Q3_K_M": 4.76, "Q3_K_L": 5.13, "Q4_K_S": 5.48, "Q4_K_M": 5.76, "Q5_K_S": 6.48,
         "Q5_K_M": 6.65, "Q6_K": 7.59, "Q8_0": 9.83, "F16": 18.5},
        f"{HUB}/lm-kit/gemma-2-9b-gguf/tree/main",
    ),
    Page(
        "Qwen3-4B",
        {"Q4_K_S": 2.38, "Q4_K_M": 2.50, "Q5_K_S": 2.82, "Q5_K_M": 2.89, "Q6_K": 3.31, "Q8_0": 4.28},
        f"{HUB}/bartowski/Qwen_Qwen3-4B-GGUF",
    ),
    Page(
        "Qwen3-8B",
        {"Q2_K": 3.28, "Q4_0": 4.77, "Q6_K": 6.73, "Q8_0": 8.71},
        f"{HUB}/codebasic/Qwen3-8B-GGUF/tree/main",
    ),
]  # fmt: skip

# tools/quantize/README.md of llama.cpp, Llama-3.1-8B: bits of tensor data per weight.
README_BITS = {
    "Q2_K_S": 2.9697, "Q2_K": 3.1593, "Q3_K_S": 3.6429, "Q3_K_M": 3.9960, "Q3_K_L": 4.2979, "Q4_K_S": 4.6672,
    "Q4_K_M": 4.8944, "Q5_K_S": 5.5704, "Q5_K_M": 5.7036, "Q6_K": 6.5633, "Q8_0": 8.5008, "F16": 16.0005,
}  # fmt: skip


def planned_bytes(model: str, mix: str) -> int:
    shapes = find_shapes(model)
    return estimated_header_bytes(shapes.spec, shapes.vocabulary) + data_bytes(
        shapes.spec, stock_types(shapes.spec, mix)
    )


def test_every_model_that_ships_has_a_published_size() -> None:
    assert {file.model for file in FILES} == set(shipped_names())


@pytest.mark.parametrize("file", FILES, ids=lambda f: f"{f.model}-{f.mix}")
def test_files_to_the_byte(file: File) -> None:
    planned = planned_bytes(file.model, file.mix)
    assert planned == pytest.approx(file.size_bytes, rel=TOLERANCE)
    assert abs(planned - file.size_bytes) < 4096  # what metadata may differ by


@pytest.mark.parametrize("page", PAGES, ids=lambda p: f"{p.model}-{p.source.split('/')[3]}")
def test_sizes_on_pages(page: Page) -> None:
    for mix, size in page.sizes.items():
        assert planned_bytes(page.model, mix) / 1e9 == pytest.approx(size, rel=TOLERANCE), mix


def test_bits_per_weight_that_llama_cpp_tells() -> None:
    spec = find_shapes("Llama-3.1-8B").spec
    for mix, bits in README_BITS.items():
        assert round(8 * data_bytes(spec, stock_types(spec, mix)) / spec.weights, 4) == bits, mix
