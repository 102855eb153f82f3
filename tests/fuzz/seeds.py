"""Sound inputs, small so that thousands of broken copies are quick to read."""

import functools
import json
import struct
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from checkpoints import TOKENIZERS
from gguf import GGUFWriter

from impq_edge.conversion.artifact import Artifact
from impq_edge.conversion.metadata import RECIPE_KEY
from impq_edge.data import data_path
from impq_edge.devices.profile import DeviceProfile, load_device
from impq_edge.ggml.split import SPLIT_COUNT, SPLIT_NO, SPLIT_TENSORS
from impq_edge.ggml.types import TensorType
from impq_edge.impq.allocate import Request, allocate_blocks, allocate_chosen
from impq_edge.impq.allocation import Allocation
from impq_edge.impq.problem import Constraint
from impq_edge.model.config import HyperParameters, read_hyperparameters
from impq_edge.model.players import players_of
from impq_edge.model.recipe import TensorTypes, tensor_types
from impq_edge.model.spec import ModelSpec, TensorSpec
from impq_edge.records import Record
from impq_edge.releases.lent import BackendLosses
from impq_edge.spqe.choice import choose
from impq_edge.spqe.ladder import LadderProfile, Rung
from impq_edge.spqe.playing import Rounds
from impq_edge.spqe.profile import Design, GameSettings, SensitivityProfile
from impq_edge.validation.doctor import DoctorReport, Package, Probe
from impq_edge.validation.inspection import Inspection, inspect
from impq_edge.validation.report import Check, ValidationReport
from impq_edge.validation.results import Build, Divergence, MemoryLimit
from impq_edge.validation.settings import RunSettings

HEADER_BYTES = 5000
TOKENIZER_ROWS = 300
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 300,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512,
    },
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}
SMALL = CONFIG | {"hidden_size": 8, "intermediate_size": 8, "head_dim": 2, "vocab_size": 8}
CARD = """---
license: other
license_name: some-licence
license_link: https://example.org/licence
base_model:
- org/base-7B
- other/model
language:
- en
- no
tags:
- text-generation
- small
datasets: [a, b]
pipeline_tag: text-generation
---
# A card
"""
JOURNAL_INPUTS = {"model": "0" * 64, "settings": {"backend": "kquant", "tokens": 512}}
JOURNAL: list[Any] = [
    {"schema": "impq-edge.journal/2", **JOURNAL_INPUTS},
    {"of": "4424", "losses": [1.5, 2.5]},
    {"of": "2222", "losses": [3.5, 4.25]},
]
_HF_NAMES = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip


@functools.cache
def gguf() -> bytes:
    """A GGUF with keys of every type, as llama.cpp would have it."""
    return _written(lambda writer: _fill(writer, ("token_embd", "blk.0.attn_q", "blk.1.ffn_down", "output")))


@functools.cache
def split_gguf() -> dict[str, bytes]:
    """One model in two files."""
    parts = (("token_embd", "blk.0.attn_q"), ("blk.1.ffn_down",))

    def write(writer: GGUFWriter, index: int) -> None:
        if index == 0:
            writer.add_context_length(2048)
        writer.add_uint16(SPLIT_NO, index)
        writer.add_uint16(SPLIT_COUNT, 2)
        writer.add_int32(SPLIT_TENSORS, 5)
        _add_tensors(writer, parts[index])

    return {f"model-{i + 1:05d}-of-00002.gguf": _written(functools.partial(write, index=i)) for i in range(2)}


@functools.cache
def imatrix() -> bytes:
    """An importance matrix of three tensors."""

    def write(writer: GGUFWriter) -> None:
        writer.add_type("imatrix")
        writer.add_array("imatrix.datasets", ["text.txt"])
        writer.add_uint32("imatrix.chunk_count", 3)
        writer.add_uint32("imatrix.chunk_size", 512)
        for name in ("blk.0.attn_q", "blk.0.ffn_up", "output"):
            writer.add_tensor(f"{name}.weight.in_sum2", np.ones((1, 8), np.float32))
            writer.add_tensor(f"{name}.weight.counts", np.ones((1, 1), np.float32))

    return _written(write)


