"""Laws of the search space: walks and their inverse, what can be reached, and limits; against every config tried one by one."""

import gc
import itertools
import pickle
import random
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import optuna
import pytest
import tiny
from commands import refused

from nas.config import Document, parse_yaml
from nas.errors import UserError
from nas.presets import presets
from nas.sharing.builder import PlanBuilder
from nas.sharing.distribution import HOPELESS, ConfigDistribution, single_decisions
from nas.sharing.memo import LayerMemo
from nas.sharing.memory import LIMITS, MemorySpec, measure
from nas.sharing.plan import Plan
from nas.sharing.primitives import ENTRIES, LAYER_ROWS, MODEL_ROWS, OWN, PRIMITIVES, entry
from nas.sharing.shape import ModelShape
from nas.sharing.sharing_config import SharingConfig, try_apply
from nas.sharing.space import Assignment, Decision, SearchSpace

QUICKSTART = Path(__file__).parents[1] / "search_spaces" / "quickstart.yaml"
SPECS = [MemorySpec(context=1), MemorySpec(context=3000, batch=4, dtype="float32")]
SEEDS = range(40)


def every_walk(space: SearchSpace) -> Iterator[tuple[SharingConfig, Assignment]]:
    """All that `walk` can do: each decision in turn at each of its options."""
    pending: list[list[Any]] = [[]]
    while pending:
        script, unasked = pending.pop(), []
        answers = iter(script)

        def pick(
            name: str, options: tuple[Any, ...], answers: Iterator[Any] = answers, unasked: list[tuple[Any, ...]] = unasked
        ) -> Any:
            answer = next(answers, None)
            if answer is None:
                unasked.append(options)
            return options[0] if answer is None else answer

        config, asked = space.decode(pick)
        if unasked:
            pending += [[*script, option] for option in unasked[0]]
        else:
            yield config, asked


@lru_cache(maxsize=len(SEEDS))
def small_space(seed: int) -> tuple[SearchSpace, set[SharingConfig]]:
    """A random space with at most some thousand walks, and all its configs."""
    for n in itertools.count():
        space = tiny.random_space(random.Random(f"{seed} {n}"))
        walks = list(itertools.islice(every_walk(space), 3000))
        if 1 < len(walks) < 3000:
            return space, {config for config, _ in walks}
    raise AssertionError


def test_reach_is_what_brute_force_finds() -> None:
    for space, configs in map(small_space, SEEDS):
        for spec in SPECS:
            reach = space.size(spec, width=10**6)
            assert reach.exact
            assert reach.count == len(configs)
            sizes = [measure(space.shape, config, spec).to_data() for config in configs]
            assert reach.least == {name: min(size[name] for size in sizes) for name in LIMITS}
            assert reach.most == {name: max(size[name] for size in sizes) for name in LIMITS}


def test_the_beam_finds_the_extremes() -> None:
    """What `reach` says of a space too large to count, tried on one that is not."""
    for space, configs in map(small_space, SEEDS):
        for spec, name in itertools.product(SPECS, LIMITS):
            sizes = [measure(space.shape, config, spec).to_data()[name] for config in configs]
            for sign, best in ((1, min(sizes)), (-1, max(sizes))):
                found = space.extreme(spec, name, sign)
                assert found in configs
                assert measure(space.shape, found, spec).to_data()[name] == best


def test_assignment_is_the_inverse_of_suggest() -> None:
    for space, configs in map(small_space, SEEDS):
        for config, asked in itertools.islice(every_walk(space), 200):
            assignment = space.encode(config)
            assert assignment is not None
            assert space.suggest(optuna.trial.FixedTrial(assignment)) == config
            assert space.suggest(optuna.trial.FixedTrial(asked)) == config
        for config in tiny.configs(space.shape, 20):
            assert (space.encode(config) is not None) == (config in configs)


def plan_by_rows(shape: ModelShape, config: SharingConfig) -> Plan:
    """A config's plan, each primitive applied in turn."""
    builder = PlanBuilder(shape)
    for n, choices in enumerate((config.model_choices, *config.layers)):
        for name, value in choices:
            PRIMITIVES[name].apply(builder, value)
        if n:
            builder.commit_layer()
    return builder.plan()


