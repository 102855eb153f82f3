"""The game on Ray's workers: real processes on this machine, a toy game where the model does not matter."""

import collections
import itertools
import os
import signal
import subprocess
import sys
import textwrap
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from impq_edge.errors import ImpqError, ModelError, SensitivityError
from impq_edge.spqe import cluster
from impq_edge.spqe.cluster import RayEvaluator
from impq_edge.spqe.sampling import Coalition

WANTED: list[Coalition] = list(itertools.product((4, 2), repeat=6))


class Toy:
    """Losses that say who computed them; every evaluation leaves a line in a file before it is delivered."""

    def __init__(self, log: Path, seconds: float = 0.0, refuse: Callable[[Coalition], Any] = lambda _: None) -> None:
        self.evaluations = 0
        self.recomputed_share = 0.5
        self._log, self._seconds, self._refuse = log, seconds, refuse

    def losses(self, coalition: Coalition) -> np.ndarray:
        self._refuse(coalition)
        self.evaluations += 1
        with self._log.open("a") as file:
            file.write(f"{os.getpid()} {''.join(map(str, coalition))}\n")
        time.sleep(self._seconds)
        return np.array([worth(coalition), os.getpid()], dtype=np.float64)


def worth(coalition: Coalition) -> float:
    return sum(bits / (3 + i) for i, bits in enumerate(coalition))


def meeting(place: Path, workers: int) -> Callable[[Coalition], None]:
    """Let no worker play before that many are there, however slowly processes start."""
    place.mkdir()

    def wait(_: Coalition) -> None:
        (place / str(os.getpid())).touch()
        while len(list(place.iterdir())) < workers:
            time.sleep(0.01)

    return wait


def logged(path: Path) -> list[tuple[int, Coalition]]:
    lines = [line.split() for line in path.read_text().splitlines()]
    return [(int(pid), tuple(map(int, bits))) for pid, bits in lines]


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    found = pytest.importorskip("ray", reason="ray is not installed, see the extra 'cluster'")
    found.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import the tests
    found.init("local", num_cpus=4, object_store_memory=75 * 2**20, include_dashboard=False, log_to_driver=False)
    yield found
    found.shutdown()


def test_every_coalition_is_evaluated_and_delivered_once(ray: Any, tmp_path: Path) -> None:
    log, all_there = tmp_path / "log", meeting(tmp_path / "met", 3)
    with RayEvaluator(lambda: Toy(log, 0.01, all_there), 3) as evaluator:
        delivered = list(evaluator.evaluate(WANTED))
        assert sorted(c for c, _ in delivered) == sorted(WANTED) == sorted(c for _, c in logged(log))
        assert all(losses[0] == worth(c) for c, losses in delivered)
        assert evaluator.evaluations == len(WANTED) and evaluator.recomputed_share == 0.5
        assert len({pid for pid, _ in logged(log)}) == 3
        assert list(evaluator.evaluate([])) == []
        assert [c for c, _ in evaluator.evaluate(WANTED[:1])] == WANTED[:1]
        assert evaluator.ask(lambda toy: toy.recomputed_share) == 0.5
        assert evaluator.lost_workers == 0