def _fill(writer: GGUFWriter, tensors: tuple[str, ...]) -> None:
    writer.add_name("A model")
    writer.add_license("apache-2.0")
    writer.add_tags(["a", "b"])
    writer.add_base_model_count(1)
    writer.add_base_model_repo_url(0, "https://example.org/base")
    writer.add_file_type(10)
    writer.add_context_length(2048)
    writer.add_block_count(2)
    writer.add_string(RECIPE_KEY, json.dumps({"bits": "2444", "encoder": "gptq"}))
    writer.add_chat_template("{{ messages }}")
    for add, value in (
        (writer.add_uint8, 1), (writer.add_int8, -1), (writer.add_uint16, 2), (writer.add_int16, -2),
        (writer.add_int32, -3), (writer.add_uint64, 4), (writer.add_int64, -4), (writer.add_float32, 0.5),
        (writer.add_float64, 0.25), (writer.add_bool, True),
    ):  # fmt: skip
        add(f"x.{add.__name__}", value)
    writer.add_token_list(["<s>", "a", "b", "ab"])
    writer.add_token_types([3, 1, 1, 1])
    writer.add_token_scores([0.0, 1.0, 2.0, 3.0])
    _add_tensors(writer, tensors)


def _add_tensors(writer: GGUFWriter, names: tuple[str, ...]) -> None:
    for name in names:
        writer.add_tensor(f"{name}.weight", np.ones((4, 32), np.float32))
    writer.add_tensor(f"{names[0]}_norm.weight", np.ones(7, np.float32))


def _written(fill: Any) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "made.gguf"
        writer = GGUFWriter(path, "llama")
        fill(writer)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path.read_bytes()


def device_toml() -> str:
    """A shipped device."""
    return data_path("devices", "raspberry-pi-5.toml").read_text("utf-8")


@functools.cache
def _shapes(small: bool) -> dict[str, tuple[int, ...]]:
    shapes = hyper(small).expected_shapes()
    return {name: shape for name, shape in shapes.items() if name != "rope_freqs.weight"}


@functools.cache
def hyper(small: bool = False) -> HyperParameters:
    """The numbers of a model of two blocks."""
    return read_hyperparameters(SMALL if small else CONFIG)


def _hf_name(gguf_name: str) -> str:
    parts = gguf_name.split(".")
    prefix = f"model.layers.{parts[1]}." if parts[0] == "blk" else ""
    return f"{prefix}{_HF_NAMES[parts[-2]]}.weight"


@functools.cache
def checkpoint(kind: str) -> dict[str, bytes]:
    """Its configuration and its weights, in one file or two."""
    names = {_hf_name(name): shape for name, shape in _shapes(True).items()}
    files = {"config.json": json.dumps(SMALL).encode()}
    if kind == "one":
        return files | {"model.safetensors": _safetensors(names)}
    weight_map = {}
    for index in range(2):
        part = dict(list(names.items())[index::2])
        file = f"model-{index + 1:05d}-of-00002.safetensors"
        files[file] = _safetensors(part)
        weight_map |= dict.fromkeys(part, file)
    return files | {"model.safetensors.index.json": json.dumps({"metadata": {}, "weight_map": weight_map}).encode()}


