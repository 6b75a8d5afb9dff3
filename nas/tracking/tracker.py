"""Tracking that neither delays nor fails a search or a training.

Owns the way from the program to MLflow: every call appends an entry to the outbox and returns; a background thread writes the
entries in their order. What MLflow has not acknowledged stays in the outbox, and is written when it answers again: by the same
process, by `nas resume`, or by `nas sync`.
"""

from __future__ import annotations

import logging
import shlex
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from ..errors import UserError
from ..files import locked
from ..sharing.label import labels, sharing_line
from ..sharing.objectives import DEFAULT
from ..sharing.sharing_config import SharingConfig
from ..training.evaluation import Evaluation
from .spec import LINK_FILE, OUTBOX_FILE, Link, Outbox, TrackingSpec, is_damaged, require_same, without_password
from .store import Kind, Sender, Status, be_quiet, model_entry, now_ms, primitives_of, table_entry

log = logging.getLogger("nas.tracking")

PATIENCE = 60.0  # seconds that `finish` waits for what is still to be written
INTERRUPTED = 3.0  # seconds that it waits after Ctrl-C and SIGTERM
PACE = 1.0  # seconds between two writings. Points of series that come in between are written together
LONGEST_PAUSE = 30.0  # seconds between two attempts at a server that does not answer
EVERY = 10.0  # seconds between two looks at the machine, as of MLflow's own


