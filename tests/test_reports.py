"""The research programs: the measures by hand and by their laws, and tiny real grids that go on from their tables."""

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from commands import refused

from nas.cli import RENAMED, nas
from nas.data import eval_sequences
from nas.errors import UserError
from nas.model.supernet import Supernet
from nas.pareto import hypervolume
from nas.search.context import presets_in
from nas.search.progress import Silent
from nas.search.supernets import Supernets
from nas.sharing.memory import measure
from nas.sharing.sharing_config import SharingConfig
from nas.splitting import SplitTree
from nas.workers import Session
from reports.contest import benchmark, leaderboard
from reports.contest.__main__ import contest
from reports.contest.leaderboard import BESIDE, KINDS, Leaderboard, Result, kind_rows, model_rows
from reports.grid import Request, noise_of_seeds, read_table, write_table
from reports.ground_truth import training
from reports.ground_truth.__main__ import ground_truth
from reports.ground_truth.agreement import agreement, front_share, quartiles, regret, tau, tau_within
from reports.ground_truth.table import BenchmarkTable, read_tables, reliability
from reports.ground_truth.training import CONFIGS, TABLE, BenchmarkRow, GroundTruth
from reports.ranking import scores
from reports.ranking.__main__ import ranking
from reports.ranking.estimators import SUPERNETS, Estimate, RankFile, SupernetEstimate, SupernetKind
from reports.samplers.__main__ import sampler_rows, samplers
from reports.samplers.searches import KINDS as SEARCHES
from reports.samplers.searches import Surrogate, search
from reports.samplers.tying import Agent, TyingJob, config_of, tie_while_training, untie

Made = tuple[GroundTruth, Path, list[BenchmarkRow]]
REPORTS = Path(__file__).parents[1] / "reports"
RNG = np.random.default_rng(0)
MEMORY, LOSS = RNG.random(40), RNG.random(40)
MODEL = {"vocab_size": 257, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24}
COMMON = {
    "space": "space.yaml",
    "texts": {"python": {"text": "python", "max_bytes": 60_000}, "other": {"text": "missing.txt"}},
    "seeds": 2,
    "windows": 4,
    "memory": {"context": 64},
    "run": {"workers": 0},
}
TRUTH = COMMON | {"name": "truth", "configs": 10, "bins": 2, "points": [0.5, 1.0]}
TRUTH |= {"train": {"steps": 4, "batch": 2, "seq": 16, "lr_decay_fraction": 0}}
RANK = {"name": "rank", "benchmark": "truth.yaml", "budget": 0.5, "seeds": 1, "windows": 4}
RANK |= {"train": {"steps": 1, "batch": 2, "seq": 16}}
CONTEST = COMMON | {"name": "contest", "learning_rates": [0.01, 0.001], "candidates": 3, "evaluations": 30}
CONTEST |= {"train": {"steps": 4, "batch": 2, "seq": 16}, "predictor": {"configs": 4, "steps": 2, "rounds": 1}}
CONTEST |= {"smaller": {"layers": [2], "widths": [8]}}


def write(folder: Path, data: dict[str, Any], **changes: Any) -> Path:
    """An experiment file, and its space beside it."""
    choices = {"tie": {"sources": "previous"}, "kv": {"sources": "previous"}}
    (folder / "space.yaml").write_text(yaml.safe_dump({"model": MODEL, "choices": choices}))
    path = folder / f"{data['name']}.yaml"
    path.write_text(yaml.safe_dump({**data, **changes}))
    return path


def asked(path: Path, **changes: Any) -> Request:
    given = {"to": path.parent, "only": ["python"], "runs": path.parent / "runs", "progress": Silent()}
    return Request(path, **(given | changes))


def run(program: Any, path: Path, *options: str) -> str:
    found = CliRunner().invoke(program, [str(path), "--only", "python", "--runs", str(path.parent / "runs"), *options])
    if found.exception:
        raise found.exception
    return Path(found.stdout.strip()).read_text()


# --- measures of agreement


