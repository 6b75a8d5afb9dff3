"""What a ranking is worth: the measures by hand and by their laws, and a tiny real truth, stopped and gone on with."""

from __future__ import annotations

import itertools
import json
import math
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner

from nas.cli import nas
from nas.errors import UserError
from nas.model.supernet import Supernet
from nas.pareto import front, hypervolume
from nas.rank.agreement import agreement, corner, front_share, overlap, quartiles, regret, tau, tau_within
from nas.rank.estimators import SUPERNETS, Estimate, RankFile, SupernetEstimate, SupernetKind
from nas.rank.known import Known, reliability
from nas.rank.score import (
    ESTIMATES,
    free_scores,
    informed_scores,
    other_texts,
    own_slopes,
    predictor_scores,
    smoothed_scores,
)
from nas.rank.spec import TruthPlan
from nas.rank.truth import CONFIGS, TRUTH, TruthRow, entries, make_truth, read_truth, write_truth
from nas.search.predictor import Predictor, features, select_by_expected_hypervolume, shrink_to_observed, spread
from nas.search.progress import Silent
from nas.search.supernets import Supernets
from nas.sharing.memory import MemorySpec, measure
from nas.sharing.sharing_config import SharingConfig
from nas.sharing.space import SearchSpace
from nas.splitting import SplitTree
from nas.training.evaluation import noise_of_seeds
from nas.workers.cluster import cluster

RNG = np.random.default_rng(0)
MEMORY, LOSS = RNG.random(40), RNG.random(40)


# --- the measures


def test_tau_by_hand() -> None:
    """Of the pairs, those in order less those not, over all."""
    one, other = np.array([1.0, 2, 3, 4, 5]), np.array([2.0, 1, 3, 5, 4])
    pairs = list(itertools.combinations(range(5), 2))
    agree = sum((one[i] - one[j]) * (other[i] - other[j]) > 0 for i, j in pairs)
    assert tau(one, other) == pytest.approx((agree - (len(pairs) - agree)) / len(pairs))


def test_an_estimate_that_says_the_same_of_all_is_worth_nothing() -> None:
    assert tau(LOSS, np.ones(40)) == tau_within(MEMORY, LOSS, np.ones(40)) == 0


def test_the_truth_itself_is_the_best_estimate_and_its_opposite_the_worst() -> None:
    best, worst = agreement(MEMORY, LOSS, LOSS), agreement(MEMORY, LOSS, -LOSS)
    assert (best.tau, best.tau_within) == pytest.approx((1, 1))
    assert (best.top_overlap, best.regret_1, best.regret_10, best.regret_1_within) == (1, 0, 0, 0)
    assert (worst.tau, worst.tau_within, worst.top_overlap) == pytest.approx((-1, -1, 0))
    assert worst.regret_1 == pytest.approx(math.exp(LOSS.max() - LOSS.min()) - 1)
    assert best.front_share > worst.front_share


def test_only_the_order_of_an_estimate_counts() -> None:
    estimate = RNG.random(40)
    assert agreement(MEMORY, LOSS, estimate) == agreement(MEMORY, LOSS, np.exp(5 * estimate))


def test_an_estimate_by_memory_is_worth_nothing_within_bins_that_memory_does_not_order() -> None:
    """Loss falls from bin to bin and is random inside: the global rank correlation is high and says nothing."""
    memory = np.repeat([1.0, 2, 3, 4], 50)
    loss = -memory + 0.5 * RNG.random(200)
    noise = memory + 0.1 * RNG.random(200)
    assert tau(loss, -noise) > 0.6
    assert abs(tau_within(memory, loss, -noise)) < 0.15


def test_quartiles_hold_every_config_once_in_the_order_of_memory() -> None:
    groups = quartiles(MEMORY)
    assert sorted(np.concatenate(groups).tolist()) == list(range(40))
    assert {len(group) for group in groups} == {10}
    assert all(MEMORY[low].max() <= MEMORY[high].min() for low, high in itertools.pairwise(groups))


