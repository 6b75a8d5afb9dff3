"""A search in MLflow: one parent run, a child for each evaluation that matters, tables, pictures and a view. And the training of
one model: a run with its curves.

Owns every call to MLflow's client. Every call here may take seconds and may raise; who must not wait or fail goes through
`nas.tracking.tracker`.
"""

from __future__ import annotations

import csv
import getpass
import io
import json
import logging
import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ..sharing.primitives import LAYER_ROWS
from ..training.evaluation import Evaluation, Weights
from .note import clip, sharing_line
from .spec import Link, artifact_folder, database_file
from .view import KIND_COLORS, SEARCH_TAG, VIEW_TAG, layers_param, view_tag

Kind = Literal["front", "preset"] | Weights
"""What a child run is: a member of the front, a preset off it, or another model, by where its weights are from."""
Status = Literal["FINISHED", "FAILED", "KILLED"]

KEY_TAG = "nas.key"
NOTE_TAG = "mlflow.note.content"
BATCH = 1000
"""Metrics in one `log_batch`: MLflow's limit."""

QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "GIT_PYTHON_REFRESH": "quiet",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
}


class Point(NamedTuple):
    """One value of a series."""

    name: str
    value: float
    step: int
    time_ms: int


def now_ms() -> int:
    """The time as MLflow writes it: milliseconds since 1970."""
    return int(time.time() * 1000)


def connect(uri: str) -> Any:
    """An `MlflowClient`: no telemetry, no progress bars, nothing on the terminal below a warning.

    What the environment already says stands. A new SQLite file takes some seconds: MLflow runs its migrations.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    from mlflow import MlflowClient

    logging.getLogger("mlflow").setLevel(logging.WARNING)
    database = database_file(uri)
    if database:
        database.parent.mkdir(parents=True, exist_ok=True)
    return MlflowClient(tracking_uri=uri)


@dataclass
class Logged:
    """A run, open for writing: what a search's parent run and a training have in common."""

    client: Any
    link: Link
    resumed: bool = field(default=False, kw_only=True)
    _last_step: dict[str, int] = field(default_factory=dict, kw_only=True)

    def say(self, params: Mapping[str, Any], tags: Mapping[str, str]) -> None:
        """Parameters and tags, in one call. A parameter once written stands."""
        known = self.client.get_run(self.link.run_id).data.params if self.resumed else {}
        self._batch(self.link.run_id, params={k: v for k, v in params.items() if k not in known}, tags=tags)

    def describe(self, markdown: str) -> None:
        """The run's description."""
        self.client.set_tag(self.link.run_id, NOTE_TAG, clip(markdown))

    def points(self, points: Sequence[Point]) -> None:
        """Values of the run's series; after a resume, steps that are there already are left out."""
        from mlflow.entities import Metric

        new = [p for p in points if p.step > self._step_reached(p.name)]
        for start in range(0, len(new), BATCH):
            metrics = [Metric(p.name, _round(p.value, 7), p.time_ms, p.step) for p in new[start : start + BATCH]]
            self.client.log_batch(self.link.run_id, metrics=metrics)

    def _step_reached(self, name: str) -> int:
        if self.resumed and name not in self._last_step:
            history = self.client.get_metric_history(self.link.run_id, name)
            self._last_step[name] = max((metric.step for metric in history), default=-1)
        return self._last_step.get(name, -1)

    def finish(self, status: Status) -> None:
        """The run has ended."""
        self.client.set_terminated(self.link.run_id, status)

    def _batch(self, run_id: str, **entries: Mapping[str, Any]) -> None:
        from mlflow.entities import Metric, Param, RunTag

        now = now_ms()
        metrics = [Metric(name, value, now, 0) for name, value in entries.get("metrics", {}).items()]
        params = [Param(name, str(value)) for name, value in entries.get("params", {}).items()]
        tags = [RunTag(name, str(value)) for name, value in entries.get("tags", {}).items()]
        self.client.log_batch(run_id, metrics=metrics, params=params, tags=tags)


class Training(Logged):
    """A model's training."""

    @staticmethod
    def start(uri: str, runs: Path, experiment: str, name: str) -> Training:
        """A new run in an experiment, which is made if there is none by that name."""
        return Training(*_start(uri, runs, experiment, name, "training"))

    @staticmethod
    def resume(link: Link) -> Training:
        """The training that a link leads to. Raises MlflowException if it is gone."""
        client, _ = _reopen(link)
        return Training(client, link, resumed=True)


