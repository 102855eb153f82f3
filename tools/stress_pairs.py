"""Start several builds or releases in one directory at random moments, kill some, and see what it ends with.

    python tools/stress_pairs.py FOLDER --trials 30 --at-once 2 -- build --device raspberry-pi-5 --average-bits 3
    python tools/stress_pairs.py FOLDER --beside 'convert --type q4_k -o {out}/uniform-4bit.gguf' -- build …

What follows ``--`` is a command of ``impq-edge`` without its ``-o``. Whoever comes second must end with one sentence
and status 3, or do nothing where all is done; with ``--kill`` one of them is killed with SIGKILL at a random moment.
Commands of ``--beside`` are started with them, as by hand, and may end with status 0 or one sentence. After each trial
the command is run once more, and the directory must hold the bytes of an undisturbed run. With ``--apart`` each has a
directory of its own, and all must end well. Prints counts as JSON.
"""

import random
import shlex
import shutil
import time
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer
from stress_build import contents, differences
from stressed import Ended, Started, ended, report, tell, undisturbed


def main(
    folder: Annotated[Path, typer.Argument(help="Where all of it goes.")],
    words: Annotated[list[str], typer.Argument(help="The command, after `--`.")],
    trials: Annotated[int, typer.Option(help="How many.")] = 30,
    at_once: Annotated[int, typer.Option(help="How many are started in each.")] = 2,
    kills: Annotated[bool, typer.Option("--kill", help="Kill one of them.")] = False,
    beside: Annotated[list[str] | None, typer.Option(help="Another command, {out} in it the directory.")] = None,
    apart: Annotated[bool, typer.Option("--apart", help="A directory for each.")] = False,
    within: Annotated[float, typer.Option(help="Share of an undisturbed run in which all are started.")] = 0.5,
    seed: Annotated[int, typer.Option(help="Of the moments.")] = 0,
) -> None:
    """Try it so many times."""
    folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    wanted = undisturbed(folder / "undisturbed", words)
    whole_s = max(time.monotonic() - started, 5.0)
    generator = random.Random(seed)
    counts, wrong = Counter[str](), list[str]()
    for trial in range(trials):
        outs = [folder / f"trial-{trial}" / (f"out-{n}" if apart else "out") for n in range(at_once)]
        plans = [(out, words) for out in outs] + [
            (out.parent, shlex.split(text.format(out=out))) for text in beside or () for out in set(outs)
        ]
        moments = sorted(generator.uniform(0, within * whole_s) for _ in plans)
        generator.shuffle(plans)
        found = together(plans, [0.0, *moments[1:]], generator if kills else None, whole_s)
        told = Counter(map(kind_of, found))
        counts += told
        wrong += [f"trial {trial}: {fault}" for done in found for fault in faults_of(done)]
        for out in dict.fromkeys(outs):
            last = ended(out, words)
            wrong += [f"trial {trial}, once more: {last.said[-400:]}"] if last.status else []
            wrong += [f"trial {trial}: {text}" for text in differences(wanted, contents(out), out.name)]
        tell(f"trial {trial}: {dict(told)}; {len(wrong)} wrong in all")
        shutil.rmtree(folder / f"trial-{trial}")
    raise typer.Exit(report({"trials": trials, "processes": counts.total(), "ended": dict(counts)}, wrong))


def together(
    plans: list[tuple[Path, list[str]]], moments: list[float], killer: random.Random | None, whole_s: float
) -> list[Ended]:
    """Start every command at its moment, kill one where asked for, and wait for all."""
    started, processes = time.monotonic(), []
    for (out, words), moment in zip(plans, moments, strict=True):
        time.sleep(max(0.0, started + moment - time.monotonic()))
        processes.append(Started(out, words))
    if killer is not None:
        time.sleep(killer.uniform(0, whole_s))
        killer.choice(processes).kill(alone=killer.random() < 0.5)
    return [process.end() for process in processes]


def kind_of(done: Ended) -> str:
    """Return how a command ended, in a word."""
    refused = done.errors[0] if done.errors else ""
    return {0: "done", -9: "killed"}.get(done.status) or ("in use" if " is in use by " in refused else refused)


def faults_of(done: Ended) -> list[str]:
    """Say what is wrong with how a command ended."""
    return [] if done.status in {0, -9} else done.faults(" is in use by ", "run the same command again")


if __name__ == "__main__":
    typer.run(main)
