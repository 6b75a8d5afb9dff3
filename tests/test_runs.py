"""What is said of runs: the list of them, how far each is, the front of several, and a search in optuna-dashboard."""

import json
import shutil
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import optuna
import pytest
import yaml
from click.testing import CliRunner
from commands import refused, said, told
from test_search import copy_of

from nas.cli import nas
from nas.errors import UserError
from nas.pareto import front, hypervolume
from nas.report.front import front_figure, run_looks
from nas.search import dashboard as module
from nas.search.dashboard import RunStudy, dashboard
from nas.search.fronts import Fronts
from nas.search.progress import PROGRESS, read_progress, runs_in, stages, status
from nas.search.run import Run


def test_runs_are_listed_followed_and_deleted(predictor_run: Run, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    done = copy_of(predictor_run, runs)
    stopped = Run(Path(shutil.copytree(done.folder, runs / "stopped")))
    (stopped.folder / "front.json").unlink()
    *seen, search, _ = read_progress(stopped.folder)
    search = replace(search, done=12, ended=False)
    (stopped.folder / PROGRESS).write_text(json.dumps({"stages": [asdict(one) for one in (*seen, search)]}))
    damaged = Run(Path(shutil.copytree(done.folder, runs / "damaged")))
    (damaged.folder / "front.json").write_text("{")

    rows = {row["run"]: row for row in told("runs", "--runs", runs)}
    states = {name: row["state"].partition(":")[0] for name, row in rows.items()}
    assert states == {done.name: "finished", "stopped": "stopped", "damaged": "damaged"}
    assert rows[done.name]["front"] == len(done.front().members)
    assert rows[done.name]["perplexity"] == min(e.losses.perplexity for e in done.front().evaluations)
    assert (rows["stopped"]["stage"], rows["stopped"]["done"], rows["stopped"]["total"]) == ("search", 12, 24)
    left = stages(stopped)
    assert [one.part for one in left] == [1, 1, 0.5, 0]
    assert left[-1].seconds_left > 0 == left[0].seconds_left
    assert rows["stopped"]["seconds_left"] == pytest.approx(sum(one.seconds_left for one in left))
    assert (left[0].tokens, left[-1].tokens) == (left[0].all_tokens, 0)
    assert rows[done.name]["seconds_left"] is None
    with stopped.locked():
        assert status(stopped).state == "working"
    assert "finished" in said("watch", done.name, "--runs", runs)
    shown = said("watch", "stopped", "--runs", runs)
    for words in (
        "stopped · search: 12 of 24 configs",
        "proxy trainings",
        "100%",
        "50%",
        "best within the limits",
        "the front so far",
    ):
        assert words in shown
    with stopped.locked(), pytest.raises(UserError, match="another process works on this run"):
        said("rm", "stopped", "--yes", "--runs", runs)
    for given, answer in (("n\n", "nothing was deleted"), ("", "nas rm: nothing was deleted; answer y, or give --yes")):
        asked = CliRunner().invoke(nas, ["rm", "stopped", "--runs", str(runs)], input=given)
        assert answer in asked.output + str(asked.exception or "")
    assert stopped.folder.is_dir()
    (runs / "link").symlink_to("stopped")
    said("rm", "link", "--yes", "--runs", runs)
    assert not (runs / "link").is_symlink()
    assert stopped.folder.is_dir()
    assert said("rm", "stopped", "damaged", runs / "stopped", "--yes", "--runs", runs).count("deleted") == 2
    assert [run.name for run in runs_in(runs)] == [done.name]
    assert said("runs", "--runs", tmp_path / "none").startswith("no runs in")


@pytest.fixture
def runs(predictor_run: Run, supernet_run: Run, tmp_path: Path) -> list[Run]:
    """Two searches of one text whose models are trained alike, and a copy of the second."""
    kinds = {"first": predictor_run, "second": supernet_run, "third": supernet_run}
    return [Run(Path(shutil.copytree(run.folder, tmp_path / "runs" / name))) for name, run in kinds.items()]


def test_the_front_of_several_runs_is_what_no_model_of_any_dominates(runs: list[Run]) -> None:
    fronts = Fronts.of(runs[:2])
    panel, rows = fronts.front.panel, {row["run"]: row for row in fronts.rows()}
    points = {run.name: [m.point for m in run.front().configs] for run in runs[:2]}
    every = [point for some in points.values() for point in some]

    def is_dominated(point: tuple[float, ...]) -> bool:
        return any(o != point and all(a <= b for a, b in zip(o, point, strict=True)) for o in every)

    assert {name: sorted(m.point for m in panel.runs[name]) for name in points} == {n: sorted(p) for n, p in points.items()}
    assert all(panel.is_member(m) != is_dominated(m.point) for m in panel.all)
    volumes = {name: hypervolume(some, fronts.reference) for name, some in points.items()}
    assert {name: row["hypervolume"] for name, row in rows.items()} == volumes
    assert all(limit > worst for limit, worst in zip(fronts.reference, map(max, zip(*every, strict=True)), strict=True))
    whole = hypervolume(every, fronts.reference)
    assert max(volumes.values()) <= whole
    assert {name: row["hypervolume_share"] for name, row in rows.items()} == {n: v / whole for n, v in volumes.items()}
    best = min(every, key=lambda point: point[-1])
    assert fronts.front.pick("lowest-perplexity").validation_perplexity == best[-1]
    within = min((p for p in every if p[0] <= best[0]), key=lambda point: point[-1])
    assert fronts.front.pick(f"memory_bytes<={best[0]}").point == within
    assert fronts.front.pick("second:dense").run == "second"


def test_a_run_and_its_equal_share_every_model(runs: list[Run]) -> None:
    _, second, third = Fronts.of(runs).rows()
    assert second == third | {"run": "second", "folder": second["folder"]}
    panel = Fronts.of(runs[1:]).front.panel
    assert all(panel.is_member(m) for m in panel.all) == (len(panel.front) == len(panel.all) // 2)
    assert sum(map(panel.is_member, panel.all)) == 2 * len(panel.front)
    for m in panel.front:  # nothing is compared with its own equal
        neighbour = panel.neighbour(m)
        assert neighbour is None or neighbour.point != m.point


def changed(run: Run) -> Iterator[str]:
    """Changes of a run that make it another to compare, each with what is said of it."""
    data = run.trial().to_data()
    for section, change, words in (
        ("evaluate", {"final_windows": 4}, "test windows (4 of 16 tokens, not 8 of 16 tokens)"),
        ("memory", {"context": 32}, "memory (32 tokens × 1, bfloat16, not 64 tokens × 1, bfloat16)"),
    ):
        (run.folder / "trial.yaml").write_text(yaml.safe_dump(data | {section: data[section] | change}))
        yield words
    (run.folder / "trial.yaml").write_text(yaml.safe_dump(data))
    (run.folder / "test.txt").write_text("another")
    yield "test text or tokenizer ("


def test_runs_that_do_not_compare_are_refused_with_what_differs(runs: list[Run], from_run: Run, tmp_path: Path) -> None:
    for words in changed(runs[1]):
        with pytest.raises(UserError) as caught:
            Fronts.of(runs)
        assert str(caught.value).startswith(f"second: differs from first in {words}")
    refused(lambda: Fronts.of([runs[0], from_run]), "from: differs from first in ", "weights (fine-tuned, not retrained)")
    refused(lambda: Fronts.of([runs[0], runs[2], runs[0]]), "first: the run is named twice")
    refused(lambda: Fronts.of([runs[0], copy_of(runs[2], tmp_path / "stopped", "front.json")]), "third: the run has not finished")
    folder = tmp_path / "runs"
    with pytest.raises(UserError, match="--limit: asks what one run's search evaluated"):
        said("front", "first", "third", "--limit", "memory_bytes=1MiB", "--runs", folder)


def test_tables_figures_and_pages_show_every_run(runs: list[Run], tmp_path: Path) -> None:
    folder, fronts = tmp_path / "runs", Fronts.of(runs[:2])
    data = told("front", "first", "second", "--runs", folder)
    assert json.dumps(data) == json.dumps(json.loads(json.dumps(fronts.to_data())))  # NaN and all
    members = {(row["run"], row["hash"]) for row in data["front"]}
    assert members == {(m.first.run, m.first.config.hash) for m in fronts.front.configs if fronts.front.panel.is_member(m)}
    shown = said("front", "first", "second", "--runs", folder)
    assert all(m.label in shown for m in fronts.front.members)
    assert all(row["hypervolume"] in shown for row in fronts.table())
    model = fronts.front.pick("smallest")
    assert f"nas export {fronts.runs[model.run].argument} --pick {model.config.hash}" in said(
        *("front", "first", "second", "--pick", "smallest", "--runs", folder)
    )
    assert told("front", "first", "--pick", "knee", "--runs", folder)["hash"] == runs[0].read_json("front.json")["knee"]

    page = Path(said("report", "first", "second", "--to", tmp_path / "reports", "--runs", folder).strip())
    assert page.parent.name == "first-and-second"
    assert all(row["hypervolume"] in page.read_text() for row in fronts.table())
    assert (page.parent / "front.png").stat().st_size > 10_000
    html = (page.parent / "front.html").read_text()
    assert all(f'"name":"{name}"' in html for name in fronts.runs)
    figure = front_figure([fronts.front.panel], "", (900, 560))
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert [text for text in legend if text in fronts.runs] == sorted(fronts.runs)
    assert list(Fronts.of([copy_of(runs[0], tmp_path / "other"), *runs[:2]]).runs) == ["other/first", "runs/first", "second"]
    looks = list(run_looks(30))
    assert len({(look.colour, look.sign) for look in looks}) == len(looks)


def test_a_runs_study_has_its_evaluations_and_its_front(predictor_run: Run, tmp_path: Path) -> None:
    run = copy_of(predictor_run, tmp_path)
    searched = run.searched()
    failed = next(run.journal().read()) | {"failure": "NotFinite: the loss is nan", "number": 99}
    run.journal().append(failed)
    for _ in range(2):  # it is made anew each time
        trials = RunStudy(run).study.get_trials()
        assert len(trials) == len(searched) + 1
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(run.folder / module.FILE)))
    study = optuna.load_study(study_name=run.name, storage=storage)  # as any other program reads it
    assert study.metric_names == ["memory_bytes", "perplexity"]
    members = [searched[n] for n in front([e.point for e in searched])]
    assert {e.config.hash for e in members} <= {t.user_attrs["hash"] for t in study.best_trials}  # which has both of two equals
    assert {tuple(t.values) for t in study.best_trials} == {(e.value("memory_bytes"), e.losses.perplexity) for e in members}
    assert [t.user_attrs["failure"] for t in study.get_trials() if t.state.name == "FAIL"] == [failed["failure"]]
    space = run.trial().space
    for trial in study.get_trials()[:-1]:
        config = next(e.config for e in searched if e.config.hash == trial.user_attrs["hash"])
        assert trial.params == {name: module._plain(option) for name, option in (space.encode(config) or {}).items()}


