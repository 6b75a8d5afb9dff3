"""`nas train`: trains the model of an exported folder, with curves in MLflow beside the search that the folder comes from.

Owns where in MLflow a training is written, and its parameters and tags there. The training is `nas.export`'s.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..export import Provenance, read_config
from ..export.train import Progress, Record, train_export
from ..export.trainers import CHECKPOINTS, Trained, TrainSettings, is_main_process
from ..files import require_no_links
from ..sharing.label import names_of, sharing_line
from ..tracking import Link, Tracker, TrackingSpec, forget, set_aside, unsent
from ..tracking.tracker import UNSENT


@dataclass(frozen=True)
class TrackedTraining:
    """A finished training, and where its curves are, if it was tracked."""

    trained: Trained
    experiment: str = ""
    link: Link | None = None

    def to_data(self) -> dict[str, Any]:
        link = self.link
        where = {"experiment": self.experiment, "run_id": link.run_id, "tracking_uri": link.uri} if link else {}
        return self.trained.to_data() | (where or dict.fromkeys(("experiment", "run_id", "tracking_uri")))


def train_folder(
    directory: Path,
    text: str | Path,
    settings: TrainSettings,
    to: Path | None = None,
    tracking: str | None = None,
    progress: Progress | None = None,
) -> TrackedTraining:
    """Train a folder's model as `train_export` does, its curves in the experiment of the search that the folder comes from.

    Without a search, in an experiment named after the folder. `tracking` is MLflow's address, `none` for nowhere; by default
    MLFLOW_TRACKING_URI, else nowhere. The folder, which may be a stranger's, does not choose the address. Raises UserError.
    """
    provenance = Provenance.load(directory)
    target = to or directory
    require_no_links(target, CHECKPOINTS)
    spec = TrackingSpec.said(tracking) if is_main_process() else TrackingSpec(enabled=False)
    if not (spec.enabled and spec.known):
        return TrackedTraining(train_export(directory, text, settings, to, progress))
    experiment = provenance.experiment if provenance and provenance.experiment else directory.resolve().name
    folder = target / CHECKPOINTS
    tracker = Tracker(spec, folder, experiment, "training")
    with _removing_link(folder), tracker:
        about = _about(directory, text, settings, provenance)
        trained = train_export(directory, text, settings, to, progress, _record(tracker, settings, target.resolve().name, *about))
        for name in ("tokens", "seconds"):
            tracker.log_series(name, getattr(trained, name), trained.steps)
    return TrackedTraining(trained, experiment, tracker.link)


def _about(
    directory: Path, text: str | Path, settings: TrainSettings, provenance: Provenance | None
) -> tuple[dict[str, Any], dict[str, str]]:
    """Parameters and tags of the run."""
    _, config = read_config(directory)
    given = {name: value for name, value in asdict(settings).items() if value is not None and name != "resume"}
    params = {"text": str(text), **names_of(config), "sharing": sharing_line(config)} | given
    tags = {"folder": str(directory.resolve())}
    return params, tags | ({"search": provenance.run, "search_run_id": provenance.run_id} if provenance else {})


def _record(tracker: Tracker, settings: TrainSettings, name: str, params: Mapping[str, Any], tags: Mapping[str, str]) -> Record:
    """Logs figures. The run starts with the first of them, after all checks; it continues one only if it was begun there."""
    begun = False

    def record(step: int, figures: Mapping[str, float]) -> None:
        nonlocal begun
        if not begun and (not settings.resume or tracker.begun_elsewhere):
            set_aside(tracker.folder)
        begun = True
        tracker.start(f"train {name}", params, tags, "")
        for figure, value in figures.items():
            if math.isfinite(value):
                tracker.log_series(figure, value, step)

    return record


@contextmanager
def _removing_link(folder: Path) -> Iterator[None]:
    """Remove the link to the run once a training has ended (its checkpoints are gone) and all of it is written."""
    try:
        yield
    finally:
        kept = [path for path in folder.iterdir() if not path.name.startswith("tracking.")] if folder.is_dir() else []
        if folder.is_dir() and all(path.name.startswith(UNSENT) for path in kept) and not unsent(folder):
            forget(folder)
            if not kept:
                folder.rmdir()
