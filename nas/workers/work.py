"""Units of work, their outcomes, and what a person says about where they run. Nothing here imports Ray.

Owns the `run:` key of a trial, `Task` and `Job`, `Failure`, when a training's state is saved (`Saver`), the wish that trainings
end (`WANTED`), which a signal, or the driver of a cluster, makes known to a process, and the files of a training:

    FOLDER/KEY/result.json      there if the training is done: its result, or why it never will be
    FOLDER/KEY/checkpoint-7/    the newest state, until then
    FOLDER/KEY/...              what the training itself wants to keep
"""

from __future__ import annotations

import gc
import json
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any, Generic, Literal, Protocol, TypeVar

from ..config import NonNegativeFloat, NonNegativeInt, PositiveInt, Strict, read_json
from ..errors import UserError
from ..files import atomic_write, write_text
from ..training.ranks import ALONE, Ranks

T = TypeVar("T")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)


# ---- settings

LOCAL = "local"  # the address of no cluster


@dataclass(frozen=True)
class RunSpec(Strict):
    """Processes at work at once, where, and how often work lost with its process is done again.

    With 0 `workers` everything is done in this process, one piece of work after the other, without Ray, and on this process's
    accelerator if it has one; the other settings then mean nothing. `address` names a Ray cluster (`host:6379`, or `auto` for the
    one this machine is part of); without it, or with `local`, one is started here and ended with the run. `retries` counts the
    times a lost task or training is done again elsewhere. With `auto` for `gpus_per_worker`, each worker has a GPU where the
    machines have any, or an equal part of one where the workers are more. So many `workers_per_training` do one training
    together, each on its part of every batch; with `auto` as many as keep all GPUs busy, and one on processors.
    """

    workers: NonNegativeInt = 2
    address: str | None = None
    cpus_per_worker: NonNegativeFloat = 1.0
    gpus_per_worker: Literal["auto"] | NonNegativeFloat = "auto"
    retries: NonNegativeInt = 3
    workers_per_training: Literal["auto"] | PositiveInt = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.together > max(self.workers, 1):
            message = f"{self.together} are more than the {self.workers} workers"
            raise UserError(message, where="workers_per_training", hint="use as many workers, or more")
        for name in ("cpus_per_worker", "gpus_per_worker"):
            share = getattr(self, name)
            if share != "auto" and share > 1 and share != int(share):
                raise UserError(f"{share:g} cannot be reserved", where=name, hint="use a whole number, or a part of one")

    def threads(self, cores: int) -> int:
        """Torch's threads in each worker on a node of so many cores: as many as all the workers together keep within it."""
        return max(1, int(self.cpus_per_worker), cores // self.workers)

    def require_batch(self, batch: int, where: str) -> None:
        """Raise UserError for a batch that those who do a training together cannot divide evenly."""
        if batch % self.together:
            message = f"a batch of {batch} is not divisible among {self.together} workers"
            raise UserError(message, where=where, hint="change it, or run.workers_per_training")

    @property
    def together(self) -> int:
        """Workers of a training, where `auto` is not yet decided: at least so many."""
        return 1 if self.workers_per_training == "auto" else self.workers_per_training

    def with_given(self, address: str | None, workers: int | None) -> RunSpec:
        """The spec with a cluster and a number of workers that the user gives in place of its own."""
        return replace(self, address=address or self.address, workers=self.workers if workers is None else workers)

    def for_trainings(self, count: int, together: int) -> RunSpec:
        """The spec for so many trainings of so many workers each: a training alone has every core."""
        return replace(self, workers=min(self.workers // together, count) * together, workers_per_training=together)


# ---- outcomes


OUT_OF_MEMORY = ("OutOfMemoryError", "can't allocate memory", "not enough memory", "CUDA out of memory")
"""How torch says it: a class of its own on a GPU, a plain RuntimeError on a CPU."""


@dataclass(frozen=True)
class Failure:
    """Why a piece of work has no result, in one line. `permanent` if doing it again would end the same way (a loss that is not
    finite)."""

    reason: str
    permanent: bool = False

    @staticmethod
    def of(error: BaseException) -> Failure:
        name, text = type(error).__name__, first_line(error)
        if isinstance(error, MemoryError) or any(sign in f"{name}: {error}" for sign in OUT_OF_MEMORY):
            return Failure(f"out of memory: {text or name}")
        return Failure(f"{name}: {text}" if text else name, isinstance(error, ArithmeticError))


def first_line(error: BaseException) -> str:
    """The first line of an exception's message that is not blank."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "")


def run_catching(work: Callable[..., R], *given: Any) -> R | Failure:
    """The work's result, or why there is none: the one place where any exception is caught. Memory is freed after a failure."""
    try:
        return work(*given)
    except Exception as error:
        failure = Failure.of(error)
    gc.collect()
    if "torch" in sys.modules and sys.modules["torch"].cuda.is_initialized():
        sys.modules["torch"].cuda.empty_cache()
    return failure


# ---- short tasks


@dataclass(frozen=True)
class Task(Generic[T]):
    """A piece of work: `data` goes to the evaluator, `key` stays with the caller. Those of most `cost` are begun first, so that
    no long one is alone at the end."""

    key: Hashable
    data: T
    cost: float = 0.0


class Pool(Protocol[T, R_co]):
    """Evaluators, each built once in its process, that tasks are given to."""

    @property
    def all_ready(self) -> bool:
        """Whether all are built: workers beyond the first start, or find room, while the others work."""

    def run(self, tasks: Iterable[Task[T]]) -> Iterator[tuple[Task[T], R_co | Failure]]:
        """Each task with its result or why it has none, exactly once, as they come. A task lost with its worker is done again
        elsewhere, `retries` times at most; one whose evaluator raised is not."""


# ---- long trainings


RESULT = "result.json"

Train = Callable[[Any, "Session"], dict[str, Any] | None]
"""A job's settings and its session to its result. It must be importable in every worker."""


@dataclass(frozen=True)
class Job(Task[Any]):
    """A training by its settings. Its key names it for ever, in its folder's name too: other settings are another key."""

    key: str

    def __post_init__(self) -> None:
        assert re.fullmatch(r"\w[\w.=+-]*", self.key), f"{self.key!r} cannot name a folder"


@dataclass(frozen=True)
class Session:
    """What a training sees of the world: where to go on from, and where to report.

    `folder` is its own; what it leaves there (weights, curves) stays, on whichever machine it was done. `report` tells how it
    goes: `step`, `steps` (the last one), and other metrics by name. It may be done by several processes, of which this is one of
    `ranks`.
    """

    folder: Path
    report: Callable[[dict[str, Any]], None] = field(default=lambda metrics: None)
    ranks: Ranks = ALONE

    @property
    def leads(self) -> bool:
        """Whether this is the process of its training that reports and saves."""
        return self.ranks.rank == 0

    @property
    def checkpoint(self) -> Path | None:
        """The folder of the newest checkpoint; None at a first start."""
        return max(_checkpoints(self.folder), key=_number, default=None)

    def keep(self, checkpoint_folder: Path) -> None:
        """Move a checkpoint's folder here, in place of the one before; it is safe once this returns."""
        old = _checkpoints(self.folder)
        with atomic_write(self.folder / f"checkpoint-{max(map(_number, old), default=0) + 1}") as part:
            shutil.rmtree(part, ignore_errors=True)
            shutil.move(checkpoint_folder, part)
        _remove(old)

    def finish(self, data: dict[str, Any]) -> dict[str, Any]:
        """Put the outcome on disk, before anybody hears of it, and drop checkpoints; returns it."""
        return write_result(self.folder, data)


def _checkpoints(folder: Path) -> list[Path]:
    return [path for path in folder.glob("checkpoint-*") if path.suffix != ".part"]


def _number(checkpoint: Path) -> int:
    return int(checkpoint.name.partition("-")[2])


def _remove(folders: Iterable[Path]) -> None:
    for path in folders:
        shutil.rmtree(path, ignore_errors=True)


def write_result(folder: Path, data: dict[str, Any]) -> dict[str, Any]:
    """Put a training's outcome on disk, before anybody hears of it, and drop its checkpoints."""
    write_text(folder / RESULT, json.dumps(data, indent=1))
    _remove(folder.glob("checkpoint*"))
    return data


def read_result(folder: Path) -> dict[str, Any] | Failure | None:
    """An outcome on disk; None if the training is not done."""
    if not (folder / RESULT).exists():
        return None
    data = read_json(folder / RESULT, "delete it: the training is done again")
    return Failure(data["failure"], permanent=True) if set(data) == {"failure"} else data


# ---- saving

LEAST_SECONDS = 30.0  # seconds between two checkpoints, at least
SHARE = 0.05  # the share of the time, at most, that a training stands still for its checkpoints
BYTES_PER_SECOND = 2**29  # how fast a state is assumed to be written until one was
PREFIX = "making-"  # of the folder of a checkpoint that is being written
WANTED = threading.Event()  # set in a process whose trainings are to save their state and end


class Ended(SystemExit):
    """Ends a training whose state was saved, since it was asked to."""


class Saver:
    """Saves a training's state by `write(folder)`, `size` bytes: not more often than `LEAST_SECONDS` and `SHARE` allow. At
    SIGTERM or Ctrl-C it is saved at once, and the training ends.

    The training stands still while `write` hands its state to the operating system. That it reaches the disk, and then replaces
    the one before, is waited for in a thread. What goes wrong there is raised at the next step, or at the end.
    """

    def __init__(self, session: Session, write: Callable[[Path], None], size: int) -> None:
        self._session, self._write = session, write
        self._cost, self._saved = size / BYTES_PER_SECOND, time.monotonic()
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._signals = ending_by_signals()

    def __enter__(self) -> Saver:
        for torn in self._session.folder.glob(f"{PREFIX}*"):
            shutil.rmtree(torn, ignore_errors=True)
        self._signals.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._join()
        self._signals.__exit__(None, None, None)
        if self._error and kind is None:
            raise self._error

    def step(self) -> None:
        """Called after each step but the last."""
        if self._error:
            raise self._error
        if WANTED.is_set():
            self._join()
            self._save()
            self._join()
            raise Ended
        waiting = self._thread is not None and self._thread.is_alive()
        if not waiting and time.monotonic() - self._saved > max(LEAST_SECONDS, self._cost / SHARE):
            self._save()

    def _save(self) -> None:
        began, folder = time.monotonic(), Path(tempfile.mkdtemp(dir=self._session.folder, prefix=PREFIX))
        self._write(folder)
        self._saved = time.monotonic()
        self._cost = self._saved - began
        self._thread = threading.Thread(target=self._keep, args=(folder,))
        self._thread.start()

    def _keep(self, folder: Path) -> None:
        try:
            self._session.keep(folder)
        except Exception as error:
            self._error = error

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()


@contextmanager
def ending_by_signals() -> Iterator[None]:
    """SIGTERM and Ctrl-C are wishes while this lasts, and do what they did before when it ends; a second one does so at once.
    No signal comes to a thread that is not the main one."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []

    def wish(number: int, frame: FrameType | None) -> None:
        came.append(number)
        if came[1:]:
            restore()
            signal.raise_signal(number)
        WANTED.set()

    before = {number: signal.signal(number, wish) for number in (signal.SIGTERM, signal.SIGINT)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    try:
        yield
    finally:
        restore()
        if came:
            WANTED.clear()
            signal.raise_signal(came[0])
