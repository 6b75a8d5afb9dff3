"""The executor that runs on Ray: a few actors, each of which builds its evaluator once and is then given one task after another.

Owns the worker processes, which task is where, and what becomes of the tasks of a process that died. A training is such a task,
too, whose reports travel through a mailbox. What is computed is the caller's. What a short task costs here is measured by
`tests/benchmarks/bench_orchestration.py`; through Ray Tune it costs about as much as an evaluation.
"""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from ..errors import RunFailed
from .cluster import OUT_OF_MEMORY, alive_nodes, configure_worker, failure_reason, place, ray, share_trainings, workers_summary
from .executor import Build, Executor, Outcome, Report, Trainings
from .mirror import offered
from .ranks import train_together
from .work import WANTED, Failure, RunSpec, Task, run_catching

T = TypeVar("T")
R = TypeVar("R")

log = logging.getLogger(__name__)

DEPTH = 2  # tasks a worker is given at once: one to do, and one so that it never waits for the driver
PATIENCE = 60.0  # seconds without a worker after which a person is told
ENDING = 5.0  # seconds that trainings have to save their state when the driver is told to end, which is to be gone in ten

PAUSE, LONGEST_PAUSE = 5.0, 60.0
"""Seconds before a worker that was out of memory is started again, at first and at most; each pause is four times the last."""

POLL = 0.5  # seconds between two looks at what trainings report


class RayExecutor(Executor):
    """Runs work on the Ray cluster that is joined."""

    @property
    def summary(self) -> str:
        return workers_summary(self.spec)

    def together(self, trainings: int, batch: int) -> int:
        return share_trainings(self.spec, alive_nodes(), trainings, batch)

    def pool(self, build: Build[T, R], payload: Any, weights: Mapping[str, Tensor] | None = None) -> RayPool[T, R]:
        return RayPool(self.spec, build, payload, weights)

    def _train(self, trainings: Trainings, report: Report, end: Callable[[str, Outcome], None]) -> None:
        here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        lasting = {"max_restarts": -1, "max_task_retries": -1}  # its death costs what it has not delivered, and no training
        options = {"num_cpus": 0, "scheduling_strategy": here, **lasting}
        mailbox = ray.remote(_Mailbox).options(**options).remote()

        def deliver() -> None:
            for key, metrics in ray.get(mailbox.empty.remote()):
                report(key, metrics)

        try:
            spec = trainings.spec
            with (
                offered(trainings, options) as given,
                RayPool(spec, _build_trainer, (given, mailbox), depth=1, together=spec.together) as pool,
            ):
                tasks = [Task(key, key) for key in trainings.left]
                for task, outcome in pool.run(tasks, deliver, lambda: ray.get(mailbox.end_all.remote())):
                    deliver()
                    end(str(task.key), outcome)
        finally:
            ray.kill(mailbox)


class _Mailbox:
    """Trainings' reports on their way to the driver; it answers whether they are to end."""

    def __init__(self) -> None:
        self._reports, self._ending = list[tuple[str, dict[str, Any]]](), False

    def put(self, key: str, metrics: dict[str, Any]) -> bool:
        self._reports.append((key, metrics))
        return self._ending

    def end_all(self) -> None:
        self._ending = True

    def empty(self) -> list[tuple[str, dict[str, Any]]]:
        reports, self._reports = self._reports, []
        return reports


def _build_trainer(payload: tuple[Trainings, Any], weights: dict[str, Tensor]) -> Callable[[str], Outcome]:
    trainings, mailbox = payload

    def tell(key: str, metrics: dict[str, Any]) -> None:
        if ray.get(mailbox.put.remote(key, metrics)):
            WANTED.set()

    def train(key: str) -> Outcome:
        if trainings.spec.together == 1:
            return trainings.run(key, tell)
        return train_together(trainings, key, tell)

    return train


