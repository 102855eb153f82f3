"""The command line. It parses, calls one stage, and prints; every decision is the stage's.

Exit codes: 0 done · 1 a check failed · 2 options that do not parse · 3 bad input, one sentence on stderr ·
130 interrupted.
"""

import errno
import functools
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from impq_edge import console
from impq_edge.errors import (
    EXIT_BAD_INPUT,
    EXIT_CHECK_FAILED,
    AllocationError,
    ImpqError,
    ReleaseError,
    SensitivityError,
    ValidationError,
)
from impq_edge.ggml import cache

if TYPE_CHECKING:
    from impq_edge.devices.latency import Rate
    from impq_edge.devices.profile import DeviceProfile
    from impq_edge.releases.dry import DryRun
    from impq_edge.releases.manifest import Manifest
    from impq_edge.releases.verify import Verdict
    from impq_edge.spqe.ladder import LadderProfile
    from impq_edge.spqe.options import GameOptions
    from impq_edge.spqe.profile import SensitivityProfile
    from impq_edge.stages.planning import Plan, Variant
    from impq_edge.validation.doctor import DoctorReport
    from impq_edge.validation.inspection import Inspection
    from impq_edge.validation.report import ValidationReport

_EPILOG = "Exit codes: 0 done, 1 a check failed, 2 bad options, 3 bad input, 130 interrupted."

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="The best mixed-precision GGUF that fits an edge device, and the proof of it.",
    epilog=_EPILOG,
)
devices_app = typer.Typer(help="The devices that are known, and what they have.", epilog=_EPILOG)
app.add_typer(devices_app, name="devices")

_BUDGET = re.compile(r"(\d+(?:\.\d+)?)\s*(B|KB|KiB|MB|MiB|GB|GiB)?", re.IGNORECASE)
_BITS = re.compile(r"\d{1,3}(?:\.\d{1,9}|/[1-9]\d{0,5})?")
_DURATION = re.compile(r"(\d{1,9}(?:\.\d{1,9})?)\s*(s|min|h)")
_SECONDS = {"s": 1, "min": 60, "h": 3600}
_UNITS = {"b": 1, "kb": 10**3, "kib": 2**10, "mb": 10**6, "mib": 2**20, "gb": 10**9, "gib": 2**30}

_BAR_KINDS = {
    "reserve": "system reserve", "process": "process and tokenizer", "tokenizer": "process and tokenizer",
    "driver": "GPU driver", "KV cache": "KV cache", "buffer": "buffers", "repacked": "copies for speed",
    "weights": "weights",
}  # fmt: skip
"""A word in the name of a part of memory → what it is shown as."""
_BAR_ORDER = (
    "system reserve", "process and tokenizer", "KV cache", "buffers", "weights", "copies for speed", "GPU driver",
)  # fmt: skip
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO}
_WIDE_TABLE = 76  # columns

Model = Annotated[str, typer.Option(help="`demo`, a checkpoint directory, or a hub id such as `org/name`.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")]
Device = Annotated[str, typer.Option(help="A name from `impq-edge devices`, or a TOML file.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Backend = Annotated[Literal["kquant", "hqq", "quanto", "gptq"], typer.Option(help="What quantises in the game.")]
GroupSize = Annotated[
    int | None, typer.Option(min=1, help="Weights that share a scale (hqq, quanto, gptq); the library's default.")
]
Axis = Annotated[int | None, typer.Option(min=0, max=1, help="Axis of hqq's groups; the library's default.")]
DampPercent = Annotated[float | None, typer.Option(help="Damping of gptq's Hessian; the library's default.")]
Sym = Annotated[bool | None, typer.Option("--sym/--no-sym", help="Symmetric codes (gptq); the library's default.")]
Encode = Annotated[
    Literal["rtn", "imatrix", "gptq"] | None,
    typer.Option(help="How K-quants are encoded: as ggml does, with an importance matrix, or by GPTQ; gptq."),
]
Players = Annotated[
    Literal["blocks", "sublayers", "tensors"] | None,
    typer.Option(
        help="What drops to 2 bit together: tensors in rounds with K-quants, which give the better files at equal "
        "bytes; blocks otherwise, as in the paper."
    ),
]
Method = Annotated[
    Literal["rounds", "impq"] | None,
    typer.Option(
        help="`rounds`: most evaluations go to what a model of the game proposes at the budgets, and the best that was "
        "measured is taken. `impq`: the paper's game and program. rounds, but for --types other than 2,4."
    ),
]
Objective = Annotated[
    Literal["loss", "divergence"] | None,
    typer.Option(
        help="What is measured and minimised: the text's loss, as in the paper, or the KL divergence from the "
        "unquantised model; divergence with --method rounds, else loss."
    ),
]
Curve = Annotated[
    str | None,
    typer.Option(
        metavar="BITS",
        help="With --method rounds: average bits to play them at, such as `2.5,3`; 2.25 to 3.75 in profile, the "
        "device's own budgets in build.",
    ),
]
Estimator = Annotated[
    Literal["permutations", "antithetic", "stratified"] | None,
    typer.Option(
        help="Which coalitions: independent walks (permutations, the paper's and the default), walks and their "
        "reverse, complement pairs."
    ),
]
Permutations = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="Walks from all-4-bit to all-2-bit, or as many evaluations: 8 by default, 3 of tensors in rounds, 100 in "
        "the paper; none by default with other --types than 2,4.",
    ),
]
UntilStable = Annotated[
    str | None,
    typer.Option(
        metavar="WHAT",
        help="Stop early once `order`, or the allocations at average bits such as `2.5,3` (α 0.5), have stopped "
        "changing; in build also `allocation`, this device's.",
    ),
]
TimeLimit = Annotated[str | None, typer.Option(help="Stop early after so long, such as `90s`, `10min` or `2h`.")]
Workers = Annotated[
    int, typer.Option(min=0, help="Processes that play the game, one GPU each; needs impq-edge[cluster]. 0: this one.")
]
RayAddress = Annotated[str | None, typer.Option(help="`host:port` of a running Ray cluster, for several machines.")]
Types = Annotated[
    str,
    typer.Option(
        metavar="BITS",
        help="Widths to choose from, such as `2,3,4,5,6,8`; the paper: `2,4`. With others, each is measured one player "
        "at a time, and embedding and head are players too.",
    ),
]
CalibrationTokens = Annotated[
    int, typer.Option(min=1, help="Tokens of the calibration text that encoders see (imatrix, gptq).")
]
Tokens = Annotated[int, typer.Option(min=1, help="Calibration tokens per evaluation, in windows of 512.")]
Calibration = Annotated[Path | None, typer.Option(help="Calibration text, UTF-8; a short one ships.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the draws.")]
Context = Annotated[int | None, typer.Option(min=1, help="Tokens the KV cache must hold; the device's default.")]
KvType = Annotated[cache.KvType | None, typer.Option(help="Type of the KV cache; the device's default.")]
Budget = Annotated[str | None, typer.Option(help="Largest file, such as `900MiB`.")]
MinTokensPerSecond = Annotated[
    float | None,
    typer.Option(min=0, help="Slowest generation; needs a device whose speed was measured, see calibrate-device."),
]
AverageBits = Annotated[str | None, typer.Option(help="Highest nominal bits of the blocks on average, 2 to 4.")]
Alpha = Annotated[
    float | None, typer.Option(help="Damping of interactions: 0 none, 1 drops them; 0.5, the paper's, by default.")
]
HeadType = Annotated[Literal["q6_k", "q8_0", "q4_k", "f16"], typer.Option(help="Type of embedding and head.")]
AllowFallback = Annotated[bool, typer.Option(help="Build although some rows hold no K-quants.")]
Text = Annotated[Path | None, typer.Option(help="Evaluation text, UTF-8; a short one ships.")]
Windows = Annotated[int, typer.Option(min=1, help="Windows of 512 tokens to score.")]
On = Annotated[
    str | None,
    typer.Option(metavar="USER@HOST", help="Validate there, over ssh; see docs/on-device.md."),
]
Wheels = Annotated[
    Path | None, typer.Option(help="Over ssh: install from these wheels (scripts/carry-wheels), not from an index.")
]
RemotePython = Annotated[str | None, typer.Option(help="Over ssh: the Python to use there, 3.11 or newer.")]
RemoteClean = Annotated[
    Literal["nothing", "files", "all"],
    typer.Option(help="Over ssh: what to remove there afterwards: nothing, the files, or the environment too."),
]
Ssh = Annotated[str, typer.Option("--ssh", help="Over ssh: the ssh to use, with options, such as `ssh -p 2222`.")]
Yes = Annotated[bool, typer.Option("--yes", help="Over ssh: compile llama.cpp there, if need be, without asking.")]
Compute = Annotated[Literal["cuda", "cpu"] | None, typer.Option(help="Where the game runs; CUDA when there is one.")]