def _safetensors(shapes: dict[str, tuple[int, ...]]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(end)


@functools.cache
def tokenizer(kind: str) -> dict[str, Any]:
    """A cut-down tokenizer of one of the two kinds that can be converted."""
    source = TOKENIZERS / ("tiny-llama3" if kind == "byte-level" else "tiny-gemma2")
    file = json.loads((source / "tokenizer.json").read_text("utf-8"))
    settings = json.loads((source / "tokenizer_config.json").read_text("utf-8"))
    model, added = file["model"], {token["content"] for token in file["added_tokens"]}
    by_id = sorted(model["vocab"], key=model["vocab"].__getitem__)
    plain = [text for text in by_id if text not in added]
    singles = [text for text in plain if len(text) == 1 or (kind != "byte-level" and text.startswith("<0x"))]
    named = [token["content"] for token in file["added_tokens"]][:8]
    tokens = [*named, *singles][:TOKENIZER_ROWS] if kind == "byte-level" else [*named, *singles[:280]]
    model["vocab"] = {text: index for index, text in enumerate(tokens)}
    model["merges"] = [merge for merge in model["merges"] if set(_pair(merge)) | {"".join(_pair(merge))} <= set(tokens)]
    file["added_tokens"] = [
        {**token, "id": model["vocab"][token["content"]]} for token in file["added_tokens"] if token["content"] in named
    ]
    _renumber(file.get("post_processor"), model["vocab"])
    return {
        "tokenizer.json": file,
        "tokenizer_config.json": settings,
        "generation_config.json": {"eos_token_id": [0, 1]},
        "config.json": {"eos_token_id": 1, "bos_token_id": 0},
    }


def _pair(merge: str | list[str]) -> list[str]:
    return merge.split(" ") if isinstance(merge, str) else merge


def _renumber(processor: Any, vocab: dict[str, int]) -> None:
    if isinstance(processor, dict):
        for text, token in processor.get("special_tokens", {}).items():
            token["ids"] = [vocab[text]]
        for inner in processor.get("processors", []):
            _renumber(inner, vocab)


@functools.cache
def model() -> ModelSpec:
    """A record of a checkpoint, without the checkpoint."""
    tensors = []
    for name, shape in hyper().expected_shapes().items():
        derived = name == "rope_freqs.weight"
        roles = {"token_embd.weight": "embedding", "output.weight": "head"}
        tensors.append(
            TensorSpec(
                name=name if derived else _hf_name(name),
                gguf_name=name,
                shape=shape,
                role=roles.get(name, "vector" if len(shape) == 1 else "matrix"),  # type: ignore[arg-type]
                block=int(name.split(".")[1]) if name.startswith("blk.") else None,
                shard=None if derived else "model.safetensors",
            )
        )
    return ModelSpec("tiny", hyper(), tuple(tensors), "0" * 64)


@functools.cache
def uniform_types() -> TensorTypes:
    """Every block at 4 bit."""
    return tensor_types(model(), [TensorType.Q4_K] * 2, TensorType.Q6_K, "blocks")


@functools.cache
def record(kind: type[Record]) -> dict[str, Any]:
    """A sound record of a kind, as JSON values."""
    return json.loads(json.dumps(_RECORDS[kind]().to_json()))  # type: ignore[no-any-return]


def _game() -> GameSettings:
    return GameSettings({"name": "kquant", "encoder": "rtn"}, "blocks", "0" * 64, 1024, 512, "cpu", "bfloat16")


@functools.cache
def _profile() -> SensitivityProfile:
    losses = {(4, 4): 1.0, (2, 4): 1.3, (4, 2): 1.1, (2, 2): 1.5}
    return SensitivityProfile.from_losses(
        model=model(),
        header_bytes=HEADER_BYTES,
        settings=_game(),
        design=Design("permutations", 2, 0),
        stopped_by="permutations",
        bits_per_weight=(2.625, 4.5),
        reference_losses=np.array([0.9, 1.0]),
        draws=[(0, 1), (1, 0)],
        losses={coalition: np.array([loss, loss + 0.1]) for coalition, loss in losses.items()},
    )


def _ladder() -> LadderProfile:
    names = [player.name for player in players_of(model(), "blocks", outer=True)]
    rungs = tuple(Rung(name, bits, (0.5 / bits, 0.6 / bits)) for name in names for bits in (2, 4))
    return LadderProfile(model(), HEADER_BYTES, _game(), (2, 4), (1.0, 1.1), rungs)


def _allocation() -> Allocation:
    from fractions import Fraction

    profile = _profile()
    request = Request(device=load_device("raspberry-pi-5"), context_tokens=512, kv_type="f16", average_bits=Fraction(3))
    return allocate_blocks(
        model(), HEADER_BYTES, np.array(profile.phi), np.array(profile.covariance), profile.identity(), request
    )


def _artifact() -> Artifact:
    return Artifact(
        "a.gguf", "0" * 64, 1000, 1000, "0" * 64, None, {"output.weight": TensorType.Q6_K}, {"encoder": "rtn"}, 4.5
    )


def _report() -> ValidationReport:
    numbers = dict.fromkeys((name for name in Divergence.__dataclass_fields__ if not name.startswith("__")), 0.5)
    divergence = Divergence(**numbers | {"tokens": 255, "window_klds": (0.1,), "reference_window_nlls": (2.0,)})  # type: ignore[arg-type]
    return ValidationReport(
        file="a.gguf", sha256="0" * 64, file_bytes=1000, architecture="llama", weights=1000, bits_per_weight=4.5,
        device="board", settings=RunSettings(512, 4), text="text", text_sha256="0" * 64, perplexity=10.0,
        perplexity_stderr=0.5, tokens=255, window_nlls=(2.3,), load_s=0.1, prompt_tokens=512, prompt_tok_per_s=100.0,
        prompt_sd_tok_per_s=1.0, generation_tokens=64, generation_tok_per_s=10.0, generation_sd_tok_per_s=0.1,
        peak_rss_bytes=10**8, anonymous_bytes=None, process_bytes=10**7, filled_tokens=512, generated_text="Once",
        chat_text=None, llama_cpp="b1", llama_cpp_python="0.3", system_info="CPU : AVX2 = 1",
        checks=(Check("loads", "passed", 0.1, None, "well"),), request_sha256="0" * 64, passed=True,
        reference="f16.gguf", reference_sha256="0" * 64, divergence=divergence,
        memory_limit=MemoryLimit(10**9, "cgroup v2"),
    )  # fmt: skip


def _doctor() -> DoctorReport:
    return DoctorReport(
        "3.11", "Linux x86_64", (Package("numpy", "", "2"),), Build("b", "0.3", "CPU"), ("avx2",), 2,
        (Probe(True, "passed", "well"),), ("a problem",),
    )  # fmt: skip


def _inspection() -> Inspection:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.gguf"
        path.write_bytes(gguf())
        return inspect(path)


def _losses() -> BackendLosses:
    return BackendLosses(
        "0" * 64, "0" * 64, ("24", "44", "22", "42"), (1.0, 0.9, 1.2, 1.1), (1.1, 0.9, 1.3, 1.0), 0.1, 0.02, 0.5
    )


def _played() -> SensitivityProfile:
    """As the other, but made in rounds."""
    found, design = _profile(), Design("stratified", 4, 0, rounds=_rounds())
    losses = found.window_losses
    return SensitivityProfile.from_losses(
        model=found.model, header_bytes=HEADER_BYTES, settings=_game(), design=design, stopped_by="evaluations",
        bits_per_weight=found.bits_per_weight, reference_losses=np.array(found.reference_losses), draws=[(0,)],
        losses=losses, also=losses,
    )  # fmt: skip


def _rounds() -> Rounds:
    return Rounds.within([(Constraint("file budget", "bytes", ((0, 10), (0, 12)), 15),)], 6)


def _chosen() -> Allocation:
    from fractions import Fraction

    profile = _played()
    request = Request(device=load_device("raspberry-pi-5"), context_tokens=512, kv_type="f16", average_bits=Fraction(3))
    return allocate_chosen(model(), HEADER_BYTES, lambda budget: choose(profile, budget), profile.identity(), request)


@functools.cache
def in_rounds(kind: type[Record]) -> dict[str, Any]:
    """A sound record of a kind as rounds leave it, as JSON values."""
    made = _played() if kind is SensitivityProfile else _chosen()
    return json.loads(json.dumps(made.to_json()))  # type: ignore[no-any-return]


_RECORDS: dict[type[Record], Any] = {
    SensitivityProfile: _profile,
    LadderProfile: _ladder,
    Allocation: _allocation,
    Artifact: _artifact,
    ValidationReport: _report,
    ModelSpec: model,
    DoctorReport: _doctor,
    Inspection: _inspection,
    BackendLosses: _losses,
    DeviceProfile: lambda: load_device("raspberry-pi-5"),
}
