"""A run in MLflow: entries of the outbox, written by MLflow's client.

Owns every call to the client, and what a search (one parent run, a child for each model of the front, tables, pictures, a view)
and a training (a run with its curves) are in MLflow. Writing an entry twice is the same as writing it once, so that a process
that is killed between a call and its acknowledgement leaves nothing double: runs are found again by a tag that they are created
with.
"""

from __future__ import annotations

import getpass
import io
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from csv import writer
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from ..sharing.label import labels, sharing_line
from ..sharing.objectives import DEFAULT
from ..sharing.primitives import LAYER_ROWS
from ..training.evaluation import Evaluation, Weights
from .spec import Entry, Link, Outbox, artifact_folder, is_damaged, prepare_database
from .view import KIND_COLORS, SEARCH_TAG, VIEW_TAG, clip, layers_param, view_tag

Kind = Literal["front", "preset"] | Weights
"""What a child run is: a member of the front, a preset off it, or another model, by where its weights are from."""
Status = Literal["FINISHED", "FAILED", "KILLED"]

RUN_TAG = "nas.run"
KEY_TAG = "nas.key"
NOTE_TAG = "mlflow.note.content"
TABLES_TAG = "mlflow.loggedArtifacts"
BATCH = 1000  # metrics in one `log_batch`: MLflow's limit

PERMANENT = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "INVALID_STATE")
"""MLflow's error codes of an entry that is refused now and at any later time."""

QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "GIT_PYTHON_REFRESH": "quiet",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # what fails is written again from the outbox
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "60",
}


def now_ms() -> int:
    """The time as MLflow writes it: milliseconds since 1970."""
    return int(time.time() * 1000)


def be_quiet() -> None:
    """Set what MLflow reads as it is imported: else it writes telemetry's file to the user's home."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)


def connect(uri: str) -> Any:
    """An `MlflowClient`: no telemetry, no progress bars, nothing on the terminal below a warning. The environment's own
    settings have precedence. A new SQLite database takes some seconds."""
    be_quiet()
    logging.getLogger("alembic").setLevel(logging.WARNING)
    from mlflow import MlflowClient

    logging.getLogger("mlflow").setLevel(logging.WARNING)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # a traceback of what is said here in a line
    prepare_database(uri)
    return MlflowClient(tracking_uri=uri)


class Sender:
    """Writes the entries of a folder's outbox to MLflow at `uri`, in their order; the folder's `Link` says how far they are."""

    def __init__(self, folder: Path, uri: str) -> None:
        self.folder, self.uri, self.outbox = folder, uri, Outbox(folder)
        self.refused: list[str] = []
        """Why MLflow refused entries, which are left out."""
        self.written = 0
        """How many entries were written, or refused."""
        self._run: _Run | None = None

    def send(self, stopped: Callable[[], bool] = lambda: False) -> None:
        """Write all entries that are not written yet, or until it is `stopped`. Raises what the client raises where MLflow does
        not answer."""
        if self._run is None:
            self._run = self._open()
        self._run.link = Link.load(self.folder) or self._run.link  # another process may have written meanwhile
        while not stopped() and (batch := self._next(self._run.link.sent)):
            entries, end = batch
            try:
                WRITERS[entries[0]["op"]](self._run, entries)
            except Exception as error:
                if not _is_permanent(error):
                    raise
                self.refused.append(f"{type(error).__name__}: {error}")
            self._run.link = replace(self._run.link, sent=end)
            self._run.link.save(self.folder)
            self.written += len(entries)

    def _next(self, offset: int) -> tuple[list[Entry], int] | None:
        """The next entry, or as many points of series as follow one another, and the offset behind them."""
        found: list[Entry] = []
        end = offset
        for entry, after in self.outbox.read(offset):
            if found and (entry["op"] != "point" or found[0]["op"] != "point" or len(found) == BATCH):
                break
            found.append(entry)
            end = after
        return (found, end) if found else None

    def _open(self) -> _Run:
        """The run of the outbox's first entry: the one that is linked, one that was created before a kill, or a new one."""
        client, (first, _) = connect(self.uri), next(self.outbox.read())
        link = Link.load(self.folder)
        run = _existing(client, link.run_id) if link and link.uri == self.uri else None
        if run is not None and run.data.tags.get(RUN_TAG) != first["id"]:
            run = None  # another run than the outbox's: the folder would choose where is written
        if link is None or run is None:
            experiment = _experiment(client, first["experiment"], artifact_folder(self.uri, self.folder.parent))
            same = client.search_runs([experiment], f"tags.`{RUN_TAG}` = '{first['id']}'", max_results=1)
            run = same[0] if same else None
            if run is None:
                tags = _tags(first["kind"]) | {RUN_TAG: first["id"]}
                run = client.create_run(experiment, start_time=first["time_ms"], run_name=first["name"], tags=tags)
            link = Link(self.uri, experiment, run.info.run_id)
            link.save(self.folder)  # another one that is there is not of this run
        if run.info.lifecycle_stage != "active":
            client.restore_run(run.info.run_id)
        return _Run(client, self.folder, link, first["name"], first["kind"] == "search")