class RayPool(Generic[T, R]):
    """See `Pool` and `Executor.pool`: a context manager on the joined cluster. A worker is given `depth` tasks at once, and does
    each `together` with others."""

    def __init__(
        self,
        spec: RunSpec,
        build: Build[T, R],
        payload: Any,
        weights: Mapping[str, Tensor] | None = None,
        depth: int = DEPTH,
        together: int = 1,
    ) -> None:
        self._spec, self._build, self._payload, self._weights = spec, build, payload, dict(weights or {})
        self._depth, self._together = depth, together
        self._slots: list[_WorkerSlot] = []

    def __enter__(self) -> RayPool[T, R]:
        self._spec = place(self._spec)
        stored = ray.put((self._payload, {name: _pack(weight) for name, weight in self._weights.items()}))
        self._slots = [_WorkerSlot(self._spec, self._build, stored) for _ in range(self._spec.workers // self._together)]
        try:
            while not any(slot.ready for slot in self._slots):
                list(self._wait(deque(), Counter()))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        for slot in self._slots:
            slot.end()
        self._slots = []

    @property
    def all_ready(self) -> bool:
        return all(slot.ready for slot in self._slots)

    def run(
        self,
        tasks: Iterable[Task[T]],
        meanwhile: Callable[[], None] = lambda: None,
        end_all: Callable[[], None] | None = None,
    ) -> Iterator[tuple[Task[T], R | Failure]]:
        """See `Pool`; `meanwhile` is called about every `POLL` seconds, `end_all` where this process is to end: tasks then have
        `ENDING` seconds to do so, too."""
        assert not any(slot.given for slot in self._slots), "one run at a time"
        tasks, lost = list(tasks), Counter[int]()
        waiting, done = deque(sorted(range(len(tasks)), key=lambda index: -tasks[index].cost)), 0
        try:
            while done < len(tasks):
                self._give(tasks, waiting)
                for index, result in self._wait(waiting, lost, meanwhile):
                    done += 1
                    yield tasks[index], result
        except BaseException as error:
            given = [ref for slot in self._slots for ref in slot.given]
            if end_all and given and not isinstance(error, Exception | GeneratorExit):
                with suppress(Exception):
                    end_all()
                    ray.wait(given, num_returns=len(given), timeout=ENDING)
            raise
        finally:
            for slot in self._slots:  # nobody waits for its tasks any more; cancelled by Ray, they can block the next for long
                slot.given.clear()

    def _give(self, tasks: list[Task[T]], waiting: deque[int]) -> None:
        """Hand waiting tasks to the workers that have fewest; the last of them to workers that are idle, so that none waits for
        a worker while another has nothing to do."""
        while waiting:
            slot = min((slot for slot in self._slots if slot.ready), key=lambda slot: len(slot.given), default=None)
            if slot is None or len(slot.given) >= (self._depth if len(waiting) > len(self._slots) else 1):
                return
            index = waiting.popleft()
            slot.give(index, tasks[index].data)

    def _wait(
        self, waiting: deque[int], lost: Counter[int], meanwhile: Callable[[], None] = lambda: None
    ) -> Iterator[tuple[int, Any]]:
        """Wait until something happens; the tasks that have ended by it, and their results."""
        polls, ready = 0, list[Any]()
        while not ready:
            refs = {ref: slot for slot in self._slots for ref in slot.awaited()}
            if refs:
                ready, _ = ray.wait(list(refs), num_returns=1, timeout=POLL)
            else:
                time.sleep(POLL)
            meanwhile()
            polls += 1
            if polls % (PATIENCE / POLL) == 0 and not any(slot.ready for slot in self._slots):
                log.warning("no worker has found room for %d s; free now: %s", PATIENCE, ray.available_resources())
        for ref in ready:
            slot = refs[ref]
            if not slot.ready:
                slot.finish_start()
                continue
            try:
                result = _fetch(ref)
            except ray.exceptions.RayError as error:
                yield from self._recover(slot, error, waiting, lost)
            else:
                yield slot.given.pop(ref), result

    def _recover(self, slot: _WorkerSlot, error: Exception, waiting: deque[int], lost: Counter[int]) -> Iterator[tuple[int, Any]]:
        """A worker died: keep what it had done, blame the task that it was at, and put another worker in its place."""
        done, again = slot.drain()
        log.warning("a worker died (%s): %d of its tasks go elsewhere", failure_reason(error), len(again))
        slot.start_again(error)
        waiting.extendleft(reversed(again))
        if again:
            lost[again[0]] += 1
            if (times := lost[again[0]]) > self._spec.retries:
                done[waiting.popleft()] = Failure(f"its worker died {times} times: {failure_reason(error)}")
        yield from done.items()


class _WorkerSlot:
    """A worker's place: the process in it now, and the tasks that it was given, oldest first."""

    def __init__(self, spec: RunSpec, build: Build[Any, Any], stored: Any) -> None:
        self._spec, self._work, self._false_starts, self._pause = spec, (build, stored), 0, PAUSE
        self._due = math.inf
        self.given: dict[Any, int] = {}
        self.start()

    def start(self) -> None:
        """Put a new process in this place, on the machine that has most room."""
        options = {"num_cpus": self._spec.cpus_per_worker, "num_gpus": self._spec.gpus_per_worker, "max_restarts": 0}
        self._actor = ray.remote(_Worker).options(scheduling_strategy="SPREAD", **options).remote()
        self._started = self._actor.start.remote(self._spec, *self._work)
        self.ready, self._due = False, math.inf

    def start_again(self, error: Exception) -> None:
        """Put a new process in this place; after a pause if memory was short, which may be another program's doing."""
        if failure_reason(error) != OUT_OF_MEMORY:
            return self.start()
        log.warning("memory is short: a worker is started again in %d s", self._pause)
        self.ready, self._due, self._pause = False, time.monotonic() + self._pause, min(4 * self._pause, LONGEST_PAUSE)

    def awaited(self) -> list[Any]:
        """What this place will next be heard from by; nothing in a pause."""
        if time.monotonic() >= self._due:
            self.start()
        return list(self.given) if self.ready else [self._started] if self._due == math.inf else []

    def finish_start(self) -> None:
        """Its evaluator is built, or the process is replaced. Raises what `build` raised; RunFailed if it cannot start."""
        try:
            ray.get(self._started)
            self.ready, self._false_starts = True, 0
        except ray.exceptions.RayTaskError as error:
            raise error.cause from error
        except ray.exceptions.RayError as error:
            self._false_starts += 1
            if self._false_starts > self._spec.retries:
                hint = "use fewer workers if memory is short; on a cluster, install this package on every machine"
                raise RunFailed(f"workers die as they start: {failure_reason(error)}; {hint}") from error
            self.start_again(error)

    def give(self, index: int, data: Any) -> None:
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

    def end(self) -> None:
        with suppress(Exception):  # it may have died, or the cluster under it
            ray.kill(self._actor)


class _Worker:
    def start(self, spec: RunSpec, build: Build[Any, Any], stored: tuple[Any, Mapping[str, _Packed]]) -> None:
        configure_worker(spec)
        payload, weights = stored
        self._evaluate = build(payload, {name: _unpack(weight) for name, weight in weights.items()})

    def evaluate(self, data: Any) -> Any:
        return run_catching(self._evaluate, data)


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
