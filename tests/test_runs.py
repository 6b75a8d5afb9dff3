"""The folder of runs: what is in it, how far each run is, and how one goes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from test_search import copy_of

from nas.cli import nas
from nas.errors import UserError
from nas.search.run import Run
from nas.search.status import runs_in, status


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
    for lost in ("front.json", "final"):
        path = stopped.folder / lost
        shutil.rmtree(path) if path.is_dir() else path.unlink()
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
    assert (rows["stopped"]["stage"], rows["stopped"]["done"]) == ("search", len(done.searched()))
    with stopped.locked():
        assert status(stopped).state == "working"
    assert "finished" in invoke("watch", done.name, "--runs", runs)
    assert "stopped · search" in invoke("watch", "stopped", "--runs", runs)
    with stopped.locked(), pytest.raises(UserError, match="another process works on this run"):
        invoke("rm", "stopped", "--yes", "--runs", runs)
    assert invoke("rm", "stopped", "damaged", runs / "stopped", "--yes", "--runs", runs).count("deleted") == 2
    assert [run.name for run in runs_in(runs)] == [done.name]
    assert invoke("runs", "--runs", tmp_path / "none").startswith("no runs in")
