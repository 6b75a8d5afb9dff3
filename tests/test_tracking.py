"""A search in MLflow: everything arrives once, whenever MLflow answers, and the search neither waits for it nor fails."""

import base64
import csv
import fcntl
import json
import logging
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest
import tiny
from commands import refused
from searches import PREDICTOR, write_trial

from nas.config import Document, build
from nas.errors import UserError
from nas.pareto import front
from nas.presets import presets
from nas.report.measured import panels
from nas.search.launch import Launch, resume, start
from nas.search.progress import Silent
from nas.search.run import Run
from nas.sharing.label import sharing_line
from nas.sharing.memory import Memory
from nas.sharing.primitives import LAYER_ROWS
from nas.sharing.shape import ModelShape
from nas.sharing.sharing_config import SharingConfig
from nas.tracking import Kind, Link, Tracker, TrackingSpec, front_note, set_aside, sync, unsent
from nas.tracking.spec import Outbox, artifact_folder, prepare_database
from nas.tracking.store import KEY_TAG, Sender, connect
from nas.tracking.view import LINE_LIMIT, NOTE_LIMIT, QUIET, SEARCH_TAG, VIEW_TAG, layers_param
from nas.training.evaluation import Evaluation

SHAPE = tiny.MHA
FIGURES = {
    *("weight_bytes", "kv_cache_bytes", "kv_bytes_per_token", "kv_read_bytes_per_token", "memory_bytes", "unique_params"),
    "flops_per_token",
    *("perplexity", "perplexity_standard_error", "bits_per_byte", "loss_nats_per_token", "tokens", "seconds"),
    "validation_perplexity",
}
COMPARED = {
    *("loss_vs_dense_nats_per_token", "loss_vs_dense_standard_error", "windows_needed"),
    *("loss_vs_neighbour_nats_per_token", "loss_vs_neighbour_standard_error", "seeds_needed"),
}


EVALUATIONS = tiny.evaluated(SHAPE, 2)
FRONT = [EVALUATIONS[i] for i in front([e.point for e in EVALUATIONS])]
RETRAINED = [replace(e, weights="retrained", seed=seed) for e in FRONT[:1] for seed in (0, 1)]
(PANEL,) = panels(EVALUATIONS)
BESIDE = {m.first.config: PANEL.beside(m) for m in PANEL.all}
MODELS: dict[Kind, list[Evaluation]] = {"preset": EVALUATIONS, "front": FRONT, "retrained": RETRAINED}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module", autouse=True)
def no_server() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        yield


@pytest.fixture(scope="module")
def tracked(runs: Path) -> Path:
    """A run folder whose search was logged whole."""
    folder = runs / "first"
    folder.mkdir()
    picture, page = folder / "picture.svg", folder / "front.html"
    page.write_text("<html></html>", encoding="utf-8")
    picture.write_text("<svg xmlns='http://www.w3.org/2000/svg'/>", encoding="utf-8")
    with Tracker(TrackingSpec(), folder, "it's a trial") as tracker:
        tracker.start(folder.name, {"sampler": "nsga2", "evaluations": 300}, {"trial": "t"}, "before")
        for step in range(25):
            tracker.log_series("hypervolume", step / 3, step)
        tracker.log_models(MODELS, {e.config.hash: picture for e in FRONT}, BESIDE)
        tracker.log_table(EVALUATIONS)
        tracker.log_artifact(page)
        tracker.log_artifact(picture, "pictures")
        tracker.describe(front_note({"text": "random"}, FRONT, folder.name))
        # MLflow makes a new database in seconds; the search was not kept waiting for it.
        assert not (folder / "tracking.json").exists()
    return folder


def client_of(folder: Path) -> tuple[Any, Link]:
    link = Link.load(folder)
    assert link
    return connect(link.uri), link


def children(folder: Path) -> list[Any]:
    """The child runs, as MLflow's `Run`."""
    client, link = client_of(folder)
    query = f"tags.mlflow.parentRunId = '{link.run_id}'"
    return list(client.search_runs([link.experiment_id], query, max_results=1000))