def _game_options(
    backend: Backend = "kquant",
    group_size: GroupSize = None,
    axis: Axis = None,
    damp_percent: DampPercent = None,
    sym: Sym = None,
    encode: Encode = None,
    players: Players = None,
    types: Types = "2,4",
    method: Method = None,
    objective: Objective = None,
    estimator: Estimator = None,
    permutations: Permutations = None,
    curve: Curve = None,
    until_stable: UntilStable = None,
    time_limit: TimeLimit = None,
    tokens: Tokens = 4096,
    calibration: Calibration = None,
    calibration_tokens: CalibrationTokens = 16384,
    seed: Seed = 0,
    compute: Compute = None,
    workers: Workers = 0,
    ray_address: RayAddress = None,
) -> "GameOptions":
    """How sensitivity is measured: the options of every command that measures it."""
    from impq_edge.spqe.options import GameOptions

    settings: dict[str, Any] = {"group_size": group_size, "axis": axis, "damp_percent": damp_percent, "sym": sym}
    if backend == "kquant":
        settings["encode"] = encode
    return GameOptions(
        backend=backend, backend_settings={key: value for key, value in settings.items() if value is not None},
        players=players, types=_types(types), method=method, objective=objective, estimator=estimator,
        permutations=permutations, curve=curve, until_stable=until_stable, time_limit_s=_seconds(time_limit),
        tokens=tokens, calibration=calibration, calibration_tokens=calibration_tokens, seed=seed, compute=compute,
        workers=workers, ray_address=ray_address,
    )  # fmt: skip


def _with_game_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of :func:`_game_options`, and their result as its argument ``game``.

    Typer reads options off signatures, and has no other way to share them.
    """
    shared = signature(_game_options).parameters
    own = [p for p in signature(command).parameters.values() if p.name != "game"]
    takes = {p.name for p in own}

    @functools.wraps(command)
    def run(**given: Any) -> None:
        game = _game_options(**{name: given[name] for name in shared})
        command(game=game, **{name: value for name, value in given.items() if name in takes})

    both = {p.name: p for p in [*own, *shared.values()]}
    ordered = sorted(both.values(), key=lambda p: p.default is not Parameter.empty)
    run.__signature__ = Signature(ordered)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in ordered}
    del run.__wrapped__
    return run


@devices_app.callback(invoke_without_command=True)
def devices(context: typer.Context, as_json: Json = False) -> None:
    """List the devices. Example: `impq-edge devices --json`."""
    if context.invoked_subcommand is not None:
        return
    from impq_edge.devices.profile import device_names, load_device

    found = [load_device(name) for name in device_names()]
    if as_json:
        console.show_json({"devices": [device.to_json() for device in found]})
        return
    rows = [
        [d.name, d.title, _mib(d.memory_bytes), _mib(d.system_reserve_bytes), _gpu(d), str(d.context_tokens), d.kv_type]
        for d in found
    ]
    columns = ["name", "device", "memory, MiB", "reserve, MiB", "GPU, MiB", "context", "KV"]
    console.show_table("Devices", columns, rows)


@devices_app.command("show", epilog=_EPILOG)
def show_device(name: Annotated[str, typer.Argument(help="Name or TOML file.")], as_json: Json = False) -> None:
    """Show one device with the source of each number. Example: `impq-edge devices show raspberry-pi-5`."""
    from impq_edge.devices.profile import load_device

    device = load_device(name)
    if as_json:
        console.show_json(device.to_json())
        return
    console.show_table(device.title, ["field", "value", "source"], _device_rows(device))


@app.command("calibrate-device", epilog=_EPILOG)
def calibrate_device(
    device: Device,
    out: Annotated[Path, typer.Option("--out", "-o", help="The device profile to write, a TOML.")],
    minutes: Annotated[
        float, typer.Option(min=0, help="How long to measure; three rounds are made in any case.")
    ] = 5.0,
    force: Annotated[
        bool, typer.Option("--force", help="This machine is the device, although it cannot be told.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Measure on a device how fast each format is, and write its profile with that. A killed run goes on.

    Example: `impq-edge calibrate-device --device raspberry-pi-5 -o my-pi.toml`
    """
    from impq_edge.validation.calibration import calibrate

    with console.progress() as advance:
        made = calibrate(device, out, minutes=minutes, force=force, say=console.say, progress=advance)
    assert made.speed is not None
    if as_json:
        console.show_json({"device": str(out), "speed": made.to_json()["speed"]})
        return
    kernels = {"plain": made.speed.plain, "repacked": made.speed.repacked}
    found = {name: speeds for name, speeds in kernels.items() if speeds}
    rows = [
        [kind, *(f"{1e12 * costs.weight_s[kind]:.2f}" for k in found.values() for costs in (k.generation, k.prompt))]
        for kind in next(iter(found.values())).generation.weight_s
    ]
    columns = ["format", *(f"{name}, {mode}" for name in found for mode in ("generation", "prompt"))]
    console.show_table("Time per weight and token, 10⁻¹² s", columns, rows)
    for name, speeds in found.items():
        console.show_line(
            f"{name}: {1e6 * speeds.operation_s:.2f} µs per operation; the fit is off by {speeds.generation_error:.1%} "
            f"in generation and {speeds.prompt_error:.1%} in prompts, times spread by {speeds.spread:.1%}"
        )