def test_the_dashboard_is_served_and_follows_the_run(predictor_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("optuna_dashboard")
    monkeypatch.setattr(module, "EVERY", 0.05)
    run = copy_of(predictor_run, tmp_path)
    count = len(list(run.journal().read()))

    def ask(url: str, path: str) -> str:
        return urllib.request.urlopen(url.partition("/dashboard")[0] + path, timeout=10).read().decode()

    def trials(url: str) -> int:
        return len(json.loads(ask(url, f"/api/studies/{url.rpartition('/')[2]}?after=0"))["trials"])

    with dashboard(run) as url:
        assert "<html" in ask(url, url.partition(url.split("/dashboard")[0])[2]).lower()
        assert trials(url) == count
        run.journal().append(next(run.journal().read()) | {"number": 99})
        deadline = time.monotonic() + 20
        while trials(url) == count:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    with pytest.raises(OSError, match="refused"):
        ask(url, "/")


def test_without_optuna_dashboard_one_line_says_what_to_install(predictor_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna_dashboard", None)
    before = sorted(predictor_run.folder.rglob("*"))
    with pytest.raises(UserError, match=r"not installed.*nas-sharing\[dashboard\]"), dashboard(predictor_run):
        pass
    assert sorted(predictor_run.folder.rglob("*")) == before
