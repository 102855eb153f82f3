"""Quality at equal bytes: llama.cpp's stock mixes against ours, made and measured in one run.

    python tools/bench_quality.py MODEL … --text books=books.txt --text wikitext=wiki.txt --work WORK --out RESULTS
    python tools/bench_quality.py --report --out RESULTS

MODEL is a checkpoint's directory, or `demo`. For each of llama.cpp's mixes its own quantiser makes a file from our
F16, with our importance matrix; ours of no more bytes is allocated from one ladder per model and written by the
encoder that the ladder was measured with. Both are compared with the F16 on the same windows of every text: mean KL
divergence, perplexity, and the difference of the divergences window by window.

RESULTS gets one JSON per model with every number, a table (also printed), and a plot, which needs matplotlib;
`--report` makes table and plot anew from the JSONs alone. Everything that was made or measured is kept in WORK: a run
that was killed goes on, and the same inputs give the same JSON. Models are prepared in processes of their own, and
files measured while others are made.
"""

import argparse
import dataclasses
import json
import math
import os
import platform
import shlex
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pydantic

import impq_edge
from impq_edge.data import data_path
from impq_edge.errors import ImpqError, RecordError, ValidationError
from impq_edge.records import STRICT, Record, atomic_path, sha256_file, sha256_files, sha256_json
from impq_edge.validation.file import read_facts
from impq_edge.validation.process import run_child
from impq_edge.validation.results import Divergence
from impq_edge.validation.validate import available_threads, compare

MIXES = ("Q2_K", "Q2_K_S", "Q3_K_S", "Q3_K_M", "Q4_K_S", "Q4_K_M")
STOCK, OURS, SAME_TYPES, TWO_FOUR = "stock", "ours", "same types", "2/4"
MAKERS = {
    STOCK: "llama.cpp's mix, with the same importance matrix",
    OURS: "a type for every player from the ladder",
    SAME_TYPES: "the stock mix's types, our encoder",
    TWO_FOUR: "the published program: blocks at 2 or 4 bit, embedding and head at Q6_K",
}
"""Who made a file; all but the first write with our encoder."""

ROOMY_DEVICE = "laptop-16gb"  # the file's bytes are what limits, not its memory
_OF_FEWER = ("mixes", "texts", "windows", "threads", "same_types", "permutations")
"""Settings that not all files of a model depend on: those files are named after them."""
_ROOMS = ("backends", "conversion", "ggml", "impq", "model", "spqe")  # whose code decides a file's bytes
_TOLD_EVERY_S = 10.0
_MIB = 2**20
_ROOT = Path(__file__).resolve().parents[1]


