"""Laws of `ConfigDistribution`: memory is drawn evenly, options are drawn unless ruled out, and cheap sharing more often."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest
import tiny

from nas.config import parse_yaml
from nas.sharing.distribution import HOPELESS, ConfigDistribution, single_decisions
from nas.sharing.memory import MemorySpec, measure
from nas.sharing.space import SearchSpace

MEMORY = MemorySpec(context=256)
DEEP = replace(tiny.MHA, num_hidden_layers=12)
KINDS = ("measured", "not measured")
CHOICES = """choices:
  tie: {sources: adjacent}
  ffn: {sources: adjacent}
  kv: {sources: {window: 2}}
  kv_heads: {options: [4, 1]}
  drop: {options: [own, attn, ffn]}
"""


def measured(space: SearchSpace, seed: int, hopeless: float = 0.2) -> SearchSpace:
    """The space with a loss increase drawn for each option, a part of them beyond hope."""
    rng, found = random.Random(seed), list(single_decisions(space, MEMORY))
    costs = [rng.uniform(2 * HOPELESS, 9) if rng.random() < hopeless else rng.lognormvariate(-3, 1) for _ in found]
    return replace(
        space, measured=tuple(replace(one, loss_increase=min(cost, 9)) for one, cost in zip(found, costs, strict=True))
    )


def make(kind: str, depth: int) -> ConfigDistribution:
    space = SearchSpace.from_document(parse_yaml(CHOICES, "space.yaml"), replace(tiny.MHA, num_hidden_layers=depth))
    return ConfigDistribution.of(measured(space, 0) if kind == "measured" else space, MEMORY)


@pytest.fixture(params=KINDS)
def distribution(request: pytest.FixtureRequest) -> ConfigDistribution:
    return make(request.param, 5)


def bytes_of(distribution: ConfigDistribution, rng: random.Random) -> int:
    return measure(distribution.space.shape, distribution.draw(rng), MEMORY).memory_bytes


@pytest.mark.parametrize("kind", KINDS)
def test_every_amount_of_memory_is_equally_likely(kind: str) -> None:
    distribution, rng = make(kind, 12), random.Random(0)
    least, most = distribution.range
    bins = Counter(int(5 * (bytes_of(distribution, rng) - least) / (most + 1 - least)) for _ in range(300))
    assert sum(bins[n] for n in range(5)) == 300
    assert all(0.7 < 5 * bins[n] / 300 < 1.3 for n in range(5)), bins


def test_every_option_is_drawn_unless_it_is_ruled_out(distribution: ConfigDistribution) -> None:
    space, rng = distribution.space, random.Random(0)
    seen = {pair for config in (distribution.draw(rng) for _ in range(800)) for pair in (space.encode(config) or {}).items()}
    assert {(one.decision, one.option) for one in distribution.kept} <= seen
    assert not seen & {(one.decision, one.option) for one in distribution.ruled_out}
    assert len(distribution.kept) + len(distribution.ruled_out) == len(single_decisions(space, MEMORY))
    assert bool(distribution.ruled_out) == bool(space.measured) == ("left out" in distribution.summary)


def test_the_same_seed_gives_the_same_draws(distribution: ConfigDistribution) -> None:
    again = ConfigDistribution.of(distribution.space, MEMORY)
    one, other, third = (
        [of.draw(rng) for _ in range(20)]
        for of, rng in ((distribution, random.Random(0)), (again, random.Random(0)), (again, random.Random(1)))
    )
    assert one == other != third


def test_cheap_sharing_is_likelier_than_dear() -> None:
    """Of options that save the same bytes, the cheapest are drawn most often."""
    space = SearchSpace.from_document(parse_yaml("choices: {drop: {options: [own, ffn]}}", "space.yaml"), DEEP)
    singles = list(single_decisions(space, MEMORY))
    space = replace(space, measured=tuple(replace(one, loss_increase=0.01 * 1.5**n) for n, one in enumerate(singles)))
    distribution, rng = ConfigDistribution.of(space, MEMORY), random.Random(0)
    counts = Counter(i for _ in range(300) for i, layer in enumerate(distribution.draw(rng).layers) if layer)
    thirds = [sum(counts[i] for i in range(start, start + 4)) for start in (0, 4, 8)]
    assert thirds[0] > 1.3 * thirds[1] > 1.6 * thirds[2] > 0


def test_draws_are_within_the_limits(distribution: ConfigDistribution) -> None:
    least, most = distribution.range
    space = replace(distribution.space, limits={"memory_bytes": (least + 2 * most) // 3, "kv_cache_bytes": most // 3})
    tight, rng = ConfigDistribution.of(space, MEMORY), random.Random(0)
    assert all(space.meets_limits(tight.draw(rng), MEMORY) for _ in range(30))


def test_an_option_that_was_not_measured_costs_what_its_neighbour_does() -> None:
    space = SearchSpace.from_document(parse_yaml(CHOICES, "space.yaml"), DEEP)
    whole = measured(space, 1)
    known = {(one.decision, one.option): one for one in whole.measured}
    half = replace(space, measured=whole.measured[::2])
    for one in single_decisions(half, MEMORY):
        if known[one.decision, one.option] in half.measured:
            assert one == known[one.decision, one.option]
        assert one.loss_increase in {other.loss_increase for other in half.measured}
