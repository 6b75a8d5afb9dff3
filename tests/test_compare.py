"""The zoo compared on a tiny real model: real text, real Ray, a real kill; what is written is what was trained."""

from __future__ import annotations

import csv
import io
import json
import math
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from nas.cli import nas
from nas.errors import UserError
from nas.pareto import front
from nas.presets import preset, presets
from nas.report.compare import AXES, Compared, Comparison, compared_csv, compared_table, draw_compared, write_comparison
from nas.search.compare import ComparePlan, compare, read_compare
from nas.search.launch import Launch
from nas.search.progress import Silent
from nas.search.run import Run
from nas.sharing.memory import measure

NAMES = ["dense", "cla-2", "sequence-2", "albert"]
TINY = {
    "name": "tiny",
    "model": {"vocab_size": 256, "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 24},
    "data": {"text": "python", "max_bytes": 60_000},
    "memory": {"context": 64},
    "train": {"steps": 4, "batch": 2, "seq": 16},
    "learning_rates": [0.01, 0.001],
    "presets": NAMES,
    "windows": 8,
}


def tiny(folder: Path, **changes: object) -> Path:
    """The tiny comparison as a file, whole keys replaced; None takes one out."""
    path = folder / "zoo.yaml"
    data = {**TINY, **changes}
    path.write_text(yaml.safe_dump({name: value for name, value in data.items() if value is not None}, sort_keys=False))
    return path


def results(run: Run) -> dict[str, int]:
    """When each training's result was written."""
    return {path.parent.name: path.stat().st_mtime_ns for path in run.folder.glob("trained/*/result.json")}


pytestmark = pytest.mark.slow  # a comparison is some twenty trainings, twice


@pytest.fixture(scope="module")
def killed_and_resumed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Comparison, dict[str, int]]:
    """A comparison whose process was killed on the way, carried through; and what had been done by then."""
    folder = tmp_path_factory.mktemp("compared")
    path, run = tiny(folder), Run(folder / "runs" / "tiny")
    words = [sys.executable, "-c", "from nas.cli import main; main()", "compare", str(path), "--runs", str(folder / "runs")]
    process = subprocess.Popen(words, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    give_up = time.monotonic() + 120
    while len(results(run)) < 2:
        assert process.poll() is None, process.stderr and process.stderr.read().decode()
        assert time.monotonic() < give_up, "nothing was trained"
        time.sleep(0.02)
    process.kill()
    process.wait()
    before = results(run)
    assert 2 <= len(before) < 8, "it was to be killed on the way"
    run, comparison = compare(Launch(path, folder / "runs"), Silent(), folder / "page")
    return run, comparison, before


def test_a_killed_comparison_goes_on_and_does_nothing_twice(killed_and_resumed) -> None:
    run, comparison, before = killed_and_resumed
    after = results(run)
    assert len(after) == 8
    assert {key: after[key] for key in before} == before
    assert [row.measured.names for row in comparison.rows] == [(name,) for name in NAMES]


def test_a_finished_comparison_trains_nothing_and_says_the_same(killed_and_resumed) -> None:
    run, comparison, _ = killed_and_resumed
    before = results(run)
    again = compare(Launch(run.folder.parent.parent / "zoo.yaml", run.folder.parent), Silent())[1]
    assert results(run) == before
    assert again.rows == comparison.rows


def test_every_scheme_is_shown_at_its_rate_of_least_loss(killed_and_resumed) -> None:
    run, comparison, _ = killed_and_resumed
    plan = ComparePlan.load(run.folder.parent.parent / "zoo.yaml")
    told = {key: json.loads((run.folder / "trained" / key / "result.json").read_text()) for key in results(run)}
    for row, (config, names) in zip(comparison.rows, plan.configs.items(), strict=True):
        assert row.measured.names == names
        losses = {rate: told[f"{config.hash}-{rate}-0"]["loss_nats_per_token"] for rate in (0.001, 0.01)}
        assert row.losses == pytest.approx(losses)
        assert row.learning_rate == min(losses, key=losses.__getitem__)
        best = told[f"{config.hash}-{row.learning_rate}-0"]
        assert row.measured.perplexity == pytest.approx(math.exp(losses[row.learning_rate]))
        assert math.log(row.measured.perplexity) == pytest.approx(sum(best["window_losses"]) / 8)
        assert row.measured.first.tokens == 4 * 2 * 16
        assert row.measured.first.memory == measure(plan.file.model, config, plan.file.memory)
        assert row.end == ("lowest" if row.learning_rate == 0.001 else "highest")


def test_the_ratio_to_dense_is_that_of_the_perplexities(killed_and_resumed) -> None:
    _, comparison, _ = killed_and_resumed
    dense = next(row for row in comparison.rows if row.measured.names == ("dense",))
    assert dense.against is None
    assert dense.kind == ""
    for row in comparison.rows:
        if row is not dense:
            ratio, error = row.against
            assert ratio == pytest.approx(row.measured.perplexity / dense.measured.perplexity)
            assert 0 < error < ratio * row.measured.standard_error / row.measured.perplexity * 2


def test_the_page_the_table_and_the_terminal_say_the_same(killed_and_resumed) -> None:
    run, comparison, _ = killed_and_resumed
    page = run.folder.parent.parent / "page"
    for folder in (page, run.folder):
        assert (folder / "README.md").is_file()
        assert (folder / "compared.csv").read_text() == compared_csv(comparison.rows)
        assert (folder / "compared.png").stat().st_size > 10_000
    said = (page / "README.md").read_text()
    assert "nas compare" in said
    assert "beyond it another may be better yet" in said
    lines = list(csv.DictReader(io.StringIO((page / "compared.csv").read_text())))
    for line, shown in zip(lines, compared_table(comparison.rows), strict=True):
        assert line["presets"] == shown["name"]
        assert f"| {shown['name']}" in said
        assert shown["perplexity"] in said
        row = next(row for row in comparison.rows if row.measured.label == line["presets"])
        typed = {name: None if value is None else str(value) for name, value in row.to_data().items() if name != "config"}
        assert {name: value or "" for name, value in typed.items()} == {name: line[name] for name in typed}
        assert json.loads(line["config"]) == json.loads(json.dumps(row.to_data()["config"]))


def test_more_may_be_asked_for_and_only_that_is_trained(killed_and_resumed, tmp_path) -> None:
    """A preset more, and a rate beyond all reason, which makes weights that are not numbers."""
    run, _, _ = killed_and_resumed
    before = results(run)
    path = tiny(tmp_path, presets=[*NAMES, "mqa", "gqa-1"], learning_rates=[0.01, 1e30])
    found = CliRunner().invoke(nas, ["compare", str(path), "--runs", str(run.folder.parent), "--json"])
    assert found.exit_code == 0, found.output
    rows = json.loads(found.stdout)["rows"]
    assert [row["presets"] for row in rows] == [*NAMES, "mqa = gqa-1"]
    assert all(row["learning_rate"] == 0.01 and row["loss_nats_per_token_at_1e+30"] is None for row in rows)
    assert found.stderr.count("failed at a learning rate of 1e+30") == 5
    after = results(run)
    assert len(after) == len(before) + 1 + 5
    assert {key: after[key] for key in before} == before
    again = compare(Launch(path, run.folder.parent), Silent())[1]
    assert results(run) == after
    assert all(shown["loss at 1e+30"] == "failed" for shown in compared_table(again.rows))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"train": {**TINY["train"], "steps": 5}}, "train is not what this comparison began with"),  # type: ignore[dict-item]
        ({"windows": 4}, "windows is not what this comparison began with"),
        ({"data": {"text": "python", "max_bytes": 50_000}}, "data is not what this comparison began with"),
    ],
)
def test_a_folder_holds_trainings_of_one_kind(killed_and_resumed, tmp_path, changes, says) -> None:
    run, _, _ = killed_and_resumed
    before = results(run)
    with pytest.raises(UserError, match=says):
        compare(Launch(tiny(tmp_path, **changes), run.folder.parent), Silent())
    assert results(run) == before