def test_measures_by_hand() -> None:
    one, other = np.array([1.0, 2, 3, 4, 5]), np.array([2.0, 1, 3, 5, 4])
    pairs = list(itertools.combinations(range(5), 2))
    agree = sum((one[i] - one[j]) * (other[i] - other[j]) > 0 for i, j in pairs)
    assert tau(one, other) == pytest.approx((agree - (len(pairs) - agree)) / len(pairs))
    assert tau(LOSS, np.ones(40)) == tau_within(MEMORY, LOSS, np.ones(40)) == 0, "an estimate without an order says nothing"
    groups = quartiles(MEMORY)
    assert sorted(np.concatenate(groups).tolist()) == list(range(40))
    assert all(MEMORY[low].max() <= MEMORY[high].min() for low, high in itertools.pairwise(groups))


def test_the_losses_themselves_are_the_best_estimate_and_their_opposite_the_worst() -> None:
    best, worst = agreement(MEMORY, LOSS, LOSS), agreement(MEMORY, LOSS, -LOSS)
    assert (best.tau, best.tau_within) == pytest.approx((1, 1))
    assert (best.top_overlap, best.regret_1, best.regret_10, best.regret_1_within) == (1, 0, 0, 0)
    assert (worst.tau, worst.tau_within, worst.top_overlap) == pytest.approx((-1, -1, 0))
    assert worst.regret_1 == pytest.approx(math.exp(LOSS.max() - LOSS.min()) - 1)
    assert best.front_share > worst.front_share
    estimate = RNG.random(40)
    assert agreement(MEMORY, LOSS, estimate) == agreement(MEMORY, LOSS, np.exp(5 * estimate)), "only the order counts"
    assert front_share(MEMORY, LOSS, estimate, 40) == 1, "all configs are the whole front"


def test_chance_and_memory_alone_are_worth_nothing() -> None:
    """Loss falls from bin to bin and is random inside: the global rank correlation is high and says nothing."""
    memory = np.repeat([1.0, 2, 3, 4], 50)
    loss, noise = -memory + 0.5 * RNG.random(200), memory + 0.1 * RNG.random(200)
    assert tau(loss, -noise) > 0.6
    assert abs(tau_within(memory, loss, -noise)) < 0.15
    estimate = LOSS + RNG.normal(0, 0.3, 40)
    regrets = [regret(LOSS, estimate, count) for count in range(1, 41)]
    assert regrets == sorted(regrets, reverse=True)
    assert regrets[-1] == 0


# --- how reliable a benchmark is


def rows_of(losses: np.ndarray, noise: float, seeds: int = 4, early: float = 0.0) -> list[BenchmarkRow]:
    """Rows of configs whose losses have noise: of each training and, at its first point, more."""
    rng = np.random.default_rng(1)
    rows = []
    for c, loss in enumerate(losses):
        for seed in range(seeds):
            off = rng.normal(0, noise)
            for tokens, more in ((100, early), (200, 0.0)):
                value = float(loss + off + rng.normal(0, 1) * more)
                rows.append(BenchmarkRow("t", f"{c:012d}", "", 1000 + c, c * 37 % 61, 500, c * 17 % 61, seed, tokens, value))
    return rows


def table_of(*given: Any, **named: Any) -> BenchmarkTable:
    return BenchmarkTable.of(rows_of(*given, **named), "t")


def test_halves_agree_as_far_as_noise_lets_them() -> None:
    sure, pure = reliability(table_of(LOSS, 0.0)), reliability(table_of(np.zeros(40), 0.1))
    assert (*sure.halves, *sure.halves_within) == pytest.approx((1.0,) * 6)
    assert sure.noise == pytest.approx(0, abs=1e-12)
    assert np.mean(pure.halves) == pytest.approx(0, abs=0.2)
    assert pure.noise == pytest.approx(0.1, rel=0.3)
    means = [float(np.mean(reliability(table_of(RNG.random(60), noise)).halves)) for noise in (0.05, 0.2, 0.8)]
    assert means == sorted(means, reverse=True)
    settled, loose = (reliability(table_of(LOSS, 0.01, early=early)).settled[100] for early in (0.0, 1.0))
    assert settled[0] > 0.9 > loose[0]