def children_of(folder: Path) -> dict[tuple[str, str], Any]:
    """The child runs by kind and name."""
    return {(run.data.tags["kind"], run.info.run_name): run for run in children(folder)}


def keys_of(folder: Path) -> list[str]:
    return sorted(run.data.tags.get(KEY_TAG, "half written") for run in children(folder))


def steps_of(folder: Path) -> list[int]:
    client, link = client_of(folder)
    return sorted(metric.step for metric in client.get_metric_history(link.run_id, "hypervolume"))


def expected_keys(evaluations: list[Evaluation], kind: str) -> list[str]:
    return [f"{kind}:{e.config.hash}:{e.seed}" for e in evaluations]


def parent_of(folder: Path) -> Any:
    client, link = client_of(folder)
    return client.get_run(link.run_id)


def artifact(folder: Path, run_id: str, name: str) -> str:
    found = list((folder.parent / "mlartifacts").rglob(f"{run_id}/artifacts/{name}"))
    return found[0].read_text(encoding="utf-8")


def test_each_evaluation_that_matters_is_one_child(tracked: Path) -> None:
    unique = {e.config.hash: e for e in EVALUATIONS}.values()
    wanted = [*expected_keys(list(unique), "preset"), *expected_keys(FRONT, "front"), *expected_keys(RETRAINED, "retrained")]
    assert keys_of(tracked) == sorted(wanted)
    for run in children(tracked):
        assert run.data.tags["mlflow.parentRunId"] == parent_of(tracked).info.run_id
        assert run.info.status == "FINISHED"


def test_a_child_holds_its_figures_in_five_digits_its_config_and_its_picture(tracked: Path) -> None:
    known = children_of(tracked)
    for evaluation in FRONT:
        run, row = known["front", evaluation.name], evaluation.to_data() | BESIDE[evaluation.config]
        figures = FIGURES | {name for name, value in row.items() if name in COMPARED and value is not None}
        assert set(run.data.metrics) == figures | {"memory_mib"}
        for name in figures:
            given = row[name]
            assert run.data.metrics[name] == (given if isinstance(given, int) else pytest.approx(given, rel=1e-4))
        assert run.data.metrics["memory_mib"] == pytest.approx(evaluation.memory.memory_bytes / 2**20, rel=1e-4)
        assert run.data.params["sharing"] == sharing_line(evaluation.config)
        assert artifact(tracked, run.info.run_id, "sharing.yaml") == evaluation.config.to_yaml()
        assert "svg" in artifact(tracked, run.info.run_id, "picture.svg")


def test_the_parent_tells_what_was_searched(tracked: Path) -> None:
    parent = parent_of(tracked)
    assert parent.info.run_name == "first"
    assert parent.info.status == "FINISHED"
    assert parent.data.params == {"sampler": "nsga2", "evaluations": "300"}
    assert parent.data.tags["trial"] == "t"
    note = parent.data.tags["mlflow.note.content"]
    experiment = client_of(tracked)[0].get_experiment(parent.info.experiment_id)
    assert experiment.name == "it's a trial"
    assert experiment.tags["mlflow.note.content"] == note
    assert "nas export first --pick knee --to DIR" in note


def test_all_evaluations_are_in_one_table(tracked: Path) -> None:
    run_id = parent_of(tracked).info.run_id
    rows = list(csv.DictReader(artifact(tracked, run_id, "evaluations.csv").splitlines()))
    assert [row["hash"] for row in rows] == [e.config.hash for e in EVALUATIONS]
    assert set(rows[0]) == set(EVALUATIONS[0].to_data())
    table = json.loads(artifact(tracked, run_id, "evaluations.json"))
    assert len(table["data"]) == len(EVALUATIONS)
    assert table["columns"] == list(rows[0])
    assert "svg" in artifact(tracked, run_id, "pictures/picture.svg")
    assert artifact(tracked, run_id, "front.html") == "<html></html>"