def test_chance_overlaps_by_as_much_as_it_takes() -> None:
    loss = RNG.random(1000)
    assert np.mean([overlap(loss, RNG.random(1000)) for _ in range(50)]) == pytest.approx(0.1, abs=0.02)


def test_regret_falls_with_more_picks() -> None:
    estimate = LOSS + RNG.normal(0, 0.3, 40)
    regrets = [regret(LOSS, estimate, count) for count in range(1, 41)]
    assert regrets == sorted(regrets, reverse=True)
    assert regrets[-1] == 0


def test_all_configs_are_the_whole_front() -> None:
    assert front_share(MEMORY, LOSS, RNG.random(40), 40) == 1
    assert front_share(MEMORY, LOSS, LOSS, 10) == pytest.approx(1, abs=0.05)


def test_of_losses_that_are_known_as_many_picks_as_the_front_has_are_the_front() -> None:
    points = list(zip(MEMORY.tolist(), np.exp(LOSS).tolist(), strict=True))
    members, against = front(points), corner(MEMORY, LOSS)
    picked = select_by_expected_hypervolume(MEMORY, LOSS, 0.0, len(members))
    assert hypervolume([points[i] for i in picked], against) == pytest.approx(hypervolume(points, against))
    volumes = [hypervolume([points[i] for i in picked[: n + 1]], against) for n in range(len(picked))]
    gains = np.diff([0, *volumes])
    assert np.all(gains[1:] <= gains[0] + 1e-12)


def test_a_pick_is_worth_what_it_adds_to_those_before_it() -> None:
    """Of three, two are nearly one: the third is picked second, though either of the two alone would be worth more."""
    memory, losses = np.array([1.0, 1.01, 5.0, 10.0]), np.array([1.0, 1.001, 0.9, 2.0])
    assert select_by_expected_hypervolume(memory, losses, 0.01, 2) == [0, 2]
    assert select_by_expected_hypervolume(memory, losses, 0.01, 1, there=[0]) == [2]
    assert select_by_expected_hypervolume(memory, losses, 0.01, 2, out=[0]) == [1, 2]
    assert sorted(select_by_expected_hypervolume(memory, losses, 0.01, 9)) == [0, 1, 2, 3]


# --- how far a truth can be trusted


def rows_of(truth: np.ndarray, noise: float, seeds: int = 4, early: float = 0.0) -> list[TruthRow]:
    """Rows of configs whose losses are a truth and noise: of each training and, at its first point, more."""
    rng = np.random.default_rng(1)
    rows = []
    for c, loss in enumerate(truth):
        for seed in range(seeds):
            off = rng.normal(0, noise)
            for tokens, more in ((100, early), (200, 0.0)):
                value = loss + off + rng.normal(0, 1) * more
                rows.append(TruthRow("t", f"{c:012d}", "", 1000 + c, c * 37 % 61, 500, c * 17 % 61, seed, tokens, float(value)))
    return rows


def test_a_truth_without_noise_agrees_with_itself_and_pure_noise_does_not() -> None:
    loss = RNG.random(40)
    sure, noise = (reliability(Known.of(rows_of(loss * scale, 0.1 * (not scale)), "t")) for scale in (1, 0))
    assert sure.halves == pytest.approx((1.0,) * 3)
    assert sure.halves_within == pytest.approx((1.0,) * 3)
    assert sure.noise == pytest.approx(0, abs=1e-12)
    assert np.mean(noise.halves) == pytest.approx(0, abs=0.2)
    assert noise.noise == pytest.approx(0.1, rel=0.3)


def test_noise_is_what_is_left_of_losses_when_a_models_and_a_seeds_own_are_taken_off() -> None:
    rng = np.random.default_rng(5)
    off = rng.normal(0, 0.1, (200, 3))
    alike = rng.normal(size=(200, 1)) + rng.normal(size=(1, 3))
    assert noise_of_seeds(off) == pytest.approx(0.1, rel=0.1)
    assert noise_of_seeds(off + alike) == pytest.approx(noise_of_seeds(off))
    assert noise_of_seeds(np.array([[1.0, 1.5], [1.0, 1.4]])) == pytest.approx(0.05), "each is 0.025 off"
    assert math.isnan(noise_of_seeds(off[:, :1]))
    assert math.isnan(noise_of_seeds(off[:1]))


