"""Downstream tasks: `lm-eval` on local files gives what the model's own log probabilities say. Skipped where it is missing."""

import json
import math
import re
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click import UsageError
from click.testing import CliRunner
from commands import refused, said, told
from exports import Exports, rhyme
from searches import SHAPE, SUPERNET, search
from tiny import read_csv
from torch.nn import functional as F

from nas.cli import nas as command_line
from nas.data.tokenizer import encode_bytes
from nas.errors import UserError
from nas.export import measure as room
from nas.export.measure import Score, eval_tasks, require_tasks
from nas.search.launch import resume
from nas.search.progress import Silent
from nas.search.publish import export_run

pytestmark = [pytest.mark.service, pytest.mark.filterwarnings("ignore")]

needs_lm_eval = pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is not installed")

ROWS = [{"question": f"{n} and", "options": ["one", "two", "six"], "answer": n % 3} for n in range(12)]
CHOICE: dict[str, Any] = {
    "task": "counting",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "{{options}}",
    "doc_to_target": "answer",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}
ROLLING: dict[str, Any] = {
    "task": "questions",
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{question}}",
    "metric_list": [{"metric": "bits_per_byte"}],
}


def write_task(folder: Path, task: dict[str, Any]) -> Path:
    """A task file, and its data beside it."""
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
    path = folder / f"{task['task']}.yaml"
    path.write_text(yaml.safe_dump(task | source))
    return path


@torch.no_grad()
def log_probability(model: Any, context: str, text: str) -> float:
    before, row = len(context.encode()), encode_bytes((context + text).encode()).long()
    return -F.cross_entropy(model(row[None, :-1])[0, before - 1 :], row[before:], reduction="sum").item()


@needs_lm_eval
def test_scores_are_those_of_the_models_own_log_probabilities(exports: Exports, tmp_path: Path) -> None:
    made = exports("everything")
    files = [write_task(tmp_path, CHOICE), write_task(tmp_path, ROLLING)]
    found = {(score.task, score.metric): score for score in eval_tasks(made.folder, files)}
    # lm-eval puts a space between a question and an option.
    sums = [[log_probability(made.subnet, row["question"], f" {option}") for option in row["options"]] for row in ROWS]
    right = [max(range(3), key=row.__getitem__) == answer["answer"] for row, answer in zip(sums, ROWS, strict=True)]
    accuracy = sum(right) / len(ROWS)
    error = math.sqrt(accuracy * (1 - accuracy) / (len(ROWS) - 1))
    assert found["counting", "acc"] == Score("counting", "acc", pytest.approx(accuracy), pytest.approx(error), 12, True)
    nats = 0.0
    for question in (row["question"] for row in ROWS):
        row = torch.cat([torch.tensor([256]), encode_bytes(question.encode())]).long()
        with torch.no_grad():
            nats += F.cross_entropy(made.subnet(row[None, :-1])[0], row[1:], reduction="sum").item()
    bits = nats / math.log(2) / sum(len(row["question"]) for row in ROWS)
    assert found["questions", "bits_per_byte"].value == pytest.approx(bits, rel=1e-4)
    assert not found["questions", "bits_per_byte"].higher_is_better

    words = ["eval", str(made.folder), *(word for file in files for word in ("--task", str(file)))]
    tasks = told(*words)["tasks"]
    assert tasks == [asdict(score) for score in found.values()]
    assert re.search(rf"counting +acc +{accuracy:.4f} ± {error:.4f} +higher +12", said(*words))
    both = told(*words, "--text", rhyme(tmp_path / "rhyme.txt"), "--seq", 16, "--eval-sequences", 4, "--context", 8)
    assert both["tasks"] == tasks
    assert both["perplexity"] > 1


@needs_lm_eval
def test_a_file_that_is_no_task_is_one_line(exports: Exports, tmp_path: Path) -> None:
    gone = CHOICE | {"dataset_path": "json", "dataset_kwargs": {"data_files": str(tmp_path / "gone.jsonl")}}
    for name, content, says in (
        ("none.yaml", None, "no such file"),
        ("text.yaml", "{", "is no task that lm-eval reads"),
        ("empty.yaml", "a: 1", "is no task that lm-eval reads"),
        ("gone.yaml", yaml.safe_dump(gone), "is no task that lm-eval reads"),
    ):
        if content is not None:
            (tmp_path / name).write_text(content)
        with pytest.raises(UserError, match=f"{name}: {says}") as raised:
            require_tasks([tmp_path / name])
        assert "\n" not in str(raised.value)
    broken = write_task(tmp_path, CHOICE | {"doc_to_text": "{{question|no_such_filter}}"})
    with pytest.raises(UserError, match=r"counting\.yaml: (cannot be run by|is no task that) lm-eval"):
        eval_tasks(exports("everything").folder, [broken])


