"""What a release is asked by and leaves: sound ones to break, and the functions that read them."""

import functools
import hashlib
import json
import os
import random
from pathlib import Path

from fuzz import seeds
from fuzz.mutations import TEXTS, broken_bytes, broken_json, broken_text

from impq_edge.backends.kquant import KQuant
from impq_edge.backends.kquant_kept import Kept
from impq_edge.ggml.types import TensorType
from impq_edge.records import parse
from impq_edge.releases.gates import Gate
from impq_edge.releases.manifest import (
    Comparison,
    Input,
    Manifest,
    Measured,
    Output,
    Predicted,
    ReleasedFile,
    ReleasedModel,
    Taker,
    sums_text,
)
from impq_edge.releases.matrix import resolve
from impq_edge.releases.naming import Layout
from impq_edge.releases.order import Order, load_order
from impq_edge.releases.verify import verify

ORDER = """
name = "small"
encode = "rtn"
windows = 2
contexts = [256, 512]
text = "text.txt"
alpha = 0.5
head_type = "q6_k"

[[models]]
model = "demo"
name = "Small"

[game]
method = "impq"
permutations = 2
tokens = 1024
calibration = "text.txt"
compute = "cpu"

[gates]
max_perplexity_ratio = 1e9
max_memory = "4 GiB"

[[devices]]
device = "raspberry-pi-5"
average_bits = "8/3"
gates = { min_tokens_per_second = 1 }

[[devices]]
device = "device.toml"
budget = "1 GiB"
kv_type = "q8_0"
"""
ODD_NAMES = (
    "../canary/x", "/tmp/x", "a/../../x", "a\0b", "a\nb", "-rf", "CON", "x" * 300, "\u202egpj.exe", "é" * 100, ".",
    "..", "", "a\\..\\b", "<script>x</script>", "'; rm -rf /", "$(id)", "\x1b]0;x\x07", "\ud800", " ", "a b", ".hidden",
)  # fmt: skip
FILES = {
    "Small-board-IMPQ-4.50bpw.gguf": b"GGUF",
    "README.md": b"# A card\n",
    "records/Small/sensitivity.json": b"{}\n",
}


def order_from_anybody(folder: Path, rng: random.Random) -> Path:
    """Write a broken ``release.toml``, with the files it names beside it."""
    (folder / "text.txt").write_text("Once upon a time there was a model. " * 200)
    (folder / "device.toml").write_text(seeds.device_toml().replace('name = "raspberry-pi-5"', 'name = "board"'))
    text = ORDER
    if rng.random() < 0.4:
        name = rng.choice([*ODD_NAMES, *TEXTS])
        if not any("\ud800" <= char <= "\udfff" for char in name):
            old = rng.choice(("demo", "Small", "small", "text.txt", "device.toml", "raspberry-pi-5", "8/3"))
            text = text.replace(f'"{old}"', json.dumps(name, ensure_ascii=False).replace("\x7f", "\\u007f"))
    (folder / "release.toml").write_bytes(broken_text(text, rng) if rng.random() < 0.7 else text.encode())
    return folder / "release.toml"


def read_order(path: Path) -> None:
    """Read it and find everything that it names."""
    order = load_order(path)
    matrix = resolve(order, path.parent)
    json.dumps(order.to_json(), allow_nan=False)
    for row in matrix.rows:
        for cell in row.cells:
            _require_within(path.parent, Layout(path.parent).cell(row.name, cell.key))


@functools.cache
def manifest() -> Manifest:
    """A sound one, of a release that was never made."""
    measured = Measured(1, 1, 2.0, 0.1, 1.0, 1.0, 0.1, 0.01, 0.0, 5.0, 50.0, False)
    gate = Gate("max_perplexity_ratio", "passed", 1.0, 2.0, "to F16")
    taker = Taker(
        "board", "A board", 512, "f16", "llama-cli -m x", "records/Small/board-512", "0" * 64,
        Predicted(1, 1, None, 0.1, None, None), measured, (gate,),
    )  # fmt: skip
    name = next(iter(FILES))
    model = ReleasedModel(
        "Small", "demo", None, "0" * 64, 10, "mit", None, None, ("org/base",), ("en",), 0, "0" * 64, 4,
        (Comparison("F16", 1, "0" * 64, 2.0, 0.0),),
    )  # fmt: skip
    order = parse(Order, {"name": "small", "models": ["demo"], "devices": ["raspberry-pi-5"]}, Path("release.toml"))
    return Manifest(
        name="small", command="impq-edge release release.toml", recipe=order, machine="a machine",
        versions={"impq-edge": "1"}, reference="f16", inputs=(Input("evaluation text", "text", "0" * 64),),
        models=(model,), files=(ReleasedFile(name, "Small", "0" * 64, 4, 4.5, 3.0, (taker,)),),
        outputs=tuple(Output(path, len(data), hashlib.sha256(data).hexdigest()) for path, data in FILES.items()),
        passed=True,
    )  # fmt: skip


