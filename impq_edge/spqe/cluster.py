"""The game on several GPUs and machines, through Ray: each worker holds the model, the driver hands out coalitions.

A worker is a Ray actor. The driver cuts the coalitions, in the order given, into short runs and hands the next
run to whichever worker is free; losses come back one by one. Which worker evaluates a coalition changes no bit
of its loss, because every worker makes the same player and computes with the same number of threads.

Ray could restart actors by itself (``max_restarts``), but a task it repeats starts from its first coalition, and
a worker that dies on every start would be restarted for ever. So a lost worker is replaced here: what its run had
not delivered goes back to the head of the queue, and deaths that lead nowhere are counted.
"""

import collections
import contextlib
import dataclasses
import logging
import os
import socket
from collections.abc import Callable, Generator, Iterator, Sequence
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from impq_edge.backends import undisturbed
from impq_edge.errors import ImpqError, SensitivityError
from impq_edge.spqe.sampling import Coalition

DEATHS_PER_WORKER = 3
"""Deaths in a row, without one result in between, after which a run is given up; times the number of workers."""

_SHORTEST_RUN = 4  # a run's first coalition finds little to reuse, a long last run lets the others wait
_OBJECT_STORE_BYTES = 75 * 2**20  # the least Ray accepts: only losses travel
# Read when ray is imported and when it starts processes, which inherit them.
_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",  # it would report usage to its authors
    "RAY_prestart_worker_first_driver": "0",  # it would start an idle process per CPU beside the workers
    "RAY_enable_metrics_collection": "0",  # needs an agent that the plain package lacks
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".",  # it would tell of lost workers on standard output
}


class Host(Protocol):
    """What a worker holds: the game, as :class:`impq_edge.spqe.game.Game` plays it."""

    @property
    def evaluations(self) -> int:
        """How many coalitions were evaluated so far."""
        ...

    @property
    def recomputed_share(self) -> float:
        """Share of the blocks that these evaluations had to compute, on average."""
        ...

    def losses(self, coalition: Coalition) -> NDArray[np.float64]:
        """Return the loss of each window in nats per token, shape (windows,)."""
        ...


class Evaluator(Protocol):
    """Plays coalitions somewhere."""

    def evaluate(self, coalitions: Sequence[Coalition]) -> Generator[tuple[Coalition, NDArray[np.float64]], None, None]:
        """Yield each coalition with its losses, shape (windows,), as soon as they exist and in any order."""
        ...


class _Seat:
    """The worker's side. The player is made by a method, since Ray hides what a constructor raises."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make = make
        self._player: Any = None

    def open(self) -> None:
        self._player = self._make()

    def answer(self, question: Callable[[Any, Any], Any], items: Sequence[Any]) -> Iterator[Any]:
        import ray

        context = ray.get_runtime_context()
        for item in items:
            if context.is_canceled():
                return
            yield question(self._player, item)


@dataclasses.dataclass(eq=False)
class _Worker:
    """The driver's side: an actor, what it is doing, and what of its run it still owes."""

    actor: Any
    pending: Any  # of Ray's references, the one that says the model is loaded, or the stream of results; None if idle
    loaded: bool = False
    owed: collections.deque[tuple[int, Any]] = dataclasses.field(default_factory=collections.deque)