def test_halves_agree_as_far_as_noise_lets_them() -> None:
    """More noise, less agreement; and a half of two seeds agrees better than one seed alone."""
    loss = RNG.random(60)
    found = [reliability(Known.of(rows_of(loss, noise), "t")) for noise in (0.05, 0.2, 0.8)]
    means = [float(np.mean(one.halves)) for one in found]
    assert means == sorted(means, reverse=True)


def test_an_order_that_is_not_settled_is_said() -> None:
    loss = RNG.random(40)
    settled, loose = (reliability(Known.of(rows_of(loss, 0.01, early=early), "t")).settled[100] for early in (0.0, 1.0))
    assert settled[0] > 0.9 > loose[0]


def test_a_seed_that_is_under_way_is_left_out_and_with_fewer_than_two_so_are_the_configs_that_lack_it() -> None:
    rows = rows_of(RNG.random(5), 0.1)
    known = Known.of(rows[:-1], "t")
    assert known.losses.shape == (5, 3, 2), "the last training has not ended"
    assert known.without(0).shape == (5,)
    second = [row for row in rows if row.seed == 0 or (row.seed == 1 and row.hash[-1] in "012")]
    assert Known.of(second, "t").losses.shape == (3, 2, 2)
    first = [row for row in rows if row.seed == 0 and row.hash[-1] in "0123"]
    assert Known.of(first, "t").losses.shape == (4, 1, 2)


def test_a_table_survives_being_written(tmp_path: Path) -> None:
    rows = rows_of(RNG.random(3), 0.1)
    random.Random(0).shuffle(rows)
    write_truth(tmp_path / TRUTH, rows)
    assert set(read_truth(tmp_path / TRUTH)) == set(rows)
    first = (tmp_path / TRUTH).read_bytes()
    write_truth(tmp_path / TRUTH, rows[::-1])
    assert (tmp_path / TRUTH).read_bytes() == first


# --- a tiny real truth

SPACE = {
    "model": {"vocab_size": 256, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24},
    "choices": {"tie": {"sources": "previous"}, "kv": {"sources": "previous"}},
}
TINY = {
    "name": "tiny",
    "space": "space.yaml",
    "texts": {"python": {"text": "python", "max_bytes": 60_000}, "other": {"text": "missing.txt"}},
    "configs": 3,
    "bins": 2,
    "seeds": 2,
    "points": [0.5, 1.0],
    "windows": 4,
    "train": {"steps": 4, "batch": 2, "seq": 16, "decay": 0},
    "memory": {"context": 64},
}


def tiny(folder: Path, **changes: object) -> Path:
    (folder / "space.yaml").write_text(yaml.safe_dump(SPACE))
    (folder / "truth.yaml").write_text(yaml.safe_dump({**TINY, **changes}))
    return folder / "truth.yaml"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[TruthPlan, Path, list[TruthRow]]:
    folder = tmp_path_factory.mktemp("truth")
    plan = TruthPlan.load(tiny(folder), only=["python"])
    return plan, folder / "table", make_truth(plan, folder / "table", folder / "work", Silent())


def test_every_training_is_known_at_every_point(made: tuple[TruthPlan, Path, list[TruthRow]]) -> None:
    plan, table, rows = made
    assert {row.training for row in rows} == {entry.training for entry in entries(plan)}
    assert {row.tokens for row in rows} == {2 * 2 * 16, 4 * 2 * 16}
    assert len(rows) == 2 * len(list(entries(plan)))
    configs = json.loads((table / CONFIGS).read_text())
    for row in rows:
        config = SharingConfig.from_data(plan.space.shape, configs[row.hash])
        assert config.hash == row.hash
        assert measure(plan.space.shape, config, plan.file.memory).memory_bytes == row.memory_bytes
        assert plan.configs[config] == row.name
    assert Known.of(rows, "python").losses.shape == (len(plan.configs), 2, 2)


