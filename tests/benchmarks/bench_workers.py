"""How much of the time of 8, 64 and 256 workers is work.

    python -m tests.benchmarks.bench_workers [--workers 8 64 256] [--processes 2]

The pool, the scheduler and Ray are those of a search; a piece of work sleeps. How long is what configs of
`search_spaces/everything.yaml`, drawn at random, cost in operations, times a factor that nobody knows beforehand (log-normal,
0.1). Evaluations take 1 s in the mean and come in batches of four for each worker, of which the next is given when the last of
one is done, as in a search. Trainings take 5 s in the mean, eight for each worker, report twice a second and write their
results. `efficiency` is the sum of the durations by workers and by the time from the first that is given to the last result; the
goal is 0.9.

So many processes have no room on one machine: workers are seats in a few Ray actors, one piece of work on a seat at a time. The
driver, Ray's messages and files are real, and share the machine's cores with the seats; that processes start is not measured.
"""

import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from statistics import fmean
from typing import Any
from unittest import mock

from nas.sharing.memory import MemorySpec, measure
from nas.sharing.space import SearchSpace
from nas.workers import Executor, Job, RunSpec, Session, Task, pool
from nas.workers.cluster import cluster, ray
from reports.page import options, show

GOAL = 0.9
BATCH, BATCHES, TRAININGS = 4, 5, 8
"""Evaluations of a batch for each worker, batches, and trainings for each worker."""

REPORT_SECONDS = 0.5


class Host:
    """A process with many seats."""

    def __init__(self, seats: int) -> None:
        self._locks = [threading.Lock() for _ in range(seats)]
        self._evaluate: dict[int, Callable[[Any], Any]] = {}

    def start(self, seat: int, spec: RunSpec, build: Callable[..., Any], stored: Any) -> None:
        self._evaluate[seat] = build(*stored)

    def evaluate(self, seat: int, data: Any) -> Any:
        """One piece of work after the other."""
        with self._locks[seat]:
            return self._evaluate[seat](data)


@dataclass(frozen=True)
class Bound:
    """A method of a host, for one seat."""

    method: Any
    seat: int

    def remote(self, *given: Any) -> Any:
        return self.method.remote(self.seat, *given)


@contextmanager
def hosted(workers: int, processes: int) -> Iterator[None]:
    """Workers that start in here are seats."""
    seats = -(-workers // processes)
    hosts = [ray.remote(Host).options(num_cpus=0, max_concurrency=2 * seats + 4).remote(seats) for _ in range(processes)]
    places = cycle([(host, seat) for seat in range(seats) for host in hosts])

    class Seat(pool._WorkerSlot):
        """A worker's place that is no process of its own."""

        def start(self) -> None:
            host, seat = next(places)
            self._actor = mock.Mock(evaluate=Bound(host.evaluate, seat))
            self._started, self.ready = Bound(host.start, seat).remote(self._spec, *self._work), False

    with mock.patch.object(pool, "_WorkerSlot", Seat):
        yield
    for host in hosts:
        ray.kill(host)


@dataclass(frozen=True)
class Work:
    """A piece of work: what is known of its duration beforehand, and the seconds that it takes."""

    cost: float
    seconds: float


def drawn(count: int, mean: float) -> list[Work]:
    """The same each time."""
    space, rng = SearchSpace.load(Path(__file__).parents[2] / "search_spaces" / "everything.yaml"), random.Random(0)
    known = [measure(space.shape, space.sample(rng), MemorySpec(context=256)).flops_per_token for _ in range(100)]
    costs = rng.choices(known, k=count)
    seconds = [cost * rng.lognormvariate(0, 0.1) for cost in costs]
    return [Work(cost, mean * each / fmean(seconds)) for cost, each in zip(costs, seconds, strict=True)]


def build(payload: None, weights: dict[str, Any]) -> Callable[[float], None]:
    """An evaluator that sleeps."""
    return time.sleep


def train(seconds: float, session: Session) -> dict[str, Any]:
    """A training that sleeps, and reports."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        time.sleep(min(left, REPORT_SECONDS))
        session.report({"step": 1, "steps": 2})
    return {}


def evaluations(work: Executor) -> tuple[float, float]:
    """The durations' sum, and the time that all took."""
    each = BATCH * work.spec.workers
    tasks = [Task(n, one.seconds, one.cost) for n, one in enumerate(drawn(BATCHES * each, 1.0))]
    with work.pool(build, None) as workers:
        while not workers.all_ready:
            list(workers.run([Task(0, 0.01)]))
        begun = time.monotonic()
        for n in range(BATCHES):
            list(workers.run(tasks[n * each : (n + 1) * each]))
        return sum(task.data for task in tasks), time.monotonic() - begun


def trainings(work: Executor) -> tuple[float, float]:
    jobs = [Job(f"job-{n}", one.seconds, one.cost) for n, one in enumerate(drawn(TRAININGS * work.spec.workers, 5.0))]
    with tempfile.TemporaryDirectory() as folder:
        begun = time.monotonic()
        work.train(jobs, train, Path(folder))
        return sum(job.data for job in jobs), time.monotonic() - begun


def main(given: list[str] | None = None) -> int:
    """Print the table; 1 if the goal is missed."""
    args, rows, least = options(__doc__, given, workers=[8, 64, 256], processes=2), list[dict[str, str]](), 1.0
    with cluster(RunSpec(workers=args.processes)):
        for workers in args.workers:
            with hosted(workers, args.processes):
                for kind in (evaluations, trainings):
                    ideal, wall = kind(pool.RayExecutor(RunSpec(workers=workers)))
                    efficiency = ideal / workers / wall
                    least = min(least, efficiency)
                    row = {"workers": workers, "work": kind.__name__, "sum (s)": f"{ideal:,.0f}", "time (s)": f"{wall:.1f}"}
                    rows.append({key: str(value) for key, value in row.items()} | {"efficiency": f"{efficiency:.3f}"})
    show("Many workers", __doc__, rows)
    return int(least < GOAL)


if __name__ == "__main__":
    sys.exit(main())
