"""Presets compared on a tiny real model: real text, interrupted and continued; what is written is what was trained."""

import csv
import io
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from commands import refused, said

from nas.cli import nas
from nas.errors import UserError
from nas.pareto import front
from nas.presets import preset, presets
from nas.report.compare import AXES, Comparison, compared_csv, compared_table, draw_compared, write_comparison
from nas.report.tables import SAID, samples_text
from nas.search.compare import compare, read_compare
from nas.search.launch import Launch
from nas.search.progress import Silent
from nas.search.run import Run
from nas.sharing.memory import measure

Made = tuple[Run, Comparison, dict[str, int]]
NAMES = ["dense", "cla-2", "sequence-2", "albert"]
TINY: dict[str, Any] = {
    "name": "tiny",
    "model": {"vocab_size": 257, "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 24},
    "data": {"text": "python", "max_bytes": 60_000},
    "memory": {"context": 64},
    "train": {"steps": 4, "batch": 2, "seq": 16},
    "learning_rates": [0.01, 0.001],
    "presets": NAMES,
    "windows": 8,
    "run": {"workers": 0},
}


def tiny(folder: Path, **changes: object) -> Path:
    """The tiny comparison as a file, whole keys replaced; None takes one out."""
    data = {name: value for name, value in {**TINY, **changes}.items() if value is not None}
    path = folder / "zoo.yaml"
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    return path


def results(run: Run) -> dict[str, int]:
    return {path.parent.name: path.stat().st_mtime_ns for path in run.folder.glob("trained/*/result.json")}


class Interrupted(Silent):
    """Ends the process's work once so many steps are done."""

    def update(self, done: int, note: str = "") -> None:
        if done >= 3 * TINY["train"]["steps"]:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A comparison that was interrupted and then carried through, and what had been done by the interruption."""
    folder = tmp_path_factory.mktemp("compared")
    path, run = tiny(folder), Run(folder / "runs" / "tiny")
    with pytest.raises(KeyboardInterrupt):
        compare(Launch(path, folder / "runs"), Interrupted())
    before = results(run)
    run, comparison = compare(Launch(path, folder / "runs"), Silent(), folder / "page")
    return run, comparison, before


def test_it_goes_on_does_nothing_twice_and_then_says_the_same(compared: Made) -> None:
    run, comparison, before = compared
    after = results(run)
    assert (0 < len(before) < 8, len(after)) == (True, 8)
    assert {key: after[key] for key in before} == before
    assert [row.measured.names for row in comparison.rows] == [(name,) for name in NAMES]
    again = compare(Launch(run.folder.parent.parent / "zoo.yaml", run.folder.parent), Silent())[1]
    assert results(run) == after
    assert again.rows == comparison.rows


def test_every_preset_is_shown_at_its_rate_of_least_loss_and_beside_dense(
    compared: Made,
) -> None:
    run, comparison, _ = compared
    file, configs = read_compare(run.folder.parent.parent / "zoo.yaml")
    read = {key: json.loads((run.folder / "trained" / key / "result.json").read_text()) for key in results(run)}
    dense = comparison.rows[0]
    assert (dense.against, dense.kind) == (None, "")
    for row, (config, names) in zip(comparison.rows, configs.items(), strict=True):
        assert row.measured.names == names
        losses = {rate: read[f"{config.hash}-{rate}-0"]["loss_nats_per_token"] for rate in (0.001, 0.01)}
        assert row.losses == pytest.approx(losses)
        assert row.learning_rate == min(losses, key=losses.__getitem__)
        best = read[f"{config.hash}-{row.learning_rate}-0"]
        assert math.log(row.measured.perplexity) == pytest.approx(sum(best["test"]["window_losses"]) / 8)
        assert {e.part for e in row.measured.evaluations} == {"test"}
        assert row.measured.first.tokens == 4 * 2 * 16
        assert row.measured.first.memory == measure(file.model, config, file.memory)
        assert row.end == ("lowest" if row.learning_rate == 0.001 else "highest")
        if row.against:
            ratio, error = row.against
            assert ratio == pytest.approx(row.measured.perplexity / dense.measured.perplexity)
            assert 0 < error < ratio * row.measured.standard_error / row.measured.perplexity * 2


def test_page_table_figure_and_fronts_say_the_same(compared: Made, tmp_path: Path) -> None:
    run, comparison, _ = compared
    folder = run.folder.parent.parent / "page"
    page, shown = (folder / "README.md").read_text(), compared_table(comparison.rows)
    assert "beyond it another may be better yet" in page
    assert all(len(comparison.samples[row.measured.label]) == 3 for row in comparison.rows)
    assert f"<details>\n<summary>{SAID}</summary>\n\n````\n{samples_text(comparison.samples)}\n````\n\n</details>" in page
    for place in (folder, run.folder):
        assert (place / "compared.csv").read_text() == compared_csv(comparison.rows)
    for line, cells in zip(csv.DictReader(io.StringIO(compared_csv(comparison.rows))), shown, strict=True):
        row = next(row for row in comparison.rows if row.measured.label == line["presets"] == cells["name"])
        assert f"| {cells['name']}" in page
        assert cells["perplexity"] in page
        assert json.loads(line.pop("config")) == json.loads(json.dumps(row.to_data()["config"]))
        assert line == {name: "" if row.to_data()[name] is None else str(row.to_data()[name]) for name in line}
    for axis, read in AXES.items():
        points = [(float(read(row)), row.measured.perplexity) for row in comparison.rows]
        members = {comparison.rows[i].measured.label for i in front(points)}
        assert members == {cells["name"] for cells in shown if axis in cells["front"].split(", ")}
    one, other = (draw_compared(comparison.rows, tmp_path / f"{n}.svg").read_bytes() for n in range(2))
    assert one == other
    single = replace(comparison, rows=[replace(comparison.rows[1], against=None)], failed={"albert": "NotFinite: nan"})
    assert "albert could not be trained at any rate: NotFinite: nan" in write_comparison(tmp_path, single).read_text()


def test_more_may_be_asked_for_and_only_that_is_trained(compared: Made, tmp_path: Path) -> None:
    """Two presets more, and a rate beyond all reason, which makes weights that are not numbers."""
    run, _, _ = compared
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


def test_a_folder_holds_trainings_of_one_kind(compared: Made, tmp_path: Path) -> None:
    run = compared[0]
    before = results(run)
    changes = {"train": {**TINY["train"], "steps": 5}, "windows": 4, "data": {"text": "python", "max_bytes": 50_000}}
    for key, value in changes.items():
        with pytest.raises(UserError, match=f"{key} is not what this comparison began with"):
            compare(Launch(tiny(tmp_path, **{key: value}), run.folder.parent), Silent())
    assert results(run) == before
    (tmp_path / "runs" / "tiny").mkdir(parents=True)
    (tmp_path / "runs" / "tiny" / "letter.txt").write_text("dear")
    refused(lambda: compare(Launch(tiny(tmp_path), tmp_path / "runs"), Silent()), "not empty and is no comparison")
    assert [path.name for path in (tmp_path / "runs" / "tiny").iterdir()] == ["letter.txt"]


def test_mistakes_are_named_with_their_place_before_anything_is_written(tmp_path: Path) -> None:
    mistakes: list[tuple[dict[str, Any], str]] = [
        ({"presets": ["dense", "clb-2"]}, "presets"),
        ({"presets": ["cla-9"]}, "presets"),
        ({"presets": []}, "presets"),
        ({"learning_rates": [0.1, 0.1]}, "learning_rates"),
        ({"train": {"steps": 0}}, "train.steps"),
        ({"train": {"steps": 3, "learning_rate": 0.1}}, "train.learning_rate"),
        ({"windows": 1}, "windows"),
        ({"train": {"steps": 3, "seq": 4000}}, ""),
        ({"memory": {"context": 4000}}, ""),
    ]
    for changes, key in mistakes:
        path = tiny(tmp_path, **changes)
        with pytest.raises(UserError) as error:
            compare(Launch(path, tmp_path / "runs"), Silent())
        assert error.value.where.startswith(str(path)), changes
        assert key in error.value.where.removeprefix(str(path)), changes
    assert not (tmp_path / "runs").exists()


def test_without_a_list_every_preset_is_compared(tmp_path: Path) -> None:
    file, configs = read_compare(tiny(tmp_path, presets=None))
    assert sorted(name for names in configs.values() for name in names) == sorted(name for name, _ in presets(file.model))
    assert all(preset(name, file.model) == config for config, names in configs.items() for name in names)
    assert said("check", tiny(tmp_path)).endswith("a comparison: 4 configs at 2 learning rates, 4 steps\n")
