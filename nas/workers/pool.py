"""Thousands of short tasks on a few processes, each of which builds its evaluator once.

Owns the worker processes, which task is where, and what becomes of the tasks of a process that died. What a task is, and what
an evaluator does with it, are the caller's. Ray Tune would do for this but for its price, about as much a task as one costs;
what it costs here is measured by `tests/benchmarks/bench_orchestration.py`.
"""

from __future__ import annotations

import logging
import warnings
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from .cluster import cluster, settle
from .outcome import Failure, attempt, failure_reason
from .quiet import ray
from .spec import RunSpec

T = TypeVar("T")
R = TypeVar("R")

log = logging.getLogger(__name__)

DEPTH = 2
"""Tasks a worker is given at once: one to do, and one so that it never waits for the driver."""

PATIENCE = 60.0
"""Seconds without a worker after which a person is told."""

Build = Callable[[Any, dict[str, Tensor]], Callable[[T], R]]
"""Payload and weights to an evaluator; run once in every worker, so it must be importable there."""


@dataclass(frozen=True)
class Task(Generic[T]):
    """A piece of work: `data` goes to the evaluator, `key` stays with the caller."""

    key: Hashable
    data: T


class Pool(Generic[T, R]):
    """Workers that hold an evaluator, as a context manager.

    ```
    with Pool(spec, build, payload, supernet.state_dict()) as pool:
        for task, result in pool.run(tasks): ...
    ```

    The weights are stored once on each machine, and every worker there reads the same bytes: an evaluator that wants to change
    them clones them first. Other weights are another pool. Entering raises whatever `build` raises.
    """

    def __init__(self, spec: RunSpec, build: Build[T, R], payload: Any, weights: Mapping[str, Tensor] | None = None) -> None:
        self._spec, self._build, self._payload, self._weights = spec, build, payload, dict(weights or {})
        self._seats: list[_WorkerSlot] = []
        self._stack = ExitStack()

    def __enter__(self) -> Pool[T, R]:
        with ExitStack() as stack:
            stack.enter_context(cluster(self._spec))
            stack.callback(self._end)
            stored = ray.put({name: _pack(weight) for name, weight in self._weights.items()})
            self._seats = [_WorkerSlot(self._spec, (self._build, self._payload, stored)) for _ in range(self._spec.workers)]
            while not any(seat.ready for seat in self._seats):
                self._collect(_TaskState())
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _end(self) -> None:
        for seat in self._seats:
            seat.end()
        self._seats = []

    @property
    def all_ready(self) -> bool:
        """Every worker has built its evaluator; the pool is of use before that, from the first on."""
        return all(seat.ready for seat in self._seats)

    def run(self, tasks: Iterable[Task[T]], ordered: bool = False) -> Iterator[tuple[Task[T], R | Failure]]:
        """Each task with its result or why it has none, exactly once, as they come.

        The next task is asked for only when there is room for it, after the results so far were handed back, so `tasks` may be
        a generator that learns from them. A task lost with its worker is done again elsewhere, `retries` times at most; one
        whose evaluator raised is not. With `ordered`, results come in the tasks' own order, and since `2 * workers` tasks are
        always under way, what was known when a task was asked for does not depend on how fast anything ran: a search then
        repeats exactly. The price is a wait behind a slow task.
        """
        assert not any(seat.given for seat in self._seats), "one run at a time"
        try:
            yield from self._run(enumerate(tasks), ordered)
        finally:
            for seat in self._seats:
                seat.clear()

    def _run(self, source: Iterator[tuple[int, Task[T]]], ordered: bool) -> Iterator[tuple[Task[T], R | Failure]]:
        book: _TaskState[T] = _TaskState()
        while True:
            for index, task in islice(source, DEPTH * len(self._seats) - len(book.window)):
                book.window[index] = task
                book.backlog.append(index)
            self._give(book)
            index = next(iter(book.window if ordered else book.done), -1)
            if index in book.done:
                yield book.window.pop(index), book.done.pop(index)
            elif book.window:
                self._collect(book)
            else:
                return

    def _give(self, book: _TaskState[T]) -> None:
        """Hand waiting tasks to the workers that have fewest."""
        while book.backlog:
            seat = min((seat for seat in self._seats if seat.ready), key=lambda seat: len(seat.given), default=None)
            if seat is None or len(seat.given) >= DEPTH:
                return
            index = book.backlog.popleft()
            seat.give(index, book.window[index].data)

    def _collect(self, book: _TaskState[T]) -> None:
        """Wait until something happens, and write it down."""
        refs = {ref: seat for seat in self._seats for ref in seat.awaited}
        ready, _ = ray.wait(list(refs), num_returns=1, timeout=PATIENCE)
        if not ready and not any(seat.ready for seat in self._seats):
            log.warning("no worker has found room for %d s; free now: %s", PATIENCE, ray.available_resources())
        for ref in ready:
            seat = refs[ref]
            if not seat.ready:
                seat.settle()
                continue
            try:
                result = _fetch(ref)
            except ray.exceptions.RayError as error:
                self._recover(seat, error, book)
            else:
                book.done[seat.given.pop(ref)] = result

    def _recover(self, seat: _WorkerSlot, error: Exception, book: _TaskState[T]) -> None:
        """A worker died: keep what it had done, blame the task that it was at, and put another in its place."""
        done, again = seat.drain()
        log.warning("a worker died (%s): %d of its tasks go elsewhere", failure_reason(error), len(again))
        book.done.update(done)
        book.backlog.extendleft(reversed(again))
        if again:
            book.lost[again[0]] += 1
            if (times := book.lost[again[0]]) > self._spec.retries:
                book.done[book.backlog.popleft()] = Failure(f"its worker died {times} times: {failure_reason(error)}")
        seat.begin()