@app.command(epilog=_EPILOG)
def plan(
    model: Annotated[
        str, typer.Option(help="`demo`, a directory with a config.json, a hub id, or a name such as `Llama-3.1-8B`.")
    ],
    device: Annotated[
        list[str], typer.Option(help="A name from `impq-edge devices`, a TOML file, or `all`; again for several.")
    ],
    context: Context = None,
    kv_type: KvType = None,
    types: Annotated[str, typer.Option(metavar="BITS", help="Widths of the blocks, such as `2,3,4,5,6,8`.")] = "2,4",
    head_type: HeadType = "q6_k",
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Tell what a device will hold of a model, and how fast, from the model's shapes alone. 1 if nothing fits.

    Example: `impq-edge plan --model meta-llama/Llama-3.1-8B --device raspberry-pi-5 --context 8192`

    Example: `impq-edge plan --model Qwen3-4B --device all`
    """
    from impq_edge.devices.profile import device_names, load_device
    from impq_edge.model.shapes import find_shapes
    from impq_edge.stages import planning

    asked = [name for given in device for name in (device_names() if given == "all" else [given])]
    targets = [load_device(name) for name in dict.fromkeys(asked)]
    shapes = find_shapes(model, revision)
    console.say(f"Model: {shapes.origin}.")
    one = len(targets) == 1
    plans = [
        planning.plan(
            shapes, target, context_tokens=context, kv_type=kv_type, types=_types(types), outer_type=head_type,
            mixes=planning.SHOWN_MIXES if one else (),
        )
        for target in targets
    ]  # fmt: skip
    if as_json:
        console.show_json(plans[0].to_json() if one else {"plans": [made.to_json() for made in plans]})
    elif one:
        _show_plan(plans[0], targets[0])
    else:
        _show_plans(plans)
    if not any(made.fits for made in plans):
        for made in plans:
            console.fail(str(made.remedy))
        raise typer.Exit(EXIT_CHECK_FAILED)


@app.command(epilog=_EPILOG)
@_with_game_options
def profile(
    out: Annotated[Path, typer.Option("--out", "-o", help="The profile to write.")],
    game: "GameOptions",
    model: Model = "demo",
    revision: Revision = None,
    allow_fallback: AllowFallback = False,
    as_json: Json = False,
) -> None:
    """Measure how much each player suffers in fewer bits (SPQE, or a ladder). A killed run goes on where it stopped.

    Example: `impq-edge profile --model meta-llama/Llama-3.2-1B --permutations 10 -o llama.json`

    Example: `impq-edge profile --model meta-llama/Llama-3.2-1B --method impq --permutations 100 -o llama.json`

    Example: `impq-edge profile --model meta-llama/Llama-3.2-1B --types 2,3,4,5,6,8 --players tensors -o llama.json`
    """
    from impq_edge import stages

    measure = stages.ladder if game.is_ladder else stages.profile
    with console.progress() as advance:
        made: Any = measure(
            model, out=out, game=game, revision=revision, allow_fallback=allow_fallback, say=console.say,
            progress=advance,
        )  # fmt: skip
    shown = {"profile": str(out), "sha256": made.identity(), "players": [player.name for player in made.who]}
    if game.is_ladder:
        _show_ladder(made, shown, as_json)
    else:
        _show_profile(made, shown, as_json)


@app.command(epilog=_EPILOG)
def allocate(
    profile: Annotated[str, typer.Argument(help="A sensitivity profile: a file, or the name of a shipped one.")],
    device: Device,
    out: Annotated[Path, typer.Option("--out", "-o", help="The allocation to write.")],
    context: Context = None,
    kv_type: KvType = None,
    budget: Budget = None,
    average_bits: AverageBits = None,
    min_tokens_per_second: MinTokensPerSecond = None,
    method: Annotated[
        Literal["rounds", "impq"] | None,
        typer.Option(
            help="`impq` solves the paper's program; `rounds` takes the best that was measured, or what a model of all "
            "measured losses thinks better. As the profile was made."
        ),
    ] = None,
    alpha: Alpha = None,
    head_type: HeadType = "q6_k",
    types: Annotated[
        str | None, typer.Option(metavar="BITS", help="Widths to choose from; by default all that were measured.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Choose every player's bits within a device's memory: proven optimal for the profile, or the best measured.

    Example: `impq-edge allocate llama.json --device raspberry-pi-5 --context 8192 -o llama-pi5.json`
    """
    from impq_edge import stages

    made = stages.allocate(
        stages.load_profile(profile), device=device, context_tokens=context, kv_type=kv_type,
        budget_bytes=_bytes(budget), average_bits=_fraction(average_bits),
        min_generation_tok_per_s=min_tokens_per_second, method=method, alpha=alpha, outer_type=head_type,
        types=None if types is None else _types(types), out=out,
    )  # fmt: skip
    if as_json:
        console.show_json(made.to_json())
        return
    console.show_line(f"bits per player ({made.players}): " + " ".join(str(bits) for bits in made.player_bits))
    console.show_line(
        f"{made.average_bits:.3f} bits on average, {made.predicted_file_bytes:,} of {made.budget_bytes:,} bytes, "
        + (
            f"everything fits at {made.types[-1]} bit"
            if made.everything_fits
            else made.evidence.told()
            if made.evidence
            else f"objective {made.objective:.6g} nats/token, optimal"
        )
    )
    if made.speeds is not None:
        console.show_line(made.speeds.summary(made.device))


@app.command(epilog=_EPILOG)
def convert(
    out: Annotated[Path, typer.Option("--out", "-o", help="The GGUF to write.")],
    model: Model = "demo",
    allocation: Annotated[Path | None, typer.Option(help="An allocation; or give --type.")] = None,
    type: Annotated[
        Literal["f32", "f16", "q8_0", "q4_k", "q2_k"] | None, typer.Option(help="One type for all blocks.")
    ] = None,
    head_type: Annotated[
        Literal["q6_k", "q8_0", "q4_k", "f16"] | None,
        typer.Option(help="Type of embedding and head, q6_k by default; an allocation has its own."),
    ] = None,
    encode: Encode = None,
    imatrix: Annotated[
        Path | None, typer.Option(help="llama.cpp's importance matrix, in place of a calibration text.")
    ] = None,
    calibration: Calibration = None,
    calibration_tokens: CalibrationTokens = 16384,
    compute: Compute = None,
    revision: Revision = None,
    allow_fallback: AllowFallback = False,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of the encoder; all cores.")] = None,
    shard_size: Annotated[
        str | None, typer.Option(help="Write files of at most that size, such as `2GiB`, as llama.cpp splits them.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write one GGUF straight from safetensors.

    Example: `impq-edge convert --allocation llama-pi5.json --model meta-llama/Llama-3.2-1B -o llama.gguf`
    """
    from impq_edge import stages
    from impq_edge.conversion.encoder import EncodeOptions

    options = EncodeOptions(
        encode=encode, calibration=calibration, calibration_tokens=calibration_tokens, compute=compute, imatrix=imatrix
    )
    with console.progress() as advance:
        made = stages.convert(
            model, out=out, allocation=allocation, type=type, outer_type=head_type, encode=options, revision=revision,
            allow_fallback=allow_fallback, threads=threads, shard_bytes=_bytes(shard_size, "--shard-size"),
            say=console.say, progress=advance,
        )  # fmt: skip
    if as_json:
        console.show_json({**made.to_json(), "artifact": str(out.with_name(made.artifact))})
        return
    console.show_line(
        f"{out.with_name(made.artifact)}: {made.file_bytes:,} bytes, {made.bits_per_weight:.2f} bits/weight, "
        f"sha256 {made.sha256}"
    )


@app.command(epilog=_EPILOG)
def imatrix(
    out: Annotated[Path, typer.Option("--out", "-o", help="The GGUF to write.")],
    model: Model = "demo",
    calibration: Calibration = None,
    calibration_tokens: CalibrationTokens = 16384,
    compute: Compute = None,
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Write llama.cpp's importance matrix, for `llama-quantize --imatrix` or `impq-edge convert --imatrix`.

    Example: `impq-edge imatrix --model Qwen/Qwen3-0.6B --calibration wiki.txt -o qwen3.imatrix.gguf`
    """
    from impq_edge import stages

    with console.progress() as advance:
        made = stages.imatrix(
            model, out=out, calibration=calibration, calibration_tokens=calibration_tokens, compute=compute,
            revision=revision, progress=advance,
        )  # fmt: skip
    told = {"imatrix": str(out), "tensors": len(made.sums), "windows": made.chunk_count, "datasets": made.datasets}
    if as_json:
        console.show_json(told)
        return
    console.show_line(f"{out}: {len(made.sums)} tensors, {made.chunk_count} windows of {made.chunk_tokens} tokens")


@app.command(epilog=_EPILOG)
def validate(
    file: Annotated[Path, typer.Argument(help="A GGUF.")],
    device: Annotated[str | None, typer.Option(help="A device's name or TOML file: its limits are checked.")] = None,
    text: Text = None,
    reference: Annotated[
        Path | None, typer.Option(help="The F16 GGUF of the same model: how far this file's predictions are from its.")
    ] = None,
    windows: Windows = 24,
    context: Context = None,
    kv_type: KvType = None,
    memory_limit: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="What the process may hold, or `none`; what the device leaves."),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Also save the report here.")] = None,
    as_json: Json = False,
    on: On = None,
    wheels: Wheels = None,
    remote_python: RemotePython = None,
    remote_clean: RemoteClean = "nothing",
    ssh: Ssh = "ssh",
    yes: Yes = False,
) -> None:
    """Load a GGUF in llama.cpp, measure it, and check it against a device. Exit code 0 only if all checks hold.

    Example: `impq-edge validate llama.gguf --device raspberry-pi-5 --reference llama-f16.gguf`

    Example: `impq-edge validate llama.gguf --device raspberry-pi-5 --on pi@raspberrypi.local --wheels wheels-aarch64`
    """
    if on is None and (wheels or remote_python or remote_clean != "nothing" or yes):
        raise ValidationError(
            "--wheels, --remote-python, --remote-clean and --yes are for another machine; name it with --on."
        )
    limit: int | Literal["device"] | None = None
    if memory_limit != "none":
        limit = "device" if memory_limit is None else _bytes(memory_limit, "--memory-limit")
    options: dict[str, Any] = {
        "windows": windows, "context_tokens": context, "kv_type": kv_type, "memory_limit_bytes": limit,
    }  # fmt: skip
    with console.progress() as advance:
        if on is None:
            from impq_edge.devices.profile import load_device
            from impq_edge.validation.validate import validate as run

            profile = load_device(device) if device else None
            report = run(file, device=profile, text=text, reference=reference, progress=advance, **options)
        else:
            from impq_edge.validation.remote.run import validate_on

            report = validate_on(
                on, file, device=device, text=text, reference=reference, options=options, wheels=wheels,
                python=remote_python, ssh=ssh, clean=remote_clean, agree=lambda question: yes or _confirmed(question),
                say=console.say, progress=advance,
            )  # fmt: skip
    if out is not None:
        report.save(out)
    if as_json:
        console.show_json(report.to_json())
    else:
        _show_validation(report)
    if not report.passed:
        raise typer.Exit(EXIT_CHECK_FAILED)


@app.command("inspect", epilog=_EPILOG)
def inspect_file(
    file: Annotated[Path, typer.Argument(help="A GGUF, or its first piece.")], as_json: Json = False
) -> None:
    """Say what a GGUF is and what its tensors are stored in, from its header alone.

    Example: `impq-edge inspect llama.gguf`
    """
    from impq_edge.validation.inspection import inspect as read

    found = read(file)
    if as_json:
        console.show_json(found.to_json())
    else:
        _show_inspection(found)


@app.command(epilog=_EPILOG)
@_with_game_options
def build(
    device: Device,
    game: "GameOptions",
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory of this build; an unfinished one is resumed.")],
    encode: Encode = None,
    model: Model = "demo",
    revision: Revision = None,
    profile: Annotated[
        str | None,
        typer.Option(help="A finished sensitivity profile, file or shipped name; the game's options are then unused."),
    ] = None,
    context: Context = None,
    kv_type: KvType = None,
    budget: Budget = None,
    average_bits: AverageBits = None,
    min_tokens_per_second: MinTokensPerSecond = None,
    alpha: Alpha = None,
    head_type: HeadType = "q6_k",
    allow_fallback: AllowFallback = False,
    text: Text = None,
    windows: Windows = 24,
    as_json: Json = False,
) -> None:
    """Build the best GGUF for a device: profile, allocate, convert, validate, report.

    Example: `impq-edge build --device raspberry-pi-5 --average-bits 3 -o build/demo`

    Example: `impq-edge build --device jetson-orin-nano-8gb --model Qwen/Qwen3-8B --permutations 10 -o build/qwen3-8b`
    """
    from impq_edge.releases import build as pipeline

    with console.progress() as advance:
        made = pipeline.build(
            device, out=out, model=model, revision=revision, game=game, encode=encode,
            sensitivity=Path(profile) if profile else None, context_tokens=context, kv_type=kv_type,
            budget_bytes=_bytes(budget), average_bits=_fraction(average_bits),
            min_generation_tok_per_s=min_tokens_per_second, alpha=alpha, outer_type=head_type,
            allow_fallback=allow_fallback, text=text, windows=windows,
            command=_command_line(), say=console.say, progress=advance,
        )  # fmt: skip
    if as_json:
        console.show_json(pipeline.summary(made))
    else:
        files = {"this file": (made.artifact, made.validation)}
        files |= {f"all {bits} bit": both for bits, both in made.uniform.items()}
        rows = [
            [name, f"{artifact.file_bytes:,}", f"{artifact.bits_per_weight:.2f}", _perplexity(report)]
            for name, (artifact, report) in files.items()
        ]
        console.show_table(made.artifact.artifact, ["file", "bytes", "bits/weight", "perplexity"], rows)
        for name in ("report.md", "report.html"):
            if (out / name).exists():
                console.show_line(str(out / name))
    if not made.validation.passed:
        console.fail("The file was built, but validation failed; see the checks in report.md.")
        raise typer.Exit(EXIT_CHECK_FAILED)


@app.command(epilog=_EPILOG)
def release(
    order: Annotated[Path, typer.Argument(metavar="RELEASE.TOML", help="Models, devices, limits and gates.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Directory of the release; its name by default.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would be built, with sizes.")] = False,
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="Publish it there, once every gate holds.")
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="With --push-to-hub: a new repository is private.")
    ] = False,
    as_json: Json = False,
    wheels: Wheels = None,
    remote_python: RemotePython = None,
    remote_clean: RemoteClean = "nothing",
    ssh: Ssh = "ssh",
    yes: Yes = False,
) -> None:
    """Build models × devices × contexts with their papers; a killed run goes on. 1 if a gate fails.

    A device with `on = "user@host"` in the file is measured there, over ssh; the last options are for that.

    Example: `impq-edge release release.toml --dry-run`

    Example: `impq-edge release release.toml -o build/release --push-to-hub me/qwen3-edge`
    """
    from impq_edge.releases.order import load_order

    if private and push_to_hub is None:
        raise ReleaseError("--private is for --push-to-hub; name the repository, or leave it out.")
    asked = load_order(order)
    directory = Path(asked.name) if out is None else out
    if dry_run:
        from impq_edge.releases.dry import foresee

        found = foresee(asked, out=directory, base=order.parent)
        if as_json:
            console.show_json(found.to_json())
        else:
            _show_dry_run(found)
        return
    from impq_edge.releases import push
    from impq_edge.releases import release as pipeline
    from impq_edge.releases.trial import Reach

    reach = Reach(wheels, remote_python, ssh, remote_clean, lambda question: yes or _confirmed(question))
    if push_to_hub is not None:
        push.require_repository(push_to_hub)
    with console.progress() as advance:
        made = pipeline.release(
            asked, out=directory, base=order.parent, source=order, reach=reach, say=console.say, progress=advance,
        )  # fmt: skip
    address = None
    if push_to_hub is not None and made.passed:
        address = push.push(directory, push_to_hub, private=private, say=console.say)
    if as_json:
        console.show_json({"directory": str(directory), "pushed": address, **made.to_json()})
    else:
        _show_release(made, directory, address)
    if not made.passed:
        _tell_failed_gates(made, push_to_hub)
        raise typer.Exit(EXIT_CHECK_FAILED)