@dataclass
class Search(Logged):
    """A search's parent run, open for writing. `logged` maps the children's keys to their run ids.

    `stated` are the primitives that any child's config states: every child counts the layers of each, because MLflow leaves a run
    out of a chart if it lacks one of its axes.
    """

    name: str
    title: str = ""
    stated: tuple[str, ...] = ()
    logged: dict[str, str] = field(default_factory=dict)

    @staticmethod
    def start(uri: str, runs: Path, experiment: str, name: str) -> Search:
        """A new parent run in an experiment, which is made if there is none by that name."""
        client, link = _start(uri, runs, experiment, name, "search")
        search = Search(client, link, f"{name} {link.run_id[:8]}".replace("'", ""), name)
        client.set_tag(link.run_id, SEARCH_TAG, search.name)
        search._write_view()
        return search

    @staticmethod
    def resume(link: Link) -> Search:
        """The search that a link leads to, knowing what it has. Raises MlflowException if it is gone."""
        client, run = _reopen(link)
        search = Search(client, link, run.data.tags[SEARCH_TAG], run.info.run_name, resumed=True)
        counted: dict[str, set[str]] = {}
        for child in list(search.children()):
            key = child.data.tags.get(KEY_TAG)
            if key:
                search.logged[key] = child.info.run_id
                counted[child.info.run_id] = {row.name for row in LAYER_ROWS if layers_param(row.name) in child.data.params}
            else:
                client.delete_run(child.info.run_id)  # half written when the search was killed
        search._take_up(counted)
        return search

    def _take_up(self, counted: Mapping[str, set[str]]) -> None:
        """Count again what any child counts, in all of them: a kill may have come between two."""
        self.stated = _in_order(name for names in counted.values() for name in names)
        for run_id, names in counted.items():
            self._count_none(run_id, {*self.stated} - names)
        self._write_view()

    def _count_none(self, run_id: str, primitives: Iterable[str]) -> None:
        params = {layers_param(name): 0 for name in primitives}
        if params:
            self._batch(run_id, params=params)

    def children(self) -> Iterable[Any]:
        """The child runs, as MLflow's `Run`."""
        token, query = None, f"tags.mlflow.parentRunId = '{self.link.run_id}'"
        while True:
            page = self.client.search_runs([self.link.experiment_id], query, page_token=token)
            yield from page
            token = page.token
            if not token:
                return

    def describe(self, markdown: str) -> None:
        """The description of the experiment and of the parent run."""
        super().describe(markdown)
        self.client.set_experiment_tag(self.link.experiment_id, NOTE_TAG, clip(markdown))

    def evaluations(self, evaluations: Sequence[Evaluation], kind: Kind, pictures: Mapping[str, Path]) -> None:
        """A child for each evaluation that has none; of a front, members that are no longer on it are taken away."""
        keys = {_key(e, kind): e for e in evaluations}
        self._widen({name for e in evaluations for layer in e.config.layers for name, _ in layer} - {*self.stated})
        for key, evaluation in keys.items():
            if key not in self.logged:
                self.logged[key] = self._child(evaluation, kind, pictures.get(evaluation.config.hash))
        gone = [key for key in self.logged if kind == "front" and key.startswith("front:") and key not in keys]
        for key in gone:
            self.client.delete_run(self.logged.pop(key))

    def _widen(self, new: set[str]) -> None:
        """Count these primitives too, in the children that are there and in the view."""
        if not new:
            return
        for run_id in self.logged.values():
            self._count_none(run_id, new)
        self.stated = _in_order([*self.stated, *new])
        self._write_view()

    def _write_view(self) -> None:
        view = view_tag(self.title, self.name, self.stated, now_ms())
        self.client.set_experiment_tag(self.link.experiment_id, f"{VIEW_TAG}{self.link.view}", view)

    def _child(self, e: Evaluation, kind: Kind, picture: Path | None) -> str:
        end = now_ms()
        tags = _tags(kind) | {"mlflow.parentRunId": self.link.run_id, SEARCH_TAG: self.name}
        start = end - int(e.seconds * 1000)
        run = self.client.create_run(self.link.experiment_id, start_time=start, tags=tags, run_name=_name(e, kind))
        self._batch(run.info.run_id, params=_params(e, self.stated), metrics=_metrics(e))
        self.client.log_text(run.info.run_id, e.config.to_yaml(), "sharing.yaml")
        if picture:
            self.client.log_artifact(run.info.run_id, str(picture))
        self.client.set_terminated(run.info.run_id, "FINISHED", end)
        # The key comes last: a child without one is half written, and a resumed search writes it anew.
        self.client.set_tag(run.info.run_id, KEY_TAG, _key(e, kind))
        return str(run.info.run_id)

    def table(self, evaluations: Sequence[Evaluation], name: str) -> None:
        """All evaluations as `name.csv` and as the table that MLflow's page shows, `name.json`; written anew each time."""
        rows = [_row(e) for e in evaluations]
        columns = list(rows[0]) if rows else []
        data = [list(row.values()) for row in rows]
        text = io.StringIO()
        csv.writer(text).writerows([columns, *data])
        self.client.log_text(self.link.run_id, text.getvalue(), f"{name}.csv")
        table = json.dumps({"columns": columns, "data": data}, ensure_ascii=False)
        self.client.log_text(self.link.run_id, table, f"{name}.json")
        shown = [{"path": f"{name}.json", "type": "table"}]
        self.client.set_tag(self.link.run_id, "mlflow.loggedArtifacts", json.dumps(shown))

    def artifact(self, path: Path, folder: str) -> None:
        """A file, or a folder's files, among the parent's artifacts."""
        log = self.client.log_artifacts if path.is_dir() else self.client.log_artifact
        log(self.link.run_id, str(path), folder or None)

    def text(self, text: str, file: str) -> None:
        """A text as the artifact `file` of the parent."""
        self.client.log_text(self.link.run_id, text, file)


