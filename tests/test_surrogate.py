"""Laws of the surrogate: it learns what options cost, alone or together, knows what it does not know, and is solved."""

import random
import statistics
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import tiny

from nas.config import parse_yaml
from nas.pareto import front, hypervolume, reference_point
from nas.search.candidates import Predictor, features, greedy_hypervolume, select_by_expected_hypervolume, shrink_to_observed
from nas.search.loop import Study
from nas.search.surrogate import HORIZON, Known, Solver, nearest_front
from nas.search.trial_file import SearchSpec
from nas.sharing.distribution import ConfigDistribution
from nas.sharing.memory import MemorySpec, measure
from nas.sharing.sharing_config import SharingConfig
from nas.sharing.space import SearchSpace

MEMORY = MemorySpec(context=256)
CHOICES = "{kv: {sources: adjacent}, ffn: {sources: adjacent}, kv_heads: {options: [4, 1]}, drop: {options: [own, attn, ffn]}}"
SPACE = SearchSpace.from_document(parse_yaml(f"choices: {CHOICES}", "space.yaml"), replace(tiny.MHA, num_hidden_layers=8))
DENSE = SharingConfig.dense(SPACE.shape)


@cache
def loss(config: SharingConfig) -> float:
    """Options cost by layer and primitive, two of the sixteen layers' parts are sacred, and costs compound."""
    total = 0.0
    for i, layer in enumerate(config.layers):
        for pair in layer:
            sacred = (i, pair[0]) in {(0, "drop"), (5, "drop"), (3, "kv")}
            total += random.Random(f"{i} {pair}").uniform(0.02, 0.12) + 6 * sacred
    return 3 + total * (1 + total)


def known(config: SharingConfig) -> Known:
    least = SPACE.least_sharing()
    decided = {name: option for name, option in (SPACE.encode(config) or {}).items() if option != least[name]}
    return Known(config, decided, (measure(SPACE.shape, config, MEMORY).memory_bytes,), loss(config))


@pytest.fixture(scope="module")
def told() -> list[Known]:
    rng, distribution = random.Random(0), ConfigDistribution.of(SPACE, MEMORY)
    return [known(config) for config in dict.fromkeys([DENSE, *(distribution.draw(rng) for _ in range(90))])]


def test_the_surrogate_learns_what_options_cost_from_configs_of_many(told: list[Known]) -> None:
    """The options that are sacred, too, though none was evaluated alone."""
    solver = Solver(SPACE, MEMORY, told[:65], random.Random(0))
    mean, deviation = solver.surrogate([one.decided for one in told[65:]])
    truth = np.log([one.loss - loss(DENSE) + 0.02 for one in told[65:]])
    assert np.corrcoef(mean, truth)[0, 1] > 0.9
    assert np.mean(np.abs(mean - truth) < 3 * deviation) > 0.9
    dearest = max(solver.distribution.kept + solver.distribution.ruled_out, key=lambda one: one.loss_increase or 0.0)
    assert (dearest.decision, dearest.option) in {(f"layer_{i}.drop", part) for i in (0, 5) for part in ("attn", "ffn")}


def test_its_error_is_small_where_it_knows_and_large_where_it_does_not(told: list[Known]) -> None:
    few = Solver(SPACE, MEMORY, told[:10], random.Random(0)).surrogate
    mean, deviation = few([one.decided for one in told])
    assert deviation[:10].max() < 0.1 < deviation[10:].min()
    assert mean[:10] == pytest.approx(np.log([one.loss - loss(DENSE) + 0.02 for one in told[:10]]), abs=0.1)


def test_solutions_are_new_and_within_the_limits_and_follow_from_the_seed(told: list[Known]) -> None:
    limit = max(one.costs[0] for one in told) * 2 // 3
    tight = replace(SPACE, limits={"memory_bytes": limit})
    within = [one for one in told if one.costs[0] <= limit]
    solved = [Solver(tight, MEMORY, within, random.Random(seed)).solve(6) for seed in (0, 0, 1)]
    configs = [SPACE.config_of(SPACE.least_sharing() | setting) for setting in solved[0]]
    assert solved[0] == solved[1] != solved[2]
    assert len(set(configs)) == 6
    assert not {*configs} & {one.config for one in told}
    assert all(tight.meets_limits(config, MEMORY) for config in configs)


def test_the_nearest_to_the_front_are_the_front_first(told: list[Known]) -> None:
    best = nearest_front(told, 5)
    assert all(not any(o.costs <= one.costs and o.loss < one.loss for o in told) for one in best)
    assert all(one.loss <= min(o.loss for o in told) + HORIZON for one in nearest_front(told, 1_000))


