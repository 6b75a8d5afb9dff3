"""A contest on a tiny real model: who takes part, who pays for what, and how it stands."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from nas.cli import nas
from nas.errors import UserError
from nas.model.supernet import dense_config
from nas.pareto import hypervolume
from nas.rank.contest import TABLE, Contest, Entrant, Proposed, hold, propose
from nas.rank.rows import read_rows, write_rows
from nas.report.contest import BESIDE, FIGURE, KINDS, PAGE, Result, Standing, _figure, contest_rows, model_rows, write_contest
from nas.search.context import published
from nas.search.progress import Silent
from nas.sharing.sharing_config import SharingConfig

SPACE = {
    "model": {"vocab_size": 256, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24},
    "choices": {"tie": {"sources": "previous"}, "kv": {"sources": "previous"}, "kv_heads": {"options": [2, 1]}},
}
TINY = {
    "name": "tiny",
    "space": "space.yaml",
    "texts": {"python": {"text": "python", "max_bytes": 60_000}, "other": {"text": "missing.txt"}},
    "train": {"steps": 4, "batch": 2, "seq": 16},
    "learning_rates": [0.01, 0.001],
    "seeds": 2,
    "candidates": 3,
    "evaluations": 30,
    "predictor": {"configs": 4, "steps": 2, "rounds": 1},
    "smaller": {"layers": [2], "widths": [8]},
    "windows": 4,
    "memory": {"context": 64},
}


def tiny(folder: Path, **changes: object) -> Path:
    (folder / "space.yaml").write_text(yaml.safe_dump(SPACE))
    (folder / "contest.yaml").write_text(yaml.safe_dump({**TINY, **changes}))
    return folder / "contest.yaml"


def test_everybody_takes_part_and_random_search_may_spend_what_the_search_does(tmp_path: Path) -> None:
    contest = Contest.load(tiny(tmp_path), ["python"])
    some = contest.space.largest(), *published(contest.space)
    found = contest.entrants(Proposed(some[:1], some[:2], 5 * contest.model_tokens))
    kinds = {kind: [e for e in found if e.kind == kind] for kind in KINDS}
    assert [len(mine) for mine in kinds.values()] == [1, 2, len(published(contest.space)), 3 + 5, 2]
    assert {e.name for e in kinds["published scheme"]} >= {"dense", "mqa", "cla-2"}
    shapes = {(e.shape.num_hidden_layers, e.shape.hidden_size, e.shape.intermediate_size) for e in kinds["smaller dense model"]}
    assert shapes == {(2, 16, 24), (3, 8, 16)}
    assert all(e.config == dense_config(e.shape) for e in kinds["smaller dense model"])
    assert len({e.model for e in found}) == len({(e.shape, e.config) for e in found}), "models of unlike shapes are told apart"
    models = {e.model for e in found}
    bouts = list(contest.bouts("python", found, []))
    assert len({bout.key for bout in bouts}) == len(bouts) == len(models) * 2


def test_other_seeds_are_trained_at_the_rate_with_which_the_first_ended_best(tmp_path: Path) -> None:
    contest = Contest.load(tiny(tmp_path), ["python"])
    who = [Entrant("search", name, contest.space.shape, config) for config, name in published(contest.space).items()][:2]
    a, b = (entrant.model for entrant in who)
    results = [result(a, 1, 2.0, 0.01), result(a, 1, 1.0, 0.001), result(b, 1, 1.0, 0.01)]
    results = [replace(r, text="python") for r in results] + [replace(result(b, 1, 0.0, 0.001), text="other")]
    more = {(bout.entrant.model, bout.rate, bout.seed) for bout in contest.bouts("python", who, results)}
    assert more == {(model, rate, 0) for model in (a, b) for rate in (0.01, 0.001)} | {(a, 0.001, 1)}
    assert contest.model_tokens == 3 * 4 * 2 * 16


def result(model: str, memory: int, loss: float, rate: float = 0.1, seed: int = 0) -> Result:
    return Result("t", model, memory, memory // 2, memory // 2, rate, seed, 10, loss)


def test_how_a_contest_stands_by_hand() -> None:
    """Each model at its best rate; hypervolumes against the worst of both; who is matched by the search and who is not."""
    entrants = [("search", "a", "a"), ("search", "b", "b"), ("published scheme", "b*", "b"), ("published scheme", "c", "c")]
    entrants += [("random config", "d", "d"), ("smaller dense model", "e", "e")]
    losses = {"a": (10, 2.0), "b": (20, 1.0), "c": (15, 1.5), "d": (30, 1.2), "e": (5, 3.0)}
    results = [result(m, memory, loss + 0.1 * (seed - 0.5), 0.1, seed) for m, (memory, loss) in losses.items() for seed in (0, 1)]
    results += [result(m, memory, loss + 1, 0.2, 0) for m, (memory, loss) in losses.items()]
    standing = Standing("t", entrants, results, 7)
    assert {one.name: round(one.loss, 6) for one in standing.judged} == {
        "a": 2.0, "b": 1.0, "b*": 1.0, "c": 1.5, "d": 1.2, "e": 3.0
    }  # fmt: skip
    assert standing.noise == pytest.approx(0), "what all models of a seed have in common is no noise"
    assert standing.corner == (30, pytest.approx(math.exp(3)))
    published = hypervolume([(15, math.exp(1.5)), (20, math.exp(1))], standing.corner)
    wanted = hypervolume([(10, math.exp(2)), (20, math.exp(1))], standing.corner)
    assert standing.volume("search") == pytest.approx(wanted / published)
    wanted = hypervolume([(10, math.exp(2)), (15, math.exp(1.5)), (20, math.exp(1))], standing.corner)
    assert standing.volume("search", "published scheme") == pytest.approx(wanted / published)
    assert standing.tokens("search", "published scheme") == 3 * 3 * 10 + 7, "a model of both was trained once"
    assert standing.tokens("search") == 2 * 3 * 10 + 7
    assert standing.tokens("published scheme") == 2 * 3 * 10
    assert [(one.name, round(short, 6)) for one, short in standing.undominated("published scheme", "search")] == [("c", 0.5)]
    assert [one.name for one, _ in standing.undominated("smaller dense model", "search")] == ["e"], (
        "the search has nothing so small"
    )
    assert not standing.undominated("random config", "search")
    beside = replace(standing, entrants=[*entrants, (BESIDE, "c", "c")])
    assert [one.name for one, _ in beside.undominated("published scheme", BESIDE)] == ["b*"]
    assert not beside.undominated("published scheme", BESIDE, "search"), "either may match it"
    assert beside.tokens(BESIDE) == 1 * 3 * 10 + 7, "it is the same lessons that it learnt from"
    assert beside.tokens("search", BESIDE) == 3 * 3 * 10 + 7
    fewer = replace(standing, results=results[:-1])
    assert "e" not in {one.name for one in fewer.judged}, "who was not trained at every rate is not judged yet"


def test_the_page_and_its_tables_say_the_same(tmp_path: Path) -> None:
    results = [result(m, n * 2**20, 2 / n, seed=seed) for n, m in enumerate("abc", 1) for seed in (0, 1)]
    standing = Standing("t", [("search", "a", "a"), ("published scheme", "b", "b"), ("random config", "c", "c")], results, 0)
    page = write_contest(tmp_path, "nas contest", [standing]).read_text()
    for row in (*contest_rows(standing), *model_rows(standing)):
        line = next(line for line in page.splitlines() if line.startswith("|") and all(cell in line for cell in row.values()))
        assert line
    assert (tmp_path / FIGURE).stat().st_size > 10_000
    before = (tmp_path / FIGURE).read_bytes()
    write_contest(tmp_path, "nas contest", [standing])
    assert (tmp_path / FIGURE).read_bytes() == before


@pytest.mark.parametrize("panels", [1, 2, 3])
def test_all_words_of_the_figure_are_on_it(panels: int) -> None:
    results = [result(kind, n * 2**20, 2 / n) for n, kind in enumerate(KINDS, 1)]
    figure = _figure([Standing("t", [(kind, kind, kind) for kind in KINDS], results, 0)] * panels)
    figure.canvas.draw()
    labels = [label for axes in figure.axes for label in (axes.xaxis.label, axes.yaxis.label) if label.get_text()]
    for word in (*figure.legends, *figure.texts, *labels):
        x0, y0, x1, y1 = word.get_window_extent().extents
        assert 0 <= x0 < x1 <= figure.bbox.width, word
        assert 0 <= y0 < y1 <= figure.bbox.height, word


def test_what_the_search_has_nothing_as_small_as_is_said_in_words(tmp_path: Path) -> None:
    entrants = [("search", "a", "a"), ("random config", "b", "b")]
    results = [result("a", 2, 1.0), result("b", 1, 1.5)]
    page = write_contest(tmp_path, "nas contest", [Standing("t", entrants, results, 0)]).read_text()
    assert "b (nothing of it is so small)" in page


def test_how_much_the_search_falls_short_by_is_said_in_deviations_where_there_are_seeds(tmp_path: Path) -> None:
    entrants = [("search", "a", "a"), ("random config", "b", "b")]
    results = [result("a", 1, 1.5), result("b", 2, 1.0)]
    again = [result("a", 1, 1.5, seed=1), result("b", 2, 1.4, seed=1)]
    page = write_contest(tmp_path, "nas contest", [Standing("t", entrants, [*results, *again], 0)]).read_text()
    assert "b (by 0.3000 nats, 1.5 σ)" in page
    page = write_contest(tmp_path, "nas contest", [Standing("t", entrants, results, 0)]).read_text()
    assert "b (by 0.5000 nats)" in page


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"learning_rates": [0.1, 0.1]}, "learning_rates"),
        ({"candidates": 0}, "candidates: 0 is too few"),
        ({"texts": {}}, "texts: names no text"),
        ({"smaller": {"widths": [7]}}, "does not divide"),
        ({}, "missing.txt"),
    ],
)
def test_what_is_no_contest_is_refused(changes: dict[str, object], says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        Contest.load(tiny(tmp_path, **changes))
    assert says in str(error.value)
    assert "contest.yaml:" in str(error.value)


def test_proposals_of_an_earlier_format_are_refused_with_what_to_do(tmp_path: Path) -> None:
    contest = Contest.load(tiny(tmp_path), ["python"])
    (tmp_path / "search-python.json").write_text('{"spent": 1, "configs": []}')
    with pytest.raises(UserError, match=r"no beside.*delete it"):
        propose(contest, "python", tmp_path, tmp_path / "work", Silent())


@pytest.mark.slow
def test_a_contest_goes_on_from_its_table_and_trains_nothing_twice(tmp_path: Path) -> None:
    path, to = tiny(tmp_path), tmp_path / "to"
    arguments = ["contest", str(path), "--to", str(to), "--only", "python", "--runs", str(tmp_path / "runs"), "--json"]
    found = CliRunner().invoke(nas, arguments)
    assert found.exit_code == 0, found.exception
    results = read_rows(to / TABLE, Result, "")
    models = {r.model for r in results}
    assert len(results) == len(models) * 3
    said = json.loads(found.stdout)
    assert {row["name"] for row in said} >= {*KINDS, "dense", "mqa", "2 layers of 16"}
    assert "## python" in (to / PAGE).read_text()
    proposed = json.loads((to / "search-python.json").read_text())
    assert proposed["spent"] == 4 * 2 * 2 * 16
    assert [len(proposed[key]) for key in ("configs", "beside")] == [3, 3]
    space = Contest.load(path, ["python"]).space
    beside = {SharingConfig.from_data(space.shape, one) for one in proposed["beside"]}
    assert not beside & {*published(space)}, "beside the published schemes others are proposed"
    lost = next(r for r in results if r.seed)
    write_rows(to / TABLE, [r for r in results if r != lost], Result)
    standing = hold(Contest.load(path, ["python"]), to, tmp_path / "again", Silent())[0]
    assert [p.name for p in (tmp_path / "again" / "trained").iterdir() if p.is_dir()] == [
        f"python-{lost.model}-{lost.rate:g}-{lost.seed}"
    ]
    assert sorted(standing.results, key=str) == sorted(results, key=str), "the same training gives the same loss"
    assert "contest" in CliRunner().invoke(nas, ["check", str(path)]).output
