"""What a search will cost, said before: its tokens are those that a finished run counted, and saying it leaves nothing behind."""

import json
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import searches
import torch
from click.testing import CliRunner

from nas.cli import nas
from nas.search import budget
from nas.search.budget import Budget, budget_lines
from nas.search.context import presets_in
from nas.search.convert import conversions_of
from nas.search.progress import Recorded, Silent, StageBudget, StageSeen, read_budget, read_progress, seconds_left
from nas.search.run import Run
from nas.search.timing import KINDS, Pass, Timed, TimedModels, build_timer
from nas.search.trial_file import EarlyStopping
from nas.sharing.sharing_config import SharingConfig
from nas.tracking.view import PROGRESS, STAGES, view_state
from nas.training.loop import TrainSpec
from nas.workers import Executor, InProcess


def counted(run: Run, folder: str, name: str = "tokens") -> tuple[int, int]:
    """The trainings in a part of a run's folder, and what they say they took."""
    found = [json.loads(path.read_text())[name] for path in run.folder.glob(f"{folder}/*/result.json")]
    return len(found), sum(found)


def planned(run: Run) -> dict[str, tuple[int, int]]:
    found: dict[str, tuple[int, int]] = {}
    for stage in Budget(run.trial()).stages():
        jobs, tokens = found.get(stage.name, (0, 0))
        found[stage.name] = jobs + stage.jobs, tokens + stage.tokens
    return found


def split_tokens(run: Run) -> int:
    return sum(json.loads(path.read_text())["tokens"] for path in run.folder.glob("split-*.json"))


def test_the_tokens_that_are_planned_are_those_that_a_run_counts(
    predictor_run: Run, supernet_run: Run, from_run: Run, from_predictor_run: Run
) -> None:
    found = planned(predictor_run)
    assert found["proxy trainings"] == counted(predictor_run, "predictor")
    assert found["retrain from scratch"] == counted(predictor_run, "final")

    found = planned(supernet_run)
    assert found["retrain from scratch"] == counted(supernet_run, "final")
    assert found["split by gradient-matching"][1] == split_tokens(supernet_run)
    trainings, tokens = counted(supernet_run, "supernet", "stage_tokens")  # a step that draws its teacher runs one subnet
    assert trainings == found["train supernets"][0]
    assert found["train supernets"][1] / 2 <= tokens <= found["train supernets"][1]

    found = planned(from_predictor_run)
    assert found["proxy trainings"] == counted(from_predictor_run, "predictor")
    assert found["fine-tune"] == counted(from_predictor_run, "final")
    assert "single decisions" in found
    assert "train supernets" not in found

    found = planned(from_run)
    assert found["train supernets"] == counted(from_run, "supernet", "stage_tokens")
    assert found["fine-tune"] == counted(from_run, "final")
    assert found["convert the base model"][0] == len(list(from_run.folder.glob("converted/*/result.json")))
    losses = json.loads((from_run.folder / "single_decisions.json").read_text())["single_decisions"]
    assert found["single decisions"][0] <= len(losses) + 1
    drawn = split_tokens(from_run)  # what is compared there depends on losses
    assert 0.5 * drawn < found["split by gradient-matching"][1] < 2 * drawn


def test_conversions_of_one_config_are_planned_once_and_what_weights_decide_at_most(from_run: Run) -> None:
    """Beside those that a run made: one that chooses by weights counts for itself."""
    trial, found = from_run.trial(), from_run.converted()
    file = replace(trial.file, final=replace(trial.file.final, conversions=True))
    tasks = conversions_of(trial.space.shape)
    rows = {e.supernet: tasks[e.supernet] for e in found if e.supernet != "dense"}
    by_shape = {e.config for e in found if e.supernet in rows and not rows[e.supernet].row.choose}
    assert {task.row.preset(trial.space.shape, task.size) for task in rows.values() if not task.row.choose} == by_shape
    assert len(by_shape) < sum(not task.row.choose for task in rows.values()), "several are one config"
    by_weights = sum(task.row.choose is not None for task in tasks.values() if task.size)
    always = {*presets_in(trial.space, file.memory), SharingConfig.dense(trial.space.shape)}
    last = Budget(replace(trial, file=file)).stages()[-1]
    assert (last.name, last.jobs, last.at_most) == (
        "fine-tune",
        file.final.candidates + len(always | by_shape) + by_weights,
        True,
    )
    assert last.jobs >= file.final.candidates + len(always | {e.config for e in found})
    assert not Budget(trial).stages()[-1].at_most
    (line,) = budget_lines([StageBudget("fine-tune", last.jobs, 0, 0.0, 0, 0, 1.0, at_most=True)], 0)[2:3]
    assert f"  at most {last.jobs}  " in line


