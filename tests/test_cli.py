"""The command line as a user meets it: real processes, data on stdout, sentences on stderr, exit codes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from impq_edge.spqe.profile import Design, SensitivityProfile

ON_PI = ("--device", "raspberry-pi-5")
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "200", "NO_COLOR": "1"}


def run(*arguments: str | Path | int, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "impq_edge.cli", *map(str, arguments)],
        check=False, capture_output=True, text=True, env={**ENVIRONMENT, **environment}, cwd=cwd,
    )  # fmt: skip


def test_devices() -> None:
    table, listed = run("devices"), json.loads(run("devices", "--json").stdout)
    names = {device["name"] for device in listed["devices"]}
    assert names >= {
        "raspberry-pi-5", "raspberry-pi-5-4gb", "raspberry-pi-5-16gb", "raspberry-pi-4-4gb", "raspberry-pi-zero-2w",
        "jetson-orin-nano-8gb", "rock-5b-8gb", "android-8gb", "mini-pc-n100-8gb", "laptop-16gb",
        "laptop-16gb-rtx4050",
    }  # fmt: skip
    assert "shared" in table.stdout and "6,144" in table.stdout  # memory of GPUs
    assert table.returncode == 0 and all(name in table.stdout for name in names)
    shown = run("devices", "show", "raspberry-pi-5")
    assert "17.1" in shown.stdout or "17100000000" in shown.stdout


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has it")
@pytest.mark.parametrize("as_json", [(), ("--json",)])
def test_output_that_finds_no_room_is_one_sentence(as_json: tuple[str, ...]) -> None:
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "impq_edge.cli", "devices", *as_json]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False, env=ENVIRONMENT)
    assert done.returncode == 3 and done.stderr.startswith("Error: What stdout leads to cannot be written: No space")
    assert len(done.stderr.splitlines()) == 1


def test_unknown_device_names_the_nearest() -> None:
    done = run("devices", "show", "rapsberry-pi5")
    assert done.returncode == 3 and done.stdout == ""
    assert "raspberry-pi-5" in done.stderr and "Traceback" not in done.stderr


def test_a_devices_toml_of_ones_own(tmp_path: Path) -> None:
    from impq_edge.data import data_path

    own = tmp_path / "mine.toml"
    own.write_text(data_path("devices", "raspberry-pi-5.toml").read_text().replace("raspberry-pi-5", "mine"))
    assert json.loads(run("devices", "show", own, "--json").stdout)["name"] == "mine"


def test_stages_one_after_another(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    model, out = checkpoints["gemma2"], tmp_path
    done = run("profile", "--model", model, "--permutations", 1, "--tokens", 512, "-o", out / "p.json", "--json")
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["phi"]) == 21  # the matrices of three blocks
    done = run(
        "allocate", out / "p.json", "--device", "raspberry-pi-zero-2w", "--average-bits", "8/3", "-o", out / "a.json",
        "--json", "--context", "256",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    allocation = json.loads(done.stdout)
    assert allocation["average_bits"] <= 8 / 3  # a random model's φ may be negative: then even less is spent
    done = run("convert", "--model", model, "--allocation", out / "a.json", "-o", out / "m.gguf", "--json")
    assert done.returncode == 0, done.stderr
    artifact = json.loads(done.stdout)
    assert artifact["file_bytes"] == allocation["predicted_file_bytes"] == (out / "m.gguf").stat().st_size
    done = run(
        "validate", out / "m.gguf", "--device", "raspberry-pi-zero-2w", "--windows", 1, "--context", 256, "--json"
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["passed"] and report["sha256"] == artifact["sha256"]


def test_a_profile_as_asked_for(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "p.json"
    done = run(
        "profile", "--model", checkpoints["llama"], "--backend", "quanto", "--group-size", 64,
        "--players", "sublayers", "--method", "impq", "--estimator", "stratified", "--until-stable", "order",
        "--permutations", 6, "--tokens", 512, "--seed", 3, "-o", out, "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told, made = json.loads(done.stdout), SensitivityProfile.load(out)
    assert told.keys() == {
        "profile",
        "sha256",
        "players",
        "objective",
        "phi",
        "phi_stderr",
        "evaluations",
        "stopped_by",
    }
    assert told["players"] == [f"blk.{block}.{part}" for block in range(3) for part in ("attn", "ffn")]
    assert (told["profile"], told["sha256"]) == (str(out), made.identity())
    assert tuple(told["phi"]) == made.phi and tuple(told["phi_stderr"]) == made.phi_stderr
    assert told["evaluations"] == len(made.evaluations) <= 32 and told["stopped_by"] == made.stopped_by
    assert made.design == Design("stratified", 6, 3, "order")
    assert made.settings.backend["name"] == "quanto" and made.settings.backend["group_size"] == 64
    assert made.bits_per_weight == (2 + 2 * 32 / 64, 4 + 2 * 32 / 64)  # scale and shift of a group in float32
    sentence = done.stderr.strip()
    assert sentence.startswith(f"{len(made.evaluations)} evaluations, which recomputed ") and "\n" not in sentence


def test_a_game_in_rounds_and_what_is_chosen_from_it(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    out, options = tmp_path / "p.json", ("--players", "sublayers", "--permutations", 6, "--tokens", 512)
    done = run(
        "profile", "--model", checkpoints["qwen3"], "--method", "rounds", "--curve", "2.5,3", *options, "-o", out,
        "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told, made = json.loads(done.stdout), SensitivityProfile.load(out)
    assert (told["method"], told["budgets"], told["stopped_by"]) == ("rounds", 2, "evaluations")
    assert told["evaluations"] == len(made.losses) == 6 * 5 + 2 and told["phi"] == list(made.phi)
    shown = run(
        "profile", "--model", checkpoints["qwen3"], "--method", "rounds", "--curve", "2.5,3", *options, "-o", out
    )
    assert shown.stdout.endswith("32 evaluations in rounds at 2 budgets, stopped by evaluations\n")

    def allocated(*more: str) -> subprocess.CompletedProcess[str]:
        return run("allocate", out, "--device", "laptop-16gb", "--average-bits", "3", *more, "-o", tmp_path / "a.json")

    chosen, solved = json.loads(allocated("--json").stdout), json.loads(allocated("--method", "impq", "--json").stdout)
    assert chosen["evidence"]["is_measured"] and chosen["lower_bound"] is None and chosen["alpha"] is None
    assert "evidence" not in solved and solved["lower_bound"] is not None and solved["alpha"] == 0.5
    assert "the best of 32 measured coalitions that fits, KL divergence from " in allocated().stdout
    assert "nats/token, optimal" in allocated("--method", "impq").stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "end"),
    [
        (("--method", "impq", "--until-stable", "order"), "evaluations, stopped by stability\n"),
        (("--method", "rounds"), "evaluations in rounds at 7 budgets, stopped by evaluations\n"),
    ],
)
def test_the_number_of_workers_changes_no_byte(
    checkpoints: dict[str, Path], tmp_path: Path, options: tuple[str, ...], end: str
) -> None:
    pytest.importorskip("ray", reason="ray is not installed, see the extra 'cluster'")
    outs = {workers: tmp_path / f"{workers}.json" for workers in (1, 2)}
    for workers, out in outs.items():
        done = run(
            "profile", "--model", checkpoints["llama"].name, "--players", "sublayers", "--permutations", 60,
            "--tokens", 512, *options, "--workers", workers, "-o", out,
            cwd=checkpoints["llama"].parent,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert len(done.stderr.splitlines()) == 1 and " evaluations, which recomputed " in done.stderr, done.stderr
        assert "blk.2.ffn" in done.stdout and done.stdout.endswith(end)
    assert outs[1].read_bytes() == outs[2].read_bytes()
    assert set(tmp_path.iterdir()) == set(outs.values())


def test_workers_without_ray_say_what_to_install(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    code = "import sys; sys.modules['ray'] = None; from impq_edge.cli import main; main()"
    out = tmp_path / "out" / "p.json"
    done = subprocess.run(
        [sys.executable, "-c", code, "profile", "--model", checkpoints["llama"], "--tokens", "512", "--workers", "2",
         "-o", out],
        check=False, capture_output=True, text=True, env=ENVIRONMENT,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr == "Error: --workers 2 needs ray; pip install 'impq-edge[cluster]'.\n"
    assert not out.parent.exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["build", "--device", "raspberry-pi-9000", "-o", "OUT"], 3, "raspberry-pi-5"),
        (["build", "--device", "raspberry-pi-5", "--model", "someone/unknown", "-o", "OUT"], 3, "HF_HUB_OFFLINE"),
        (["build", "--device", "raspberry-pi-5", "--average-bits", "lots", "-o", "OUT"], 3, "'lots' is not a number"),
        (["build", "--device", "raspberry-pi-5", "--budget", "big", "-o", "OUT"], 3, "write it like 900MiB"),
        (["build", "-o", "OUT"], 2, "--device"),
        (["profile", "--backend", "awq", "-o", "OUT"], 2, "awq"),
        (["profile", "--players", "heads", "-o", "OUT"], 2, "heads"),
        (["profile", "--time-limit", "soon", "-o", "OUT"], 3, "'soon' is not a time; write it like 90s, 10min or 1.5h"),
        (["profile", "--method", "guess", "-o", "OUT"], 2, "guess"),
        (["profile", "--method", "rounds", "--until-stable", "order", "-o", "OUT"], 3, "is for --method impq"),
        (["build", *ON_PI, "--method", "rounds", "--types", "2,3,4", "-o", "OUT"], 3, "between 2 and 4 bit"),
        (["build", *ON_PI, "--method", "rounds", "--alpha", "0.5", "-o", "OUT"], 3, "--alpha 0.5 is for --method impq"),
        (["profile", "--method", "impq", "--curve", "3", "-o", "OUT"], 3, "--curve 3 is for --method rounds"),
        (["allocate", "tiny-llama3-kquant", *ON_PI, "--method", "rounds", "-o", "OUT"], 3, "what rounds measured"),
        (["profile", "--group-size", "64", "--backend", "kquant", "-o", "OUT"], 3,
         "Backend 'kquant' has no setting 'group-size'; it takes encode."),
        (["allocate", "nothing.json", "--device", "raspberry-pi-5", "-o", "OUT"], 3, "nothing.json does not exist"),
        (["allocate", "tiny-llama3-kquant", *ON_PI, "--budget", "1MiB", "-o", "OUT"], 3, "--budget"),
        (["allocate", "tiny-llama3-kquant", *ON_PI, "--average-bits", "7", "-o", "OUT"], 3, "2…4"),
        (["convert", "--type", "q9", "-o", "OUT"], 2, "q9"),
        (["convert", "-o", "OUT"], 3, "--allocation FILE or --type TYPE"),
        (["validate", "pyproject.toml"], 3, "not a GGUF"),
        (["validate", "nothing.gguf"], 3, "does not exist"),
        (["inspect", "pyproject.toml"], 3, "not a GGUF"),
        (["calibrate-device", *ON_PI, "-o", "OUT"], 3, "raspberry-pi-5"),
        (["allocate", "tiny-llama3-kquant", *ON_PI, "--min-tokens-per-second", "1e5", "-o", "OUT"], 3,
         "raspberry-pi-5 generates at most "),
        (["allocate", "tiny-llama3-kquant", "--device", "laptop-16gb", "--min-tokens-per-second", "5", "-o", "OUT"], 3,
         "run impq-edge calibrate-device on it"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence(tmp_path: Path, arguments: list[str], code: int, message: str) -> None:
    out = tmp_path / "out"
    done = run(*[str(out) if argument == "OUT" else argument for argument in arguments], HF_HOME=str(tmp_path / "hf"))
    assert done.returncode == code, done.stderr
    assert message in done.stderr and done.stdout == ""
    assert "Traceback" not in done.stderr and not out.exists()
    if code == 3:
        told = [line for line in done.stderr.splitlines() if not line.startswith(("Model: ", "This writes"))]
        assert len(told) == 1 and told[0].startswith("Error: ")


def test_a_file_cut_short(demo_gguf: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(demo_gguf.read_bytes()[:-1000])
    done = run("validate", cut)
    assert done.returncode == 3 and "cut short by" in done.stderr


def test_a_file_and_its_reference(demo_gguf: Path, tiny_ggufs: dict[str, Path]) -> None:
    short = ("--windows", 1, "--context", 64)
    done = run("validate", demo_gguf, "--reference", demo_gguf, *short)
    assert done.returncode == 0, done.stderr
    assert "KL divergence" in done.stdout and "0.00000 ± 0.00000 nats/token" in done.stdout
    assert "100.00% ± 0.00%" in done.stdout
    done = run("validate", demo_gguf, "--reference", tiny_ggufs["qwen3"], *short, "--json")
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.startswith("Error: ") and len(done.stderr.splitlines()) == 1
    assert "tokenise the text differently" in done.stderr


def test_inspect(demo_gguf: Path) -> None:
    done, told = run("inspect", demo_gguf), json.loads(run("inspect", demo_gguf, "--json").stdout)
    assert done.returncode == 0 and done.stderr == ""
    assert told["architecture"] == "llama" and told["file_type"] == "Q4_K_S" and told["recipe"]["type"] == "q4_k"
    assert sum(group["weights"] for group in told["groups"]) == told["weights"]
    for shown in ("tiny-llama3", f"{told['weights']:,}", "ffn_down", "q4_k × 16", "chat template"):
        assert shown in done.stdout


def test_every_command_has_help_with_an_example() -> None:
    for command in (
        "devices",
        "devices show",
        "plan",
        "profile",
        "allocate",
        "convert",
        "validate",
        "inspect",
        "build",
        "doctor",
        "calibrate-device",
    ):
        done = run(*command.split(), "--help")
        assert done.returncode == 0 and "Exit codes" in done.stdout
        assert "Example" in done.stdout or command == "devices show" or "doctor" in command


def test_doctor(demo_gguf: Path) -> None:
    done = run("doctor", "--file", demo_gguf, "--json")
    told = json.loads(done.stdout)
    assert done.returncode == (1 if told["problems"] else 0)
    assert {probe["status"] for probe in told["probes"]} == {"passed"}
    assert told["build"]["system_info"]