def write_release(root: Path, manifest_text: bytes) -> str:
    """Write the files of a release under this manifest, and return what its ``SHA256SUMS`` should say."""
    for path, data in FILES.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(data)
    (root / "manifest.json").write_bytes(manifest_text)
    own = Output("manifest.json", len(manifest_text), hashlib.sha256(manifest_text).hexdigest())
    sums = sums_text([*manifest().outputs, own])
    (root / "SHA256SUMS").write_text(sums)
    return sums


def release_from_anybody(folder: Path, rng: random.Random) -> Path:
    """Write a release in which something is not as it should be: a paper, a file, or what is no file."""
    root = folder / "release"
    made = manifest().to_json()
    text = json.dumps(made).encode()
    if rng.random() < 0.6:
        text = broken_json(_renamed(made, rng), rng)
    sums = write_release(root, text)
    if rng.random() < 0.3:
        (root / "SHA256SUMS").write_bytes(broken_text(sums, rng))
    for _ in range(rng.choice((0, 0, 1, 3))):
        _spoil(root, rng)
    return root


def _renamed(made: dict[str, object], rng: random.Random) -> dict[str, object]:
    text = json.dumps(made)
    old = rng.choice(("demo", "Small", "small", "board", "raspberry-pi-5", *FILES, "0" * 64))
    found: dict[str, object] = json.loads(text.replace(f'"{old}"', json.dumps(rng.choice([*ODD_NAMES, *TEXTS]))))
    return found


def _spoil(root: Path, rng: random.Random) -> None:
    """Put something that is no file, no finite one, or of an odd name, into a release."""
    path = root / rng.choice([*FILES, "manifest.json", "SHA256SUMS", "more", "records/more"])
    if path.is_file() or path.is_symlink():
        path.unlink()
    if path.exists() or not path.parent.is_dir():
        return
    match rng.randrange(8):
        case 0:
            path.mkdir()
        case 1:
            os.mkfifo(path)
        case 2:
            path.symlink_to("/dev/zero")
        case 3:
            path.symlink_to(path.name)
        case 4:
            path.symlink_to("/etc/hostname")
        case 5:
            with path.open("wb") as file:
                file.truncate(1 << rng.choice((20, 33, 42)))  # takes no room
        case 6:
            name = bytes(rng.choice((b"\xff\xfe", b"a\nb", b"\x1b[2J", b"-rf", b" ", "é".encode() * 100)))
            Path(os.fsdecode(os.fsencode(root) + b"/" + name)).write_bytes(b"")
        case 7:
            path.write_bytes(broken_bytes(b"x" * 20, rng))


def check_release(root: Path) -> None:
    """Verify it; what is wrong is told and nothing is written."""
    before = sorted(root.iterdir())
    found = verify(root)
    json.dumps(found.to_json(), allow_nan=False)
    assert sorted(root.iterdir()) == before


def read_manifest(path: Path) -> None:
    """Read a manifest and follow its recipe as far as finding everything."""
    made = Manifest.load(path)
    matrix = resolve(made.recipe, path.parent)
    for row in matrix.rows:
        for cell in row.cells:
            _require_within(path.parent, Layout(path.parent).cell(row.name, cell.key))


def renamed_manifest(folder: Path, rng: random.Random) -> Path:
    """Write a broken manifest."""
    (folder / "manifest.json").write_bytes(broken_json(_renamed(manifest().to_json(), rng), rng))
    return folder / "manifest.json"


def kept_encodings(folder: Path, rng: random.Random) -> Path:
    """Write what a killed build may have left, with the right name and any bytes."""
    tensor = seeds.model().tensors[0]
    kept = Kept(KQuant("rtn"), folder, {"a": 1})
    path = kept._path(tensor, TensorType.Q4_K)
    path.parent.mkdir()
    size = TensorType.Q4_K.tensor_bytes(tensor.shape)
    path.write_bytes(rng.randbytes(size if rng.random() < 0.7 else rng.randrange(2 * size)))
    return folder


def read_kept(folder: Path) -> None:
    """Find it again: bytes of the right number, or nothing."""
    tensor = seeds.model().tensors[0]
    found = Kept(KQuant("rtn"), folder, {"a": 1}).find(tensor, TensorType.Q4_K)
    assert found is None or found.numel() == TensorType.Q4_K.tensor_bytes(tensor.shape)


def _require_within(root: Path, path: Path) -> None:
    assert path.resolve().is_relative_to(root.resolve()), f"{path} leads out of {root}"