def test_a_folder_of_anything_else_is_left_alone(tmp_path) -> None:
    (tmp_path / "runs" / "tiny").mkdir(parents=True)
    (tmp_path / "runs" / "tiny" / "letter.txt").write_text("dear")
    with pytest.raises(UserError, match="not empty and is no comparison"):
        compare(Launch(tiny(tmp_path), tmp_path / "runs"), Silent())
    assert [path.name for path in (tmp_path / "runs" / "tiny").iterdir()] == ["letter.txt"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"presets": ["dense", "clb-2"]}, "presets: no such preset: clb-2; did you mean cla-2?"),
        ({"presets": ["cla-9"]}, "presets: cla: n=9 does not fit this model; use 1 to 4"),
        ({"presets": []}, "presets: names no preset"),
        ({"learning_rates": []}, "learning_rates: [] are not different rates above zero"),
        ({"learning_rates": [0.1, 0.1]}, "learning_rates: [0.1, 0.1] are not different rates above zero"),
        ({"learning_rates": [0.1, -0.1]}, "are not different rates above zero"),
        ({"train": {"steps": 0}}, "train.steps: 0 steps train nothing"),
        (
            {"train": {"steps": 3, "learning_rate": 0.1}},
            "train.learning_rate: each rate of learning_rates is tried; leave it out",
        ),
        ({"seeds": 0}, "seeds: 0 is too small"),
        ({"windows": 1}, "windows: 1 is too small"),
        ({"model": None}, "model is missing"),
    ],
)
def test_mistakes_are_one_line_with_their_place(tmp_path, changes, says) -> None:
    with pytest.raises(UserError) as caught:
        read_compare(tiny(tmp_path, **changes))
    assert says in str(caught.value)
    assert "zoo.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_text_and_context_that_do_not_fit_are_refused_before_anything_is_written(tmp_path) -> None:
    for changes in ({"train": {"steps": 3, "seq": 4000}}, {"memory": {"context": 4000}}):
        with pytest.raises(UserError, match="max_position_embeddings=2048"):
            compare(Launch(tiny(tmp_path, **changes), tmp_path / "runs"), Silent())
    assert not (tmp_path / "runs").exists()