class RayEvaluator:
    """Plays on workers that Ray runs; a context manager, which ends all that it started.

    Parameters
    ----------
    make
        Called on every worker to load the model; picklable, as are the errors it raises.
    workers
        How many; each takes one GPU of its own if ``gpus``.
    threads
        CPU threads of each worker. On a CPU the last bits of a loss may depend on them, so the default is a
        constant rather than a share of the machine.
    address
        ``HOST:PORT`` of a running Ray cluster; RAY_ADDRESS in the environment counts too. Without either, Ray
        is started on this machine, or used as the calling program has started it.

    Raises
    ------
    SensitivityError
        On entry: Ray is missing, the cluster cannot be joined or is too small. Workers that wait for resources
        that others hold just start later.
    """

    def __init__(
        self,
        make: Callable[[], Host],
        workers: int,
        *,
        gpus: bool = False,
        threads: int = 1,
        address: str | None = None,
    ) -> None:
        self._make = make
        self._count = workers
        self._gpus = gpus
        self._threads = threads
        self._address = address or os.environ.get("RAY_ADDRESS")
        self.lost_workers = 0  # and replaced
        self._deaths = 0  # since the last answer
        self._workers: list[_Worker] = []
        self._tallies: dict[_Worker, tuple[int, float]] = {}  # evaluations and recomputed share, the lost's too
        self._cleanup = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:  # whatever fails below, nothing stays behind
            self._ray = self._connect(stack)
            stack.callback(self._kill)
            self._check_size()
            # From its birth, so that torch reads it however it is loaded; Ray would say 1 by itself.
            environment = {"OMP_NUM_THREADS": str(self._threads)}
            self._seat = self._ray.remote(_Seat).options(
                num_cpus=self._threads, num_gpus=int(self._gpus), runtime_env={"env_vars": environment}
            )
            self._workers = [self._start() for _ in range(self._count)]
            self._cleanup = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._cleanup.close()

    @property
    def evaluations(self) -> int:
        """Evaluations of all workers, as far as they have been heard of."""
        return sum(evaluations for evaluations, _ in self._tallies.values())

    @property
    def recomputed_share(self) -> float:
        """Share of the blocks that these evaluations had to compute, on average."""
        return sum(n * share for n, share in self._tallies.values()) / max(1, self.evaluations)

    def evaluate(self, coalitions: Sequence[Coalition]) -> Generator[tuple[Coalition, NDArray[np.float64]], None, None]:
        """Yield each coalition with its losses, shape (windows,), as soon as they arrive.

        Closing the iterator early cancels the rest; the workers keep the model for a next call.

        Raises
        ------
        ImpqError
            As the player raised it, or when workers keep dying.
        """
        longest = max(map(len, coalitions), default=1)  # about one walk, so that draws are finished in turn
        with contextlib.closing(self._stream(_play, coalitions, longest)) as stream:
            for worker, index, (losses, *tally) in stream:
                self._tallies[worker] = tuple(tally)
                yield coalitions[index], losses

    def ask(self, question: Callable[[Any], Any]) -> Any:
        """Return what ``question``, which is picklable, finds out from the player of any one worker."""
        with contextlib.closing(self._stream(lambda player, _: question(player), [None], 1)) as stream:
            return next(stream)[2]

    def _connect(self, stack: contextlib.ExitStack) -> Any:
        if self._address:
            _check_reachable(self._address)
        with undisturbed():
            os.environ.update(_QUIET)
            try:
                import ray
            except ImportError:
                raise SensitivityError(
                    f"--workers {self._count} needs ray; pip install 'impq-edge[cluster]'."
                ) from None
            if ray.is_initialized():  # by the program that uses this package, which will also end it
                return ray
            stack.callback(ray.shutdown)
            started: dict[str, Any] = {
                "num_cpus": self._count * self._threads,
                "object_store_memory": _OBJECT_STORE_BYTES,
                "include_dashboard": False,
            }
            try:
                ray.init(
                    self._address or "local",  # never a cluster that happens to run here
                    log_to_driver=False,
                    logging_level=logging.CRITICAL,
                    **({} if self._address else started),
                )
            except (ConnectionError, RuntimeError, ValueError) as error:
                where = f"The Ray cluster at {self._address}" if self._address else "Ray on this machine"
                raise SensitivityError(
                    f"{where} cannot be used ({' '.join(str(error).split())}); every machine needs the same "
                    "versions of Python and ray, and RAY_AUTH_MODE as the cluster has it."
                ) from error
        return ray

    def _check_size(self) -> None:
        found = self._ray.cluster_resources()
        for name, each in (("GPU", int(self._gpus)), ("CPU", self._threads)):
            wanted, there = each * self._count, found.get(name, 0)
            if wanted > there:
                raise SensitivityError(
                    f"--workers {self._count} needs {wanted} {name}s, and Ray has {there:g}; "
                    "ask for fewer workers or add machines."
                )

    def _start(self) -> _Worker:
        actor = self._seat.remote(self._make)
        return _Worker(actor, actor.open.remote())

    def _kill(self) -> None:
        for worker in self._workers:
            self._ray.kill(worker.actor)

    def _stream(
        self, question: Callable[[Any, Any], Any], items: Sequence[Any], longest: int
    ) -> Generator[tuple[_Worker, int, Any], None, None]:
        """Yield who answered, the item's index and the answer; runs are at most ``longest`` items."""
        lost = (self._ray.exceptions.RayActorError, self._ray.exceptions.ObjectLostError)
        queue = collections.deque(enumerate(items))
        undelivered = len(items)
        shortest = min(_SHORTEST_RUN, self._share(len(items)))
        try:
            while undelivered:
                for worker in self._workers:
                    if queue and worker.pending is None:
                        length = min(max(self._share(len(queue)), shortest), longest, len(queue))
                        worker.owed.extend(queue.popleft() for _ in range(length))
                        worker.pending = worker.actor.answer.options(num_returns="streaming").remote(
                            question, [item for _, item in worker.owed]
                        )
                worker = self._whoever_is_ready()
                try:
                    answers = self._receive(worker)
                except lost as error:
                    queue.extendleft(reversed(worker.owed))
                    self._replace(worker, error)
                    continue
                for answer in answers:
                    undelivered -= 1
                    self._deaths = 0
                    yield worker, worker.owed.popleft()[0], answer
        finally:
            for worker in self._workers:
                self._stop(worker)

    def _share(self, items: int) -> int:
        return -(-items // self._count)

    def _whoever_is_ready(self) -> _Worker:
        waiting = [worker for worker in self._workers if worker.pending is not None]
        ready, _ = self._ray.wait([worker.pending for worker in waiting])
        return next(worker for worker in waiting if worker.pending == ready[0])

    def _receive(self, worker: _Worker) -> list[Any]:
        """Return the next answer, or none when the worker has just loaded the model or finished its run."""
        try:
            if worker.loaded:
                return [self._ray.get(next(worker.pending))]
            self._ray.get(worker.pending)
            worker.loaded = True
        except StopIteration:
            pass
        except self._ray.exceptions.RayTaskError as error:  # raised by the player, not by Ray
            raise error.cause from (None if isinstance(error.cause, ImpqError) else error)
        worker.pending = None
        return []

    def _replace(self, worker: _Worker, error: Exception) -> None:
        self.lost_workers += 1
        self._deaths += 1
        if self._deaths >= DEATHS_PER_WORKER * self._count:
            raise SensitivityError(
                f"{self._deaths} workers died in a row without finishing one evaluation, which is the limit for "
                f"--workers {self._count} (the last one: {_last_line(error)}); look for their reason in Ray's logs on "
                "their machine, /tmp/ray/session_latest/logs, or ask for fewer workers or --tokens."
            ) from error
        self._workers[self._workers.index(worker)] = self._start()

    def _stop(self, worker: _Worker) -> None:
        """End a run after the evaluation it is at; the worker stays."""
        if worker.owed:
            self._ray.cancel(worker.pending)
            worker.owed.clear()
        if worker.loaded:
            worker.pending = None


def _check_reachable(address: str) -> None:
    """Refuse in a moment what Ray would try for minutes."""
    if address == "auto":  # a cluster on this machine, which Ray finds
        return
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, ValueError, OverflowError):
        raise SensitivityError(
            f"No Ray cluster answers at {address!r}; give --ray-address as HOST:PORT of the machine that runs "
            "`ray start --head`."
        ) from None


def _play(player: Host, coalition: Coalition) -> tuple[NDArray[np.float64], int, float]:
    losses = player.losses(coalition)
    return losses, player.evaluations, player.recomputed_share


def _last_line(error: Exception) -> str:
    return str(error).strip().rpartition("\n")[2].strip().rstrip(".")
