"""Time a profile with different numbers of Ray workers, and check that all of them measure the same.

    python tools/bench_workers.py --hidden 2048 --ffn 8192 --blocks 16 --workers 0 1 2

The model has random weights, the demo's tokenizer, and as many blocks of the given shape; 0 workers is this process
without Ray. Prints one JSON object: per number of workers, seconds until the first loss (loading and quantising),
evaluations per second from then on, and whether the profile equals the first one to the byte.
"""

import argparse
import dataclasses
import json
import shutil
import tempfile
import time
from pathlib import Path

import torch
import transformers

import impq_edge
from impq_edge.data import data_path
from impq_edge.spqe.profile import SensitivityProfile


def main() -> None:
    """Parse the options, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--ffn", type=int, default=768)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--backend", default="hqq")
    parser.add_argument("--permutations", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    game = impq_edge.GameOptions(
        method="impq", backend=options.backend, permutations=options.permutations, tokens=options.tokens
    )
    with tempfile.TemporaryDirectory() as folder:
        model = make_checkpoint(Path(folder) / "model", options.hidden, options.ffn, options.blocks)
        gpus = torch.cuda.device_count()
        told = {"gpus": gpus, "gpu": torch.cuda.get_device_name() if gpus else None, "runs": []}
        first: SensitivityProfile | None = None
        for workers in options.workers:
            out = Path(folder) / f"{workers}.json"
            profile, run = timed(model, out, dataclasses.replace(game, workers=workers))
            first = first or profile
            told["runs"].append({"workers": workers, **run, "same_bytes": profile.identity() == first.identity()})
            print(json.dumps(told, indent=1), flush=True)


def timed(model: Path, out: Path, game: impq_edge.GameOptions) -> tuple[SensitivityProfile, dict[str, float]]:
    """Make a profile; return it and what it took."""
    start = time.perf_counter()
    marks: list[tuple[float, int]] = []

    def watch(phase: str, done: int, _: int) -> None:
        if phase == "evaluating":
            marks.append((time.perf_counter(), done))

    profile = impq_edge.profile(str(model), out=out, game=game, progress=watch)
    begun = next(index for index, (_, done) in enumerate(marks) if done)
    (first_s, first_done), (last_s, last_done) = marks[begun], marks[-1]
    return profile, {
        "seconds_to_first_loss": first_s - start,
        "evaluations": last_done,
        "evaluations_per_s": (last_done - first_done) / (last_s - first_s),
        "seconds": time.perf_counter() - start,
    }


def make_checkpoint(directory: Path, hidden: int, ffn: int, blocks: int) -> Path:
    """Write a random llama with the demo model's tokenizer."""
    demo = data_path("demo", "tiny-llama3")
    config = transformers.AutoConfig.from_pretrained(demo)
    heads = hidden // 64
    config.update(
        {
            "hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": blocks, "head_dim": 64,
            "num_attention_heads": heads, "num_key_value_heads": max(1, heads // 4),
        }
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.to(torch.bfloat16).save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        if (demo / name).exists():
            shutil.copy(demo / name, directory)
    return directory


if __name__ == "__main__":
    main()