def test_failures_have_their_reasons_and_the_machine_is_watched(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nas.tracking.tracker.EVERY", 0.0)
    folder = runs / "failing"
    folder.mkdir()
    failed = {e.config: f"NotFinite: {n}" for n, e in enumerate(EVALUATIONS[:3])}
    with Tracker(TrackingSpec(), folder, "it's a trial") as tracker:
        tracker.start(folder.name, {}, {}, "")
        tracker.log_table(EVALUATIONS)
        for count in (1, 3):
            tracker.log_failures(dict(list(failed.items())[:count]))
    run = parent_of(folder)
    table = json.loads(artifact(folder, run.info.run_id, "failures.json"))
    assert [(row[1], row[2]) for row in table["data"]] == [(config.hash, reason) for config, reason in failed.items()]
    shown = [row["path"] for row in json.loads(run.data.tags["mlflow.loggedArtifacts"])]
    assert shown == ["evaluations.json", "failures.json"]
    assert 0 < run.data.metrics["system/system_memory_usage_percentage"] < 100
    assert 0 <= run.data.metrics["system/cpu_utilization_percentage"] <= 100


def test_the_view_shows_only_what_is_there(tracked: Path) -> None:
    parent, (client, link), known = parent_of(tracked), client_of(tracked), children_of(tracked).values()
    view, state = view_of(tracked)
    assert view["name"] == "first"
    assert state["searchFilter"] == f"tags.search = '{parent.data.tags[SEARCH_TAG]}'"
    child = next(iter(known))
    columns = {f"{group}.`{name}`" for group in ("metrics", "params", "tags") for name in getattr(child.data, group)}
    assert set(state["selectedColumns"]) <= columns
    stated = {name for e in EVALUATIONS for layer in e.config.layers for name, _ in layer}
    assert axes_of(tracked) == [layers_param(row.name) for row in LAYER_ROWS if row.name in stated]
    for run in known:
        assert set(axes_of(tracked)) <= set(run.data.params), "a run that lacks an axis is left out of the chart"
    logged = {name for run in known for name in run.data.metrics}
    assert set(QUIET) == logged | {"seeds_needed"}, "a new figure would get a bar chart; one seed does not say how many"
    found = client.search_runs([link.experiment_id], state["searchFilter"], max_results=1000)
    assert len(found) == len(keys_of(tracked)) + 1


def test_a_resumed_search_continues_and_logs_nothing_twice(tracked: Path) -> None:
    before, keys = parent_of(tracked), keys_of(tracked)
    with Tracker(TrackingSpec(), tracked, "it's a trial") as tracker:
        tracker.start("first", {"sampler": "nsga2", "evaluations": 300}, {}, before.data.tags["mlflow.note.content"])
        for step in range(20, 30):
            tracker.log_series("hypervolume", step / 3, step)
        tracker.log_models(MODELS, {})
    assert parent_of(tracked).info.run_id == before.info.run_id
    assert parent_of(tracked).info.status == "FINISHED"
    assert keys_of(tracked) == keys
    assert steps_of(tracked) == list(range(30))


def view_of(folder: Path) -> tuple[Any, Any]:
    """The search's own view in MLflow, and its state."""
    client, link = client_of(folder)
    view = json.loads(client.get_experiment(link.experiment_id).tags[f"{VIEW_TAG}{link.view}"])
    return view, json.loads(zlib.decompress(base64.b64decode(view["state"].removeprefix("deflate;"))))


def axes_of(folder: Path) -> list[str]:
    """The primitives' axes in the search's own view."""
    (parallel,) = [chart for chart in view_of(folder)[1]["compareRunCharts"] if chart["type"] == "PARALLEL"]
    return parallel["selectedParams"]


def test_models_that_fell_off_the_front_disappear_and_all_children_count_the_same_primitives(runs: Path, tracked: Path) -> None:
    folder = runs / "changing"
    known = {e.name: e for e in EVALUATIONS}
    with Tracker(TrackingSpec(), folder, "changing") as tracker:
        tracker.start(folder.name, {}, {}, "")
        tracker.log_models({"front": [*FRONT, known["dense"]]}, {})
        tracker.log_models({"front": [known["dense"]]}, {})
    assert keys_of(folder) == expected_keys([known["dense"]], "front")
    assert axes_of(folder) == []
    with Tracker(TrackingSpec(), folder, "changing") as tracker:
        tracker.start(folder.name, {}, {}, "")
        tracker.log_models({"front": [known["dense"], known["gqa-2"]]}, {})
    assert axes_of(folder) == ["kv_heads_layers"]
    assert sorted(run.data.params["kv_heads_layers"] for run in children(folder)) == ["0", "4"]


KILLED = """
    import json, sys
    from pathlib import Path
    from nas.training.evaluation import Evaluation
    from nas.sharing.shape import ModelShape
    from nas.tracking import Tracker, TrackingSpec
    assert "mlflow" not in sys.modules
    shape, folder = ModelShape(**json.loads(sys.argv[1])), Path(sys.argv[2])
    rows = json.loads((folder / "rows.json").read_text())
    with Tracker(TrackingSpec(), folder, "killed") as tracker:
        tracker.start(folder.name, {"sampler": "tpe"}, {}, "")
        models = [Evaluation.from_data(shape, row | {"seed": seed}) for seed in range(1000) for row in rows]
        tracker.log_models({"retrained": models}, {})
"""


def test_killed_at_any_moment_it_is_resumed_without_a_trace_and_in_silence(tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    folder.mkdir()
    (folder / "rows.json").write_text(json.dumps([e.to_data() for e in EVALUATIONS[:5]]), encoding="utf-8")
    command = [sys.executable, "-c", textwrap.dedent(KILLED), json.dumps(asdict(SHAPE)), str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while len(list(tmp_path.rglob("sharing.yaml"))) < 7 and process.poll() is None:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    assert process.communicate()[0] == ""
    (folder / "tracking.json").unlink()  # the kill may have come between the creation of the run and the saving of its id
    with (folder / "tracking.jsonl").open("a") as file:
        file.write('{"op": "torn')
    wanted = [replace(e, seed=seed) for seed in range(3) for e in EVALUATIONS[:5]]
    Outbox(folder).repair()
    kept = [line for line in (folder / "tracking.jsonl").read_text().splitlines() if '"op": "models"' not in line]
    (folder / "tracking.jsonl").write_text("\n".join(kept) + "\n")
    with Tracker(TrackingSpec(), folder, "killed") as tracker:
        tracker.start(folder.name, {"sampler": "tpe"}, {}, "")
        tracker.log_models({"retrained": wanted}, {})
    assert keys_of(folder) == sorted(expected_keys(wanted, "retrained"))
    assert {run.info.status for run in children(folder)} == {"FINISHED"}
    client, link = client_of(folder)
    parents = [r for r in client.search_runs([link.experiment_id]) if "mlflow.parentRunId" not in r.data.tags]
    assert [r.info.status for r in parents] == ["FINISHED"], "no run is left over that was created before the kill"


def test_a_search_that_is_ended_when_its_front_is_there_has_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of such a run `resume` writes no more than what is left to write."""
    write = Run.write_json

    def write_and_end(run: Run, name: str, data: Any) -> Path:
        path = write(run, name, data)
        if name == "front.json":
            raise KeyboardInterrupt
        return path

    monkeypatch.setattr(Run, "write_json", write_and_end)
    monkeypatch.setattr("nas.tracking.tracker.INTERRUPTED", 60.0)  # on a busy machine all is written within more than 3 s
    trial = write_trial(tmp_path, PREDICTOR, tracking={}, final={"steps": 1, "batch": 2, "seq": 16, "candidates": 1})
    with pytest.raises(KeyboardInterrupt):
        start(Launch(trial, runs=tmp_path / "runs"), Silent())
    run = Run(tmp_path / "runs" / "tiny")
    resume(run, Silent())
    assert parent_of(run.folder).info.status == "FINISHED"
    assert unsent(run.folder) == 0


def test_one_bad_entry_is_said_once_and_spoils_no_other(runs: Path, tracked: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = runs / "bad"
    (runs.parent / "secret.txt").write_text("nothing outside the run's folder is sent")
    with Tracker(TrackingSpec(), folder, "bad") as tracker:
        tracker.start(folder.name, {}, {}, "")
        for _ in range(3):
            tracker.log_artifact(folder / "not-there.png")
        Outbox(folder).append("artifact", path=str(runs.parent / "secret.txt"), folder="")
        tracker.log_models({"front": FRONT[:1]}, {})
    assert keys_of(folder) == expected_keys(FRONT[:1], "front")
    assert not list(runs.rglob("mlartifacts/**/secret.txt"))
    (record,) = [record for record in caplog.records if record.name == "nas.tracking"]
    assert record.levelno == logging.WARNING
    assert str(folder) in record.getMessage()


@pytest.mark.parametrize("answers", [True, False], ids=["refuses", "hangs"])
def test_what_a_server_does_not_take_is_written_later_and_once(
    answers: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is counted is this process's own time, for other processes of a busy machine must not fail a test."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    folder = tmp_path / "run"
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if not answers:
            server.listen()
        uri = f"http://someone:secret@127.0.0.1:{server.getsockname()[1]}"
        worked = time.process_time()
        with Tracker(TrackingSpec(uri=uri), folder, "away", patience=20.0 if answers else 0.2) as tracker:
            tracker.start("run", {"a": 1}, {}, "")
            for step in range(1000):
                tracker.log_series("hypervolume", 1.0, step)
            tracker.log_models({"preset": EVALUATIONS[:2]}, {})
            assert time.process_time() - worked < 5.0
        (record,) = [record for record in caplog.records if record.name == "nas.tracking"]
        assert "127.0.0.1" in record.getMessage()
        assert "secret" not in record.getMessage()
        left = unsent(folder)
        assert left == 1000 + 5, "a run, its beginning, a note, models, an end"
    database = f"sqlite:///{tmp_path}/mlflow.db"  # in place of the server, which nobody can start on that port
    for _ in range(2):
        Sender(folder, database).send()
    assert unsent(folder) == 0
    assert steps_of(folder) == list(range(1000))
    assert keys_of(folder) == sorted(expected_keys(EVALUATIONS[:2], "preset"))
    assert sync(folder) == 0


def test_a_server_that_goes_away_in_the_middle_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every second call fails, before or after MLflow has done it."""
    folder, calls = tmp_path / "run", iter(range(10**6))
    sender = Sender(folder, f"sqlite:///{tmp_path}/mlflow.db")
    outbox = Outbox(folder)
    folder.mkdir()
    outbox.append("run", id="1", name="run", kind="search", experiment="e", uri=sender.uri, time_ms=0)
    for step in range(12):
        outbox.append("begin" if step % 2 else "note", **({"params": {"a": "1"}, "tags": {}} if step % 2 else {"text": "t"}))
        outbox.append("point", name="hypervolume", value=1.0, step=step, time_ms=step)
    sender.send()
    (folder / "tracking.json").unlink()
    sender = Sender(folder, sender.uri)
    sender._run = sender._open()
    log_batch = sender._run.client.log_batch

    def unreliable(*arguments: Any, **more: Any) -> None:
        n = next(calls)
        if n % 3 == 0:
            raise ConnectionError("away")
        log_batch(*arguments, **more)
        if n % 3 == 1:
            raise ConnectionError("away before it answered")

    monkeypatch.setattr(sender._run.client, "log_batch", unreliable)
    for _ in range(100):
        try:
            sender.send()
        except ConnectionError:
            continue
        break
    assert unsent(folder) == 0
    assert steps_of(folder) == list(range(12))


def test_a_sync_of_what_was_never_tracked_or_is_being_written_is_refused(tmp_path: Path, tracked: Path) -> None:
    refused(lambda: sync(tmp_path), "nothing to write")
    with (tracked / "tracking.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        refused(lambda: sync(tracked), "another process")


def test_a_folder_does_not_choose_where_it_is_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither by the address that it names, nor by another run's id."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    elsewhere, folder = f"sqlite:///{tmp_path}/elsewhere/mlflow.db", tmp_path / "runs" / "given"
    folder.mkdir(parents=True)
    first = {"id": "a" * 32, "name": "given", "kind": "training", "experiment": "x", "uri": elsewhere, "time_ms": 1}
    Outbox(folder).append("run", **first)
    Outbox(folder).append("point", name="loss", value=1.0, step=1, time_ms=1)
    refused(lambda: sync(folder), "was tracked at ", "--tracking")
    assert not (tmp_path / "elsewhere").exists()
    client = connect(elsewhere)
    victim = client.create_run(client.create_experiment("mine")).info.run_id
    Link(elsewhere, "1", victim).save(folder)
    assert sync(folder, elsewhere) == 2
    assert client.get_run(victim).data.metrics == {}
    (link,) = [Link.load(folder)]
    assert link
    assert link.run_id != victim
    assert client.get_run(link.run_id).data.metrics == {"loss": 1.0}


MADE = "import sys; from nas.tracking.store import connect; connect(sys.argv[1]).search_experiments()"


def test_a_database_is_made_whole_or_not_at_all(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """By several processes at once, one of which is killed; a database that was left half-made is set aside."""
    uri, database = f"sqlite:///{tmp_path}/mlflow.db", tmp_path / "mlflow.db"
    makers = [subprocess.Popen([sys.executable, "-c", MADE, uri], stderr=subprocess.PIPE) for _ in range(3)]
    while not list(tmp_path.glob(".mlflow.db.part*")) and makers[0].poll() is None:
        time.sleep(0.01)
    makers[0].kill()
    assert [maker.wait() for maker in makers[1:]] == [0, 0], makers[1].communicate()
    assert connect(uri).search_experiments()
    half = tmp_path / "half.db"
    with closing(sqlite3.connect(database)) as whole, closing(sqlite3.connect(half)) as copy:
        whole.backup(copy)
        copy.execute("delete from alembic_version")
        copy.commit()
    assert connect(f"sqlite:///{half}").search_experiments()
    assert len(list(tmp_path.glob("half-*.db"))) == 1
    assert "half-made" in caplog.text


def test_a_database_that_is_being_written_stays_where_it_is(
    runs: Path, tracked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was taken for half-made, and renamed under its writer."""
    monkeypatch.setattr("nas.tracking.spec.BUSY", 0.1)
    shutil.copy(runs / "mlflow.db", tmp_path)
    with closing(sqlite3.connect(tmp_path / "mlflow.db", isolation_level=None)) as writer:
        writer.execute("begin exclusive")
        with pytest.raises(UserError, match=r"mlflow.db: cannot be read: database is locked; try again"):
            prepare_database(f"sqlite:///{tmp_path}/mlflow.db")
        writer.execute("update experiments set name = 'written' where experiment_id = 0")
        writer.execute("commit")
    prepare_database(f"sqlite:///{tmp_path}/mlflow.db")
    assert [path.name for path in tmp_path.glob("*.db")] == ["mlflow.db"]
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as read:
        assert ("written",) in read.execute("select name from experiments").fetchall()


def test_who_goes_on_in_one_process_waits_for_the_writer_of_who_was_stopped(
    runs: Path, tracked: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Ctrl-C in a notebook leaves it, on a machine that is busy: nothing is written twice, or into the wrong run."""
    monkeypatch.setattr("nas.tracking.tracker.INTERRUPTED", 0.1)
    begun, go, connected = threading.Event(), threading.Event(), connect

    def slow(uri: str) -> Any:
        begun.set()
        assert go.wait(60)
        return connected(uri)

    def log(folder: Path, value: float, error: type[BaseException] | None) -> None:
        with suppress(KeyboardInterrupt), Tracker(TrackingSpec(), folder, "busy") as tracker:
            tracker.start(folder.name, {}, {}, "")
            tracker.log_series("loss", value, int(value))
            assert begun.wait(60)
            if error:
                raise error

    for forgets in (False, True):
        folder = runs / f"busy-{forgets}"
        begun.clear()
        go.clear()
        with monkeypatch.context() as patch:
            patch.setattr("nas.tracking.store.connect", slow)
            log(folder, 1.0, KeyboardInterrupt)
        left = (folder / "tracking.jsonl").read_text()
        assert "5 entries are not written yet" in caplog.text
        threading.Timer(0.5, go.set).start()
        if forgets:
            set_aside(folder)
            assert [path.read_text() for path in folder.glob("unsent-*/tracking.jsonl")] == [left]
        caplog.clear()
        log(folder, 2.0, None)
        assert caplog.text == ""
        client, link = client_of(folder)
        points = client.get_metric_history(link.run_id, "loss")
        assert [point.value for point in points] == [1.0, 2.0][forgets:]
        assert unsent(folder) == 0


def test_entries_of_another_kind_are_not_gone_on_with(tmp_path: Path) -> None:
    """A stranger's checkpoints could hold a search's entries, which describe whichever experiment they name."""
    mine = {"uri": f"sqlite:///{tmp_path}/mlflow.db", "experiment": "mine", "kind": "training"}
    tracker = Tracker(TrackingSpec(mine["uri"]), tmp_path / "run", "mine", "training")
    assert not tracker.begun_elsewhere
    (tmp_path / "run").mkdir()
    for change in ({}, {"uri": "http://host"}, {"experiment": "yours"}, {"kind": "search"}):
        Outbox(tmp_path / "run").append("run", id="1", name="run", time_ms=0, **mine | change)
        assert tracker.begun_elsewhere == bool(change)
        (tmp_path / "run" / "tracking.jsonl").unlink()


def test_a_run_moves_with_its_database_and_is_written_again_if_that_is_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with Tracker(TrackingSpec(), tmp_path / "runs" / "run", "moved") as tracker:
        tracker.start("run", {"a": 1}, {}, "")
        tracker.log_series("hypervolume", 1.0, 1)
    for place in ("second", "third"):
        shutil.copytree(tmp_path / "runs", tmp_path / place)
    shutil.rmtree(tmp_path / "runs")
    folder, damaged = tmp_path / "second" / "run", tmp_path / "third" / "run"
    for step, each in ((2, folder), (3, damaged)):
        Outbox(each).append("point", name="hypervolume", value=2.0, step=step, time_ms=2)
    assert sync(folder) == 6, "all, which is the same as once: a run, its beginning, a note, two points, an end"
    assert steps_of(folder) == [1, 2]
    database = damaged.parent / "mlflow.db"
    with closing(sqlite3.connect(database)) as read:
        ((page,),) = read.execute("select rootpage from sqlite_master where name = 'metrics'")
    with database.open("r+b") as file:
        file.seek((page - 1) * 4096)
        file.write(b"\xff" * 4096)
    refused(lambda: sync(damaged), "the database is damaged; move it away")
    database.rename(database.with_name("away.db"))
    uri = f"sqlite:///{damaged.parent}/new.db"  # in one process MLflow has the old file open under the old name
    assert sync(damaged, uri) == 6
    assert steps_of(damaged) == [1, 3]


@pytest.mark.parametrize(("error", "status"), [(ValueError, "FAILED"), (KeyboardInterrupt, "KILLED")])
def test_a_search_that_breaks_off_is_marked(error: type[BaseException], status: str, runs: Path, tracked: Path) -> None:
    folder = runs / status

    def break_off() -> None:
        with Tracker(TrackingSpec(), folder, "breaks off") as tracker:
            tracker.start(folder.name, {}, {}, "")
            raise error

    with pytest.raises(error):
        break_off()
    assert parent_of(folder).info.status == status


def test_a_disabled_tracker_does_nothing(tmp_path: Path) -> None:
    with Tracker(TrackingSpec(enabled=False), tmp_path / "run", "none") as tracker:
        tracker.start("run", {}, {}, "")
        tracker.log_series("hypervolume", 1.0, 0)
        tracker.log_models({"preset": EVALUATIONS}, {})
    assert not list(tmp_path.iterdir())


def test_the_trial_then_the_environment_then_the_run_folders_say_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert TrackingSpec().resolve(tmp_path) == f"sqlite:///{tmp_path}/mlflow.db"
    assert artifact_folder(TrackingSpec().resolve(tmp_path), tmp_path) == tmp_path / "mlartifacts"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://host:5000")
    assert TrackingSpec().resolve(tmp_path) == "http://host:5000"
    assert artifact_folder("http://host:5000", tmp_path) is None
    monkeypatch.chdir(tmp_path)
    assert TrackingSpec(uri="sqlite:///x/m.db").resolve(tmp_path) == f"sqlite:///{tmp_path}/x/m.db"


def test_what_is_no_address_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for uri in ("mlruns", "localhost:5000", "", "file:///tmp/mlruns"):
        with pytest.raises(UserError, match=r"tracking.uri: .* is not an MLflow address; write http://HOST:PORT"):
            build(TrackingSpec, Document({"uri": uri}, "trial.yaml"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "mlruns")
    refused(lambda: TrackingSpec().resolve(tmp_path), "MLFLOW_TRACKING_URI: 'mlruns'")


def test_a_config_is_one_line_and_different_configs_are_different_lines() -> None:
    found = tiny.configs(SHAPE, 40)
    assert {name for config in found for layer in config.layers for name, _ in layer} > {"heads", "factor", "value_residual"}
    assert len({sharing_line(config) for config in found}) == len(found)
    for name, line in {
        "dense": "nothing shared",
        "mqa": "kv_heads 1 at 0–3",
        "cla-2": "kv 1→0 3→2",
        "albert": "tie 1–3→0 · norms tied · embedding_rank 5",
        "universal": "tie 1–3→0 · step_embedding true",
        "resformer": "value_residual 0.5 at 1–3",
        "masa-1": 'factor "dictionary 1 at 0 for q k v o" at 0–3',
        "merge-layers-2": "drop both at 1–2",
    }.items():
        assert sharing_line(dict(presets(SHAPE))[name]) == line


def test_a_line_in_a_table_is_not_endless() -> None:
    shape = ModelShape(vocab_size=64, hidden_size=128, num_hidden_layers=12, num_attention_heads=32, intermediate_size=48)
    ties = [" ".join(f"{head}=0.{head + i}" for head in range(16)) for i in range(11)]
    config = SharingConfig.make(shape, [{}, *({"heads": text} for text in ties)])
    note = front_note({}, [replace(FRONT[0], config=config)], "run-1")
    assert max(map(len, note.splitlines())) < LINE_LIMIT + 200
    assert " …" in note


def test_a_note_lists_the_front_and_never_outgrows_its_tag() -> None:
    note = front_note({"text": "random"}, FRONT, "run-1")
    assert note.startswith(f"**{len(FRONT)} configs on the front**" if len(FRONT) > 1 else "**1 config on the front**")
    assert all(f"`{e.label}`" in note for e in FRONT)
    many = [replace(FRONT[0], memory=Memory(*range(n, n + len(fields(Memory))))) for n in range(500)]
    long = front_note({"text": "random"}, many, "run-1")
    assert len(long) <= NOTE_LIMIT
    assert "nas export run-1" in long
    assert "cut here" in long
    assert front_note({"text": "random"}, [], "run-1") == "- **text**: random"
