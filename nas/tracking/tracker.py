"""Tracking that never stands in a search's way, nor in a training's.

Owns the thread between them and MLflow: every call puts its work on a queue and comes back at once, and an error is said once and
costs the work nothing. What is written is `nas.tracking.store`'s.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Generic, Self, TypeVar

from ..training.evaluation import Evaluation
from .spec import Link, TrackingSpec
from .store import Kind, Point, Search, Status, Training, now_ms

log = logging.getLogger("nas.tracking")

PATIENCE = 60.0
"""Seconds that `finish` waits for what is still to be written."""

PACE = 1.0
"""Seconds for which points of series are gathered before they are written together."""

R = TypeVar("R", Search, Training)
Job = Callable[[R], None]


class Writer(Generic[R]):
    """A way to a run in MLflow, written in the background.

    `tracking.json` in the folder remembers the run, so that what is resumed goes on with it and logs nothing twice. Files handed
    in must stay where they are until `finish`.
    """

    kind: type[R]
    work: ClassVar[str]
    """What it is that goes on without MLflow."""

    def __init__(self, spec: TrackingSpec, folder: Path, experiment: str, patience: float = PATIENCE) -> None:
        self._spec, self._folder, self._patience = spec, folder, patience
        self._experiment = spec.experiment or experiment
        self._jobs: queue.Queue[Job[R] | None] = queue.Queue()
        self._points: queue.SimpleQueue[Point] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._warned = False
        self.link: Link | None = None
        """Where the run is, once it is there."""

    def start(self, name: str, params: Mapping[str, Any], tags: Mapping[str, str], description: str) -> None:
        """Begin the run, or go on with the one that the folder remembers."""
        if not self._spec.enabled or self._thread:
            return
        self._thread = threading.Thread(target=self._work, args=(name,), name="tracking", daemon=True)
        self._thread.start()
        self._jobs.put(lambda run: run.say(dict(params), dict(tags)))
        self.describe(description)

    def log_series(self, name: str, value: float, step: int) -> None:
        """One value of a series of the run's, such as `hypervolume` over evaluations."""
        if self._thread:
            self._points.put(Point(name, float(value), step, now_ms()))

    def describe(self, markdown: str) -> None:
        """The run's description; a search's (see `front_note`) is its experiment's too."""
        self._put(lambda run: run.describe(markdown))

    def finish(self, status: Status = "FINISHED") -> None:
        """End the run, once all is written or `patience` is over."""
        if not self._thread:
            return
        self._put(self._write_points)
        self._put(lambda run: run.finish(status))
        self._jobs.put(None)
        self._thread.join(self._patience)
        if self._thread.is_alive():
            self._warn(f"{self._jobs.qsize()} entries were not written within {self._patience:g} s")
        self._thread = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        interrupted = isinstance(error, KeyboardInterrupt)
        self.finish("KILLED" if interrupted else "FAILED" if error else "FINISHED")

    def _put(self, job: Job[R]) -> None:
        if self._thread:
            self._jobs.put(job)

    def _work(self, name: str) -> None:
        run = self._open(name)
        while (job := self._next()) is not None:
            try:
                if run:
                    job(run)
            except Exception as error:
                self._warn(f"{type(error).__name__}: {error}")

    def _next(self) -> Job[R] | None:
        """The next job; in a quiet moment, the points that have gathered."""
        try:
            return self._jobs.get(timeout=PACE)
        except queue.Empty:
            return self._write_points

    def _write_points(self, run: R) -> None:
        points = []
        while not self._points.empty():
            points.append(self._points.get())
        if points:
            run.points(points)

    def _open(self, name: str) -> R | None:
        try:
            run = self._resume() or self.kind.start(self._uri, self._folder.parent, self._experiment, name)
            self.link = run.link
            run.link.save(self._folder)
            return run
        except Exception as error:
            self._warn(f"{type(error).__name__}: {error}")
            return None

    def _resume(self) -> R | None:
        link = Link.load(self._folder)
        if not link or link.uri != self._uri:
            return None
        from mlflow.exceptions import MlflowException

        try:
            return self.kind.resume(link)
        except MlflowException:
            return None

    @property
    def _uri(self) -> str:
        return self._spec.resolve(self._folder.parent)

    def _warn(self, why: str) -> None:
        if not self._warned:
            self._warned = True
            what = f"MLflow at {self._uri}: {why.splitlines()[0]}"
            log.warning("%s; the %s goes on, and its results are in %s", what, self.work, self._folder)


class Tracker(Writer[Search]):
    """A search's way to MLflow; `folder` is the run's."""

    kind = Search
    work = "search"

    def log_evaluations(self, evaluations: Sequence[Evaluation], kind: Kind, pictures: Mapping[str, Path] | None = None) -> None:
        """A child run for each evaluation; `pictures` maps config hashes to PNG or SVG files.

        A front is given whole each time: members that fell off it disappear.
        """
        kept, files = tuple(evaluations), dict(pictures or {})

        def log_and_remember(search: Search) -> None:
            search.evaluations(kept, kind, files)
            replace(search.link, children=dict(search.logged)).save(self._folder)

        self._put(log_and_remember)

    def log_table(self, evaluations: Sequence[Evaluation], name: str = "evaluations") -> None:
        """All evaluations of the search in one table; the newest call stands."""
        kept = tuple(evaluations)
        self._put(lambda search: search.table(kept, name))

    def log_artifact(self, path: Path, folder: str = "") -> None:
        """A file, or a folder's files: pictures, tables, the interactive page of the front."""
        self._put(lambda search: search.artifact(path, folder))

    def log_text(self, text: str, file: str) -> None:
        """A text as an artifact, such as `front.html`."""
        self._put(lambda search: search.text(text, file))


class TrainingTracker(Writer[Training]):
    """A training's way to MLflow."""

    kind = Training
    work = "training"