def test_a_worker_gets_neighbours_in_the_order_given(ray: Any, tmp_path: Path) -> None:
    log, all_there = tmp_path / "log", meeting(tmp_path / "met", 2)
    with RayEvaluator(lambda: Toy(log, 0.01, all_there), 2) as evaluator:
        list(evaluator.evaluate(WANTED))
    by_worker = collections.defaultdict(list)
    for pid, coalition in logged(log):
        by_worker[pid].append(WANTED.index(coalition))
    steps = [b - a for indices in by_worker.values() for a, b in itertools.pairwise(indices)]
    assert all(step > 0 for step in steps) and steps.count(1) > len(WANTED) / 2


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_worker_is_replaced_and_only_what_it_owed_is_repeated(ray: Any, tmp_path: Path, workers: int) -> None:
    log = tmp_path / "log"
    with RayEvaluator(lambda: Toy(log, 0.02), workers) as evaluator:
        delivered, victim = [], 0
        for coalition, losses in evaluator.evaluate(WANTED):
            delivered.append((int(losses[1]), coalition))
            if len(delivered) == 10:
                victim = int(losses[1])
                os.kill(victim, signal.SIGKILL)
        assert evaluator.lost_workers == 1
    assert sorted(c for _, c in delivered) == sorted(WANTED)
    owed = {c for pid, c in logged(log) if pid == victim} - {c for pid, c in delivered if pid == victim}
    for coalition, times in collections.Counter(c for _, c in logged(log)).items():
        assert times == 1 + (coalition in owed)
    assert len({pid for pid, _ in logged(log)}) > 1


def test_workers_that_only_die_are_given_up(ray: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "DEATHS_PER_WORKER", 2)

    def die(coalition: Coalition) -> None:
        if coalition == WANTED[40]:
            os.kill(os.getpid(), signal.SIGKILL)

    delivered = []
    with RayEvaluator(lambda: Toy(tmp_path / "log", refuse=die), 1) as evaluator:  # noqa: SIM117
        with pytest.raises(SensitivityError, match="2 workers died in a row") as caught:
            for coalition, _ in evaluator.evaluate(WANTED):
                delivered.append(coalition)
    assert delivered == WANTED[:40]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("error", [SensitivityError("The loss is not finite."), ZeroDivisionError("a bug")])
def test_an_error_of_the_game_arrives_as_itself(ray: Any, tmp_path: Path, error: Exception) -> None:
    def refuse(coalition: Coalition) -> None:
        if coalition == WANTED[20]:
            raise error

    with RayEvaluator(lambda: Toy(tmp_path / "log", refuse=refuse), 1) as evaluator:
        with pytest.raises(type(error)) as caught:
            list(evaluator.evaluate(WANTED))
        assert type(caught.value) is type(error) and str(caught.value) == str(error)
        assert (caught.value.__cause__ is None) == isinstance(error, ImpqError)  # a bug shows where it was raised


def test_an_error_while_loading_arrives_as_itself(ray: Any) -> None:
    def make() -> Toy:
        raise ModelError("The checkpoint is not here.")

    with RayEvaluator(make, 2) as evaluator, pytest.raises(ModelError) as caught:
        list(evaluator.evaluate(WANTED))
    assert type(caught.value) is ModelError and str(caught.value) == "The checkpoint is not here."


def test_stopping_early_cancels_the_rest_and_keeps_the_workers(ray: Any, tmp_path: Path) -> None:
    log, all_there = tmp_path / "log", meeting(tmp_path / "met", 2)
    wanted: list[Coalition] = list(itertools.product((4, 2), repeat=12))
    with RayEvaluator(lambda: Toy(log, 0.3, all_there), 2) as evaluator:
        results = evaluator.evaluate(wanted)
        next(results)
        results.close()
        last = wanted[-8:]  # four for each worker, who are then through with what was cancelled
        assert sorted(c for c, _ in evaluator.evaluate(last)) == sorted(last)
        assert len({pid for pid, _ in logged(log)}) == 2
    assert len([c for _, c in logged(log) if c in wanted[:24]]) < 24  # the two runs of 12 then open


def test_a_cluster_too_small_is_refused(ray: Any) -> None:
    with pytest.raises(SensitivityError, match="--workers 5 needs 5 CPUs, and Ray has 4;"):
        RayEvaluator(lambda: Toy(Path("log")), 5).__enter__()


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "head", "head:port"])
def test_a_cluster_that_does_not_answer_is_refused(address: str) -> None:
    with pytest.raises(SensitivityError, match=f"No Ray cluster answers at '{address}'"):
        RayEvaluator(lambda: Toy(Path("log")), 2, address=address).__enter__()


