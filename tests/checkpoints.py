"""Small random checkpoints of every architecture, made as they lie on the hub."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

TOKENIZERS = Path(__file__).parent / "tokenizers"

ARCHITECTURES = ("llama", "qwen3", "gemma2")
TINY = {"llama": "tiny-llama3", "qwen3": "tiny-qwen3", "gemma2": "tiny-gemma2"}
_LAYOUT: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 8192,
    "max_position_embeddings": 2048,
    "initializer_range": 0.08,  # large enough that 2-bit weights visibly change the loss
}
_SPECIFIC: dict[str, dict[str, Any]] = {
    "llama": {
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 512,
        },
        "tie_word_embeddings": True,
        "head_dim": 64,
        "bos_token_id": 8184,
        "eos_token_id": 8185,
    },
    "qwen3": {
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
        "head_dim": 128,
        "eos_token_id": 8189,
        "bos_token_id": None,
    },
    "gemma2": {
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "head_dim": 64,
        "query_pre_attn_scalar": 64,
        "sliding_window": 64,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "pad_token_id": 0,
    },
}


def make_checkpoint(directory: Path, architecture: str, *, seed: int = 0, shards: int = 1, **changes: Any) -> Path:
    """Write a random checkpoint; ``changes`` override fields of its configuration."""
    import torch
    import transformers
    from safetensors.torch import save_file

    settings = {**_LAYOUT, **_SPECIFIC[architecture], **changes}
    classes = {"llama": "Llama", "qwen3": "Qwen3", "gemma2": "Gemma2"}
    config = getattr(transformers, f"{classes[architecture]}Config")(**settings)
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:  # norms start constant, which would hide mistakes in them
            torch.nn.init.normal_(parameter, mean=0.0 if architecture == "gemma2" else 1.0, std=0.1)
        elif "embed" in name:
            torch.nn.init.normal_(parameter, std=0.08)
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    if settings["tie_word_embeddings"]:
        state.pop("lm_head.weight", None)
    directory.mkdir(parents=True)
    _save_shards(state, directory, shards, save_file)
    # The hub's older form of the configuration; tests of the newer one write it themselves.
    hub = {"architectures": [f"{classes[architecture]}ForCausalLM"], "model_type": architecture, **settings}
    hub |= {"hidden_activation": "gelu_pytorch_tanh"} if architecture == "gemma2" else {"hidden_act": "silu"}
    hub.setdefault("rms_norm_eps", 1e-6)
    if architecture == "gemma2":
        hub |= {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    hub["torch_dtype"] = "bfloat16"
    (directory / "config.json").write_text(json.dumps(hub))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZERS / TINY[architecture] / file, directory / file)
    return directory


def _save_shards(state: dict[str, Any], directory: Path, shards: int, save: Callable[..., Any]) -> None:
    if shards == 1:
        save(state, directory / "model.safetensors", metadata={"format": "pt"})
        return
    names = sorted(state)
    weight_map = {}
    for index in range(shards):
        file = f"model-{index + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: state[name] for name in names[index::shards]}
        save(part, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
