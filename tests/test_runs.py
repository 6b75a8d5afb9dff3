"""The folder of runs: what is in it, how far each run is, and how one goes."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from test_search import copy_of

from nas.cli import nas
from nas.errors import UserError
from nas.search.progress import PROGRESS, read_progress
from nas.search.run import Run
from nas.search.status import runs_in, stages, status


def invoke(*words: object) -> str:
    """What a command prints."""
    found = CliRunner().invoke(nas, [str(word) for word in words])
    if found.exception:
        raise found.exception
    return found.output


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

    rows = {row["run"]: row for row in json.loads(invoke("runs", "--json", "--runs", runs))}
    assert {name: row["state"].partition(":")[0] for name, row in rows.items()} == {
        done.name: "finished",
        "stopped": "stopped",
        "damaged": "damaged",
    }
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
    assert "finished" in invoke("watch", done.name, "--runs", runs)
    shown = invoke("watch", "stopped", "--runs", runs)
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
        invoke("rm", "stopped", "--yes", "--runs", runs)
    (runs / "link").symlink_to("stopped")
    invoke("rm", "link", "--yes", "--runs", runs)
    assert not (runs / "link").is_symlink()
    assert stopped.folder.is_dir()
    assert invoke("rm", "stopped", "damaged", runs / "stopped", "--yes", "--runs", runs).count("deleted") == 2
    assert [run.name for run in runs_in(runs)] == [done.name]
    assert invoke("runs", "--runs", tmp_path / "none").startswith("no runs in")