def test_noise_is_what_is_left_of_losses_without_the_effects_of_models_and_seeds() -> None:
    rng = np.random.default_rng(5)
    off = rng.normal(0, 0.1, (200, 3))
    common = rng.normal(size=(200, 1)) + rng.normal(size=(1, 3))
    assert noise_of_seeds(off) == pytest.approx(0.1, rel=0.1)
    assert noise_of_seeds(off + common) == pytest.approx(noise_of_seeds(off))
    assert noise_of_seeds(np.array([[1.0, 1.5], [1.0, 1.4]])) == pytest.approx(0.05), "each is 0.025 off"
    assert math.isnan(noise_of_seeds(off[:, :1]))
    assert math.isnan(noise_of_seeds(off[:1]))


def test_a_seed_that_is_under_way_is_left_out_and_so_are_configs_with_too_few() -> None:
    rows = rows_of(RNG.random(5), 0.1)
    table = BenchmarkTable.of(rows[:-1], "t")
    assert table.losses.shape == (5, 3, 2), "the last training has not ended"
    assert table.without(0).shape == (5,)
    second = [row for row in rows if row.seed == 0 or (row.seed == 1 and row.hash[-1] in "012")]
    assert BenchmarkTable.of(second, "t").losses.shape == (3, 2, 2)
    first = [row for row in rows if row.seed == 0 and row.hash[-1] in "0123"]
    assert BenchmarkTable.of(first, "t").losses.shape == (4, 1, 2)


# --- a tiny real benchmark


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    path = write(tmp_path_factory.mktemp("truth"), TRUTH)
    truth = training.load(path, asked(path))
    return truth, path.parent, truth.train(asked(path))


def test_every_training_is_known_at_every_point(made: Made) -> None:
    truth, folder, rows = made
    trainings = [(text, config.hash, seed) for text, config, seed in truth.trainings]
    assert {row.training for row in rows} == set(trainings)
    assert {row.tokens for row in rows} == {2 * 2 * 16, 4 * 2 * 16}
    assert len(rows) == 2 * len(trainings)
    configs = json.loads((folder / CONFIGS).read_text())
    for row in rows:
        config = SharingConfig.from_data(truth.space.shape, configs[row.hash])
        assert (config.hash, truth.configs[config]) == (row.hash, row.name)
        assert measure(truth.space.shape, config, truth.file.memory).memory_bytes == row.memory_bytes
    (table,) = read_tables(folder, truth)
    assert table.losses.shape == (len(truth.configs), 2, 2)
    assert {"dense", "cla-2", "recurrent-stacking"} <= set(truth.configs.values())
    assert sum(not name for name in truth.configs.values()) == truth.file.configs
    assert list(training.load(folder / "truth.yaml", asked(folder / "truth.yaml")).configs) == list(truth.configs)


def test_what_is_in_the_table_or_on_disk_is_not_trained_again(made: Made, tmp_path: Path) -> None:
    truth, folder, rows = made
    lost = rows[0].training
    write_table(tmp_path / TABLE, [row for row in rows if row.training != lost], BenchmarkRow)
    again = truth.train(asked(folder / "truth.yaml", to=tmp_path, runs=tmp_path / "runs"))
    assert [p.name for p in (tmp_path / "runs" / "truth").iterdir() if p.is_dir()] == ["-".join(map(str, lost))]
    assert sorted(again, key=lambda row: row.order) == read_table(folder / TABLE, BenchmarkRow), "the same losses"
    (tmp_path / TABLE).unlink()
    assert set(truth.train(asked(folder / "truth.yaml", to=tmp_path))) == set(rows), "results whose rows were lost are taken"
    assert (tmp_path / TABLE).read_bytes() == (folder / TABLE).read_bytes(), "the order does not depend on who ended first"