def test_presets_and_every_bin_of_memory_are_in_the_sample(made: tuple[TruthPlan, Path, list[TruthRow]]) -> None:
    plan = made[0]
    assert {"dense", "cla-2", "recurrent-stacking"} <= set(plan.configs.values())
    assert sum(not name for name in plan.configs.values()) == plan.file.configs


@pytest.mark.slow
def test_what_is_in_the_table_is_not_trained_again(made: tuple[TruthPlan, Path, list[TruthRow]], tmp_path: Path) -> None:
    """A truth that was cut off goes on from its table alone, wherever that lies; the same trainings give the same losses."""
    plan, _, rows = made
    lost = rows[0].training
    write_truth(tmp_path / TRUTH, [row for row in rows if row.training != lost])
    again = make_truth(plan, tmp_path, tmp_path / "work", Silent())
    assert [path.name for path in (tmp_path / "work").iterdir() if path.is_dir()] == ["-".join(map(str, lost))]
    assert set(again) == set(rows)


def test_a_training_done_whose_rows_were_lost_is_taken_from_its_result(
    made: tuple[TruthPlan, Path, list[TruthRow]], tmp_path: Path
) -> None:
    plan, table, rows = made
    again = make_truth(plan, tmp_path, table.parent / "work", Silent())
    assert set(again) == set(rows)
    assert set(read_truth(tmp_path / TRUTH)) == set(rows)


REFUSED: list[tuple[dict[str, object], str]] = [
    ({"train": {"steps": 4, "batch": 2, "seq": 16}}, "train.decay: a rate that falls"),
    ({"points": [0.5, 0.9]}, "points: [0.5, 0.9] do not ascend to 1"),
    ({"points": [1.0, 0.5]}, "points: [1.0, 0.5] do not ascend to 1"),
    ({"seeds": 1}, "seeds: 1 is too few"),
    ({"texts": {}}, "texts: names no text"),
    ({"average": 0.0}, "average: 0.0 is no part of a training"),
    ({}, "missing.txt"),
]


@pytest.mark.parametrize(("changes", "says"), REFUSED, ids=[says for _, says in REFUSED])
def test_what_is_no_truth_is_refused(changes: dict[str, object], says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        TruthPlan.load(tiny(tmp_path, **changes))
    assert says in str(error.value)


def test_an_unknown_text_is_refused_and_a_text_may_lie_elsewhere(tmp_path: Path) -> None:
    path = tiny(tmp_path)
    with pytest.raises(UserError, match="did you mean python"):
        TruthPlan.load(path, only=["pyton"])
    (tmp_path / "elsewhere").write_text("a text of some length, again and again\n" * 100)
    plan = TruthPlan.load(path, only=["other"], at={"other": str(tmp_path / "elsewhere")})
    assert list(plan.corpora) == ["other"]
    assert plan.at(3, None).file.run.workers == 3


def test_what_is_evaluated_on_lies_beside_a_text_that_lies_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    for name in ("train", "held"):
        (tmp_path / "there" / f"{name}.txt").write_text(f"a text to {name}, again and again\n" * 100)
    path = tiny(tmp_path, texts={"parts": {"text": "train.txt", "eval_text": "held.txt"}})
    with pytest.raises(UserError, match="does not exist"):
        TruthPlan.load(path)
    corpus = TruthPlan.load(path, at={"parts": str(tmp_path / "there" / "train.txt")}).corpora["parts"]
    assert corpus.eval_text == (tmp_path / "there" / "held.txt").read_bytes()


@pytest.mark.slow
def test_the_command_line_makes_a_table_and_says_so(tmp_path: Path) -> None:
    path = tiny(tmp_path, configs=1, seeds=2, train={"steps": 2, "batch": 1, "seq": 8, "decay": 0}, space="one.yaml")
    (tmp_path / "one.yaml").write_text(yaml.safe_dump({**SPACE, "choices": {"kv": {"sources": "adjacent", "layers": [2]}}}))
    arguments = ["truth", str(path), "--to", str(tmp_path / "t"), "--only", "python", "--runs", str(tmp_path / "runs"), "--json"]
    found = CliRunner().invoke(nas, arguments)
    assert found.exit_code == 0, found.exception
    said = json.loads(found.stdout)
    assert said["rows"] == len(read_truth(Path(said["table"]))) == 2 * said["trainings"]
    assert CliRunner().invoke(nas, ["truth", str(path), "--to", "t", "--text", "python"]).exit_code == 2


def test_a_half_written_table_is_refused(tmp_path: Path) -> None:
    (tmp_path / TRUTH).write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match=r"is no table of text, hash, .*make a table of a ground truth"):
        read_truth(tmp_path / TRUTH)