@dataclasses.dataclass(frozen=True)
class Text:
    """An evaluation text."""

    __pydantic_config__: ClassVar[pydantic.ConfigDict] = STRICT

    name: str
    file: str
    sha256: str


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything besides the model that a result depends on, and no path."""

    __pydantic_config__: ClassVar[pydantic.ConfigDict] = STRICT

    mixes: tuple[str, ...]
    texts: tuple[Text, ...]
    windows: int  # of 512 tokens, the first of each text
    threads: int  # of a comparison
    calibration: str
    calibration_sha256: str
    calibration_tokens: int  # that the importance matrix and the encoder see
    tokens: int  # of the ladder
    players: str
    types: tuple[int, ...]
    encode: str
    permutations: int  # of the game that "2/4" comes from; 0: none was played
    same_types: bool
    code_sha256: str  # of what decides a file's bytes

    def files(self) -> list[tuple[str, str]]:
        """Return mix and maker of every file."""
        also = [SAME_TYPES] * self.same_types + [TWO_FOUR] * bool(self.permutations)
        return [(mix, maker) for mix in self.mixes for maker in (STOCK, OURS, *also)]


@dataclasses.dataclass(frozen=True)
class Made:
    """A file that was made."""

    __pydantic_config__: ClassVar[pydantic.ConfigDict] = STRICT

    mix: str  # "F16" for the reference
    maker: str
    sha256: str
    file_bytes: int
    counted_bytes: int
    """What it is compared at. llama.cpp's quantiser copies the keys of our F16, those of its origin and the padding to
    their fixed length among them, which an F16 of llama.cpp's own converter has not: they are not counted."""
    tensor_types: dict[str, str]
    command: str | None = None  # of llama.cpp's quantiser
    allocation_sha256: str | None = None
    predicted: float | None = None  # the allocation's objective, nats per token


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A model whose files are being made."""

    __pydantic_config__: ClassVar[pydantic.ConfigDict] = STRICT

    name: str
    sha256: str  # of the checkpoint
    weights: int
    compute: str  # where it was calibrated and encoded
    imatrix_sha256: str
    versions: dict[str, str]


@dataclasses.dataclass(frozen=True)
class Cell(Record):
    """One comparison, as it is kept."""

    SCHEMA: ClassVar[str] = "impq-edge.quality-cell/1"

    divergence: Divergence


@dataclasses.dataclass(frozen=True)
class Measured:
    """A file on a text."""

    __pydantic_config__: ClassVar[pydantic.ConfigDict] = STRICT

    text: str
    mix: str
    maker: str
    perplexity: float
    divergence: Divergence


@dataclasses.dataclass(frozen=True)
class Pair:
    """A file of ours against the stock file of the same mix on the same text."""

    __pydantic_config__: ClassVar[pydantic.ConfigDict] = STRICT

    text: str
    mix: str
    maker: str
    ratio: float  # of the mean KL divergences
    difference: float  # of them, ours less stock, nats per token
    difference_stderr: float  # of the differences window by window

    @property
    def change(self) -> float:
        """The relative change of the KL divergence."""
        return self.ratio - 1

    @property
    def is_clear(self) -> bool:
        """Whether ours is nearer to the F16 by more than two standard errors."""
        return self.difference < -2 * self.difference_stderr


@dataclasses.dataclass(frozen=True)
class Quality(Record):
    """All that was measured of one model."""

    SCHEMA: ClassVar[str] = "impq-edge.quality/1"

    command: str
    settings: Settings
    llama_cpp: dict[str, str]
    model: Prepared
    files: tuple[Made, ...]
    measured: tuple[Measured, ...]
    pairs: tuple[Pair, ...]

    def file(self, mix: str, maker: str) -> Made:
        """Return a file."""
        return next(file for file in self.files if (file.mix, file.maker) == (mix, maker))

    def at(self, text: str, mix: str, maker: str) -> Measured:
        """Return a measurement."""
        return next(m for m in self.measured if (m.text, m.mix, m.maker) == (text, mix, maker))


def _with_root() -> dict[str, str]:
    """Return the environment in which a tool finds this checkout, and what the caller's Python finds."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))}


def main() -> None:
    """Parse the options, then prepare a model, or measure and report."""
    options = _options()
    try:
        if options.prepare is not None:
            _end_with_parent()
            _Workshop(options.prepare, options).make_all()
            return
        if not options.report:
            measure(options)
        print(report(options.out), end="")
    except ImpqError as error:
        sys.exit(f"bench_quality: {error}")