def test_layers_that_were_seen_before_become_what_they_would_anew() -> None:
    """Settings that differ by few decisions: each is decoded, resolved and encoded as in a space that has seen none."""
    rng = random.Random(0)
    shipped = [SearchSpace.load(path, tiny.MHA) for path in sorted(QUICKSTART.parent.glob("*.yaml"))]
    whole = [tiny.whole_space(shape) for shape in tiny.SHAPES.values()]
    for space in [*(tiny.random_space(random.Random(seed)) for seed in SEEDS), *whole, *shipped]:
        setting = {name: rng.choice(options) for name, options in space.options.items()}
        for _ in range(20):
            changed = rng.sample(list(space.options), min(3, len(space.options)))
            setting |= {name: rng.choice(space.options[name]) for name in changed}
            config, asked = space.decode(lambda name, options: setting[name])  # noqa: B023
            assert space.decode_setting(setting) == (config, asked)
            assert list(space.decode_setting(setting)[1]) == list(asked), "in the same order"
            assert space.plan_of(setting) == config.resolve(space.shape) == plan_by_rows(space.shape, config)
        assert space.encode(config) == replace(space).encode(config)
        copy = pickle.loads(pickle.dumps(space))
        assert copy == space
        assert copy.decode_setting(setting) == (config, asked)


def test_a_layer_that_is_refused_leaves_the_builder_as_it_was() -> None:
    builder = PlanBuilder(tiny.MHA)
    builder.commit_layer()
    layers, memo = builder.layers, LayerMemo[str]()

    def refused_layer() -> str:
        PRIMITIVES["tie"].apply(builder, builder.index + 1)
        return "tied"

    with pytest.raises(UserError, match="layer 1 cannot use layer 2"):
        memo(builder, "tie", refused_layer)
    assert builder.layers is layers
    assert memo(builder, "tie", lambda: "tied") == "tied", "nothing was kept of it"