def test_a_plan_is_the_same_whenever_it_is_made(made: tuple[TruthPlan, Path, list[TruthRow]]) -> None:
    plan = made[0]
    assert list(replace(plan).configs) == list(TruthPlan.load(made[1].parent / "truth.yaml", only=["python"]).configs)


# --- estimators


@pytest.mark.parametrize("name", [name for name, kind in SUPERNETS.items() if not kind.adapt])
def test_every_kind_of_supernet_makes_a_trial(name: str, made: tuple[TruthPlan, Path, list[TruthRow]], tmp_path: Path) -> None:
    trial = SupernetEstimate(RankFile.load(rank_file(tmp_path)), made[0], "python", SUPERNETS[name], 0).trial()
    assert (trial.supernet.message, trial.split) == (SUPERNETS[name].message, SUPERNETS[name].split)


def test_a_budget_that_adapting_takes_whole_is_refused_and_that_of_the_shipped_ranking_leaves_half_to_the_supernet(
    made: tuple[TruthPlan, Path, list[TruthRow]], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="leave no step to a supernet whose subnets are adapted for 500") as error:
        SupernetEstimate(RankFile.load(rank_file(tmp_path)), made[0], "python", SupernetKind(adapt=500), 0).trial()
    assert error.value.where == "budget"
    folder = Path(__file__).parents[1] / "trials"
    plan, file = TruthPlan.load(folder / "ground_truth.yaml", only=["python"]), RankFile.load(folder / "ranking.yaml")
    for kind in SUPERNETS.values():
        estimate = SupernetEstimate(file, plan, "python", kind, 0)
        trial = estimate.trial()
        assert trial.supernet.tokens * estimate.subnets(plan.space) > estimate.budget * 0.45


RANK = {
    "name": "rank",
    "truth": "truth.yaml",
    "budget": 0.5,
    "seeds": 1,
    "windows": 4,
    "train": {"steps": 1, "batch": 2, "seq": 16},
}


def rank_file(folder: Path, **changes: object) -> Path:
    (folder / "rank.yaml").write_text(yaml.safe_dump({**RANK, **changes}))
    return folder / "rank.yaml"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sandwich", "fair, distilled", "gradient split 2", "uniform, adapted 25"])
def test_a_supernet_takes_no_more_than_its_budget_and_little_less(
    name: str, made: tuple[TruthPlan, Path, list[TruthRow]], tmp_path: Path
) -> None:
    """Every subnet's pass over a batch counts, and so do the gradients of a cut and the steps that adapt. A subnet that is drawn
    twice in a step runs once: in so small a space that saves some."""
    plan, _, _ = made
    file = replace(RankFile.load(rank_file(tmp_path)), budget=1.0)
    plan = replace(plan, file=replace(plan.file, train=replace(plan.file.train, steps=60 if "adapted" in name else 40)))
    estimate = SupernetEstimate(file, plan, "python", SUPERNETS[name], 0)
    with cluster(plan.file.run):
        trained = estimate.run(tmp_path / "work", Silent())
    assert trained.losses.keys() == {config.hash for config in plan.configs}
    assert all(0 < loss < 20 for loss in trained.losses.values())
    cuts = 2000 * 2 * 16 if name.startswith("gradient") else 0
    assert 0.75 * estimate.budget <= trained.tokens <= estimate.budget + cuts


