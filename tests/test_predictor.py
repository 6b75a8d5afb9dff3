"""The predictor's laws, and those of choosing what to train next."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from nas.pareto import front, hypervolume, reference_point
from nas.search.candidates import Predictor, features, select_by_expected_hypervolume, shrink_to_observed
from nas.sharing.memory import MemorySpec
from nas.sharing.space import SearchSpace

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