def test_of_a_deep_config_that_differs_by_one_decision_few_layers_are_decoded_again(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = replace(tiny.MHA, num_hidden_layers=40)
    space = SearchSpace.from_document(
        parse_yaml("choices: {kv: {}, ffn: {sources: adjacent}, kv_heads: {}, drop: {}}", "s"), shape
    )
    rng, decoded, commit = random.Random(0), list[int](), PlanBuilder.commit_layer
    setting = space.least_sharing() | {name: rng.choice(space.options[name]) for name in rng.sample(list(space.options), 30)}
    space.decode_setting(setting)
    monkeypatch.setattr(PlanBuilder, "commit_layer", lambda builder: (decoded.append(builder.index), commit(builder))[1])
    for name in rng.sample(list(space.options), 20):
        space.decode_setting(setting | {name: rng.choice(space.options[name])})
    assert 0 < len(decoded) < 20 * 4


@pytest.mark.parametrize("shape", tiny.SHAPES.values(), ids=tiny.SHAPES)
def test_a_space_that_may_choose_a_preset_finds_it(shape: ModelShape) -> None:
    for name, config in presets(shape):
        options: dict[str, tuple[Any, ...]] = {row.name: tuple(row.options(shape)) for row in MODEL_ROWS}
        options |= {name: tuple(dict.fromkeys((*options[name], value))) for name, value in config.model_choices}
        for i, layer in enumerate(config.layers):
            options |= {f"layer_{i}.{primitive}": (OWN, value) for primitive, value in layer}
        space = SearchSpace(shape, options)
        assignment = space.encode(config)
        assert assignment is not None, name
        assert space.decode(lambda decision, _, chosen=assignment: chosen[decision])[0] == config


def test_rows_change_what_they_say_and_nothing_else() -> None:
    space, rng = tiny.whole_space(tiny.MHA), random.Random(0)
    tried: Counter[str] = Counter()
    for _ in range(200):
        builder = PlanBuilder(tiny.MHA)
        for i in range(tiny.MHA.num_hidden_layers):
            for row in LAYER_ROWS:
                before, options = builder.current, space.options.get(f"layer_{i}.{row.name}", (OWN,))
                if rng.random() < 0.3 and try_apply(builder, row, rng.choice(options)):
                    changed = {name for name in ENTRIES if entry(before, name) != entry(builder.current, name)}
                    cleared = {name for name in changed if not entry(builder.current, name)}
                    assert changed <= set(row.writes.replace("-", "").split()), row.name
                    assert changed - cleared <= set(row.writes.split()), row.name
                    tried[row.name] += 1
            builder.commit_layer()
    assert set(tried) == {row.name for row in LAYER_ROWS}


def test_a_decision_is_the_inverse_of_its_name() -> None:
    for decision, name in ((Decision("kv", 3), "layer_3.kv"), (Decision("norms"), "norms")):
        assert str(decision) == name
        assert Decision.parse(name) == decision


def test_only_open_decisions_with_a_choice_are_asked() -> None:
    space = tiny.whole_space(tiny.MHA, tiny.FEW)
    tied = {"norms": "private"} | {f"layer_{i}.tie": 0 for i in range(1, 4)}
    _, asked = space.decode(lambda name, options: tied.get(name, OWN if OWN in options else 4))
    assert {"layer_1.attn", "layer_1.ffn", "layer_1.kv_heads"} & set(asked) == set()
    assert {"layer_1.tie", "layer_1.kv", "layer_0.kv_heads"} <= set(asked)
    _, asked = tiny.restrict(space, "layer_1.tie", (0,)).decode(lambda name, options: options[0])
    assert "layer_1.tie" not in asked


def test_the_estimate_is_within_its_error() -> None:
    space = tiny.whole_space(replace(tiny.MHA, num_hidden_layers=3), tiny.FEW)
    exact = space.size(SPECS[0], width=10**6)
    assert exact.exact
    misses = []
    for seed in range(5):
        rough = space.size(SPECS[0], width=10, seed=seed)
        assert not rough.exact
        assert rough.least == {"memory_bytes": exact.least["memory_bytes"]}
        assert rough.most == {"memory_bytes": exact.most["memory_bytes"]}
        assert rough.relative_error < 0.1
        misses.append(abs(rough.count - exact.count) / rough.count / rough.relative_error)
    assert max(misses) < 3
    assert len(set(misses)) > 1


def test_a_deep_space_is_told_to_have_more_configs_than_are_counted() -> None:
    space = tiny.whole_space(replace(tiny.MHA, num_hidden_layers=40), tiny.FEW)
    size = space.size(MemorySpec())
    assert not size.exact
    assert size.summary().startswith("more than 1e+30 distinct configs, memory ")
    extremes = (space.extreme(MemorySpec(), "memory_bytes", sign) for sign in (1, -1))
    smallest, largest = (measure(space.shape, config, MemorySpec()) for config in extremes)
    assert size.least == {"memory_bytes": smallest.memory_bytes}
    assert size.most["memory_bytes"] == largest.memory_bytes >= measure(space.shape, space.largest(), MemorySpec()).memory_bytes


def test_sources_that_are_alike_cost_the_same() -> None:
    """The beam tries one of them: its layer's plans have the same costs as those of all, in spaces where the others differ."""
    rng = random.Random(0)
    left_out = 0
    for shape in tiny.SHAPES.values():
        space = tiny.whole_space(shape, tiny.FEW)
        tree = space.prefixes(MemorySpec(64))
        for _ in range(10):
            prefix = tree.roots[0]
            while len(prefix.layers) < tree.depth - 1:
                few, every = (tree.children(prefix, unlike) for unlike in (True, False))
                left_out += len(every) - len(few)
                assert set(few) <= set(every)
                costs = [{tuple(tree.bytes(tree.grow(prefix, layer)).values()) for layer in found} for found in (few, every)]
                assert costs[0] == costs[1]
                prefix = tree.grow(prefix, rng.choice(every))
    assert left_out > 100


def test_reach_of_the_quickstart_space_takes_no_longer_than_drawing_4000_configs() -> None:
    space, rng = SearchSpace.load(QUICKSTART), random.Random(0)
    gc.collect()
    gc.freeze()  # what the tests before have left is not to be looked through meanwhile
    start = time.process_time()
    reach = space.size(MemorySpec())
    middle = time.process_time()
    for _ in range(500):
        space.sample(rng)
    drawing = 8 * (time.process_time() - middle)
    gc.unfreeze()
    assert middle - start < drawing
    assert reach.relative_error < 0.05


def test_largest_shares_nothing_that_it_need_not() -> None:
    for space, configs in map(small_space, SEEDS):
        assert space.largest() in configs
        assert not any(tiny.whole_space(space.shape).largest().layers)


# --- files


def from_choices(choices: dict[str, Any], **more: Any) -> SearchSpace:
    model = {
        "vocab_size": 64,
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "intermediate_size": 96,
    }
    return SearchSpace.from_document(Document({"model": model, "choices": choices} | more))


def test_layers_and_sources() -> None:
    for spec, expected in (
        ({}, {1: [0], 2: [0, 1], 3: [0, 1, 2]}),
        ({"sources": "previous"}, {1: [0], 2: [0, 1], 3: [0, 1, 2]}),
        ({"sources": "adjacent"}, {1: [0], 2: [1], 3: [2]}),
        ({"sources": {"window": 2}}, {1: [0], 2: [0, 1], 3: [1, 2]}),
        ({"layers": "2-3"}, {2: [0, 1], 3: [0, 1, 2]}),
        ({"layers": [3, 1]}, {1: [0], 3: [0, 1, 2]}),
    ):
        for name in (row.name for row in PRIMITIVES.values() if row.sources):
            layers = {f"layer_{i}.{name}": (OWN, *found) for i, found in expected.items()}
            assert from_choices({name: spec}).options == {"norms": ("private",)} | layers


def test_options_are_kept_in_the_order_given() -> None:
    assert from_choices({"kv_heads": {"options": [2, 8], "layers": "0-1"}}, norms=["tied", "private"]).options == {
        "norms": ("tied", "private"),
        "layer_0.kv_heads": (2, 8),
        "layer_1.kv_heads": (2, 8),
    }
    assert from_choices({"kv_heads": {}}).options["layer_3.kv_heads"] == (8, 4, 2, 1)


def test_a_limit_that_nothing_meets_is_refused_with_the_nearest() -> None:
    spec = MemorySpec(context=100, dtype="float32")
    choices = {"kv": {}, "kv_heads": {}}
    least = from_choices(choices).size(spec).least["kv_cache_bytes"]
    assert least == 2 * 1 * 8 * 4 * 100
    tight = from_choices(choices, limits={"kv_cache_bytes": least})
    tight.require_reachable(tight.size(spec))
    assert tight.meets_limits(tight.extreme(spec, "kv_cache_bytes", 1), spec)
    assert not tight.meets_limits(tight.largest(), spec)
    tighter = from_choices(choices, limits={"kv_cache_bytes": "6.24KiB"})
    with pytest.raises(UserError) as caught:
        tighter.require_reachable(tighter.size(spec))
    says = "no config of this space has kv_cache_bytes of 6389 (6.2 KiB) or less; the smallest that can be met is 6400 (6.2 KiB)"
    assert str(caught.value) == f"limits.kv_cache_bytes: {says}"


def test_samples_meet_the_limits() -> None:
    spec, rng = MemorySpec(), random.Random(0)
    space = tiny.whole_space(tiny.MHA, tiny.FEW)
    reach = space.size(spec)
    tight = replace(space, limits={"memory_bytes": (reach.least["memory_bytes"] + reach.most["memory_bytes"]) // 2})
    drawn = [tight.sample(rng, lambda config: tight.meets_limits(config, spec)) for _ in range(30)]
    assert all(measure(tiny.MHA, config, spec).memory_bytes <= tight.limits["memory_bytes"] for config in drawn)
    refused(lambda: space.sample(rng, lambda config: False), "loosen the limits")


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
    known = (replace(one, loss_increase=min(cost, 9)) for one, cost in zip(found, costs, strict=True))
    return replace(space, measured=tuple(known))


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