def test_the_steps_of_every_stage_are_planned_also_of_a_dense_model_and_with_early_stopping(tmp_path: Path) -> None:
    trial = {**searches.FROM, "from": None, "dense": {"steps": 6, "batch": 2, "seq": 16}}
    trial |= {"space": {"model": searches.SUPERNET["space"]["model"], **searches.FROM["space"]}}
    early = {**trial["final"], "candidates": 6, "presets": False, "early_stopping": {"grace": 1, "reduction": 2}}
    run, _ = searches.search(tmp_path, trial, final=early)
    found = planned(run)
    assert found["train the dense model"] == counted(run, "dense")
    trainings, tokens = counted(run, "paused-1")
    assert tokens == trainings * 32
    half = math.ceil(trainings / 2)  # after the pauses at 1 and at 2, at least: fronts go on whole
    assert found["train until early stopping"] == (trainings + half, 32 * (trainings + half))
    assert found["fine-tune"][0] == math.ceil(half / 2) <= counted(run, "final")[0]


def test_a_dry_run_says_what_a_search_will_take_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = searches.write_trial(tmp_path, searches.FROM)
    monkeypatch.setattr(Executor, "train", lambda *given: pytest.fail("a training was started"))
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    for words in (["search", str(path), "--dry-run", "--json"], ["check", str(path), "--plan", "--json"]):
        found = CliRunner().invoke(nas, words, catch_exceptions=False)
        data = json.loads(found.stdout)
        rows = [StageBudget(**row) for row in (data if words[0] == "search" else data[0]["plan"])]
        assert [row.stage for row in rows] == [
            *("convert the base model", "single decisions", "train supernets", "split by gradient-matching", "train supernets"),
            *("search", "fine-tune"),
        ]
        assert all(row.flops > 0 and row.seconds > 0 and row.peak_bytes > 0 for row in rows)
        for line in budget_lines(rows, 0):
            assert line in found.stderr if line.startswith("plan") else line.split("  ")[0].strip() in found.stderr
    assert sorted(tmp_path.rglob("*")) == before


def test_a_run_keeps_what_was_planned(predictor_run: Run) -> None:
    rows = [(row.stage, row.count, row.tokens) for row in read_budget(predictor_run.folder)]
    assert rows == [(stage.name, stage.jobs, stage.tokens) for stage in Budget(predictor_run.trial()).stages()]