def test_without_a_list_every_preset_is_compared(tmp_path) -> None:
    file, configs = read_compare(tiny(tmp_path, presets=None))
    assert [name for names in configs.values() for name in names] == sorted(
        (name for name, _ in presets(file.model)), key=[n for names in configs.values() for n in names].index
    )
    assert all(preset(name, file.model) == config for config, names in configs.items() for name in names)
    assert (
        CliRunner()
        .invoke(nas, ["check", str(tiny(tmp_path))])
        .output.endswith("a comparison: 4 configs at 2 learning rates, 4 steps\n")
    )


def test_fronts_are_of_what_they_are_drawn_against(killed_and_resumed, tmp_path) -> None:
    _, comparison, _ = killed_and_resumed
    shown = {row["name"]: row["front"] for row in compared_table(comparison.rows)}
    for axis, read in AXES.items():
        points = [(float(read(row)), row.measured.perplexity) for row in comparison.rows]
        members = {comparison.rows[i].measured.label for i in front(points)}
        assert members == {name for name, fronts in shown.items() if axis in fronts.split(", ")}
    one, other = (draw_compared(comparison.rows, tmp_path / f"{n}.svg").read_bytes() for n in range(2))
    assert one == other


def test_a_single_scheme_has_a_page_too(killed_and_resumed, tmp_path) -> None:
    _, comparison, _ = killed_and_resumed
    row: Compared = replace(comparison.rows[1], against=None)
    page = write_comparison(tmp_path, replace(comparison, rows=[row], failed={"albert": "NotFinite: nan"}))
    assert "albert could not be trained at any rate: NotFinite: nan" in page.read_text()