def _start(uri: str, runs: Path, experiment: str, name: str, kind: str) -> tuple[Any, Link]:
    """A new run in an experiment, which is made if there is none by that name; with the client."""
    client = connect(uri)
    experiment_id = _experiment(client, experiment, artifact_folder(uri, runs))
    run_id = client.create_run(experiment_id, run_name=name, tags=_tags(kind)).info.run_id
    return client, Link(uri, experiment_id, run_id)


def _reopen(link: Link) -> tuple[Any, Any]:
    """The client, and the run that a link leads to, which goes on."""
    client = connect(link.uri)
    run = client.get_run(link.run_id)
    if run.info.lifecycle_stage != "active":
        client.restore_run(link.run_id)
    client.update_run(link.run_id, status="RUNNING")
    return client, run


def _experiment(client: Any, name: str, artifacts: Path | None) -> str:
    found = client.get_experiment_by_name(name)
    if found and found.lifecycle_stage != "active":
        client.restore_experiment(found.experiment_id)
    if found:
        return str(found.experiment_id)
    where = (artifacts / name.replace("/", "-")).as_uri() if artifacts else None
    return str(client.create_experiment(name, where, {"mlflow.experimentKind": "custom_model_development"}))


def _tags(kind: str) -> dict[str, str]:
    source = {
        "mlflow.source.name": "nas train" if kind == "training" else "nas search",
        "mlflow.source.type": "LOCAL",
        "mlflow.user": _user(),
    }
    return source | {"kind": kind, "mlflow.runColor": KIND_COLORS[kind]}


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container whose user has no name
        return "unknown"


def _key(e: Evaluation, kind: Kind) -> str:
    return f"{kind}:{e.config.hash}:{e.seed}"


def _name(e: Evaluation, kind: Kind) -> str:
    return f"{e.label} {kind}" if kind == e.weights else e.label


def _in_order(names: Iterable[str]) -> tuple[str, ...]:
    """Primitives in the order of their table."""
    known = {*names}
    return tuple(row.name for row in LAYER_ROWS if row.name in known)


def _params(e: Evaluation, primitives: Sequence[str]) -> dict[str, Any]:
    """What the config is, in few words and few numbers: for each of these primitives, how many layers state it."""
    counts = {layers_param(name): sum(name in dict(layer) for layer in e.config.layers) for name in primitives}
    origin = {"supernet": e.supernet} if e.supernet else {}
    return {"sharing": sharing_line(e.config), "hash": e.config.hash, "weights": e.weights, "seed": e.seed} | counts | origin


def _metrics(e: Evaluation) -> dict[str, float]:
    """The figures under their names; `memory_mib` besides, because an axis shows a name and a bare number."""
    figures = {k: v for k, v in e.to_data().items() if isinstance(v, int | float) and k not in ("number", "seed")}
    figures["memory_mib"] = e.memory.memory_bytes / 2**20
    return {name: _round(value) for name, value in figures.items() if math.isfinite(value)}


def _round(value: float, digits: int = 5) -> float:
    return value if isinstance(value, int) else float(f"{value:.{digits}g}")


def _row(e: Evaluation) -> dict[str, Any]:
    """A row of the table: whole numbers whole, others to five digits, the config as one line."""
    row = {k: _round(v) if isinstance(v, float) else v for k, v in e.to_data().items()}
    return {k: (None if v != v else v) for k, v in row.items()} | {"config": sharing_line(e.config)}