@dataclass
class _TaskState(Generic[T]):
    """Where each task of a run is, by its place in the order they came in."""

    window: dict[int, Task[T]] = field(default_factory=dict)  # taken, and not handed back yet
    backlog: deque[int] = field(default_factory=deque)  # of those, the ones no worker has
    done: dict[int, Any] = field(default_factory=dict)  # of those, the ones with a result
    lost: Counter[int] = field(default_factory=Counter)  # how often each took its worker with it


class _WorkerSlot:
    """A worker's place: the process in it now, and the tasks that it was given, oldest first."""

    def __init__(self, spec: RunSpec, work: tuple[Any, ...]) -> None:
        self._spec, self._work, self._false_starts = spec, work, 0
        self.given: dict[Any, int] = {}
        self.begin()

    def begin(self) -> None:
        """Put a new process in this place, on the machine that has most room."""
        options = {"num_cpus": self._spec.cpus_per_worker, "num_gpus": self._spec.gpus_per_worker, "max_restarts": 0}
        self._actor = ray.remote(_Worker).options(scheduling_strategy="SPREAD", **options).remote()
        self._start = self._actor.start.remote(self._spec, *self._work)
        self.ready = False

    @property
    def awaited(self) -> list[Any]:
        """What this place will next be heard from by."""
        return list(self.given) if self.ready else [self._start]

    def settle(self) -> None:
        """Its evaluator is built, or the process is replaced. Raises what `build` raised; UserError if it cannot start."""
        try:
            ray.get(self._start)
            self.ready, self._false_starts = True, 0
        except ray.exceptions.RayTaskError as error:
            raise error.cause from error
        except ray.exceptions.RayError as error:
            self._false_starts += 1
            if self._false_starts > self._spec.retries:
                hint = "use fewer workers if memory is short; on a cluster, install this package on every machine"
                raise UserError(f"workers die as they start: {failure_reason(error)}", where="run", hint=hint) from error
            self.begin()

    def give(self, index: int, data: Any) -> None:
        """One task more for this process."""
        self.given[self._actor.evaluate.remote(data)] = index

    def drain(self) -> tuple[dict[int, Any], list[int]]:
        """End the process for good: results that it had sent, and the tasks it leaves, oldest first."""
        ray.kill(self._actor)
        done, again = {}, []
        for ref, index in self.given.items():
            try:
                done[index] = _fetch(ref, timeout=0)
            except ray.exceptions.RayError:
                again.append(index)
        self.given.clear()
        return done, again

    def clear(self) -> None:
        """Nobody waits for its tasks any more; they are still done. Cancelled by Ray, they can block the next for long."""
        self.given.clear()

    def end(self) -> None:
        """End the process."""
        with suppress(Exception):  # it may have died, or the cluster under it
            ray.kill(self._actor)


class _Worker:
    """What lives in a worker's process."""

    def start(self, spec: RunSpec, build: Build[Any, Any], payload: Any, stored: Mapping[str, _Packed]) -> None:
        settle(spec)
        self._evaluate = build(payload, {name: _unpack(weight) for name, weight in stored.items()})

    def evaluate(self, data: Any) -> Any:
        return attempt(self._evaluate, data)


def _fetch(ref: Any, timeout: float | None = None) -> Any:
    """A task's result. Raises RayError if it was lost; an answer that cannot travel is the task's own failure."""
    try:
        return ray.get(ref, timeout=timeout)
    except ray.exceptions.RayTaskError as error:
        return Failure.of(error.cause)


_Packed = tuple[np.ndarray, torch.dtype, torch.Size]


def _pack(weight: Tensor) -> _Packed:
    """Bytes as numpy, which Ray maps into every process without copying; its own way with tensors copies them."""
    tensor = torch.as_tensor(weight).detach().cpu().contiguous()
    return tensor.flatten().view(torch.uint8).numpy(), tensor.dtype, tensor.shape


def _unpack(packed: _Packed) -> Tensor:
    array, dtype, shape = packed
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that writing to it is undefined, and here it is forbidden
        return torch.from_numpy(array).view(dtype).view(shape)