class _Run:
    """A run of MLflow's, open for writing: of one entry, or of several points of series."""

    def __init__(self, client: Any, folder: Path, link: Link, name: str, is_search: bool) -> None:
        self.client, self.folder, self.link, self.name, self.is_search = client, folder, link, name, is_search

    @property
    def search_tag(self) -> str:
        return f"{self.name} {self.link.run_id[:8]}".replace("'", "")

    def opened(self, entries: Sequence[Entry]) -> None:
        """What makes a search's run a search's: its tag, and its view."""
        if self.is_search:
            self.client.set_tag(self.link.run_id, SEARCH_TAG, self.search_tag)
            self._write_view((), DEFAULT)

    def begin(self, entries: Sequence[Entry]) -> None:
        """Parameters and tags of a start or a resumption. A parameter that is there stays as it is."""
        known = self.client.get_run(self.link.run_id).data.params
        new = {name: value for name, value in entries[0]["params"].items() if name not in known}
        self.client.update_run(self.link.run_id, status="RUNNING")
        self._batch(self.link.run_id, params=new, tags=entries[0]["tags"])

    def note(self, entries: Sequence[Entry]) -> None:
        text = clip(entries[0]["text"])
        self.client.set_tag(self.link.run_id, NOTE_TAG, text)
        if self.is_search:
            self.client.set_experiment_tag(self.link.experiment_id, NOTE_TAG, text)

    def points(self, entries: Sequence[Entry]) -> None:
        from mlflow.entities import Metric

        metrics = [Metric(e["name"], _round(e["value"], 7), e["time_ms"], e["step"]) for e in entries]
        self.client.log_batch(self.link.run_id, metrics=metrics)

    def models(self, entries: Sequence[Entry]) -> None:
        """A child for each model; children of other models are deleted, and so are those that say what an extension has changed.

        Every child counts the layers of each primitive that any of them states: MLflow leaves a run out of a chart if it lacks
        one of the chart's axes.
        """
        primitives, wanted = entries[0]["primitives"], {model["key"]: model for model in entries[0]["models"]}
        children = {run.data.tags.get(KEY_TAG, run.info.run_id): run for run in self.children()}
        for key, run in list(children.items()):
            if key not in wanted or _is_of_before(run, wanted[key]):
                self.client.delete_run(run.info.run_id)
                del children[key]
        self._write_view(primitives, entries[0].get("objectives", DEFAULT))
        for key, model in wanted.items():
            child = children.get(key)
            if child is None or child.info.status != "FINISHED":
                run_id = child.info.run_id if child else self._create_child(model)
                self._write_child(run_id, model)
            else:
                run_id = child.info.run_id
                counts = {layers_param(name): "0" for name in primitives}
                self._batch(run_id, params={n: zero for n, zero in counts.items() if n not in child.data.params})
            self.link = replace(self.link, models={**self.link.models, key: run_id})
        self.link = replace(self.link, models={key: self.link.models[key] for key in wanted})

    def children(self) -> Iterable[Any]:
        token, query = None, f"tags.mlflow.parentRunId = '{self.link.run_id}'"
        while True:
            page = self.client.search_runs([self.link.experiment_id], query, page_token=token)
            yield from page
            token = page.token
            if not token:
                return

    def _create_child(self, model: Mapping[str, Any]) -> str:
        tags = _tags(model["kind"]) | {"mlflow.parentRunId": self.link.run_id, SEARCH_TAG: self.search_tag, KEY_TAG: model["key"]}
        start = model["time_ms"] - int(model["metrics"]["seconds"] * 1000)
        run = self.client.create_run(self.link.experiment_id, start_time=start, tags=tags, run_name=model["name"])
        return str(run.info.run_id)

    def _write_child(self, run_id: str, model: Mapping[str, Any]) -> None:
        self._batch(run_id, params=model["params"], metrics=model["metrics"], time_ms=model["time_ms"])
        self.client.log_text(run_id, model["sharing"], "sharing.yaml")
        if model["picture"]:
            self.client.log_artifact(run_id, str(self._file(model["picture"])))
        self.client.set_terminated(run_id, "FINISHED", model["time_ms"])

    def _write_view(self, primitives: Sequence[str], objectives: Sequence[str]) -> None:
        view = view_tag(self.name, self.search_tag, primitives, now_ms(), objectives)
        self.client.set_experiment_tag(self.link.experiment_id, f"{VIEW_TAG}{self.link.view}", view)

    def table(self, entries: Sequence[Entry]) -> None:
        """A table as `NAME.csv` and as the table that MLflow's page shows, `NAME.json`."""
        name, columns, data = (entries[0][key] for key in ("name", "columns", "data"))
        text = io.StringIO()
        writer(text).writerows([columns, *data])
        self.client.log_text(self.link.run_id, text.getvalue(), f"{name}.csv")
        shown = json.dumps({"columns": columns, "data": data}, ensure_ascii=False)
        self.client.log_text(self.link.run_id, shown, f"{name}.json")
        known = json.loads(self.client.get_run(self.link.run_id).data.tags.get(TABLES_TAG, "[]"))
        tables = {row["path"]: row for row in (*known, {"path": f"{name}.json", "type": "table"})}
        self.client.set_tag(self.link.run_id, TABLES_TAG, json.dumps([*tables.values()]))

    def artifact(self, entries: Sequence[Entry]) -> None:
        path = self._file(entries[0]["path"])
        log = self.client.log_artifacts if path.is_dir() else self.client.log_artifact
        log(self.link.run_id, str(path), entries[0]["folder"] or None)

    def _file(self, path: str) -> Path:
        """A file of the run's folder. An outbox may be a stranger's: nothing outside the folder is sent."""
        found = (self.folder / path).resolve()
        if not found.is_relative_to(self.folder.resolve()):
            raise FileNotFoundError(f"{path} is not in {self.folder}")
        return found

    def end(self, entries: Sequence[Entry]) -> None:
        self.client.set_terminated(self.link.run_id, entries[0]["status"], entries[0]["time_ms"])

    def _batch(self, run_id: str, time_ms: int = 0, **entries: Mapping[str, Any]) -> None:
        from mlflow.entities import Metric, Param, RunTag

        metrics = [Metric(name, value, time_ms, 0) for name, value in entries.get("metrics", {}).items()]
        params = [Param(name, str(value)) for name, value in entries.get("params", {}).items()]
        tags = [RunTag(name, str(value)) for name, value in entries.get("tags", {}).items()]
        self.client.log_batch(run_id, metrics=metrics, params=params, tags=tags)