def _options() -> argparse.Namespace:
    shipped = data_path("demo", "calibration.txt")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL")
    parser.add_argument("--text", action="append", default=[], metavar="NAME=PATH", help="Of evaluation; repeat.")
    parser.add_argument("--windows", type=int, default=64, help="Of 512 tokens, the first of each text.")
    parser.add_argument("--mixes", default=",".join(MIXES), help="Of llama.cpp, such as Q2_K,Q4_K_M.")
    parser.add_argument("--calibration", type=Path, default=shipped, help="A text; the demo's by default.")
    parser.add_argument("--calibration-tokens", type=int, default=16384, help="For importance matrix and encoder.")
    parser.add_argument("--tokens", type=int, default=4096, help="For the ladder.")
    parser.add_argument("--players", default="tensors", choices=("blocks", "sublayers", "tensors"))
    parser.add_argument("--types", default="2,3,4,5,6,8", help="Widths that a player may have.")
    parser.add_argument("--encode", default="gptq", choices=("rtn", "imatrix", "gptq"))
    parser.add_argument("--two-four", type=int, default=0, metavar="PERMUTATIONS", help="Also the published program.")
    parser.add_argument("--same-types", action="store_true", help="Also the stock mixes' types by our encoder.")
    parser.add_argument("--allow-fallback", action="store_true", help="Although some rows hold no K-quants.")
    parser.add_argument("--compute", choices=("cpu", "cuda"), help="CUDA where there is one.")
    parser.add_argument("--threads", type=int, default=1, help="Of each comparison.")
    parser.add_argument("--jobs", type=int, help="Comparisons side by side; by default as many as keep all cores busy.")
    parser.add_argument("--models-at-once", type=int, default=1, help="Prepared side by side, on the same GPU.")
    parser.add_argument("--work", type=Path, help="Where everything is kept that was made and measured.")
    parser.add_argument("--out", type=Path, help="Where the JSONs, the table and the plot go.")
    parser.add_argument("--report", action="store_true", help="Only table and plot, from the JSONs in --out.")
    parser.add_argument("--prepare", help=argparse.SUPPRESS)  # what the processes are started with
    options = parser.parse_args()
    if options.out is None or (not options.report and not (options.models and options.text and options.work)):
        parser.error("give models, --text, --work and --out; or --report and --out")
    options.texts = dict(_named_text(parser, given) for given in options.text)
    options.mixes = tuple(options.mixes.split(","))
    options.types = tuple(int(bits) for bits in options.types.split(","))
    options.jobs = options.jobs or max(1, available_threads() // options.threads)
    if options.windows < 2:
        parser.error(f"--windows {options.windows} leaves no error to tell; give 2 or more")
    if options.types == (2, 4):
        parser.error("--types 2,4 is no ladder; see --two-four")
    return options


def _named_text(parser: argparse.ArgumentParser, given: str) -> tuple[str, Path]:
    name, _, path = given.partition("=")
    if not name or not Path(path).is_file():
        parser.error(f"--text {given!r} is not NAME=PATH of a file")
    return name, Path(path)


def settings_of(options: argparse.Namespace) -> Settings:
    """Return what a result depends on."""
    package = Path(impq_edge.__file__).parent
    code = sorted(path for room in _ROOMS for path in (package / room).rglob("*.py"))
    return Settings(
        mixes=options.mixes,
        texts=tuple(Text(name, path.name, sha256_file(path)) for name, path in options.texts.items()),
        windows=options.windows,
        threads=options.threads,
        calibration=options.calibration.name,
        calibration_sha256=sha256_file(options.calibration),
        calibration_tokens=options.calibration_tokens,
        tokens=options.tokens,
        players=options.players,
        types=options.types,
        encode=options.encode,
        permutations=options.two_four,
        same_types=options.same_types,
        code_sha256=sha256_files(code),
    )


def command_of(model: str, settings: Settings) -> str:
    """Return the command that measures a model alone, with names of files in place of paths."""
    texts = [part for text in settings.texts for part in ("--text", f"{text.name}={text.file}")]
    also = ["--same-types"] * settings.same_types
    also += ["--two-four", str(settings.permutations)] if settings.permutations else []
    return shlex.join([
        "python", "tools/bench_quality.py", Path(model).name, *texts, "--windows", str(settings.windows),
        "--mixes", ",".join(settings.mixes), "--calibration", settings.calibration,
        "--calibration-tokens", str(settings.calibration_tokens), "--tokens", str(settings.tokens),
        "--players", settings.players, "--types", ",".join(map(str, settings.types)), "--encode", settings.encode,
        *also, "--threads", str(settings.threads), "--work", "WORK", "--out", "RESULTS",
    ])  # fmt: skip


# Measuring: the process that was started, which holds no model.


def measure(options: argparse.Namespace) -> None:
    """Measure every model; each one's JSON is written as soon as it is whole."""
    settings, tell = settings_of(options), _Teller()
    bench = _Bench(options, settings, run_child({"kind": "describe"}, timeout_s=600), tell)
    with ThreadPoolExecutor(options.models_at_once) as pool:
        try:
            for done in [pool.submit(bench.measure, model) for model in options.models]:
                done.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            bench.close()


class _Bench:
    """Measures files as they are made, a number of them side by side."""

    def __init__(self, options: argparse.Namespace, settings: Settings, build: dict[str, str], tell: "_Teller") -> None:
        self._options, self._settings, self._build, self._tell = options, settings, build, tell
        self._pool = ThreadPoolExecutor(options.jobs)
        self._lock = threading.Lock()
        self._total = len(options.models) * len(settings.files()) * len(settings.texts)
        self._done = 0

    def close(self) -> None:
        """Drop what has not begun."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def measure(self, model: str) -> None:
        """Have a model's files made, measure them, write its JSON."""
        arguments = [sys.executable, __file__, *sys.argv[1:], "--prepare", model]
        prepared: Prepared | None = None
        folder, reference, files = Path(), Path(), list[Made]()
        waiting: list[tuple[str, Made, Future[Divergence]]] = []
        with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout
            for line in child.stdout:
                told = json.loads(line)
                if "model" in told:
                    if told["code"] != self._settings.code_sha256:
                        raise ValidationError("The code has changed since this run began; start it again.")
                    prepared, folder = Prepared(**told["model"]), Path(told["folder"])
                    continue
                made, path = Made(**told["file"]), folder / told["name"]
                files.append(made)
                if made.mix == "F16":
                    reference = path
                    continue
                for text in self._settings.texts:
                    future = self._pool.submit(self._cell, text, made, path, files[0], reference)
                    waiting.append((text.name, made, future))
        if child.returncode or prepared is None:
            raise ValidationError(f"The files of {model} could not be made: status {child.returncode}, see above.")
        measured = [_measured(name, made, future.result()) for name, made, future in waiting]
        self._quality(model, prepared, files, measured).save(self._options.out / f"{prepared.name}.json")

    def _quality(self, model: str, prepared: Prepared, files: Sequence[Made], measured: Sequence[Measured]) -> Quality:
        order = {key: index for index, key in enumerate(self._settings.files())}
        texts = [text.name for text in self._settings.texts]
        ordered = sorted(measured, key=lambda m: (texts.index(m.text), order[m.mix, m.maker]))
        return Quality(
            command=command_of(model, self._settings), settings=self._settings, llama_cpp=self._build, model=prepared,
            files=(files[0], *sorted(files[1:], key=lambda file: order[file.mix, file.maker])),
            measured=tuple(ordered), pairs=tuple(pairs_of(ordered)),
        )  # fmt: skip

    def _cell(self, text: Text, made: Made, path: Path, reference: Made, reference_path: Path) -> Divergence:
        """Compare a file with the F16, or find what was measured before."""
        inputs = {
            "file": made.sha256, "reference": reference.sha256, "text": text.sha256, "threads": self._settings.threads,
            "windows": self._settings.windows, "build": self._build,
        }  # fmt: skip
        kept = self._options.work / "cells" / f"{sha256_json(inputs)[:32]}.json"
        if kept.exists():
            found = Cell.load(kept).divergence
        else:
            _, found = compare(
                path, reference_path, text=self._options.texts[text.name], windows=self._settings.windows,
                threads=self._settings.threads,
            )  # fmt: skip
            Cell(found).save(kept)
        with self._lock:
            self._done += 1
            what = f"{path.parent.name} {text.name} {made.mix} {made.maker}"
            self._tell.line(f"{self._done}/{self._total} {what}: {found.kld_mean:.5f} ± {found.kld_stderr:.5f}")
        return found


def _measured(text: str, made: Made, found: Divergence) -> Measured:
    return Measured(text, made.mix, made.maker, found.reference_perplexity * found.perplexity_ratio, found)


def pairs_of(measured: Sequence[Measured]) -> list[Pair]:
    """Return every file of ours against the stock file of its mix, text by text."""
    stock = {(m.text, m.mix): m.divergence for m in measured if m.maker == STOCK}
    return [
        pair(m.text, m.mix, m.maker, m.divergence, stock[m.text, m.mix]) for m in measured if m.maker != STOCK
    ]  # fmt: skip


def pair(text: str, mix: str, maker: str, ours: Divergence, stock: Divergence) -> Pair:
    """Compare two files on the same windows, which are all of equal length."""
    from impq_edge.validation.divergence import mean_and_error

    difference, error = mean_and_error(np.subtract(ours.window_klds, stock.window_klds))
    return Pair(text, mix, maker, ours.kld_mean / stock.kld_mean, difference, error)


# Making: one process per model, which says on stdout what it has made.


def _end_with_parent() -> None:
    """End when the process that started this one does, however it ends: its end of the pipe closes."""

    def watch() -> None:
        while os.read(0, 1):  # not through sys.stdin, whose lock a thread must not hold when the interpreter ends
            pass
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class _Workshop:
    """Makes the files of one model in a folder that belongs to its inputs, each once."""

    def __init__(self, model: str, options: argparse.Namespace) -> None:
        from impq_edge import stages
        from impq_edge.conversion.encoder import EncodeOptions

        self._model, self._options, self._settings = model, options, settings_of(options)
        self._tell = _Teller(Path(model).name)
        self._compute = stages.require_compute(options.compute)
        self._directory, self._spec = stages.open_model(model)
        settings = dataclasses.asdict(self._settings)
        matter = {key: value for key, value in settings.items() if key not in _OF_FEWER}
        inputs = {"model": self._spec.content_sha256, "compute": self._compute, **matter}
        self._folder = (options.work / f"{self._spec.name}-{sha256_json(inputs)[:12]}").resolve()
        self._folder.mkdir(parents=True, exist_ok=True)
        self._encode = EncodeOptions(
            options.encode, options.calibration, options.calibration_tokens, compute=self._compute
        )  # fmt: skip

    def make_all(self) -> None:
        """Make every file and say so; first the ladder, so that no comparison takes its cores."""
        ladder = self._ladder()
        self._reference()
        budgets = {mix: self._stock(mix).counted_bytes for mix in self._settings.mixes}
        for mix, budget in budgets.items():
            self._allocated(ladder, mix, budget, OURS, f"ours-{mix}")
        if self._settings.same_types:
            for mix in budgets:
                self._same_types(mix)
        if self._settings.permutations:
            profile = self._profile()
            for mix, budget in budgets.items():
                self._allocated(profile, mix, budget, TWO_FOUR, f"two-four-{self._settings.permutations}-{mix}")

    def _reference(self) -> None:
        from impq_edge import stages

        stages.convert(
            self._model, type="f16", out=self._folder / "f16.gguf", allow_fallback=self._options.allow_fallback,
            progress=self._tell,
        )  # fmt: skip
        matrix = self._folder / "imatrix.gguf"
        if not matrix.exists():
            stages.imatrix(
                self._model, out=matrix, calibration=self._options.calibration, compute=self._compute,
                calibration_tokens=self._options.calibration_tokens, progress=self._tell,
            )  # fmt: skip
        prepared = Prepared(
            self._spec.name, self._spec.content_sha256, self._spec.weights, _device_name(self._compute),
            sha256_file(matrix), _versions(),
        )  # fmt: skip
        _say({"model": dataclasses.asdict(prepared), "folder": str(self._folder), "code": self._settings.code_sha256})
        self._made("f16.gguf", "F16", "reference")

    def _stock(self, mix: str) -> Made:
        """Have llama.cpp make its file; names without a folder, because the file tells the matrix's."""
        name = f"stock-{mix}.gguf"
        command = ["llama_quantize.py", "f16.gguf", name, "--type", mix, "--imatrix", "imatrix.gguf"]
        if not (self._folder / name).exists():
            with atomic_path(self._folder / name) as temporary:
                arguments = [str(_ROOT / "tools" / command[0]), command[1], temporary.name, *command[3:]]
                done = subprocess.run(
                    [sys.executable, *arguments, "--threads", str(available_threads())], cwd=self._folder, check=False,
                    env=_with_root(), stdin=subprocess.DEVNULL, capture_output=True,
                    text=True,
                )  # fmt: skip
                if done.returncode:
                    raise ValidationError(f"llama.cpp's quantiser failed at {mix}: {done.stderr.strip()[-500:]}")
        return self._made(name, mix, STOCK, command=shlex.join(["python", f"tools/{command[0]}", *command[1:]]))

    def _ladder(self) -> Any:
        from impq_edge import stages
        from impq_edge.spqe.options import GameOptions

        return stages.ladder(
            self._model, out=self._folder / "ladder.json", kept=self._folder / "encoded",
            game=GameOptions(**self._game(), types=self._settings.types),
            allow_fallback=self._options.allow_fallback, progress=self._tell,
        )  # fmt: skip

    def _profile(self) -> Any:
        from impq_edge import stages
        from impq_edge.spqe.options import GameOptions

        walks = self._settings.permutations
        game = GameOptions(**{**self._game(), "players": "blocks", "method": "impq", "permutations": walks})
        return stages.profile(
            self._model, out=self._folder / f"profile-{walks}.json", game=game, kept=self._folder / "encoded",
            allow_fallback=self._options.allow_fallback, progress=self._tell,
        )  # fmt: skip

    def _game(self) -> dict[str, Any]:
        return {
            "backend_settings": {"encode": self._settings.encode}, "players": self._settings.players,
            "tokens": self._settings.tokens, "calibration_tokens": self._settings.calibration_tokens,
            "calibration": self._options.calibration, "compute": self._compute,
        }  # fmt: skip

    def _allocated(self, profile: Any, mix: str, budget: int, maker: str, stem: str) -> None:
        from impq_edge import stages
        from impq_edge.impq.allocation import Allocation

        recipe = self._folder / f"{stem}.json"
        if recipe.exists():
            allocation = Allocation.load(recipe)
        else:
            allocation = stages.allocate(profile, device=ROOMY_DEVICE, budget_bytes=budget, out=recipe)
        stages.convert(
            self._model, out=self._folder / f"{stem}.gguf", allocation=allocation, encode=self._encode,
            kept=self._folder / "encoded", allow_fallback=self._options.allow_fallback, progress=self._tell,
        )  # fmt: skip
        identity, predicted = allocation.identity(), allocation.objective
        made = self._made(f"{stem}.gguf", mix, maker, allocation_sha256=identity, predicted=predicted)
        require_no_more_bytes(made, budget)

    def _same_types(self, mix: str) -> None:
        """Write the stock file's own types, which no allocation need be able to express."""
        from impq_edge.conversion.encoder import open_encoder
        from impq_edge.conversion.layout import plan_gguf
        from impq_edge.conversion.tokenizer import read_tokenizer
        from impq_edge.conversion.writer import write_gguf
        from impq_edge.ggml.types import TensorType

        out, stock = self._folder / f"same-types-{mix}.gguf", self._folder / f"stock-{mix}.gguf"
        if not out.exists():
            found = {tensor.name: TensorType(tensor.type) for tensor in read_facts(stock).tensors}
            types = {tensor.gguf_name: found[tensor.gguf_name] for tensor in self._spec.tensors}
            opened = open_encoder(
                self._directory, self._spec, types, self._encode, self._options.calibration, self._compute,
                self._folder / "encoded", lambda done, total: self._tell("calibrating, blocks", done, total),
            )  # fmt: skip
            shape = self._spec.hyperparameters
            tokenizer = read_tokenizer(self._directory, shape.vocabulary, shape.architecture)
            layout = plan_gguf(self._spec, tokenizer, types, {"types_of": mix, **opened.facts})
            write_gguf(self._directory, layout, out, encoder=opened.encoder)
        self._made(out.name, mix, SAME_TYPES)

    def _made(self, name: str, mix: str, maker: str, **more: Any) -> Made:
        from impq_edge.conversion.metadata import ORIGIN_BYTES

        path = self._folder / name
        facts = read_facts(path)
        types = {tensor.name: tensor.type for tensor in facts.tensors}
        counted = facts.file_bytes - (ORIGIN_BYTES if maker in (STOCK, SAME_TYPES) else 0)
        made = Made(mix, maker, sha256_file(path), facts.file_bytes, counted, types, **more)
        _say({"file": dataclasses.asdict(made), "name": name})
        return made


def require_no_more_bytes(made: Made, budget: int) -> None:
    """Refuse to compare a file that is larger than the stock one.

    Raises
    ------
    ValidationError
        When it is.
    """
    if made.file_bytes > budget:
        raise ValidationError(
            f"{made.maker} takes {made.file_bytes} bytes for {made.mix}, more than the stock file's {budget}; report "
            "this as a bug."
        )


def _say(told: dict[str, Any]) -> None:
    print(json.dumps(told), flush=True)


def _device_name(compute: str) -> str:
    import torch

    return f"cuda, {torch.cuda.get_device_name()}" if compute == "cuda" else "cpu"


def _versions() -> dict[str, str]:
    names = ("torch", "transformers", "numpy", "scipy", "gguf")
    found = {name: metadata.version(name) for name in names}
    return {"python": platform.python_version(), "impq-edge": impq_edge.__version__, **found}


class _Teller:
    """Progress on stderr: lines, and of what goes in steps one every few seconds."""

    def __init__(self, who: str = "") -> None:
        self._who, self._start, self._told = who, time.monotonic(), dict[str, float]()

    def __call__(self, phase: str, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._told.get(phase, -math.inf) >= _TOLD_EVERY_S:
            self._told[phase] = now
            self.line(f"{self._who}: {phase} {done}/{total}")

    def line(self, text: str) -> None:
        print(f"[{time.monotonic() - self._start:5.0f} s] {text}", file=sys.stderr, flush=True)


# Reporting: from the JSONs alone.


def report(out: Path) -> str:
    """Write table and plot of all models in a folder; return the table.

    Raises
    ------
    RecordError
        When there are none, or they were not measured alike.
    """
    found = [Quality.load(path) for path in sorted(out.glob("*.json"))]
    if not found:
        raise RecordError(f"{out} holds no JSON of a model; measure one first.")
    if any(quality.settings != found[0].settings for quality in found):
        raise RecordError(f"The JSONs in {out} were measured with different settings; keep those of one run.")
    text = table(found)
    with atomic_path(out / "quality.md") as temporary:
        temporary.write_text(text, "utf-8")
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        print("matplotlib is not installed: no plot; run --report where it is.", file=sys.stderr)
    else:
        with atomic_path(out / "quality.svg") as temporary:
            plot(found, temporary)
    return text


def table(found: Sequence[Quality]) -> str:
    """Return a Markdown table of all cells, and what they come to."""
    settings = found[0].settings
    also = [maker for _, maker in settings.files() if maker not in (STOCK, OURS)]
    also = list(dict.fromkeys(also))
    columns = [
        "model", "text", "mix", "bytes, stock", "bytes, ours", "KL divergence, stock", "KL divergence, ours", "change",
        "difference, paired", "perplexity, F16", "perplexity, stock", "perplexity, ours",
        *(f"KL divergence, {maker}" for maker in also),
    ]  # fmt: skip
    lines = [_row(columns), _row(["---"] * 3 + ["---:"] * (len(columns) - 3))]
    for quality in found:
        lines += [
            _row(_cells(quality, text.name, mix, also)) for text in settings.texts for mix in settings.mixes
        ]  # fmt: skip
    summaries = [f"- {maker}: {summary(found, maker)}" for maker in (OURS, *also)]
    legend = [f"- {maker}: {MAKERS[maker]}." for maker in (STOCK, OURS, *also)]
    return "\n".join([*lines, "", *summaries, "", *legend, ""])


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cells(quality: Quality, text: str, mix: str, also: Sequence[str]) -> list[str]:
    stock, ours = (quality.at(text, mix, maker) for maker in (STOCK, OURS))
    against = {pair.maker: pair for pair in quality.pairs if (pair.text, pair.mix) == (text, mix)}
    mine = against[OURS]
    return [
        quality.model.name, text, mix,
        *(f"{quality.file(mix, maker).counted_bytes:,}" for maker in (STOCK, OURS)),
        *(f"{m.divergence.kld_mean:.5f} ± {m.divergence.kld_stderr:.5f}" for m in (stock, ours)),
        _percent(mine.change), f"{mine.difference:+.5f} ± {mine.difference_stderr:.5f}".replace("-", "−"),
        f"{stock.divergence.reference_perplexity:.3f}", f"{stock.perplexity:.3f}", f"{ours.perplexity:.3f}",
        *(f"{quality.at(text, mix, m).divergence.kld_mean:.5f} ({_percent(against[m].change)})" for m in also),
    ]  # fmt: skip


def summary(found: Sequence[Quality], maker: str) -> str:
    """Say in one line what all cells of a maker come to."""
    cells = [(quality.model.name, pair) for quality in found for pair in quality.pairs if pair.maker == maker]
    won = sum(pair.difference < 0 for _, pair in cells)
    clear = sum(pair.is_clear for _, pair in cells)
    median = statistics.median(pair.change for _, pair in cells)
    name, worst = max(cells, key=lambda cell: cell[1].change)
    return (
        f"KL divergence {_percent(median)} in the median, lower than stock in {won} of {len(cells)} cells (in {clear} "
        f"by more than two standard errors); worst {_percent(worst.change)}, {name} on {worst.text} at {worst.mix}."
    )


def _percent(share: float) -> str:
    return f"{100 * share:+.1f} %".replace("-", "−")


_SERIES = {
    STOCK: ("llama.cpp's mixes", "#D55E00", "s", "--"),
    OURS: ("ours", "#0072B2", "o", "-"),
    TWO_FOUR: ("ours, blocks at 2 or 4 bit", "#009E73", "^", ":"),
}
"""Label, colour (Okabe and Ito's, which colour-blind readers tell apart), marker and line of a maker."""


def plot(found: Sequence[Quality], path: Path) -> None:
    """Draw KL divergence against file size as SVG, a panel per model and text; same inputs, same bytes."""
    from matplotlib import style
    from matplotlib.figure import Figure

    texts = [text.name for text in found[0].settings.texts]
    with style.context(["default", {"svg.hashsalt": "impq-edge", "svg.fonttype": "none", "font.size": 9}]):
        figure = Figure(figsize=(5.4 * len(texts), 3.7 * len(found)), layout="constrained")
        panels = figure.subplots(len(found), len(texts), squeeze=False)
        for row, quality in zip(panels, found, strict=True):
            for axes, text in zip(row, texts, strict=True):
                _panel(axes, quality, text)
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})