@app.command(epilog=_EPILOG)
def verify(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Directory of a release.")],
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="Also follow the recipe again, and compare the bytes that it gives.")
    ] = False,
    trust_profile: Annotated[
        bool, typer.Option("--trust-profile", help="With --rebuild: take the release's sensitivity as it is.")
    ] = False,
    inputs: Annotated[
        Path, typer.Option(metavar="DIR", help="With --rebuild: where paths in the recipe start.")
    ] = Path(),
    scratch: Annotated[
        Path | None, typer.Option(metavar="DIR", help="With --rebuild: build there, and keep it; a temporary one.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Check a release: what is tampered with, missing or extra is named, and 1 returned.

    Example: `impq-edge verify build/release`

    Example: `impq-edge verify build/release --rebuild --inputs .`
    """
    from impq_edge.releases.verify import verify as check

    if not rebuild and (trust_profile or scratch is not None):
        raise ReleaseError("--trust-profile and --scratch are for --rebuild; give that too.")
    with console.progress() as advance:
        found = check(
            directory, rebuild=rebuild, trust_profile=trust_profile, base=inputs, scratch=scratch, say=console.say,
            progress=advance,
        )  # fmt: skip
    if as_json:
        console.show_json(found.to_json())
    else:
        _show_verdict(found)
    if not found.passed:
        raise typer.Exit(EXIT_CHECK_FAILED)


@app.command(epilog=_EPILOG)
def doctor(
    file: Annotated[Path | None, typer.Option(help="A GGUF to try; a small random one is made otherwise.")] = None,
    as_json: Json = False,
) -> None:
    """Say what is installed, what llama.cpp was built for, whether it runs here, and what to do if not.

    Example: `impq-edge doctor --json`
    """
    from impq_edge.validation.doctor import examine

    report = examine(file)
    if as_json:
        console.show_json(report.to_json())
    else:
        _show_examination(report)
    if report.problems:
        raise typer.Exit(EXIT_CHECK_FAILED)


def main() -> None:
    """Run the command line and turn every expected failure into one sentence and an exit code."""
    console.print_anything()
    try:
        try:
            app()
        finally:
            sys.stdout.flush()  # here, not when the interpreter ends: what fails is told
    except ImpqError as error:
        console.fail(str(error))
        sys.exit(EXIT_BAD_INPUT)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "impq_edge":
            raise
        console.fail(f"{error.name} is not installed, which this command needs; pip install 'impq-edge[workstation]'.")
        sys.exit(EXIT_BAD_INPUT)
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        console.give_up_output()
        where = error.filename or "What stdout leads to"
        console.fail(f"{where} cannot be written: {error.strerror}; make room there and run the same command again.")
        sys.exit(EXIT_BAD_INPUT)


def _confirmed(question: str) -> bool:
    """Ask a person, where there is one."""
    return sys.stdin.isatty() and typer.confirm(question, err=True)


def _show_dry_run(found: "DryRun") -> None:
    decided = {cell.file: cell.is_decided for cell in found.cells}
    numbers = {name: str(number) for number, name in enumerate(found.files, 1)}
    console.show_line(f"{found.name}, in {found.directory}:")
    for name, size in found.files.items():
        console.show_line(f"{numbers[name]:>3}  {name}  {'' if decided[name] else 'about '}{size:,} bytes")
    rows = [
        [
            cell.device, f"{cell.context_tokens:,}", numbers[cell.file], _mib(cell.memory_bytes),
            "–" if cell.likely_tok_per_s is None else _speed(cell.likely_tok_per_s),
        ]
        for cell in found.cells
    ]  # fmt: skip
    console.show_table("Who takes which", ["device", "context", "file", "memory, MiB", "tokens/s"], rows)
    for model, evaluations in found.evaluations.items():
        told = f"{evaluations:,} evaluations at most" if evaluations else "its sensitivity is known"
        console.show_line(f"{model}: {told}")
    total = sum(found.files.values())
    console.show_line(
        f"{len(found.files)} files of {total:,} bytes in all, and {_mib(found.work_bytes)} MiB to compare them with, "
        "removed when their model is done."
    )
    if not all(cell.is_decided for cell in found.cells):
        console.show_line(
            "“About”: sensitivity decides, within the limits; files of one model that come out equal are built once."
        )


def _show_release(made: "Manifest", directory: Path, address: str | None) -> None:
    for number, file in enumerate(made.files, 1):
        console.show_line(f"{number:>3}  {file.file}  {file.file_bytes:,} bytes")
    rows = [
        [
            taker.device, f"{taker.context_tokens:,}", str(number), f"×{taker.measured.perplexity_ratio_to_f16:.4f}",
            f"{taker.measured.kl_divergence:.4f}", "passed" if taker.passed else "failed",
        ]
        for number, file in enumerate(made.files, 1)
        for taker in file.takers
    ]  # fmt: skip
    console.show_table(made.name, ["device", "context", "file", "perplexity to F16", "KLD", "gates"], rows)
    for name in ("README.md", "report.html"):
        if (directory / name).exists():
            console.show_line(str(directory / name))
    if address is not None:
        console.show_line(address)


def _tell_failed_gates(made: "Manifest", repository: str | None) -> None:
    for file in made.files:
        for taker in file.takers:
            for gate in taker.gates:
                if gate.status == "failed":
                    limit = "" if gate.limit is None else f": {_told(gate.value)}, limit {_told(gate.limit)}"
                    at = f"{taker.device} at {taker.context_tokens:,} tokens"
                    console.fail(f"{file.file} fails {gate.name} for {at}{limit} ({gate.detail}).")
    if repository is not None:
        console.fail(f"Nothing was pushed to {repository}.")


def _told(value: float | None) -> str:
    return "unknown" if value is None else f"{value:,.0f}" if value >= 10000 else f"{value:.6g}"


def _show_verdict(found: "Verdict") -> None:
    for finding in found.findings:
        console.show_line(f"{finding.kind}: {finding.path} ({finding.detail})")
    if found.findings:
        return
    again = f", {found.rebuilt} of them made again with the same bytes" if found.rebuilt else ""
    console.show_line(f"{found.manifest.name}: {found.checked} files as they were made{again}")
    if not found.manifest.passed:
        console.show_line("Its manifest says that a gate failed when it was made.")


def _show_plan(made: "Plan", device: "DeviceProfile") -> None:
    console.show_line(
        f"{made.model}, {made.weights / 1e9:.2f} billion weights, on {device.title}, {_gib(made.memory_bytes)} GiB, "
        f"with {made.context_tokens:,} tokens of context in {made.kv_type}:"
    )
    if made.best:
        console.show_line(_summary(made.best))
    elif made.fits:
        fitting = ", ".join(v.name for v in made.variants if v.fits)
        console.show_line(f"All blocks at {made.variants[0].name} do not fit; {fitting} would.")
    wide = console.width() >= _WIDE_TABLE
    columns = {"variant": [v.name for v in made.variants], "file\nGiB": [_gib(v.file_bytes) for v in made.variants]}
    if wide:
        columns["bits/\nweight"] = [f"{v.bits_per_weight:.2f}" for v in made.variants]
        columns["needs\nGiB"] = [_gib(v.memory.total_bytes) for v in made.variants]
    columns["free\nGiB"] = [_gib(v.free_bytes) for v in made.variants]
    columns["largest\ncontext"] = [_context(v) for v in made.variants]
    columns["generates\ntokens/s"] = [_rate(v.speeds.generation, wide) for v in made.variants]
    if any(v.speeds.prompt for v in made.variants):
        columns["reads\ntokens/s"] = [_rate(v.speeds.prompt, wide) for v in made.variants]
    ours = sum(1 for v in made.variants if v.kind != "stock")
    console.show_table("What it takes", list(columns), list(zip(*columns.values(), strict=True)), {ours - 1})
    bars = [
        console.Bar(v.name, _bar_parts(v.memory.parts()), f"{_gib(abs(v.free_bytes))} {_verdict(v)}")
        for v in made.variants
    ]
    limit = console.Limit(made.memory_bytes, f"{_gib(made.memory_bytes)} GiB", "the device's memory", "free")
    console.show_bars("Where memory goes", bars, limit)
    gpu_bytes = made.variants[0].memory.gpu_memory_bytes
    if gpu_bytes is not None:
        bars = [
            console.Bar(
                v.name, _bar_parts(v.memory.gpu_parts()), f"{_gib(abs(free))} {'free' if free >= 0 else 'over'}"
            )
            for v in made.variants
            if (free := v.memory.gpu_free_bytes) is not None
        ]
        limit = console.Limit(gpu_bytes, f"{_gib(gpu_bytes)} GiB", "the GPU's memory", "free")
        console.show_bars(f"Where the GPU's memory goes, {made.variants[0].memory.gpu_layers} layers", bars, limit)
    for note in made.notes:
        console.show_line(note)


def _summary(best: "Variant") -> str:
    what = f"All blocks at {best.name}" if best.kind == "uniform" else f"A {best.name}"
    speed = best.speeds.generation
    about = f", about {_speed(speed.likely_tok_per_s)} tokens/s" if speed else ""
    gpu_bytes = best.memory.gpu_free_bytes
    left = best.free_bytes if gpu_bytes is None else min(best.free_bytes, gpu_bytes)
    spare = f"{_gib(left)} GiB" if left >= 2**27 else f"{_mib(left)} MiB"
    return f"{what}: {spare} to spare, at most {best.largest_context_tokens:,} tokens of context{about}."


def _verdict(variant: "Variant") -> str:
    if variant.free_bytes < 0:
        return "over"
    return "free, file too large" if variant.memory.fits and not variant.fits else "free"


def _bar_parts(parts: dict[str, int]) -> dict[str, float]:
    """Join what is too small to be seen, and put first what is the same in every variant."""
    joined: dict[str, float] = dict.fromkeys(_BAR_ORDER, 0.0)
    for name, size in parts.items():
        kind = next((kind for word, kind in _BAR_KINDS.items() if word in name), name)
        joined[kind] = joined.get(kind, 0.0) + size
    return joined


def _show_plans(plans: "Sequence[Plan]") -> None:
    wide = console.width() >= _WIDE_TABLE
    shown = [made.best or min(made.variants, key=lambda v: v.memory.total_bytes) for made in plans]
    columns = {
        "device": [made.device for made in plans],
        "context": [f"{made.context_tokens:,}" for made in plans],
        "fits": [made.best.name if made.best else "nothing" for made in plans],
        "free\nGiB": [_gib(v.free_bytes) for v in shown],
        "largest\ncontext": [_context(v) for v in shown],
        "generates\ntokens/s": [_rate(v.speeds.generation if v.fits else None, wide) for v in shown],
    }
    if any(v.speeds.prompt for v in shown):
        columns["reads\ntokens/s"] = [_rate(v.speeds.prompt if v.fits else None, wide) for v in shown]
    title = f"{plans[0].model}: the most bits that fit"
    console.show_table(title, list(columns), list(zip(*columns.values(), strict=True)))
    for note in (note for note in plans[0].notes if all(note in made.notes for made in plans)):
        console.show_line(note)
    console.show_line("Plan for one device to see what its speeds are predicted from, and everything else that fits.")


def _context(variant: "Variant") -> str:
    return f"{variant.largest_context_tokens:,}" if variant.largest_context_tokens else "–"


def _rate(rate: "Rate | None", with_range: bool) -> str:
    if rate is None:
        return "–"
    likely = _speed(rate.likely_tok_per_s)
    return f"{likely} ({_speed(rate.low_tok_per_s)}–{_speed(rate.high_tok_per_s)})" if with_range else likely


def _speed(tok_per_s: float) -> str:
    return f"{tok_per_s:,.0f}" if tok_per_s >= 9.95 else f"{tok_per_s:.1f}" if tok_per_s >= 0.95 else f"{tok_per_s:.2f}"


def _gib(size_bytes: int) -> str:
    size = size_bytes / 2**30
    return f"{size:.2f}" if abs(size) >= 0.005 or not size else f"{size:.3f}"


def _show_validation(report: "ValidationReport") -> None:
    error = "" if report.perplexity_stderr is None else f" ± {report.perplexity_stderr:.3f}"
    measures = [
        ["perplexity", f"{_perplexity(report)}{error} on {report.tokens:,} tokens of {report.text}"],
        ["prompt", f"{report.prompt_tok_per_s:.1f} ± {report.prompt_sd_tok_per_s:.1f} tokens/s"],
        ["generation", f"{report.generation_tok_per_s:.1f} ± {report.generation_sd_tok_per_s:.1f} tokens/s"],
        ["peak memory", f"{_mib(report.peak_rss_bytes)} MiB at {report.settings.context_tokens:,} tokens of context"],
        *_limit_rows(report),
        ["file", f"{report.file_bytes:,} bytes, {report.bits_per_weight:.2f} bits/weight"],
        *_divergence_rows(report),
    ]
    console.show_table(report.file, ["measure", "value"], measures)
    checks = [[check.name, check.status.replace("_", " "), check.detail] for check in report.checks]
    console.show_table("passed" if report.passed else "failed", ["check", "status", "detail"], checks)


def _limit_rows(report: "ValidationReport") -> list[list[str]]:
    limit = report.memory_limit
    return [] if limit is None else [["memory limit", f"{_mib(limit.limit_bytes)} MiB ({limit.method})"]]


def _divergence_rows(report: "ValidationReport") -> list[list[str]]:
    d = report.divergence
    if d is None:
        return []
    return [
        ["reference", f"{report.reference}, perplexity {d.reference_perplexity:.3f}"],
        ["perplexity ratio", f"{d.perplexity_ratio:.5f} ± {d.perplexity_ratio_stderr:.5f}"],
        ["KL divergence", f"{d.kld_mean:.5f} ± {d.kld_stderr:.5f} nats/token"],
        ["… per token", f"median {d.kld_median:.5f}, 99 % below {d.kld_p99:.5f}, at most {d.kld_max:.5f}"],
        ["Δp, mean", f"{d.delta_p_mean:+.3%} ± {d.delta_p_stderr:.3%}"],
        ["Δp, RMS", f"{d.delta_p_rms:.3%} ± {d.delta_p_rms_stderr:.3%}"],
        ["same top token", f"{d.same_top:.2%} ± {d.same_top_stderr:.2%}"],
    ]


def _show_inspection(found: "Inspection") -> None:
    facts = {
        "name": found.name,
        "architecture": found.architecture,
        "parameters": f"{found.weights:,}",
        "licence": found.license,
        "base model": ", ".join(found.base_models),
        "file type": found.file_type,
        "quantised by": found.quantized_by,
        **{f"recipe: {key}": value for key, value in (found.recipe or {}).items()},
        "context": f"{found.context_tokens:,} tokens" if found.context_tokens else None,
        "chat template": found.chat_template or "none",
        "split": f"piece {found.piece} of {found.pieces}" if found.pieces > 1 else None,
        "size": f"{found.file_bytes:,} bytes"
        + (f", {found.bits_per_weight:.3f} bits/weight" if found.bits_per_weight else ""),
    }
    shown = [[key, str(value)] for key, value in facts.items() if value not in {None, ""}]
    console.show_table(found.file, ["fact", "value"], shown)
    rows = [
        [
            group.name, ", ".join(f"{kind} × {count}" for kind, count in group.types.items()), f"{group.tensors}",
            f"{group.weights:,}", f"{group.size_bytes:,}", f"{group.bits_per_weight:.3f}",
        ]
        for group in found.groups
    ]  # fmt: skip
    total_bytes = sum(group.size_bytes for group in found.groups)
    tensors = sum(group.tensors for group in found.groups)
    bits = f"{8 * total_bytes / found.weights:.3f}" if found.weights else "–"
    rows.append(["all", "", f"{tensors}", f"{found.weights:,}", f"{total_bytes:,}", bits])
    console.show_table("Tensors", ["part", "types", "tensors", "weights", "bytes", "bits/weight"], rows)
    if found.note:
        console.say(found.note)


def _show_examination(report: "DoctorReport") -> None:
    console.show_line(f"Python {report.python} on {report.machine}, {report.threads} threads")
    console.show_line(f"llama.cpp: {report.build.system_info if report.build else 'cannot be loaded'}")
    packages = [[p.name, p.extra or "base", p.version or "not installed"] for p in report.packages]
    console.show_table("Packages", ["package", "extra", "version"], packages)
    probes = [["yes" if p.use_extra_bufts else "no", p.status.replace("_", " "), p.detail] for p in report.probes]
    console.show_table("Running a model", ["repacked weights", "status", "detail"], probes)
    for problem in report.problems:
        console.fail(problem)


def _show_profile(made: "SensitivityProfile", shown: dict[str, Any], as_json: bool) -> None:
    rounds = made.design.rounds
    if as_json:
        told = {
            "objective": made.settings.objective,
            "phi": made.phi,
            "phi_stderr": made.phi_stderr,
            "evaluations": len(made.evaluations),
        }
        played = {} if rounds is None else {"method": "rounds", "budgets": len(rounds.budgets)}
        console.show_json({**shown, **told, **played, "stopped_by": made.stopped_by})
        return
    rows = [
        [name, f"{phi:+.5f}", f"{error:.5f}"]
        for name, phi, error in zip(shown["players"], made.phi, made.phi_stderr, strict=True)
    ]
    what = "Loss" if made.settings.objective == "loss" else "KL divergence"
    console.show_table(f"{what} increase at 2 bit, {made.model.name}", ["player", "φ, nats/token", "± s.e."], rows)
    how = "" if rounds is None else f" in rounds at {len(rounds.budgets)} budgets"
    console.show_line(f"{len(made.evaluations)} evaluations{how}, stopped by {made.stopped_by}")


def _show_ladder(made: "LadderProfile", shown: dict[str, Any], as_json: bool) -> None:
    table = made.divergences()
    if as_json:
        console.show_json({**shown, "types": made.types, "divergences": table.tolist()})
        return
    rows = [[name, *(f"{value:.6f}" for value in row)] for name, row in zip(shown["players"], table, strict=True)]
    title = f"KL divergence of {made.model.name} with one player at fewer bits, nats/token"
    console.show_table(title, ["player", *(f"{bits} bit" for bits in made.types)], rows)


def _perplexity(report: "ValidationReport") -> str:
    return "not finite" if report.perplexity is None else f"{report.perplexity:.3f}"


def _gpu(device: "DeviceProfile") -> str:
    """Return the memory of a GPU that llama.cpp is to use."""
    if not device.gpu_layers:
        return "–"
    return _mib(device.gpu_memory_bytes) if device.gpu_memory_bytes else "shared"


def _device_rows(device: "DeviceProfile") -> list[list[str]]:
    shown = device.to_json()
    sources = shown.pop("sources")
    return [[key, str(value), sources.get(key.split(".")[0], "")] for key, value in _flat(shown) if value is not None]


def _flat(table: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from ((f"{key}.{inner}", found) for inner, found in _flat(value))
        else:
            yield key, value


def _seconds(text: str | None) -> float | None:
    if text is None:
        return None
    found = _DURATION.fullmatch(text.strip())
    if found is None:
        raise SensitivityError(f"--time-limit {text!r} is not a time; write it like 90s, 10min or 1.5h.")
    return float(found[1]) * _SECONDS[found[2]]


def _types(text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and len(part) < 3 for part in parts):
        raise SensitivityError(f"--types {text!r} is no list of widths; write it like 2,4 or 2,3,4,5,6,8.")
    return tuple(int(part) for part in parts)


def _bytes(text: str | None, flag: str = "--budget") -> int | None:
    if text is None:
        return None
    found = _BUDGET.fullmatch(text.strip())
    if found is None:
        raise AllocationError(f"{flag} {text!r} is not a size; write it like 900MiB or 1.5GiB.")
    return int(Fraction(found[1]) * _UNITS[(found[2] or "B").lower()])


def _fraction(text: str | None) -> Fraction | None:
    if text is None:
        return None
    if _BITS.fullmatch(text.strip()) is None:
        raise AllocationError(f"--average-bits {text!r} is not a number; write it like 3, 2.75 or 8/3.")
    return Fraction(text.strip())


def _command_line() -> str:
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / 2**20:,.0f}"


if __name__ == "__main__":
    main()
