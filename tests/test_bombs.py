"""Small or sparse files that stand for huge values: each ends in a sentence, in seconds and little memory."""

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

MIB = 1 << 20
MEMORY_BYTES, SECONDS = 1200 * MIB, 10  # of address space beyond the libraries', and of processor time
RUN = """
import json, resource, sys, time
from pathlib import Path
import impq_edge.releases.verify, impq_edge.releases.order, impq_edge.conversion.card, safetensors, gguf
from impq_edge.conversion.card import read_card
from impq_edge.conversion.tokenizer import read_tokenizer
from impq_edge.devices.profile import load_device
from impq_edge.errors import ImpqError
from impq_edge.impq.allocation import Allocation
from impq_edge.model.config import read_hyperparameters
from impq_edge.model.spec import read_config, read_headers
from impq_edge.releases.manifest import Manifest
from impq_edge.releases.order import load_order
from impq_edge.spqe.profile import SensitivityProfile
from impq_edge.validation.file import read_facts
from impq_edge.validation.inspection import inspect
READ = {
    "config": lambda p: read_hyperparameters(read_config(p)), "profile": SensitivityProfile.load,
    "allocation": Allocation.load, "manifest": Manifest.load, "order": load_order,
    "device": lambda p: load_device(str(p)),
    "gguf": inspect, "facts": read_facts, "card": lambda p: read_card(p.parent),
    "tokenizer": lambda p: read_tokenizer(p.parent, 300, "llama"), "shard": lambda p: read_headers(p.parent),
}
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + int(sys.argv[1]),) * 2)
for line in sys.stdin:
    name, kind, path = json.loads(line)
    told, start = "", time.process_time()
    try:
        READ[kind](Path(path))
    except ImpqError as error:
        told = str(error)
    except BaseException as error:
        told = repr(error)
    print(json.dumps([name, kind, told, time.process_time() - start]), flush=True)
"""


def sparse(header: bytes, size_bytes: int) -> tuple[bytes, int]:
    return header, size_bytes


def gguf(tensors: int, keys: int, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, keys) + rest


def key(name: bytes, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(name)) + name + struct.pack("<I", kind) + value


def shard(header: bytes, claimed: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if claimed is None else claimed) + header


def record(kind: str, **fields: object) -> bytes:
    return json.dumps({"schema": kind, **fields}).encode()


