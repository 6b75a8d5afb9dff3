"""Where a run's work is done: the interface that a search sees, and the executor that needs no other process.

Owns `Executor` and `InProcess`, and what becomes of a training in whichever process it is run. The other
executor is `nas.workers.pool.RayExecutor`.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import RunFailed
from ..training.ranks import ALONE, Ranks
from .work import Ended, Failure, Job, Pool, RunSpec, Session, Task, Train, read_result, run_catching

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
R = TypeVar("R")

log = logging.getLogger(__name__)

Build = Callable[[Any, dict[str, "Tensor"]], Callable[[T], R]]
"""Payload and weights to an evaluator; run once in every worker, so it must be importable there."""

Outcome = dict[str, Any] | Failure

Report = Callable[[str, dict[str, Any]], None]
"""Is told a job's key and what that job reported last: metrics, its result, which is `finished`, or its `failure`."""


def unheard(key: str, latest: dict[str, Any]) -> None:
    """A report that nobody hears."""


@dataclass(frozen=True)
class Trainings:
    """Trainings that are left to do, and all that a process must know to do one of them."""

    train: Train
    left: Mapping[str, Any]
    folder: Path
    spec: RunSpec
    ranks: Ranks = ALONE

    @contextmanager
    def begun(self, key: str, tell: Report = unheard) -> Iterator[tuple[Session, Any]]:
        """A training's session and settings for this process, while it lasts; `tell` hears of its reports."""
        yield Session(self.folder / key, partial(tell, key), self.ranks), self.left[key]

    def run(self, key: str, tell: Report) -> Outcome:
        """One training, from where it stands to its outcome on disk."""
        with self.begun(key, tell) as (session, settings):
            if not session.folder.is_dir():
                return Failure(f"{session.folder} is gone")
            try:
                outcome = run_catching(lambda: session.finish(self.train(settings, session) or {}))
            except Ended:
                return Failure("it was ended, with its state saved")
            if isinstance(outcome, Failure) and outcome.permanent:
                session.finish({"failure": outcome.reason})
            return outcome

    def follow(self, key: str) -> dict[str, Any]:
        with self.begun(key) as (session, settings):
            return self.train(settings, session) or {}


@dataclass(frozen=True)
class Executor(ABC):
    """Runs tasks and trainings on as many workers as its spec has."""

    spec: RunSpec

    @property
    @abstractmethod
    def summary(self) -> str:
        """How many workers there are and what each computes on, for a person."""

    @abstractmethod
    def pool(
        self, build: Build[T, R], payload: Any, weights: Mapping[str, Tensor] | None = None
    ) -> AbstractContextManager[Pool[T, R]]:
        """Workers that hold an evaluator. The weights are stored once on each machine, and every worker there reads the same
        bytes: an evaluator that wants to change them clones them first. Entering raises whatever `build` raises."""

    def together(self, trainings: int, batch: int) -> int:
        """Workers that do each of so many trainings, with so many sequences in a batch."""
        return self.spec.together

    def train(
        self,
        jobs: Sequence[Job],
        train: Train,
        folder: Path,
        on_progress: Report | None = None,
        batch: int = 1,
    ) -> dict[str, Outcome]:
        """Every job's result by its key, in the jobs' order; `batch` is the sequences of each step, of which workers take parts.

        A result is what `train` returned. A job whose result is in the folder is not trained again, one that was interrupted goes
        on from its checkpoint, and so does one that failed, unless it would fail again (`Failure.permanent`).
        """
        assert len({job.key for job in jobs}) == len(jobs), "a key names one job"
        folder, report = folder.resolve(), on_progress or unheard
        outcomes = {job.key: outcome for job in jobs if (outcome := read_result(folder / job.key)) is not None}
        longest_first = sorted(jobs, key=lambda job: -job.cost)
        left = {job.key: job.data for job in longest_first if job.key not in outcomes}

        def end(key: str, outcome: Outcome) -> None:
            if isinstance(outcome, Failure) and not folder.is_dir():
                raise RunFailed(f"{folder} was deleted, or moved, while it was worked in")
            outcomes[key] = outcome
            report(key, {"failure": outcome.reason} if isinstance(outcome, Failure) else {**outcome, "finished": True})

        if left:
            for key in left:
                (folder / key).mkdir(parents=True, exist_ok=True)
            spec = self.spec.for_trainings(len(jobs), self.together(len(jobs), batch))
            self._train(Trainings(train, left, folder, spec), report, end)
        return {job.key: outcomes[job.key] for job in jobs}

    @abstractmethod
    def _train(self, trainings: Trainings, report: Report, end: Callable[[str, Outcome], None]) -> None:
        """Do what is left; `report` is told how each goes, `end` its outcome."""


class InProcess(Executor):
    """Does all work in this process, one piece after the other: no Ray, nothing to start, and nothing that can be lost."""

    @property
    def summary(self) -> str:
        from ..training.device import describe_device, find_device

        return f"this process on {describe_device(find_device())}"

    @contextmanager
    def pool(self, build: Build[T, R], payload: Any, weights: Mapping[str, Tensor] | None = None) -> Iterator[Pool[T, R]]:
        yield _Serial(build(payload, {name: weight.detach().cpu().contiguous() for name, weight in (weights or {}).items()}))

    def _train(self, trainings: Trainings, report: Report, end: Callable[[str, Outcome], None]) -> None:
        for key in trainings.left:
            end(key, trainings.run(key, report))


@dataclass(frozen=True)
class _Serial:
    """A pool of one evaluator, in this process."""

    evaluate: Callable[[Any], Any]
    all_ready = True

    def run(self, tasks: Iterable[Task[Any]]) -> Iterator[tuple[Task[Any], Any]]:
        for task in tasks:
            yield task, run_catching(self.evaluate, task.data)