def test_an_adapted_subnet_leaves_the_supernet_as_it_was(made: tuple[TruthPlan, Path, list[TruthRow]], tmp_path: Path) -> None:
    plan = replace(made[0], configs=dict(list(made[0].configs.items())[:2]))
    estimate = SupernetEstimate(RankFile.load(rank_file(tmp_path)), plan, "python", SupernetKind(adapt=2), 0)
    net = Supernet(plan.space.shape, torch.Generator().manual_seed(0))
    before = {name: weight.clone() for name, weight in net.state_dict().items()}
    nets = Supernets(SplitTree(), {"0": net}, {"0": 0}, 0)
    adapted = dict(estimate.ask(nets, plan.corpora["python"]))
    plain = dict(replace(estimate, kind=SupernetKind()).ask(nets, plan.corpora["python"]))
    assert all(torch.equal(before[name], weight) for name, weight in net.state_dict().items())
    assert all(adapted[config] != plain[config] for config in adapted)


def test_a_predictor_finds_a_law_that_its_features_have() -> None:
    space, rng = SearchSpace.load(Path(__file__).parents[1] / "search_spaces" / "ground_truth.yaml"), random.Random(0)
    configs = list(dict.fromkeys(space.sample(rng) for _ in range(60)))
    rows = features(space.shape, configs, MemorySpec())
    law = rows @ -np.linspace(0, 1, rows.shape[1])
    fitted = Predictor.fit(rows[:25], law[:25])
    assert tau(fitted(rows[25:]), law[25:]) > 0.8 > tau(-rows[25:, 0], law[25:])
    assert fitted.error < law.std() / 3
    noise = np.random.default_rng(0).normal(size=25)
    chance = Predictor.fit(rows[:25], noise)
    assert abs(tau(chance(rows[25:]), law[25:])) < 0.7
    assert chance.error > 0.8 * noise.std()


def test_a_predictor_never_says_that_keeping_more_is_worse() -> None:
    """Not even where what it learns from says so."""
    rng = np.random.default_rng(0)
    rows, more = rng.random((16, 5)), rng.random((16, 5))
    for losses in (rows.sum(1), -rows.sum(1), rng.random(16)):
        fitted = Predictor.fit(rows, losses)
        assert np.all(fitted(rows + more) <= fitted(rows) + 1e-12)
    assert np.all(Predictor.fit(rows, -rows.sum(1))(rows + more) < 0)


def test_another_text_tells_an_order_that_both_have() -> None:
    loss = RNG.random(40)
    one, same, less = (Known.of([replace(row, text=text) for row in rows_of(loss, 0.0)], text) for text in ("a", "b", "c"))
    less = replace(less, hashes=less.hashes[:-1], losses=less.losses[:-1])
    (found,) = other_texts(one, [one, same, less])
    assert found.estimator == "the truth of b"
    assert found.mean("tau") == 1
    assert found.tokens == 40 * 4 * 200


def test_an_own_training_tells_as_much_as_of_it_lasts() -> None:
    """Nothing where another seed is off for its own reasons, all where what a config is off is the config's."""
    features = np.random.default_rng(2).normal(size=(200, 3))
    lasting, gone = (
        own_slopes(Known.of(rows_of(truth, noise), "t"), features)[200]
        for truth, noise in ((RNG.normal(size=200), 0.01), (np.zeros(200), 1.0))
    )
    assert lasting == pytest.approx(1, abs=0.1)
    assert gone == pytest.approx(0, abs=0.15)


def test_an_own_training_outweighs_what_is_predicted_only_where_there_is_one() -> None:
    predicted, own = np.array([1.0, 1.0, 1.0]), np.array([np.nan, 0.8, 1.2])
    found = shrink_to_observed(predicted, own)
    assert found[0] == 1.0
    assert 0.8 < found[1] < 1.0 < found[2] < 1.2


