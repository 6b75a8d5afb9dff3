"""Where a run's work is done: the interface that a search sees, and the executor that needs no other process.

Owns `Executor` and `InProcess`, what becomes of a training in whichever process it is run, and the rule of early stopping. The
other executor is `nas.workers.pool.RayExecutor`.
"""

from __future__ import annotations

import logging
import socket
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TypeVar

from .saving import Ended
from .work import EarlyStopping, Failure, Job, Pool, RunSpec, Session, Task, Train, read_result, run_catching, write_result

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
R = TypeVar("R")

log = logging.getLogger(__name__)

Build = Callable[[Any, dict[str, "Tensor"]], Callable[[T], R]]
"""Payload and weights to an evaluator; run once in every worker, so it must be importable there."""

Outcome = dict[str, Any] | Failure

Report = Callable[[str, dict[str, Any]], None]
"""Is told a job's key and what that job reported last: metrics, its result, or its `failure`."""


@dataclass(frozen=True)
class Trainings:
    """Trainings that are left to do, and all that a process must know to do one of them."""

    train: Train
    left: Mapping[str, Any]
    folder: Path
    spec: RunSpec
    early_stopping: EarlyStopping | None

    def run(self, key: str, tell: Callable[[str, dict[str, Any]], bool]) -> Outcome:
        """One training, from where it stands to its outcome on disk; `tell` says of a report whether to stop early."""
        folder, latest = self.folder / key, dict[str, Any]()
        if not folder.is_dir():
            return Failure(f"{self.folder} is not to be seen on {socket.gethostname()}: a cluster's run needs a shared disk")

        def report(metrics: dict[str, Any]) -> None:
            latest.clear()
            latest.update(metrics)
            if tell(key, metrics):
                raise _StoppedEarly

        try:
            outcome = run_catching(self._finish, folder, self.left[key], report)
        except _StoppedEarly:
            return write_result(folder, {**latest, "stopped_early": True})
        except Ended:
            return Failure("it was ended, with its state saved")
        if isinstance(outcome, Failure) and outcome.permanent:
            write_result(folder, {"failure": outcome.reason})
        return outcome

    def _finish(self, folder: Path, settings: Any, report: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        result = self.train(settings, Session(folder, report)) or {}
        return write_result(folder, {**result, "stopped_early": False})


class _StoppedEarly(SystemExit):
    """Ends a training from within its report."""


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

    def train(
        self,
        jobs: Sequence[Job],
        train: Train,
        folder: Path,
        early_stopping: EarlyStopping | None = None,
        on_progress: Report | None = None,
    ) -> dict[str, Outcome]:
        """Every job's result by its key, in the jobs' order.

        A result is what `train` returned, with `stopped_early`: True for one that early stopping ended, whose result is then its
        last report, a lower fidelity that no front may hold. A job whose result is in the folder is not trained again, one that
        was interrupted goes on from its checkpoint, and so does one that failed, unless it would fail again
        (`Failure.permanent`). After an interruption early stopping compares a training with those that have reported since.
        """
        assert len({job.key for job in jobs}) == len(jobs), "a key names one job"
        folder, report = folder.resolve(), on_progress or (lambda key, latest: None)
        outcomes = {job.key: outcome for job in jobs if (outcome := read_result(folder / job.key)) is not None}
        left = {job.key: job.settings for job in jobs if job.key not in outcomes}

        def end(key: str, outcome: Outcome) -> None:
            outcomes[key] = outcome
            report(key, {"failure": outcome.reason} if isinstance(outcome, Failure) else outcome)

        if left:
            for key in left:
                (folder / key).mkdir(parents=True, exist_ok=True)
            spec = replace(self.spec, workers=min(self.spec.workers, len(jobs)))  # a training alone has every core
            self._train(Trainings(train, left, folder, spec, early_stopping), report, end)
        return {job.key: outcomes[job.key] for job in jobs}

    @abstractmethod
    def _train(self, trainings: Trainings, report: Report, end: Callable[[str, Outcome], None]) -> None:
        """Do what is left; `report` is told how each goes, `end` its outcome."""


class InProcess(Executor):
    """Does all work in this process, one piece after the other: no Ray, nothing to start, and nothing that can be lost."""

    @property
    def summary(self) -> str:
        """See `Executor`."""
        from ..training.device import describe_device, find_device

        return f"this process on {describe_device(find_device())}"

    @contextmanager
    def pool(self, build: Build[T, R], payload: Any, weights: Mapping[str, Tensor] | None = None) -> Iterator[Pool[T, R]]:
        """See `Executor`."""
        yield _Serial(build(payload, {name: weight.detach().cpu().contiguous() for name, weight in (weights or {}).items()}))

    def _train(self, trainings: Trainings, report: Report, end: Callable[[str, Outcome], None]) -> None:
        rule = Asha.of(trainings.early_stopping)

        def tell(key: str, metrics: dict[str, Any]) -> bool:
            report(key, metrics)
            return rule is not None and rule.stops(key, metrics)

        for key in trainings.left:
            end(key, trainings.run(key, tell))


@dataclass(frozen=True)
class _Serial:
    """A pool of one evaluator, in this process."""

    evaluate: Callable[[Any], Any]

    def run(self, tasks: Iterable[Task[Any]]) -> Iterator[tuple[Task[Any], Any]]:
        """See `Pool`."""
        for task in tasks:
            yield task, run_catching(self.evaluate, task.data)


class Asha:
    """Early stopping by the scheduler of Ray Tune, asked directly: Tune runs nothing here."""

    def __init__(self, rule: EarlyStopping) -> None:
        from ray.tune.schedulers import ASHAScheduler

        from . import cluster  # noqa: F401  (its settings come before Ray's own import)

        self._rule, self._known = rule, dict[str, SimpleNamespace]()
        settings = {"grace_period": rule.grace, "reduction_factor": rule.reduction, "max_t": rule.grace * rule.reduction**20}
        self._asha = ASHAScheduler(time_attr="step", metric=rule.metric, mode="min", stop_last_trials=False, **settings)

    @staticmethod
    def of(rule: EarlyStopping | None) -> Asha | None:
        """The scheduler for a rule, if there is one."""
        return Asha(rule) if rule else None

    def stops(self, key: str, metrics: Mapping[str, Any]) -> bool:
        """Whether the training that reports so is to be stopped; reports come in the order in which they are made. From its last
        step on nothing is, since what got there is finished."""
        if self._rule.metric not in metrics or metrics["step"] >= metrics["steps"]:
            return False
        if key not in self._known:
            self._known[key] = SimpleNamespace(trial_id=key)
            self._asha.on_trial_add(None, self._known[key])
        return bool(self._asha.on_trial_result(None, self._known[key], dict(metrics)) == self._asha.STOP)
