"""A run's search in optuna-dashboard: every evaluation once, failures too, also of a run that is worked on."""

from __future__ import annotations

import json
import sys
import time
import urllib.request
from pathlib import Path

import optuna
import pytest
from test_search import copy_of

from nas.errors import UserError
from nas.pareto import front
from nas.search import dashboard as module
from nas.search.dashboard import RunStudy, dashboard
from nas.search.run import Run


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