class Tracker:
    """The way of a search, or of a training, to MLflow; `folder` is the run's and remembers where it was tracked. Files that
    are handed in must stay where they are until they are written."""

    def __init__(
        self,
        spec: TrackingSpec,
        folder: Path,
        experiment: str,
        kind: Literal["search", "training"] = "search",
        patience: float = PATIENCE,
    ) -> None:
        self.folder, self.kind, self._patience = folder, kind, patience
        self._enabled, self._experiment = spec.enabled, spec.experiment or experiment
        self._uri = spec.resolve(folder.parent) if spec.enabled else ""
        self._outbox = Outbox(folder)
        self._steps: dict[str, int] = {}
        self._thread: threading.Thread | None = None
        self._closing, self._left = threading.Event(), threading.Event()
        self._warned = self._ended = False
        self.link: Link | None = None
        """Where the run is in MLflow, once it is finished."""

    def start(self, name: str, params: Mapping[str, Any], tags: Mapping[str, str], description: str) -> None:
        """Begin the run, or continue the one that the folder remembers."""
        if not self._enabled or self._thread:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self._outbox.repair()
        if next(self._outbox.read(), None) is None:
            run = {"id": uuid.uuid4().hex, "name": name, "kind": self.kind, "experiment": self._experiment, "uri": self._uri}
            self._outbox.append("run", **run, time_ms=now_ms())
        self._steps, self._ended = self._outbox.last_steps(), False
        self._outbox.append("begin", params={k: str(v) for k, v in params.items()}, tags=dict(tags))
        self._outbox.append("note", text=description)
        self._thread = threading.Thread(target=self._send, name="tracking", daemon=True)
        self._thread.start()

    @property
    def begun_elsewhere(self) -> bool:
        """Whether the folder has entries for another address, experiment or kind of run than this tracker's."""
        first, mine = next(self._outbox.read(), None), {"uri": self._uri, "experiment": self._experiment, "kind": self.kind}
        return first is not None and any(first[0].get(name) != value for name, value in mine.items())

    def log_series(self, name: str, value: float, step: int) -> None:
        """One value of a series, such as `hypervolume` over evaluations. A step that is there already is left out."""
        if self._thread and step > self._steps.get(name, -1):
            self._steps[name] = step
            self._outbox.append("point", name=name, value=float(value), step=step, time_ms=now_ms())

    def describe(self, markdown: str) -> None:
        self._append("note", text=markdown)

    def log_models(
        self,
        models: Mapping[Kind, Sequence[Evaluation]],
        pictures: Mapping[str, Path],
        beside: Mapping[SharingConfig, Mapping[str, Any]] | None = None,
    ) -> None:
        """A child run for each evaluated model, by kind; `pictures` maps config hashes to image files, and `beside` configs to
        what rows say of them among the others.

        The models are given whole each time: children of models that are not among them are deleted.
        """
        files = {hash: Path(self._relative(path)) for hash, path in pictures.items()}
        primitives = primitives_of(e for found in models.values() for e in found)
        entries = [
            model_entry(
                e, (beside or {}).get(e.config, {}), kind, primitives, files.get(e.config.hash) if kind == "front" else None
            )
            for kind, found in models.items()
            for e in found
        ]
        objectives = next((e.objectives for found in models.values() for e in found), DEFAULT)
        self._append("models", primitives=primitives, models=entries, objectives=objectives)

    def log_table(self, evaluations: Sequence[Evaluation]) -> None:
        """Evaluations as a table. The last call counts."""
        self._append("table", **table_entry(evaluations, "evaluations"))

    def log_failures(self, failed: Mapping[SharingConfig, str]) -> None:
        """The configs that could not be evaluated, each with the reason, as a table. The last call counts."""
        names = labels(failed)
        rows = [[names[config], config.hash, reason, sharing_line(config)] for config, reason in failed.items()]
        self._append("table", name="failures", columns=["label", "hash", "reason", "config"], data=rows)

    def log_artifact(self, path: Path, folder: str = "") -> None:
        self._append("artifact", path=self._relative(path), folder=folder)

    def _relative(self, path: Path) -> str:
        """A file's path within the run's folder, which may be moved before the file is sent."""
        return str(path.resolve().relative_to(self.folder.resolve()))

    def end(self, status: Status = "FINISHED") -> None:
        """How the run ended. The first call counts: what is done is done, whatever comes after."""
        if self._thread and not self._ended:
            self._ended = True
            self._append("end", status=status, time_ms=now_ms())

    def finish(self, status: Status = "FINISHED") -> None:
        """End the run; wait until all is written, at most `patience` seconds."""
        if not self._thread:
            return
        self.end(status)
        self._closing.set()
        self._thread.join(self._patience)
        self._left.set()  # it ends as soon as it can: what it leaves, the next one in this process may write
        self._thread, self.link = None, Link.load(self.folder)
        left = unsent(self.folder)
        if left:
            told = TrackingSpec().resolve(self.folder.resolve().parent) != self._uri  # the folder does not choose it
            where = f" --tracking {shlex.quote(without_password(self._uri))}" if told else ""
            self._warn(f"{left} entries are not written yet; `nas sync {shlex.quote(str(self.folder))}{where}` writes them")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None and not isinstance(error, Exception):  # a signal: whoever sent it does not wait
            self._patience = min(self._patience, INTERRUPTED)
            return self.finish("KILLED")
        self.finish("FAILED" if error else "FINISHED")

    def _append(self, op: str, **fields: Any) -> None:
        if self._thread:
            self._outbox.append(op, **fields)

    def _send(self) -> None:
        """Write entries as they come, until the run is finished; a server that does not answer is asked again, more rarely."""
        sender, pause, machine = Sender(self.folder, self._uri), PACE, Machine()
        while True:
            closing = self._closing.is_set()  # read before sending: what is appended later needs another turn
            for name, value in machine.figures().items():
                self.log_series(name, value, self._steps.get(name, -1) + 1)
            try:
                with _locked(self.folder, wait=True):
                    if not self._left.is_set():
                        sender.send(self._left.is_set)
                pause = PACE
            except Exception as error:
                self._warn(f"{type(error).__name__}: {_why(error)}")
                pause = min(2 * pause, LONGEST_PAUSE)
            for refused in sender.refused:
                self._warn(refused)
            if closing:
                return
            self._closing.wait(pause)

    def _warn(self, why: str) -> None:
        """Say once what went wrong with MLflow, and that the work goes on."""
        if not self._warned:
            self._warned = True
            what = f"MLflow at {without_password(self._uri)}: {without_password(why.splitlines()[0])}"
            log.warning("%s; the %s goes on, its results are in %s", what, self.kind, self.folder)