def test_a_surrogates_front_is_larger_than_that_of_tpe_and_of_chance() -> None:
    def volume(sampler: str, seed: int) -> float:
        study, points = Study(SPACE, SearchSpec(sampler=sampler, batch=12), seed, MEMORY), []
        study.enqueue([SPACE.encode(DENSE) or {}])
        for _ in range(4):
            for one in study.ask(12):
                points.append((float(measure(SPACE.shape, one.config, MEMORY).memory_bytes), loss(one.config)))
                study.tell(one.number, points[-1])
        return hypervolume(points, (1.05 * points[0][0], points[0][1] + HORIZON))

    mine, *others = (statistics.fmean(volume(sampler, seed) for seed in range(1)) for sampler in ("surrogate", "tpe", "random"))
    assert mine > 1.05 * max(others)


RNG = np.random.default_rng(0)


def test_it_finds_a_law_that_its_features_have() -> None:
    space, rng = SearchSpace.load(Path(__file__).parents[1] / "search_spaces" / "ground_truth.yaml"), random.Random(0)
    rows = features(space.shape, list(dict.fromkeys(space.sample(rng) for _ in range(60))), MemorySpec())
    law = rows @ -np.linspace(0, 1, rows.shape[1])
    fitted = Predictor.fit(rows[:25], law[:25])
    assert np.corrcoef(fitted(rows[25:]), law[25:])[0, 1] > 0.9
    assert fitted.error < law.std() / 3
    noise = np.random.default_rng(0).normal(size=25)
    assert Predictor.fit(rows[:25], noise).error > 0.8 * noise.std()


def test_it_never_predicts_a_higher_loss_of_a_config_that_keeps_more() -> None:
    rows, more = RNG.random((16, 5)), RNG.random((16, 5))
    for losses in (rows.sum(1), -rows.sum(1), RNG.random(16)):
        fitted = Predictor.fit(rows, losses)
        assert np.all(fitted(rows + more) <= fitted(rows) + 1e-12)


def test_predictions_are_shrunk_to_what_was_observed_only_where_something_was() -> None:
    found = shrink_to_observed(np.ones(3), np.array([np.nan, 0.8, 1.2]))
    assert found[0] == 1.0
    assert 0.8 < found[1] < 1.0 < found[2] < 1.2


@pytest.mark.parametrize("objectives", [1, 2])
def test_with_known_losses_as_many_picks_as_the_front_has_are_the_front(objectives: int) -> None:
    """With two costs but for those that the grid cannot tell apart."""
    costs, losses = RNG.random((40, objectives)), RNG.random(40)
    points = [(*row, loss) for row, loss in zip(costs.tolist(), np.exp(losses).tolist(), strict=True)]
    worst, several = reference_point(points), objectives > 1
    picked = select_by_expected_hypervolume(costs, losses, 0.0, len(front(points)))
    found = hypervolume([points[i] for i in picked], worst)
    assert found == pytest.approx(hypervolume(points, worst), rel=0.01 if several else 1e-9)


@pytest.mark.parametrize("objectives", [1, 2])
def test_each_pick_adds_most_to_those_before_it(objectives: int) -> None:
    for rng in map(np.random.default_rng, range(10)):
        costs, drawn = rng.integers(0, 4, (20, objectives)).astype(float), rng.integers(0, 3, (5, 20)).astype(float)
        known, reference = rng.choice(20, 3, replace=False).tolist(), (*[4.0] * objectives, 2.0)
        picked = greedy_hypervolume(costs, drawn, reference, 9, known)

        def expected(some: list[int]) -> float:
            points = [[(*costs[n], row[n]) for n in some] for row in drawn]  # noqa: B023
            return statistics.fmean(hypervolume(each, reference) for each in points)  # noqa: B023

        for count, one in enumerate(picked):
            before = [*known, *picked[:count]]
            assert one not in before
            assert expected([*before, one]) == pytest.approx(max(expected([*before, n]) for n in range(20)))


def test_the_config_of_most_memory_can_be_picked() -> None:
    memory, losses = np.array([1.0, 2.0, 3.0, 4.0, 10.0]), np.array([3.0, 2.8, 2.6, 2.4, 1.0])
    assert 4 in select_by_expected_hypervolume(memory[:, None], losses, 0.0, 4), "the best, by 1.4 nats"


def test_a_pick_is_worth_what_it_adds_to_those_before_it() -> None:
    """Of three, two are nearly one: the third is picked second, though either of the two alone would be worth more."""
    memory, losses = np.array([1.0, 1.01, 5.0, 10.0]), np.array([1.0, 1.001, 0.9, 2.0])
    assert select_by_expected_hypervolume(memory[:, None], losses, 0.01, 2) == [0, 2]
    assert select_by_expected_hypervolume(memory[:, None], losses, 0.01, 1, trained=[0]) == [2]
    assert select_by_expected_hypervolume(memory[:, None], losses, 0.01, 2, excluded=[0]) == [1, 2]
    assert sorted(select_by_expected_hypervolume(memory[:, None], losses, 0.01, 9)) == [0, 1, 2, 3]