def test_what_is_no_experiment_is_refused_with_its_place(tmp_path: Path) -> None:
    mistakes: list[tuple[Any, dict[str, Any], dict[str, Any], str]] = [
        (training.load, TRUTH, {"train": {"steps": 4, "batch": 2, "seq": 16}}, "train.lr_decay_fraction"),
        (training.load, TRUTH, {"points": [0.5, 0.9]}, "points"),
        (training.load, TRUTH, {"seeds": 1}, "seeds"),
        (training.load, TRUTH, {"texts": {}}, "texts"),
        (training.load, TRUTH, {"average": 0.0}, "average"),
        (benchmark.load, CONTEST, {"learning_rates": [0.1, 0.1]}, "learning_rates"),
        (benchmark.load, CONTEST, {"smaller": {"widths": [7]}}, "smaller"),
        (RankFile.load, RANK, {"budget": 0.0}, "budget"),
        (RankFile.load, RANK, {"supernets": ["best"]}, "supernets"),
    ]
    for load, data, changes, key in mistakes:
        path = write(tmp_path, data, **changes)
        with pytest.raises(UserError) as error:
            load(path) if load is RankFile.load else load(path, asked(path))
        assert error.value.where.startswith(str(path)), (key, error.value)
        assert key in error.value.where
    (tmp_path / TABLE).write_text("a,b\n1,2\n")
    refused(lambda: read_table(tmp_path / TABLE, BenchmarkRow), "is no table of text, hash")


def test_texts_are_chosen_by_name_and_may_lie_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    for name in ("train", "held"):
        (tmp_path / "there" / f"{name}.txt").write_text(f"a text to {name}, again and again\n" * 100)
    path = write(tmp_path, TRUTH, texts={"parts": {"text": "train.txt", "eval_text": "held.txt"}})
    refused(lambda: training.load(path, asked(path, only=["part"])), "did you mean parts")
    refused(lambda: training.load(path, asked(path, only=[])), "does not exist")
    places = {"parts": str(tmp_path / "there" / "train.txt")}
    truth = training.load(path, asked(path, only=[], places=places, workers=3))
    assert truth.corpora["parts"].eval_text == (tmp_path / "there" / "held.txt").read_bytes()
    assert truth.file.run.workers == 3


# --- estimators


def estimate(folder: Path, truth: GroundTruth, kind: SupernetKind, **changes: Any) -> SupernetEstimate:
    return SupernetEstimate(RankFile.load(write(folder, RANK, **changes)), truth, "python", kind, 0)