def sync(folder: Path, tracking: str | None = None) -> int:
    """Write to MLflow what a folder's outbox still holds; the number of entries written.

    It is written where the caller says (`tracking`), or MLFLOW_TRACKING_URI, or into the database beside the folder. The folder,
    which may be a stranger's, does not choose. Raises UserError if it was tracked elsewhere or never, another process is writing
    it, or MLflow does not answer.
    """
    first = next(Outbox(folder).read(), None)
    if first is None:
        raise UserError("has nothing to write to MLflow", where=str(folder), hint="give a run that was tracked")
    link, uri = Link.load(folder), TrackingSpec(tracking).resolve(folder.resolve().parent)
    if tracking is None:
        require_same(link.uri if link else str(first[0].get("uri")), uri, folder, "nas sync")
    sender = Sender(folder, uri)
    with _locked(folder):
        try:
            sender.send()
        except Exception as error:
            message, hint = f"MLflow does not answer: {_why(error)}", f"try `nas sync {shlex.quote(str(folder))}` again later"
            raise UserError(without_password(message), where=without_password(uri), hint=hint) from None
    return sender.written


def _why(error: Exception) -> str:
    """What went wrong, in a line."""
    if is_damaged(error):
        return "the database is damaged; move it away, and `nas sync` writes all of it again"
    return next(iter(str(error).splitlines()), type(error).__name__)


def unsent(folder: Path) -> int:
    """How many of a folder's entries MLflow has not acknowledged."""
    link = Link.load(folder)
    return sum(1 for _ in Outbox(folder).read(link.sent if link else 0))


def tracked(folder: Path) -> bool:
    """Whether a folder has an outbox."""
    return (folder / OUTBOX_FILE).is_file()


UNSENT = "unsent-"  # how the names of the folders begin that hold what an earlier training has not sent


def set_aside(folder: Path) -> None:
    """Forget a folder's tracking; what MLflow has not acknowledged of it is kept in a folder inside, for `nas sync`."""
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder, wait=True):  # an earlier training of this process may still be writing
        _set_aside(folder)


def _set_aside(folder: Path) -> None:
    left = unsent(folder)
    if left:
        aside = folder / f"{UNSENT}{uuid.uuid4().hex[:8]}"
        aside.mkdir()
        for name in (LINK_FILE, OUTBOX_FILE):
            if (folder / name).exists():
                (folder / name).replace(aside / name)
        log.warning("%d entries of an earlier training were not written yet; they are in %s, for `nas sync`", left, aside)
    forget(folder)


def forget(folder: Path) -> None:
    """Remove what a folder remembers of its tracking."""
    for name in (LINK_FILE, OUTBOX_FILE, LOCK_FILE):
        (folder / name).unlink(missing_ok=True)


LOCK_FILE = "tracking.lock"


def _locked(folder: Path, wait: bool = False) -> AbstractContextManager[None]:
    """Only one tracker, of any process, writes a folder's entries. Raises UserError if another one does, or waits for it."""
    refusal = UserError("another process is writing this run to MLflow", where=str(folder), hint="wait for it")
    return locked(folder / LOCK_FILE, None if wait else refusal)


class Machine:
    """The driver's machine, as far as it tells what it is busy with: MLflow's own monitors of processor, network and GPUs."""

    def __init__(self) -> None:
        be_quiet()
        from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
        from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
        from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

        self._monitors, self._looked = list[Any](), time.monotonic()
        for kind in (CPUMonitor, NetworkMonitor, GPUMonitor):
            with suppress(Exception):  # what this machine does not have
                self._monitors.append(kind())
        self._collect()  # a processor's use is counted from one look to the next

    def figures(self) -> dict[str, float]:
        """The figures by name, if it is time for them."""
        if time.monotonic() - self._looked < EVERY:
            return {}
        self._looked = time.monotonic()
        return self._collect()

    def _collect(self) -> dict[str, float]:
        found = dict[str, float]()
        for monitor in self._monitors:
            with suppress(Exception):  # a driver that does not answer is no reason to stop tracking
                monitor.clear_metrics()
                monitor.collect_metrics()
                found |= {f"system/{name}": float(value) for name, value in monitor.aggregate_metrics().items()}
        return found