def test_time_is_the_passes_of_a_stage_divided_among_its_workers(predictor_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """With clocks that say 1 s a training step, 0.25 s an evaluation of 16 rows and 5 s for workers to start."""
    seconds = {"train": 1.0, "evaluate": 0.25}

    def timed(passes: Any, models: TimedModels, work: Executor) -> Any:
        return {one: Timed(seconds[one.kind], 2**20) for one in passes}, 5.0

    monkeypatch.setattr(budget, "time_passes", timed)
    monkeypatch.setattr(budget, "asking_seconds", lambda trial: 3.0)
    trial = predictor_run.trial()
    for workers, seeds in ((0, 1), (1, 1), (2, 1), (3, 2)):
        file = replace(trial.file, run=replace(trial.file.run, workers=workers), final=replace(trial.file.final, seeds=seeds))
        planned = Budget(replace(trial, file=file), work=InProcess(file.run))
        *proxies, search, final = planned.timed()
        each = planned.scale(planned.sampled) * (2 * 1.0 + 4 / 16 * 0.25)
        for found, asking in zip(proxies, (0, 3), strict=True):  # in two rounds
            assert found.seconds == pytest.approx(5 + math.ceil(4 / max(workers, 1)) * each + asking, abs=0.06)
        assert search.seconds == 3
        models = seeds * (len(list(predictor_run.folder.glob("final/*"))))
        assert final.count == models
        assert final.seconds == pytest.approx(5 + math.ceil(models / max(workers, 1)) * (4 + 16 / 16 * 0.25), rel=0.2)
    runs = [replace(trial.file.run, workers=2, workers_per_training=count) for count in (1, 2)]
    found = [Budget(replace(trial, file=replace(trial.file, run=run)), work=InProcess(run)).timed() for run in runs]
    one, other = ([row.flops for row in rows] for rows in found)
    assert one == pytest.approx(other)  # the same work, a training at a time
    assert found[1][0].seconds - found[0][0].seconds == pytest.approx(2 * each, abs=0.1)
    early = replace(trial.file.final, early_stopping=EarlyStopping(1, 2))
    stopped = Budget(replace(trial, file=replace(trial.file, final=early)))
    assert sum(s.tokens for s in stopped.stages()) < sum(s.tokens for s in Budget(trial).stages())


def test_every_kind_of_pass_is_timed_and_leaves_the_process_as_it_was(from_run: Run) -> None:
    trial, threads = from_run.trial(), torch.get_num_threads()
    models = TimedModels(trial.space, trial.file.memory, "near_front", True, True, ("decode_tokens_per_second",), workers=2)
    run = build_timer(models, {})
    for kind in KINDS:
        for alone in (False, True):
            found = run(Pass(kind, TrainSpec(0, 2, 16), alone))
            assert found.seconds > 0
            assert found.peak_bytes > 2**24
    assert torch.get_num_threads() == threads


def test_the_time_left_is_the_plan_corrected_by_what_was_seen() -> None:
    planned = (("a", 10.0), ("b", 20.0), ("b", 30.0), ("c", 5.0))
    budget = [StageBudget(name, 1, 0, 0.0, 0, 0, seconds) for name, seconds in planned]

    def seen(*rows: tuple[str, int, float, bool]) -> list[float]:
        return seconds_left(budget, [StageSeen(name, 100, "steps", done, at, ended) for name, done, at, ended in rows])

    assert seen() == [10, 20, 30, 5]
    assert seen(("a (3 models)", 100, 20.0, True)) == [0, 40, 60, 10]  # twice as slow as was said
    first = seen(("a", 100, 10.0, True), ("b (1)", 50, 30.0, False))  # half of the second took 30 s, not 10 s
    factor = 40 / 20
    assert first == pytest.approx([0, 0.5 * 20 * factor * 0.5 + 0.5 * 30, 30 * factor, 5 * factor])
    assert seen(("a", 100, 10.0, True), ("b (1)", 100, 20.0, True), ("b (2)", 0, 0.0, False)) == [0, 0, 30, 5]
    assert sum(seen(*((name, 100, 1.0, True) for name in ("a", "b (1)", "b (2)", "c")))) == 0


def test_a_run_keeps_how_far_its_stages_are_and_goes_on_counting(predictor_run: Run, tmp_path: Path) -> None:
    stages = read_progress(predictor_run.folder)
    assert [one.stage for one in stages][:4] == ["proxy trainings (4 models)", "dry run", "proxy trainings (4 models)", "search"]
    assert all(one.ended and one.done == one.total for one in stages)
    logged = [PROGRESS + name for name in STAGES]
    state = view_state("a search", ())
    (chart,) = [c for c in state["compareRunCharts"] if c.get("metricKey") in logged and not c["deleted"]]
    assert chart["selectedMetricKeys"] == logged  # one for all of them
    for stage in Budget(predictor_run.trial()).stages():
        assert "_".join(stage.name.split()) in STAGES

    logged: list[tuple[str, float, int]] = []
    for process in (1, 2):
        recorded = Recorded(Silent(), tmp_path, [], lambda *point: logged.append(point), 0.0)
        with pytest.raises(KeyboardInterrupt) if process == 1 else recorded.stage("train (2)", 8, "steps") as stage:
            if process == 1:
                with recorded.stage("train (2)", 8, "steps") as stopped:
                    stopped.update(4)
                    recorded.change(("train", 0), now=True, seconds=100.0)
                    raise KeyboardInterrupt
            stage.update(8)
        (found,) = read_progress(tmp_path)
        assert (found.done, found.ended) == ((4, False), (8, True))[process - 1]
        assert found.seconds >= 100
    assert logged[-1][:2] == ("progress_percent_train", 100.0)

    points: list[tuple[str, float, int]] = []
    recorded = Recorded(Silent(), tmp_path / "fast", [], lambda *point: points.append(point), time.time())
    (tmp_path / "fast").mkdir()
    with recorded.stage("single decisions", 8, "configs") as stage:
        stage.update(7)
    assert points[-1][1] == 100
    assert len({at for _, _, at in points}) == len(points) > 1  # a store keeps one value of a series at a step