def test_what_a_predictor_learns_from_is_spread_over_the_memory() -> None:
    teacher_probabilities = spread(MEMORY, 8, np.random.default_rng(0))
    bands = np.array_split(np.argsort(MEMORY, kind="stable"), 8)
    assert all(chosen in band for chosen, band in zip(teacher_probabilities, bands, strict=True))


def test_scores_of_predictors_and_of_single_seeds_do_not_see_what_they_are_scored_on() -> None:
    """A truth of pure noise: whoever scores above chance has seen it."""
    rows = rows_of(np.zeros(60), 1.0)
    known = Known.of([*rows, *(replace(row, tokens=row.tokens * 10) for row in rows)], "t")
    features = np.random.default_rng(0).normal(size=(60, 4))
    found = [
        *free_scores(known, 60),
        *predictor_scores(known, features, [12], [1]),
        *smoothed_scores(known, features, 60),
    ]
    for score in found:
        assert abs(score.mean("tau")) < 0.25, score.estimator


def test_a_predictor_that_is_told_the_truth_by_a_supernet_finds_it_and_noise_does_not_hurt_much() -> None:
    loss, rng = RNG.random(60), np.random.default_rng(2)
    rows = rows_of(loss, 0.01)
    rows += [replace(row, tokens=row.tokens * 10) for row in rows]
    known = Known.of(rows, "t")
    blind = np.column_stack([loss + rng.normal(size=60), rng.normal(size=(60, 3))])
    said = {
        ("sees", 0): Estimate(dict(zip(known.hashes, loss.tolist(), strict=True)), 1000),
        ("guesses", 0): Estimate(dict(zip(known.hashes, rng.random(60).tolist(), strict=True)), 1000),
    }
    sees, guesses = informed_scores(known, blind, said)
    (alone,) = predictor_scores(known, blind, [24], [2])
    assert sees.mean("tau") > 0.8 > alone.mean("tau")
    assert guesses.mean("tau") > alone.mean("tau") - 0.2
    assert sees.tokens == 1000 + alone.tokens


@pytest.mark.slow
def test_the_command_line_ranks_and_goes_on_from_its_table(tmp_path: Path) -> None:
    path = tiny(tmp_path, configs=10)
    common = ["--only", "python", "--runs", str(tmp_path / "runs"), "--json"]
    early = CliRunner().invoke(nas, ["rank", str(rank_file(tmp_path)), "--truth", str(tmp_path / "t"), *common])
    assert isinstance(early.exception, UserError)
    assert "0 configs of python are known" in str(early.exception)
    assert CliRunner().invoke(nas, ["truth", str(path), "--to", str(tmp_path / "t"), *common]).exit_code == 0
    file = rank_file(tmp_path, supernets=["uniform", "random split 2"], budget=1.0)
    arguments = ["rank", str(file), "--truth", str(tmp_path / "t"), "--to", str(tmp_path / "page.md"), *common]
    found = CliRunner().invoke(nas, arguments)
    assert found.exit_code == 0, found.exception
    said = {row["estimator"]: row for row in json.loads(found.stdout)}
    assert {"bytes", "uniform", "random split 2", "alone, 50% of the tokens", "alone, 100% of the tokens"} <= said.keys()
    page, table = (tmp_path / "page.md").read_text(), (tmp_path / "t" / ESTIMATES).read_bytes()
    for name in said:
        assert f"\n| {name} " in page
    shown = CliRunner().invoke(nas, arguments[:-1]).stdout
    assert all(name in shown for name in said), "also on a narrow terminal"
    again = CliRunner().invoke(nas, arguments)
    assert again.stdout == found.stdout
    assert (tmp_path / "t" / ESTIMATES).read_bytes() == table
    assert "rank" in CliRunner().invoke(nas, ["check", str(file)]).output


@pytest.mark.parametrize(
    ("changes", "says"),
    [({"budget": 0.0}, "budget: 0.0"), ({"supernets": ["best"]}, "unknown supernet 'best'"), ({"seeds": 0}, "seeds: 0")],
)
def test_what_is_no_ranking_is_refused(changes: dict[str, object], says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        RankFile.load(rank_file(tmp_path, **changes))
    assert says in str(error.value)
