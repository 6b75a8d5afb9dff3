"""A run that goes on to more evaluations and candidates, from all that was measured."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from searches import SUPERNET, results, search
from test_search import EARLY, copy_of
from test_tracking import children, client_of

import nas
from nas.cli import nas as command
from nas.errors import UserError
from nas.search.front import Front
from nas.search.launch import extend, resume
from nas.search.progress import Silent
from nas.search.run import Journal, Run
from nas.training.evaluation import Evaluation


def trained(run: Run) -> dict[Path, int]:
    """Every training of a run, with the time at which it ended."""
    return {path.relative_to(run.folder): path.stat().st_mtime_ns for path in run.folder.rglob("result.json")}


def searched(run: Run) -> list[Evaluation]:
    """What a search evaluated; it may have been faster."""
    return [replace(e, seconds=0) for e in run.searched()]


def stop_at(monkeypatch: pytest.MonkeyPatch, entries: int) -> None:
    """Ctrl-C once a search has appended so many entries to its journal."""
    append, left = Journal.append, iter(range(entries))

    def stopping(journal: Journal, entry: dict[str, object]) -> None:
        append(journal, entry)
        if next(left, None) is None:
            raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "append", stopping)


@pytest.mark.parametrize("kind", ["predictor_run", pytest.param("supernet_run", marks=pytest.mark.slow), "from_run"])
def test_an_extended_run_is_the_longer_run_and_does_nothing_twice(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It evaluates what a search of so many evaluations does, where proxies and single decisions are planned for as many; its
    front has that one's models, and its own of before. It is stopped in the middle, and resumed."""
    run = request.getfixturevalue(kind)
    more, longer = copy_of(run, tmp_path / "more"), copy_of(run, tmp_path / "longer", "front.json", "journal.jsonl", "final")
    before, journal = trained(more), more.journal().path.read_text()
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            extend(more, Silent(), "+13", "+2")
    with pytest.raises(UserError, match="the run has not finished"):
        more.front()
    front = resume(more, Silent())

    data = longer.trial().to_data()
    data["search"] |= {"evaluations": 37, "began_with": 24}
    data["final"]["candidates"] = 4
    (longer.folder / "trial.yaml").write_text(yaml.safe_dump(data, sort_keys=False))
    whole = resume(longer, Silent())
    assert searched(more) == searched(longer)
    assert len(searched(more)) > len(run.searched())
    assert results(front) == results(run.front()) | results(whole)
    assert len(results(front)) > len(results(run.front()))
    assert more.journal().path.read_text().startswith(journal)
    assert before.items() <= trained(more).items()
    recorded = yaml.safe_load((more.folder / "trial.yaml").read_text())
    assert recorded == data | {"name": recorded["name"]}
    assert more.command().endswith(f"\nnas extend {more.argument} --evaluations 37 --candidates 4")
    assert run.command() == run.provenance()["command"]


def test_a_run_that_stopped_early_is_extended_too_and_what_was_stopped_stays_so(tmp_path: Path) -> None:
    run, front = search(tmp_path, SUPERNET, final=EARLY)
    before = trained(run)
    paused = {path.parent.name for path in run.folder.glob("paused-1/*/result.json")}
    stopped = paused - {path.parent.name for path in run.folder.glob("final/*/result.json")}
    again = nas.open_run(str(run.folder)).extend(candidates=8).front.found
    assert stopped
    assert results(front).items() <= results(again).items()
    assert before.items() <= trained(run).items()
    assert not stopped & {path.parent.name for path in run.folder.glob("final/*/result.json")}
    assert len(list(run.folder.glob("paused-1/*/result.json"))) > len(paused)


def test_mlflow_has_one_run_of_it_and_what_it_says_now(from_run: Run, tmp_path: Path) -> None:
    run = Run(Path(shutil.copytree(from_run.folder.parent, tmp_path / "runs")) / from_run.name)
    front = extend(run, Silent(), "+13", "+2")
    client, link = client_of(run.folder)
    found = client.search_runs([link.experiment_id], "tags.kind = 'search'")
    assert [one.info.run_id for one in found] == [link.run_id]
    assert found[0].info.status == "FINISHED"
    assert found[0].data.tags["extended"] == "to 37 evaluations, 4 candidates"
    series = [point.step for point in client.get_metric_history(link.run_id, "hypervolume")]
    assert sorted(series)[-1] == 37
    rows = {row["hash"]: row for row in (*front.to_data()["front"], *front.to_data()["dominated"])}
    told = {child.data.params["hash"]: child.data.params for child in children(run.folder)}
    assert told.keys() == rows.keys()
    for name in ("neighbour", "within_noise"):
        assert {key: params.get(name) for key, params in told.items()} == {
            key: None if row[name] is None else str(row[name]) for key, row in rows.items()
        }


def test_what_cannot_be_extended_is_refused_before_anything_is_changed(supernet_run: Run, tmp_path: Path) -> None:
    run = copy_of(supernet_run, tmp_path)
    for words, said in (
        ([], "the run has 24 evaluations and 2 candidates"),
        (["--evaluations", "+0"], "the run has 24 evaluations and 2 candidates"),
        (["--evaluations", "23"], "--evaluations 23: the run has 24 evaluations already"),
        (["--candidates=-1"], "--candidates: '-1' is no number; write +200"),
        (["--evaluations", "many"], "--evaluations: 'many' is no number"),
    ):
        error = CliRunner().invoke(command, ["extend", str(run.folder), *words]).exception
        assert isinstance(error, UserError)
        assert said in str(error)
    data = run.trial().to_data()
    data["data"]["max_bytes"] = 50_000
    (run.folder / "trial.yaml").write_text(yaml.safe_dump(data, sort_keys=False))
    with pytest.raises(UserError, match="the text is not the one this run began with"):
        extend(run, Silent(), "+13")
    with run.locked(), pytest.raises(UserError, match="another process works on this run"):
        extend(run, Silent(), "+13")
    assert run.front() == supernet_run.front()


def test_the_command_prints_the_new_front(supernet_run: Run, tmp_path: Path) -> None:
    run = copy_of(supernet_run, tmp_path)
    shown = CliRunner().invoke(command, ["extend", str(run.folder), "--candidates", "+1", "--json"], catch_exceptions=False)
    found = Front.from_data(run.trial().space.shape, json.loads(shown.stdout[shown.stdout.index("{") :]))
    assert results(found) == results(run.front())
    assert len(found.configs) == len(supernet_run.front().configs) + 1
