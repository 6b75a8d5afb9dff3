"""A few long trainings at once, each of which can stop anywhere and go on.

Owns which training runs where, its checkpoints, its result on disk, and early stopping. What is trained is the caller's: a
function that is importable in every worker, plain settings, and a `Session` to report to.

Ray Tune schedules, and files decide. Tune gives each training its process, its CPUs and GPUs, starts it again when the process
or the machine is lost, and stops the hopeless ones. What is done and where to go on is read from the run's folder alone, since
`Tuner.restore` is not to be trusted after a kill: its snapshot lags behind, so that trainings that had finished were trained
again when this was tried (Ray 2.60), and what ASHA knew is not in it at all. Here a training writes its result, whole or not at
all, before anybody hears of it, and a checkpoint replaces the last one in a single rename.

    FOLDER/KEY/result.json      there if the training is done: its result, or that it was stopped early, or why it never will be
    FOLDER/KEY/checkpoint-7/    the newest state, until then
    FOLDER/KEY/...              what the training itself wants to keep
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .cluster import cluster, settle
from .outcome import Failure, attempt, failure_reason
from .spec import EarlyStopping, RunSpec

log = logging.getLogger(__name__)

Metrics = Mapping[str, Any]
"""Names to numbers. `step` and `steps` (the last one) are read by early stopping and by progress bars."""

Train = Callable[[dict[str, Any], "Session"], dict[str, Any] | None]
Progress = Callable[[int, int, dict[str, Any]], None]
"""`(trainings done, trainings in all, latest)`; `latest` is what one reported, with its `key`."""

RESULT = "result.json"


@dataclass(frozen=True)
class Job:
    """A training: plain data. Its key names it for ever, in its folder's name too: other settings are another key."""

    key: str
    settings: dict[str, Any]

    def __post_init__(self) -> None:
        assert re.fullmatch(r"\w[\w.=+-]*", self.key), f"{self.key!r} cannot name a folder"


@dataclass(frozen=True)
class Session:
    """What a training sees of the world: where to go on from, and where to report. It works without Ray, too.

    `folder` is its own, on a disk that every machine shares; what it leaves there (weights, curves) stays.
    """

    folder: Path
    tell: Callable[[dict[str, Any]], None] = field(default=lambda metrics: None)

    @property
    def checkpoint(self) -> Path | None:
        """The folder of the newest checkpoint; None at a first start."""
        return max(self._checkpoints(), key=_number, default=None)

    def report(self, metrics: Metrics, checkpoint_folder: Path | None = None) -> None:
        """Tell how it goes. A checkpoint's folder is moved here and replaces the one before; it is safe once this returns.

        Early stopping ends a training in here, by SystemExit: what must be kept is written before.
        """
        if checkpoint_folder is not None:
            self._keep(checkpoint_folder)
        self.tell(dict(metrics))

    def _keep(self, made: Path) -> None:
        old = self._checkpoints()
        part = self.folder / "checkpoint.part"
        shutil.rmtree(part, ignore_errors=True)
        shutil.move(made, part)
        for path in [*part.rglob("*"), part]:
            _flush(path)
        part.replace(self.folder / f"checkpoint-{max(map(_number, old), default=0) + 1}")
        _flush(self.folder)
        for path in old:
            shutil.rmtree(path, ignore_errors=True)

    def _checkpoints(self) -> list[Path]:
        return list(self.folder.glob("checkpoint-*"))


def _number(checkpoint: Path) -> int:
    return int(checkpoint.name.partition("-")[2])