def _is_of_before(child: Any, model: Mapping[str, Any]) -> bool:
    """Whether a finished child says of its model what was right before the search was extended: a parameter cannot change."""
    counts = {name for name in (*child.data.params, *model["params"]) if name.endswith(layers_param(""))}
    now, then = ({n: str(v) for n, v in said.items() if n not in counts} for said in (model["params"], child.data.params))
    return bool(child.info.status == "FINISHED" and now != then)


WRITERS: dict[str, Callable[[_Run, Sequence[Entry]], None]] = {
    "run": _Run.opened,
    "begin": _Run.begin,
    "note": _Run.note,
    "point": _Run.points,
    "models": _Run.models,
    "table": _Run.table,
    "artifact": _Run.artifact,
    "end": _Run.end,
}
"""How an entry is written, by its `op`."""


def _is_permanent(error: Exception) -> bool:
    """Whether an entry will never be written: its file is gone, or MLflow refuses it."""
    if is_damaged(error):  # which MLflow calls a bad request
        return False
    return isinstance(error, FileNotFoundError) or getattr(error, "error_code", None) in PERMANENT


def _existing(client: Any, run_id: str) -> Any:
    """A run by its id; None if it is gone."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None


def _experiment(client: Any, name: str, artifacts: Path | None) -> str:
    """The id of the experiment of a name, which is created if there is none."""
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


def primitives_of(evaluations: Iterable[Evaluation]) -> list[str]:
    """The primitives that any config states, in the order of their table."""
    known = {name for e in evaluations for layer in e.config.layers for name, _ in layer}
    return [row.name for row in LAYER_ROWS if row.name in known]


def model_entry(e: Evaluation, beside: Mapping[str, Any], kind: Kind, primitives: Sequence[str], picture: Path | None) -> Entry:
    """What a child run says of a model: its config in few words and few numbers, and its figures under their names.

    `beside` is what a row says of it among the others: its label, and how it differs.

    `memory_mib` stands beside `memory_bytes`, because an axis shows a name and a bare number.
    """
    counts = {layers_param(name): sum(name in dict(layer) for layer in e.config.layers) for name in primitives}
    origin = {"supernet": e.supernet} if e.supernet else {}
    row = e.to_data() | dict(beside)
    names = ("label", "hash", "weights", "seed", "neighbour", "within_noise")
    said = {name: row[name] for name in names if row.get(name) is not None}
    params = {"sharing": sharing_line(e.config)} | said | counts | origin
    figures = {k: v for k, v in row.items() if isinstance(v, int | float) and k not in ("number", *said)}
    figures["memory_mib"] = e.memory.memory_bytes / 2**20
    return {
        "key": f"{kind}:{e.config.hash}:{e.seed}",
        "kind": kind,
        "name": (e.name or row["label"]) + f" {kind}" * (kind == e.weights),
        "params": params,
        "metrics": {name: _round(value) for name, value in figures.items() if math.isfinite(value)},
        "sharing": e.config.to_yaml(),
        "picture": str(picture) if picture else None,
        "time_ms": now_ms(),
    }


def table_entry(evaluations: Sequence[Evaluation], name: str) -> Entry:
    """A table's columns and rows: whole numbers whole, others to five digits, the config as one line."""
    names = labels(e.config for e in evaluations)
    said = ({"label": names[e.config], "config": sharing_line(e.config)} for e in evaluations)
    rows = [{k: _cell(v) for k, v in e.to_data().items()} | words for e, words in zip(evaluations, said, strict=True)]
    return {"name": name, "columns": list(rows[0]) if rows else [], "data": [list(row.values()) for row in rows]}


def _cell(value: Any) -> Any:
    return (None if math.isnan(value) else _round(value)) if isinstance(value, float) else value


def _round(value: float, digits: int = 5) -> float:
    return value if isinstance(value, int) else float(f"{value:.{digits}g}")