def _panel(axes: Any, quality: Quality, text: str) -> None:
    for maker, (label, colour, marker, line) in _SERIES.items():
        points = sorted(
            (quality.file(m.mix, maker).counted_bytes / _MIB, m.divergence.kld_mean, m.divergence.kld_stderr, m.mix)
            for m in quality.measured
            if (m.text, m.maker) == (text, maker)
        )
        if not points:
            continue
        sizes, means, errors, mixes = zip(*points, strict=True)
        axes.errorbar(
            sizes, means, yerr=errors, label=label, color=colour, marker=marker, linestyle=line, linewidth=1.2,
            markersize=5, capsize=2,
        )  # fmt: skip
        if maker == STOCK:
            for size, mean, mix in zip(sizes, means, mixes, strict=True):
                axes.annotate(
                    mix, (size, mean), xytext=(4, 5), textcoords="offset points", fontsize=7, color=colour
                )  # fmt: skip
    axes.set_yscale("log")
    axes.set_title(f"{quality.model.name}, {text}")
    axes.set_xlabel("file size, MiB")
    axes.set_ylabel("KL divergence to F16, nats/token")
    axes.grid(visible=True, which="both", color="#DDDDDD", linewidth=0.5)
    axes.margins(x=0.12, y=0.12)
    axes.legend(frameon=False)


if __name__ == "__main__":
    main()