def _flush(path: Path) -> None:
    """Onto the disk itself, or a power cut leaves a name with nothing behind it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def train_all(
    jobs: Sequence[Job],
    train: Train,
    folder: Path,
    spec: RunSpec,
    early_stopping: EarlyStopping | None = None,
    on_progress: Progress | None = None,
) -> dict[str, dict[str, Any] | Failure]:
    """Every job's result by its key, in the jobs' order; `spec.workers` train at once.

    A result is what `train` returned, with `stopped_early`: True for one that early stopping ended, whose result is then its last
    report, a lower fidelity that no front may hold. A job whose result is in the folder is not trained again, one that was
    interrupted goes on from its checkpoint, and so does one that failed, unless it would fail again (`Failure.permanent`).
    After an interruption early stopping compares a training with those that have reported since.
    """
    assert len({job.key for job in jobs}) == len(jobs), "a key names one job"
    folder = folder.resolve()
    outcomes = {job.key: outcome for job in jobs if (outcome := _read(folder / job.key)) is not None}
    left = {job.key: job.settings for job in jobs if job.key not in outcomes}
    if left:
        for key in left:
            (folder / key).mkdir(parents=True, exist_ok=True)
        with cluster(spec):
            outcomes |= _tune(_Plan(train, left, folder, spec, early_stopping), len(outcomes), on_progress or _silent)
    return {job.key: outcomes[job.key] for job in jobs}


def _silent(done: int, total: int, latest: dict[str, Any]) -> None:
    pass


@dataclass(frozen=True)
class _Plan:
    """What a worker must know to do one of the jobs that are left."""

    train: Train
    left: dict[str, dict[str, Any]]
    folder: Path
    spec: RunSpec
    early_stopping: EarlyStopping | None

    def run(self, key: str) -> dict[str, Any] | Failure:
        """One training, in a worker, from where it stands to its outcome on disk."""
        if not (self.folder / key).is_dir():
            return Failure(f"{self.folder} is not to be seen on {socket.gethostname()}: a cluster's run needs a shared disk")
        settle(self.spec)
        outcome = attempt(self._finish, key)
        if isinstance(outcome, Failure) and outcome.permanent:
            _write(self.folder / key, {"failure": outcome.reason})
        return outcome

    def _finish(self, key: str) -> dict[str, Any]:
        result = self.train(self.left[key], Session(self.folder / key, self._tell)) or {}
        return _write(self.folder / key, {**result, "stopped_early": False})

    def _tell(self, metrics: dict[str, Any]) -> None:
        """Report to Tune; early stopping sees no report from the last step on, since what got there is finished."""
        from ray import tune

        rule, judged = self.early_stopping, {}
        if rule and rule.metric in metrics and metrics["step"] < metrics["steps"]:
            judged = {"step": metrics["step"], rule.metric: metrics[rule.metric]}
        tune.report({"latest": metrics} | judged)


def _tune(plan: _Plan, before: int, on_progress: Progress) -> dict[str, dict[str, Any] | Failure]:
    """The outcomes of the jobs that are left."""
    from ray import tune

    def trainable(config: dict[str, Any], plan: _Plan) -> None:
        tune.report({"outcome": plan.run(config["key"])})

    share = {"CPU": plan.spec.cpus_per_worker, "GPU": plan.spec.gpus_per_worker}
    need = tune.PlacementGroupFactory([{name: count for name, count in share.items() if count}], strategy="SPREAD")
    watch = _watch(plan, before, on_progress)
    storage = plan.folder / ".tune"
    shutil.rmtree(storage, ignore_errors=True)
    try:
        tune.Tuner(
            tune.with_resources(tune.with_parameters(trainable, plan=plan), need),
            param_space={"key": tune.grid_search(list(plan.left))},
            tune_config=tune.TuneConfig(scheduler=_scheduler(plan), max_concurrent_trials=plan.spec.workers, reuse_actors=True),
            run_config=tune.RunConfig(
                name="tune",
                storage_path=str(storage),
                failure_config=tune.FailureConfig(max_failures=plan.spec.retries),
                callbacks=[watch],
                verbose=0,
            ),
        ).fit()
    finally:
        shutil.rmtree(storage, ignore_errors=True)
    return dict(watch.outcomes)


def _scheduler(plan: _Plan) -> Any:
    from ray.tune.schedulers import ASHAScheduler, FIFOScheduler

    rule = plan.early_stopping
    if rule is None:
        return FIFOScheduler()
    settings = {"grace_period": rule.grace, "reduction_factor": rule.reduction, "max_t": rule.grace * rule.reduction**20}
    return ASHAScheduler(time_attr="step", metric=rule.metric, mode="min", stop_last_trials=False, **settings)


def _watch(plan: _Plan, before: int, on_progress: Progress) -> Any:
    """A Tune callback that gathers outcomes and tells of progress."""
    from ray.tune import Callback

    total = before + len(plan.left)

    class Watch(Callback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.outcomes: dict[str, dict[str, Any] | Failure] = {}

        def __reduce__(self) -> tuple[type, tuple[()]]:
            return Callback, ()  # Tune snapshots its callbacks; a progress bar cannot be, and nobody reads the snapshot

        def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any) -> None:
            if "latest" in result:
                self.say(trial.config["key"], result["latest"])

        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            key, last = trial.config["key"], trial.last_result
            self.end(key, last.get("outcome") or _write(plan.folder / key, {**last["latest"], "stopped_early": True}))

        def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            log.warning("the worker that trained %s died; it goes on elsewhere, from its checkpoint", trial.config["key"])

        def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            self.end(trial.config["key"], _lost(trial.get_pickled_error(), plan.spec.retries + 1))

        def end(self, key: str, outcome: dict[str, Any] | Failure) -> None:
            self.outcomes[key] = outcome
            self.say(key, {"failure": outcome.reason} if isinstance(outcome, Failure) else outcome)

        def say(self, key: str, latest: dict[str, Any]) -> None:
            on_progress(before + len(self.outcomes), total, {"key": key, **latest})

    return Watch()


def _lost(error: Exception, times: int) -> Failure:
    """A training that Tune gave up."""
    cause = getattr(error, "cause", None)  # of a RayTaskError: the process lives, and said what it could not do
    return (
        Failure.of(cause) if isinstance(cause, Exception) else Failure(f"its worker died {times} times: {failure_reason(error)}")
    )


def _write(folder: Path, data: dict[str, Any]) -> dict[str, Any]:
    """Put an outcome on disk, whole or not at all, and drop the checkpoint."""
    part = folder / f"{RESULT}.part"
    part.write_text(json.dumps(data, indent=1), encoding="utf-8")
    _flush(part)
    part.replace(folder / RESULT)
    _flush(folder)
    for path in folder.glob("checkpoint*"):
        shutil.rmtree(path, ignore_errors=True)
    return data


def _read(folder: Path) -> dict[str, Any] | Failure | None:
    """An outcome on disk; None if the training is not done."""
    if not (folder / RESULT).exists():
        return None
    data: dict[str, Any] = json.loads((folder / RESULT).read_text(encoding="utf-8"))
    return Failure(data["failure"], permanent=True) if set(data) == {"failure"} else data
