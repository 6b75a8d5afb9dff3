"""The tabular benchmark of fine-tuned sharing, and the estimators that are scored on it, on a model of four tiny layers."""

import csv
import re
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from searches import write_dense

from nas.model import attention
from nas.search.trial import Trial
from nas.sharing.memory import MemorySpec
from nas.training.loop import TrainSpec
from reports.fine_tuned import __main__ as benchmark
from reports.fine_tuned_ranking import __main__ as ranking
from reports.supernet_fronts import __main__ as supernet_fronts

TINY = benchmark.Setting(MemorySpec(1024, 1), TrainSpec(4, batch=2, seq=16, learning_rate=1e-3), eval_sequences=4, per_bin=2)
KINDS = (
    "zero-shot",
    "dense-biased",
    "near the front",
    "dense-biased, random split 2",
    "short fine-tuning, 10% of the steps",
)


def invoke(program: object, *args: object) -> Result:
    found = CliRunner().invoke(program, [str(arg) for arg in args], catch_exceptions=False)  # type: ignore[arg-type]
    assert found.exit_code == 0, found.output
    return found


def rows(path: Path) -> list[dict[str, str]]:
    """Of a table, without what a clock says."""
    with path.open() as file:
        return [{name: value for name, value in row.items() if "seconds" not in name} for row in csv.DictReader(file)]


@pytest.mark.slow
def test_a_benchmark_goes_on_from_its_table_and_estimators_are_scored_on_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(benchmark.SETTINGS, "small", TINY)
    monkeypatch.setattr(ranking, "TABLES", tmp_path / "tables")
    monkeypatch.setattr(ranking, "HERE", tmp_path / "ranking")
    model, train, held = write_dense(tmp_path / "dense"), tmp_path / "train.txt", tmp_path / "held.txt"
    train.write_text("".join(f"{n} sheep, {n * n} goats; " for n in range(900)))
    held.write_text("".join(f"{n} goats and {n + 7} sheep, " for n in range(900, 1200)))

    args = (model, train, held, "--to", tmp_path / "tables", "--setting", "small")
    before = attention.PLAIN_UP_TO
    invoke(benchmark.main, *args)
    assert before == attention.PLAIN_UP_TO  # a setting of the process: what runs after it computes as ever
    table = tmp_path / "tables" / "small" / "losses.csv"
    whole, configs = rows(table), rows(table.parent / "configs.csv")
    assert len(configs) > 3
    assert {(row["hash"], row["step"]) for row in whole if row["seed"] == "0"} == {
        (row["hash"], step) for row in configs for step in ("0", "2", "4")
    }
    invoke(benchmark.main, *args)
    assert rows(table) == whole
    table.write_text(table.read_text()[:-40])  # a kill in the middle of the last line
    invoke(benchmark.main, *args)
    assert rows(table) == whole
    usual = TINY.train.learning_rate
    for _ in range(2):  # at the table's own rate the same losses, at another not; what is there is not trained again
        invoke(benchmark.main, *args, "--rate", usual, "--rate", 3 * usual, "--config", configs[1]["hash"])
    tried = rows(table.parent / "rates.csv")
    assert [float(row["learning_rate"]) for row in tried] == [usual] * 3 + [3 * usual] * 3
    lost = [row["loss_nats_per_token"] for row in (*tried, *whole) if (row["hash"], row["seed"]) == (configs[1]["hash"], "0")]
    assert lost[:3] == lost[6:]
    assert lost[1:3] != lost[4:6]
    assert rows(table) == whole

    (tmp_path / "ranking").mkdir()
    (tmp_path / "ranking" / "findings.md").write_text("# Found\n")
    only = [word for kind in KINDS for word in ("--only", kind)]
    ask = (model, train, "--setting", "small", "--budget", 0.5, "--runs", tmp_path / "runs", *only)
    invoke(ranking.main, *ask)
    estimates, page = tmp_path / "ranking" / "small" / "estimates.csv", (tmp_path / "ranking" / "README.md").read_text()
    said = rows(estimates)
    assert {row["estimator"] for row in said} == {*KINDS, "dense-biased, random split 2, calibrated"}
    assert all(re.search(rf"^\| {re.escape(name)} +\|", page, re.M) for name in (*KINDS, "sum of single decisions"))
    budget = 0.5 * len(configs) * TINY.train.tokens
    assert all(int(row["tokens"]) <= budget for row in said)
    invoke(ranking.main, *ask)
    assert rows(estimates) == said

    read = ranking.Table.read("small", ranking.ModelShape(**ranking.json.loads((estimates.parent / "shape.json").read_text())))
    perfect = {row["hash"]: loss for row, loss in zip(configs, read.truth.tolist(), strict=True)}
    for config in read.configs:
        row = ("perfect", 0, 1, config.hash, perfect[config.hash])
        ranking.append_row(estimates, ranking.ESTIMATES, dict(zip(ranking.ESTIMATES, row, strict=True)))
    (best,) = [score for score in ranking.scores(read, estimates) if score.estimator == "perfect"]
    assert best.mean("tau") == pytest.approx(1)
    assert best.mean("regret_1") == 0.0
    dense = read.additive()[read.configs.index(read.space.dense)]
    assert dense == 0


def test_every_way_of_evaluating_is_a_trial_and_fronts_are_compared_with_the_first_of_their_seed(tmp_path: Path) -> None:
    write_dense(tmp_path / "dense")
    for given in supernet_fronts.WAYS.values():
        texts = ("data.text=python", "data.eval_text=python", f"from={tmp_path / 'dense'}")
        Trial.load(supernet_fronts.HERE / "trial.yaml", settings=[*texts, *given])
    row = supernet_fronts.ModelRow
    found = [row("a", 0, "x", "", 50, 1.5), row("a", 0, "d", "dense", 100, 1.0), row("b", 0, "y", "", 50, 1.25)]
    (first, second) = supernet_fronts.page(found).splitlines()[-2:]
    assert "1.000" in first
    assert f"{(55 * 0.75) / (55 * 0.5 + 5 * 0.5):.3f}" in second