def test_ray_is_named_when_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SensitivityError, match=r"--workers 2 needs ray; pip install 'impq-edge\[cluster\]'."):
        RayEvaluator(lambda: Toy(Path("log")), 2).__enter__()


def test_the_number_of_workers_changes_no_bit_of_a_loss(ray: Any, checkpoints: dict[str, Path]) -> None:
    """On the threads of this process the local game may differ in rounding."""
    import torch

    directory = checkpoints["llama"]
    wanted: list[Coalition] = list(itertools.product((4, 2), repeat=3))

    def make() -> Any:
        import torch

        from impq_edge.backends import load_backend
        from impq_edge.model.calibration import Windows
        from impq_edge.model.load import read_tensor
        from impq_edge.model.spec import read_model
        from impq_edge.spqe.game import Game
        from impq_edge.spqe.walk import open_walk

        spec = read_model(directory)
        tokens = np.random.default_rng(0).integers(10, 8000, size=(5, 96))
        game = Game(open_walk(directory, spec, Windows(tokens, ""), torch.device("cpu"), torch.float32))
        game.prepare(
            lambda tensor: torch.from_numpy(read_tensor(directory, tensor)), load_backend("kquant", encode="rtn")
        )
        return game

    found = {}
    for workers in (1, 2):
        with RayEvaluator(make, workers) as evaluator:
            found[workers] = dict(evaluator.evaluate(wanted))
            assert evaluator.ask(lambda _: torch.get_num_threads()) == 1
    local = make()
    for coalition in wanted:
        assert np.array_equal(found[1][coalition], found[2][coalition])
        assert local.losses(coalition) == pytest.approx(found[1][coalition], abs=2e-5)


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks for processes in Linux's /proc")
@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL], ids=["ctrl-c", "kill -9"])
def test_no_end_leaves_a_process_or_a_file_and_ray_says_nothing(tmp_path: Path, end: signal.Signals) -> None:
    pytest.importorskip("ray", reason="ray is not installed, see the extra 'cluster'")
    script = """
        import os, signal, sys, time
        import numpy as np
        from impq_edge.spqe.cluster import RayEvaluator

        def make():
            class Toy:
                evaluations, recomputed_share = 0, 1.0
                def losses(self, coalition):
                    time.sleep(0.1)
                    return np.array([os.getpid()], dtype=np.float64)
            return Toy()

        try:
            with RayEvaluator(make, 2) as evaluator:
                seen = set()
                for done, (_, losses) in enumerate(evaluator.evaluate([(4,) * 20] * 10_000)):
                    seen.add(int(losses[0]))
                    if done == 3:
                        os.kill(int(losses[0]), signal.SIGKILL)
                    if len(seen) == 3:  # the replacement plays too
                        print("playing", flush=True)
                        time.sleep(60)
        except KeyboardInterrupt:
            sys.exit(130)
    """
    mark = f"IMPQ_EDGE_TEST={uuid.uuid4()}"
    environment = {**os.environ, "PYTHONPATH": str(Path(cluster.__file__).parents[2])}
    environment |= dict([mark.split("=")])
    driver = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], cwd=tmp_path, env=environment, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert driver.stdout is not None
    assert driver.stdout.readline() == "playing\n"
    assert len(processes(mark)) > 3
    if end == signal.SIGINT:  # as a terminal sends it
        os.killpg(driver.pid, end)
    else:
        driver.kill()
    out, err = driver.communicate(timeout=300)
    assert (out, err) == ("", "")
    assert driver.returncode == (130 if end == signal.SIGINT else -end)
    while processes(mark):  # they take a moment; a test that hangs here has found an orphan
        time.sleep(0.1)
    assert list(tmp_path.iterdir()) == []


def processes(mark: str) -> list[int]:
    """Processes that were started with ``mark`` in their environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark.encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:  # ended meanwhile, or another user's
            continue
    return found