LISTS = b"[" + b"[]," * 6_000_000 + b"[]]"
WRONG = b'{"schema": "impq-edge.allocation/3", "types": [' + b"null," * 1_000_000 + b"null]}"
BOMBS: dict[str, tuple[str, str, bytes | tuple[bytes, int]]] = {
    "lists of lists in a configuration": ("config", "config.json", b'{"a":' + LISTS + b"}"),
    "depth in a configuration": ("config", "config.json", b'{"a":' * 200_000 + b"1" + b"}" * 200_000),
    "digits in a configuration": ("config", "config.json", b'{"hidden_size": ' + b"9" * MIB + b"}"),
    "an exponent in a configuration": (
        "config", "config.json",
        b'{"architectures": ["LlamaForCausalLM"], "num_attention_heads": 1e999999, "hidden_size": NaN}',
    ),
    "a sparse configuration": ("config", "config.json", sparse(b"{", 1 << 40)),
    "a million wrong values": ("allocation", "a.json", WRONG),
    "lists in a profile": ("profile", "p.json", b'{"schema": "impq-edge.sensitivity/1", "a":' + LISTS + b"}"),
    "a sparse profile": ("profile", "p.json", sparse(b"{", 1 << 40)),
    "a sparse manifest": ("manifest", "manifest.json", sparse(b"{", 1 << 40)),
    "lists in a manifest": ("manifest", "manifest.json", LISTS),
    "merges of a tokenizer": ("tokenizer", "tokenizer.json", b'{"model": {"type": "BPE", "merges": ' + LISTS + b"}}"),
    "a key of many parts in a release": ("order", "release.toml", b".".join([b"a"] * 200_000) + b" = 1\n"),
    "tables in tables in a release": ("order", "release.toml", b"[" + b".".join([b"a"] * 200_000) + b"]\n"),
    "many tables in a release": ("order", "release.toml", b"[[models]]\n" * 90_000),
    "lists of lists in a release": ("order", "release.toml", b"a = " + b"[" * 100_000),
    "digits in a release": ("order", "release.toml", b"windows = " + b"9" * 500_000),
    "hexadecimal digits in a release": ("order", "release.toml", b"windows = 0x" + b"f" * 500_000),
    "a sparse release": ("order", "release.toml", sparse(b"#", 1 << 40)),
    "billions of permutations": (
        "order", "release.toml",
        b'name = "x"\nmodels = ["demo"]\ndevices = ["laptop-16gb"]\n[game]\npermutations = 10_000_000_000\n',
    ),
    "a device of 1e400 bytes": ("device", "d.toml", b'name = "d"\nmemory_bytes = 1e400\ncores = inf\nthreads = nan\n'),
    "aliases in a card": (
        "card", "README.md",
        b"---\na: &a [x,x,x,x,x,x,x,x,x]\n" + b"".join(
            b"%c: &%c [*%c,*%c,*%c,*%c,*%c,*%c,*%c]\n" % (98 + i, 98 + i, *(97 + i,) * 7) for i in range(20)
        ) + b"---\n",
    ),
    "depth in a card": ("card", "README.md", b"---\na: " + b"[" * 200_000 + b"\n---\n"),
    "lists in a card": ("card", "README.md", b"---\na: [" + b"[]," * 60_000 + b"]\n---\n"),
    "an object in a card": ("card", "README.md", b'---\nlicense: !!python/object/apply:os.system ["false"]\n---\n'),
    "a sparse card": ("card", "README.md", sparse(b"---\n", 1 << 40)),
    "tensors that a GGUF claims": ("gguf", "a.gguf", gguf(2**63 - 1, 0)),
    "keys that a GGUF claims": ("gguf", "a.gguf", gguf(0, 2**64 - 1)),
    "an array that a sparse GGUF claims": (
        "gguf", "a.gguf", sparse(gguf(0, 1, key(b"general.tags", 9, struct.pack("<IQ", 8, 2**40))), 1 << 43)
    ),
    "a text that a sparse GGUF claims": (
        "facts", "a.gguf", sparse(gguf(0, 1, key(b"general.name", 8, struct.pack("<Q", 2**40))), 1 << 43)
    ),
    "tensors that a sparse GGUF has room for": ("facts", "a.gguf", sparse(gguf(2**30, 0), 1 << 43)),
    "keys that a sparse GGUF has room for": ("facts", "a.gguf", sparse(gguf(0, 2**30), 1 << 43)),
    "a header that a shard claims": ("shard", "model.safetensors", shard(b"{}", 2**63)),
    "a header that a sparse shard has room for": ("shard", "model.safetensors", sparse(shard(b"{}", 1 << 28), 1 << 29)),
    "a shape that overflows": (
        "shard", "model.safetensors",
        shard(b'{"a":{"dtype":"F32","shape":[4294967296,4294967296,4294967296],"data_offsets":[0,0]}}'),
    ),
}  # fmt: skip
TOLD_OTHERWISE = {"card"}  # a card that cannot be used is left out


@pytest.mark.skipif(sys.platform != "linux", reason="the limits are Linux's")
def test_bombs_end_in_sentences(tmp_path: Path) -> None:
    asked = []
    for index, (name, (kind, file, content)) in enumerate(BOMBS.items()):
        path = tmp_path / str(index) / file
        path.parent.mkdir()
        if isinstance(content, tuple):
            with path.open("wb") as written:
                written.write(content[0])
                written.truncate(content[1])  # takes no room on the disk
        else:
            path.write_bytes(content)
        asked.append(json.dumps([name, kind, str(path)]))
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(MEMORY_BYTES)], input="\n".join(asked), capture_output=True, text=True,
        check=False, env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [name for name, *_ in answers] == list(BOMBS)
    for name, kind, told, seconds in answers:
        assert seconds < SECONDS, (name, seconds)
        if kind not in TOLD_OTHERWISE or told:
            assert told.endswith(".") and told.isprintable() and len(told) < 1500, (name, told[:2000])
    print(json.dumps({"bombs": len(answers), "slowest_s": max(seconds for *_, seconds in answers)}))