def test_every_kind_of_supernet_makes_a_trial_within_the_shipped_budget(made: Made, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        estimate(tmp_path, made[0], SupernetKind(adapt=500)).trial()
    assert error.value.where == "budget"
    path = REPORTS / "ground_truth" / "ground_truth.yaml"
    truth, file = training.load(path, asked(path, train=False)), RankFile.load(REPORTS / "ranking" / "ranking.yaml")
    for kind in SUPERNETS.values():
        one = SupernetEstimate(file, truth, "python", kind, 0)
        trial = one.trial()
        assert trial.file.supernet
        assert (trial.file.supernet.strategy, trial.file.split) == (kind.strategy, kind.split)
        assert one.budget * 0.45 < trial.file.supernet.tokens * one.subnets <= one.budget


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sandwich", "fair, distilled", "gradient split 2", "uniform, adapted 25"])
def test_a_supernet_takes_no_more_than_its_budget_and_little_less(name: str, made: Made, tmp_path: Path) -> None:
    """Every subnet's pass over a batch counts, and so do the gradients of a split and the steps that adapt. A subnet that is
    drawn twice in a step runs once: in so small a space that saves some."""
    truth = made[0]
    train = replace(truth.file.train, steps=60 if "adapted" in name else 40)
    truth = GroundTruth(replace(truth.file, train=train), truth.space, truth.texts, truth.corpora)
    one = estimate(tmp_path, truth, SUPERNETS[name], budget=1.0)
    trained = one.run(tmp_path / "work", Silent())
    assert trained.losses.keys() == {config.hash for config in truth.configs}
    assert all(0 < loss < 20 for loss in trained.losses.values())
    splits = 2000 * 2 * 16 if name.startswith("gradient") else 0
    assert 0.75 * one.budget <= trained.tokens <= one.budget + splits


def test_an_adapted_subnet_leaves_the_supernet_as_it_was(made: Made, tmp_path: Path) -> None:
    one = estimate(tmp_path, made[0], SupernetKind(adapt=2))
    net = Supernet(made[0].space.shape, torch.Generator().manual_seed(0))
    before = {name: weight.clone() for name, weight in net.state_dict().items()}
    nets, corpus = Supernets(SplitTree(), {"0": net}, {}, {"0": 0}, 0), made[0].corpora["python"]
    adapted, plain = (dict(itertools.islice(kind.ask(nets, corpus), 2)) for kind in (one, replace(one, kind=SupernetKind())))
    assert all(torch.equal(before[name], weight) for name, weight in net.state_dict().items())
    assert all(adapted[config] != plain[config] for config in adapted)


def test_scores_do_not_see_what_they_are_scored_on() -> None:
    """Losses of pure noise: whoever scores above chance has seen them."""
    rows = rows_of(np.zeros(60), 1.0)
    table = BenchmarkTable.of([*rows, *(replace(row, tokens=row.tokens * 10) for row in rows)], "t")
    features = np.random.default_rng(0).normal(size=(60, 4))
    found = (scores.free_scores(table), scores.predictor_scores(table, features, [12], [1]))
    for score in (*itertools.chain(*found), *scores.single_scores(table, features, 60)):
        assert abs(score.mean("tau")) < 0.25, score.estimator


def test_a_supernet_that_knows_the_losses_makes_a_better_feature_than_one_that_guesses() -> None:
    loss, rng = RNG.random(60), np.random.default_rng(2)
    rows = rows_of(loss, 0.01)
    table = BenchmarkTable.of([*rows, *(replace(row, tokens=row.tokens * 10) for row in rows)], "t")
    blind = np.column_stack([loss + rng.normal(size=60), rng.normal(size=(60, 3))])
    given = {
        name: [Estimate(dict(zip(table.hashes, values.tolist(), strict=True)), 1000)]
        for name, values in {"knows": loss, "guesses": rng.random(60)}.items()
    }
    knows, guesses = scores.informed_scores(table, blind, given)
    (alone,) = scores.predictor_scores(table, blind, [24], [2])
    assert knows.mean("tau") > 0.8 > alone.mean("tau")
    assert guesses.mean("tau") > alone.mean("tau") - 0.2
    assert knows.tokens == 1000 + alone.tokens


def test_another_text_says_as_much_as_both_have_in_common_and_a_training_as_much_as_of_it_lasts() -> None:
    one, same, less = (BenchmarkTable.of([replace(row, text=t) for row in rows_of(LOSS, 0.0)], t) for t in "abc")
    less = replace(less, hashes=less.hashes[:-1], losses=less.losses[:-1])
    (found,) = scores.other_texts(one, [one, same, less])
    assert (found.estimator, found.mean("tau"), found.tokens) == ("the benchmark of b", 1, 40 * 4 * 200)
    features = np.random.default_rng(2).normal(size=(200, 3))
    lasting = scores.own_slopes(table_of(RNG.normal(size=200), 0.01), features)[200]
    gone = scores.own_slopes(table_of(np.zeros(200), 1.0), features)[200]
    assert (lasting, gone) == (pytest.approx(1, abs=0.1), pytest.approx(0, abs=0.15))


def test_the_programs_go_on_from_their_tables(made: Made, tmp_path: Path) -> None:
    path = write(tmp_path, TRUTH)
    file = write(tmp_path, RANK, supernets=["uniform", "random split 2"], budget=1.0)
    refused(lambda: run(ranking, file, "--no-train"), "0 configs of python are known")
    write_table(tmp_path / TABLE, made[2], BenchmarkRow)
    assert "half of the seeds against the other half" in run(ground_truth, path, "--no-train")
    (tmp_path / "findings.md").write_text("What was found.\n")
    page, table = run(ranking, file), (tmp_path / scores.TABLE).read_bytes()
    assert page.startswith("# What a ranking is worth\n\nWhat was found.\n\nMade by `python -m reports.ranking --only python`.\n")
    for name in ("bytes", "uniform", "random split 2", "alone, 50% of the tokens, smoothed"):
        assert f"\n| {name} " in page
    assert run(ranking, file) == page
    assert run(ranking, file, "--no-train") == page
    assert (tmp_path / scores.TABLE).read_bytes() == table


# --- samplers


@pytest.fixture(scope="module")
def shipped() -> GroundTruth:
    path = REPORTS / "ground_truth" / "ground_truth.yaml"
    return training.load(path, asked(path))


def by_memory(truth: GroundTruth, noise: float) -> list[BenchmarkRow]:
    """A benchmark in which a tenfold memory takes a nat, and every training has noise of its own."""
    rng = np.random.default_rng(0)
    rows = []
    for config, name in list(truth.configs.items())[:24]:
        memory = measure(truth.space.shape, config, truth.file.memory)
        sizes = (memory.memory_bytes, memory.weight_bytes, memory.kv_cache_bytes, memory.flops_per_token)
        for seed in (0, 1):
            loss = float(8 - np.log10(memory.memory_bytes) + rng.normal() * noise)
            rows.append(BenchmarkRow("python", config.hash, name, *sizes, seed, 1000, loss))
    return rows


def test_a_surrogate_follows_the_law_of_its_table_and_has_the_noise_of_one_training(shipped: GroundTruth) -> None:
    exact = Surrogate(shipped, BenchmarkTable.of(by_memory(shipped, 0.0), "python"))
    assert exact.held_out().tau > 0.85
    memory, loss = np.array([exact(config) for config in list(shipped.configs)[30:50]]).T
    assert np.sqrt(np.mean((loss - (8 - np.log10(memory))) ** 2)) < 0.2 * np.log10(memory).std()
    surrogate, configs = Surrogate(shipped, BenchmarkTable.of(by_memory(shipped, 0.02), "python")), list(shipped.configs)
    off = np.array([[surrogate.noisy(config, seed)[1] - surrogate(config)[1] for config in configs] for seed in range(8)])
    assert off.std() == pytest.approx(surrogate.noise, rel=0.2)
    assert abs(np.corrcoef(off[0], off[1])[0, 1]) < 0.4
    assert surrogate.noisy(configs[0], 3) == surrogate.noisy(configs[0], 3)


def test_what_a_search_finds_only_grows_and_is_judged_without_noise(shipped: GroundTruth) -> None:
    surrogate = Surrogate(shipped, BenchmarkTable.of(by_memory(shipped, 0.02), "python"))
    found = [search(surrogate, *kind, 0, (12, 40)) for kind in SEARCHES]
    for first, last in found:
        assert first.hypervolume <= last.hypervolume, first.sampler
    begun = {first.hypervolume for first, _ in found if first.start == "the zoo"}
    assert begun == {surrogate.hypervolume(list(presets_in(shipped.space))[:12])}, "all evaluate the published schemes first"
    rows = sampler_rows(list(itertools.chain(*found)))
    assert max(float(row["40 evaluations"].rstrip("%")) for row in rows) == 100.0


@pytest.mark.slow
def test_a_samplers_page_is_made_from_its_table_without_the_text(shipped: GroundTruth, tmp_path: Path) -> None:
    path = write(tmp_path, TRUTH)
    truth = training.load(path, asked(path))
    write_table(tmp_path / TABLE, by_memory(truth, 0.02), BenchmarkRow)
    page = run(samplers, path, "--to", str(tmp_path), "--seeds", "1", "--tying", "1")
    assert "\n| Dynamic Layer Tying " in page
    assert run(samplers, path, "--to", str(tmp_path), "--seeds", "1", "--no-train") == page


def test_an_agent_learns_which_ties_pay() -> None:
    """Rewards that count untied layers, or tied ones, without any model."""
    for wanted in (1, -1):
        agent, ties, taken = Agent(4, 0), [0] * 4, []
        for n in range(300):
            own = sum(j == i for i, j in enumerate(ties))
            if taken:
                agent.learn(taken, wanted * own / 4)
            ties, taken = agent.decide(ties, max(1 - n / 250, 0.0))
            assert all(ties[j] == j <= i for i, j in enumerate(ties)), "a tie is to an owner before it"
        assert sum(j == i for i, j in enumerate(ties)) == (4 if wanted > 0 else 1)


def test_a_layer_that_is_untied_begins_with_the_weights_that_it_used(shipped: GroundTruth) -> None:
    shape, rows = shipped.space.shape, torch.arange(16)[None]
    net, before, after = Supernet(shape, torch.Generator().manual_seed(0)), [0, 0, 0, 3, 3, 0], [0, 1, 0, 3, 4, 0]
    with torch.no_grad():
        logits = net.subnet(config_of(shape, before))(rows)
        untie(net, before, after)
        assert torch.equal(net.subnet(config_of(shape, after))(rows), logits)
        assert not torch.equal(net.subnet(config_of(shape, [0, 1, 2, 3, 4, 5]))(rows), logits)


def test_at_a_price_beyond_any_loss_all_layers_end_tied(shipped: GroundTruth, tmp_path: Path) -> None:
    shape, corpus = shipped.space.shape, shipped.corpora["python"]
    spec, windows = replace(shipped.file.train, steps=300, batch=1, seq=8), eval_sequences(corpus.eval, 8, 4).numpy()
    job = TyingJob(shape, spec, shipped.file.memory, 100.0, 0, corpus.train.numpy(), windows)
    found = tie_while_training(job, Session(tmp_path))
    assert SharingConfig.from_data(shape, found["config"]) == config_of(shape, [0] * 6)


# --- contest


def result(model: str, memory: int, loss: float, rate: float = 0.1, seed: int = 0, text: str = "t") -> Result:
    return Result(text, model, memory, memory // 2, memory // 2, rate, seed, 10, loss)


def test_all_kinds_are_compared_and_other_seeds_are_trained_at_the_first_ones_best_rate(tmp_path: Path) -> None:
    path = write(tmp_path, CONTEST)
    compared = benchmark.load(path, asked(path))
    space = compared.space
    some = space.largest(), *presets_in(space)
    models = compared.models(benchmark.Proposed(some[:1], some[:2], 5 * compared.model_tokens))
    assert [sum(model.kind == kind for model in models) for kind in KINDS] == [1, 2, len(presets_in(space)), 3 + 5, 2]
    shapes = {(m.shape.num_hidden_layers, m.shape.hidden_size, m.shape.intermediate_size) for m in models[-2:]}
    assert shapes == {(2, 16, 24), (3, 8, 16)}
    assert len({m.key for m in models}) == len({(m.shape, m.config) for m in models}), "models of unlike shapes are told apart"
    assert compared.model_tokens == 3 * 4 * 2 * 16
    pair = [m for m in models if m.name in ("dense", "cla-2")]
    (a, b), text = (m.key for m in pair), "python"
    results = [result(a, 1, 2.0, 0.01, text=text), result(a, 1, 1.0, 0.001, text=text), result(b, 1, 1.0, 0.01, text=text)]
    runs = set(compared.training_runs(text, pair, [*results, result(b, 1, 0.0, 0.001, text="other")]))
    assert runs == {(text, key, rate, 0) for key in (a, b) for rate in (0.01, 0.001)} | {(text, a, 0.001, 1)}


def test_a_leaderboard_by_hand() -> None:
    """Each model at its best rate; hypervolumes by a tenth beyond the worst; who is matched by the search and who is not."""
    models = [("search", "a", "a"), ("search", "b", "b"), ("published scheme", "b*", "b"), ("published scheme", "c", "c")]
    models += [("random config", "d", "d"), ("smaller dense model", "e", "e")]
    losses = {"a": (10, 2.0), "b": (20, 1.0), "c": (15, 1.5), "d": (30, 1.2), "e": (5, 3.0)}
    results = [result(m, memory, loss + 0.1 * (seed - 0.5), 0.1, seed) for m, (memory, loss) in losses.items() for seed in (0, 1)]
    results += [result(m, memory, loss + 1, 0.2, 0) for m, (memory, loss) in losses.items()]
    board = Leaderboard("t", models, results, 7)
    found = {one.name: round(one.loss, 6) for one in board.scores}
    assert found == {"a": 2.0, "b": 1.0, "b*": 1.0, "c": 1.5, "d": 1.2, "e": 3.0}
    assert board.noise == pytest.approx(0), "what all models of a seed have in common is no noise"
    assert board.reference_point == pytest.approx((33, 1.1 * math.exp(3)))
    whole = hypervolume([(15, math.exp(1.5)), (20, math.exp(1))], board.reference_point)
    wanted = hypervolume([(10, math.exp(2)), (20, math.exp(1))], board.reference_point)
    assert board.volume("search") == pytest.approx(wanted / whole)
    assert board.tokens("search", "published scheme") == 3 * 3 * 10 + 7, "a model of both was trained once"
    assert (board.tokens("search"), board.tokens("published scheme")) == (2 * 3 * 10 + 7, 2 * 3 * 10)
    assert [(one.name, round(short, 6)) for one, short in board.undominated("published scheme", "search")] == [("c", 0.5)]
    assert [one.name for one, _ in board.undominated("smaller dense model", "search")] == ["e"]
    assert not board.undominated("random config", "search")
    beside = replace(board, models=[*models, (BESIDE, "c", "c")])
    assert [one.name for one, _ in beside.undominated("published scheme", BESIDE)] == ["b*"]
    assert beside.tokens("search", BESIDE) == 3 * 3 * 10 + 7, "both learnt from the same proxy trainings"
    fewer = replace(board, results=results[:-1])
    assert "e" not in {one.name for one in fewer.scores}, "a model that lacks a rate is not judged yet"


def test_a_page_says_what_its_tables_say_and_how_far_the_search_falls_short() -> None:
    models = [("search", "a", "a"), ("random config", "b", "b"), ("smaller dense model", "c", "c")]
    results = [result("a", 2, 1.5), result("b", 3, 1.0), result("c", 1, 2.0)]
    again = [result("a", 2, 1.5, seed=1), result("b", 3, 1.4, seed=1), result("c", 1, 2.2, seed=1)]
    board = Leaderboard("t", models, [*results, *again], 0)
    page = "\n".join(leaderboard.page([board]))
    for row in (*kind_rows(board), *model_rows(board)):
        assert any(line.startswith("|") and all(cell in line for cell in row.values()) for line in page.splitlines())
    assert f"b (by 0.3000 nats, {0.3 / board.doubt:.1f} σ)" in page
    assert "c (nothing of it is so small)" in page
    assert "b (by 0.5000 nats)" in "\n".join(leaderboard.page([replace(board, results=results)]))
    for panels in (1, 2, 3):
        figure = leaderboard.figure_of([board] * panels)
        figure.canvas.draw()
        for word in (*figure.legends, *figure.texts):
            x0, y0, x1, y1 = word.get_window_extent().extents
            assert 0 <= x0 < x1 <= figure.bbox.width, word
            assert 0 <= y0 < y1 <= figure.bbox.height, word


def test_a_comparison_goes_on_from_its_table_and_trains_nothing_twice(tmp_path: Path) -> None:
    path = write(tmp_path, CONTEST)
    page = run(contest, path)
    results = read_table(tmp_path / benchmark.TABLE, Result)
    assert len(results) == len({r.model for r in results}) * 3
    assert all(f"\n| {name} " in page for name in (*KINDS, "dense", "cla-2", "2 layers of 16"))
    proposed = json.loads((tmp_path / "search-python.json").read_text())
    assert proposed["spent"] == 4 * 2 * 2 * 16
    space = benchmark.load(path, asked(path)).space
    beside = {SharingConfig.from_data(space.shape, one) for one in proposed["beside"]}
    assert not beside & {*presets_in(space)}, "beside the published schemes others are proposed"
    lost = next(r for r in results if r.seed)
    write_table(tmp_path / benchmark.TABLE, [r for r in results if r != lost], Result)
    (board,) = benchmark.load(path, asked(path)).run(asked(path, runs=tmp_path / "again"))
    trained = [p.name for p in (tmp_path / "again" / "contest" / "trained").iterdir() if p.is_dir()]
    assert trained == [f"python-{lost.model}-{lost.rate:g}-{lost.seed}"]
    assert sorted(board.results, key=str) == sorted(results, key=str), "the same training gives the same loss"
    assert run(contest, path, "--no-train") == page
    (tmp_path / "search-python.json").write_text('{"spent": 1, "configs": []}')
    refused(lambda: run(contest, path, "--no-train"), "no beside", "delete it")


def test_commands_that_were_moved_are_refused_with_their_new_name() -> None:
    for name, command in RENAMED.items():
        found = CliRunner().invoke(nas, [name, "FILE.yaml"])
        assert found.exit_code == 2
        assert f"`{command}`" in found.output