@needs_lm_eval
def test_a_search_scores_the_models_of_its_front_and_reports_it_everywhere(tmp_path: Path) -> None:
    file = write_task(tmp_path, CHOICE)
    final = {**SUPERNET["final"], "presets": False, "tasks": [file.name]}
    given = {"split": {"method": "none"}, "search": {"evaluations": 8, "batch": 8}, "final": final}
    run, front = search(tmp_path, SUPERNET, **given)
    assert run.front() == front
    name, words = "task.counting.acc", ["front", str(run.folder)]
    for e in front.evaluations:
        kept = json.loads((run.weights(e).parent / "tasks.json").read_text())
        assert [(row["task"], row["metric"]) for row in kept] == [("counting", "acc")]
        assert (e.values[name], e.values[name + "_standard_error"]) == (kept[0]["value"], kept[0]["standard_error"])
    picked = export_run(run, "knee", tmp_path / "out")
    (score,) = eval_tasks(tmp_path / "out", [file])
    assert picked.values[name] == pytest.approx(score.value)
    rows = told(*words)["front"]
    assert [row[name] for row in rows] == [m.first.values[name] for m in front.members]
    assert f"{picked.values[name]:.3f} ± " in CliRunner().invoke(command_line, words, env={"COLUMNS": "200"}).output
    read = read_csv(SHAPE, (run.folder / f"{front.weights}.csv").read_text())
    assert [e.values[name] for e in read] == [e.values[name] for e in front.evaluations]
    assert "counting acc" in (run.folder / "front.html").read_text()
    (run.folder / "front.json").unlink()
    kept = {path: path.stat().st_mtime_ns for path in run.folder.glob("final/*/tasks.json")}
    assert resume(run, Silent()) == front
    assert kept == {path: path.stat().st_mtime_ns for path in run.folder.glob("final/*/tasks.json")}
    file.unlink()
    refused(lambda: search(tmp_path, SUPERNET, name="again", **given), "counting.yaml: no such file")
    assert not (tmp_path / "runs" / "again").exists()


@needs_lm_eval
def test_a_score_is_an_objective_of_the_front_and_bounds_picks(tmp_path: Path) -> None:
    files = [write_task(tmp_path, CHOICE), write_task(tmp_path, ROLLING)]
    final = {**SUPERNET["final"], "presets": False, "seeds": 2, "tasks": [file.name for file in files]}
    given = {"split": {"method": "none"}, "search": {"evaluations": 8, "batch": 8}}
    name = "task.questions.bits_per_byte"
    run, front = search(tmp_path, SUPERNET, final=final | {"objective": name}, **given)
    assert run.front() == front
    scores = {m.first.config: [e.values[name] for e in m.evaluations] for m in front.configs}
    assert all(len({*found}) == 2 for found in scores.values())  # two seeds' weights
    points = {m.first.config: (m.memory_bytes, sum(scores[m.first.config]) / 2, m.point[-1]) for m in front.configs}

    def beaten(point: tuple[float, ...]) -> bool:
        return any(q != point and all(a <= b for a, b in zip(q, point, strict=True)) for q in points.values())

    assert {m.first.config for m in front.members} == {config for config, point in points.items() if not beaten(point)}
    low = sorted(point[1] for point in points.values())[1]
    assert points[run.front().pick(f"{name}<={low}").config][1] <= low
    refused(lambda: front.pick("task.counting.acc>=2"), "no retrained model has task.counting.acc of 2 or more; the largest is")
    table = CliRunner().invoke(command_line, ["front", str(run.folder)], env={"COLUMNS": "200"}).output
    assert "questions" in table
    assert "bits_per_byte" in table
    for wrong, says in (
        ("task.counting.f1", "final.objective: no task gives task.counting.f1; did you mean task.counting.acc"),
        ("acc", "final.objective: 'acc' is no task's score; write it as task.NAME.METRIC"),
    ):
        with pytest.raises(UserError, match=re.escape(says)):
            search(tmp_path, SUPERNET, name="wrong", final=final | {"objective": wrong}, **given)
    metrics = [{"metric": "acc", "aggregation": "mean", "higher_is_better": False}]
    upside = final | {"tasks": [write_task(tmp_path, CHOICE | {"metric_list": metrics}).name], "objective": "task.counting.acc"}
    with pytest.raises(UserError, match=r"calls the lower task\.counting\.acc the better one"):
        search(tmp_path, SUPERNET, name="wrong", final=upside, **given)
    for wrong, says in (
        ({"final": final | {"objective": name, "tasks": []}}, "there is no task to score models on"),
        ({"objectives": ["memory_bytes", name]}, "a score is known of the last models alone"),
        (
            {"objectives": ["memory_bytes", "weight_bytes", "perplexity"], "final": final | {"objective": name}},
            "a fourth objective",
        ),
    ):
        with pytest.raises(UserError, match=says):
            search(tmp_path, SUPERNET, name="wrong", **{"final": final} | given | wrong)


def test_without_lm_eval_it_says_what_to_install(exports: Exports, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "find_spec", lambda name: None)
    refused(lambda: said("eval", exports("dense").folder, "--task", tmp_path / "task.yaml"), "task: needs lm-eval, ", "[tasks]")
    with pytest.raises(UsageError, match="give --text, or --task"):
        said("eval", exports("dense").folder)
