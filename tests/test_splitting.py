"""Laws of `nas.splitting`: the partition is the best there is, every config has one leaf, and gradients leave no trace."""

import json
import random
import weakref
from collections.abc import Sequence
from dataclasses import replace
from itertools import product

import pytest
import tiny
import torch
from commands import refused
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from nas.config import parse_yaml
from nas.errors import UserError
from nas.model.supernet import Supernet, standalone
from nas.sharing.distribution import single_decisions
from nas.sharing.memory import MemorySpec, measure
from nas.sharing.sharing_config import SharingConfig
from nas.sharing.space import SearchSpace
from nas.splitting import (
    METHODS,
    Comparison,
    Split,
    SplitSpec,
    SplitTree,
    ancestor,
    compare,
    conflicts,
    draw_assignments,
    in_process,
    options_in_use,
    split_leaves,
)
from nas.splitting.gradients import (
    CRITERIA,
    DISTANCES,
    MOST_TRIED,
    Gradient,
    Products,
    best_partition,
    cosine_distances,
    gradient_of,
)

MODEL = "{vocab_size: 64, hidden_size: 32, num_hidden_layers: %d, num_attention_heads: 4, intermediate_size: 48}"
SPACES = {
    "all": "tie: {sources: previous}, ffn: {sources: previous}, kv: {sources: previous}, kv_heads: {options: [4, 2, 1]}",
    "parts": "attn: {sources: adjacent}, ffn: {sources: previous}, kv: {sources: {window: 2}}",
    "heads": "tie: {sources: previous}, kv_heads: {options: [1, 4]}",
}


def make_space(choices: str, depth: int = 3, norms: str = "private") -> SearchSpace:
    text = f"model: {MODEL % depth}\nchoices: {{{choices}}}\nnorms: {norms}\n"
    return SearchSpace.from_document(parse_yaml(text, "space.yaml"))


def make_supernet(space: SearchSpace) -> Supernet:
    return Supernet(space.shape, torch.Generator().manual_seed(0))


def make_batches(count: int = 2, rows: int = 2, seq: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 64, (rows, seq + 1), generator=generator) for _ in range(count)]


def grow(spec: SplitSpec, space: SearchSpace, seed: int = 0, memory: MemorySpec | None = None) -> SplitTree:
    tree, nets = SplitTree(), {"0": make_supernet(space)}
    rng = random.Random(seed)
    for _ in range(spec.rounds):
        tree, _ = split_leaves(spec, tree.spaces(space, memory), in_process(nets), make_batches(spec.batches), rng)
        nets = {leaf: nets[ancestor(leaf, nets)] for leaf in tree.leaves()}
    return tree


def every_config(space: SearchSpace) -> set[SharingConfig]:
    """By brute force: every combination of every option."""
    names = list(space.options)
    settings = (dict(zip(names, combination, strict=True)) for combination in product(*space.options.values()))
    return {space.decode(lambda name, options, chosen=chosen: chosen[name])[0] for chosen in settings}


def scatter_of(vectors: Tensor, side: Sequence[int]) -> float:
    """The squared distances of unit vectors from the mean of their group, added up."""
    groups = [vectors[[n for n, s in enumerate(side) if s == g]] for g in set(side)]
    return sum(float((group - group.mean(0)).square().sum()) for group in groups)


def plain_distance(supernet: Supernet, pair: Sequence[SharingConfig], rows: Tensor) -> float:
    """1 − cosine by two stand-alone models and `backward`, over the names that both have."""
    grads = []
    for config in pair:
        model = standalone(supernet.subnet(config))
        logits = model(rows[:, :-1])
        F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()).backward()
        grads.append({name: weight.grad for name, weight in model.named_parameters()})
    both = [name for name in grads[0] if name in grads[1]]
    one, other = (torch.cat([grad[name].flatten() for name in both]).double() for grad in grads)
    return float(1 - one @ other / (one.norm() * other.norm()))


# The partition


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 7), st.integers(0, 10_000))
def test_the_partition_is_the_best_two_means_of_the_gradients_directions(n: int, seed: int) -> None:
    vectors = F.normalize(torch.randn(n, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=1)
    side, score = best_partition(1 - vectors @ vectors.T)
    cuts = [cut for cut in product((0, 1), repeat=n) if len(set(cut)) == 2]
    least = min(scatter_of(vectors, cut) for cut in cuts)
    assert scatter_of(vectors, side) == pytest.approx(least)
    assert score == pytest.approx((scatter_of(vectors, [0] * n) - least) / n)
    assert side[0] == 0


def test_with_more_options_than_can_be_tried_a_planted_partition_is_found() -> None:
    planted = torch.tensor([n * 7 % 3 == 0 for n in range(MOST_TRIED + 9)])
    noise = torch.rand(len(planted), len(planted), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    distances = (planted[:, None] != planted).double() * 0.5 + 0.2 * (noise + noise.T)
    side, _ = best_partition(distances.fill_diagonal_(0))
    assert torch.equal(torch.tensor(side).bool(), planted ^ planted[0])


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 6), st.integers(0, 10_000), st.sampled_from(["sum", "mean"]))
def test_the_other_criteria_are_of_the_pairs_between_the_groups(n: int, seed: int, name: str) -> None:
    distances = torch.rand(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    distances = (distances + distances.T).fill_diagonal_(0)

    def score_of(cut: Sequence[int]) -> float:
        parted = [float(distances[i, j]) for j in range(n) for i in range(j) if cut[i] != cut[j]]
        return sum(parted) / (len(parted) if name == "mean" else 1)

    side, score = best_partition(distances, name)
    assert score == pytest.approx(score_of(side))
    assert score == pytest.approx(max(score_of(cut) for cut in product((0, 1), repeat=n) if len(set(cut)) == 2))


# Gradients


def test_distances_are_those_of_a_plain_backward() -> None:
    for choices in SPACES.values():
        space = tiny.restrict(make_space(choices), "layer_0.kv_heads", (4,)) if "kv_heads" in choices else make_space(choices)
        space = SearchSpace(space.shape, {name: opts for name, opts in space.options.items() if "kv_heads" not in name})
        supernet, rows, rng = make_supernet(space), make_batches()[0], random.Random(3)
        configs = [space.largest(), *(space.sample(rng) for _ in range(3))]
        distances = cosine_distances(products(*(gradient_of(supernet, config, rows) for config in configs)))
        for i, j in product(range(4), repeat=2):
            plain = plain_distance(supernet, (configs[i], configs[j]), rows)
            assert distances[i, j].item() == pytest.approx(plain, abs=2e-5)
        assert distances.max() > 1e-3


def test_a_gradient_is_of_the_parameters_that_the_subnet_computes_with() -> None:
    for choices in SPACES.values():
        space, rng = make_space(choices), random.Random(1)
        supernet = make_supernet(space)
        for config in (space.largest(), space.extreme(MemorySpec(), "weight_bytes", 1), space.sample(rng)):
            used = {id(weight) for weight in supernet.subnet(config).parameters()}
            trained = [part is not None for part in gradient_of(supernet, config, make_batches()[0])]
            assert trained == [id(weight) in used for weight in supernet.parameters()]
        smallest = space.extreme(MemorySpec(), "weight_bytes", 1)
        assert None in gradient_of(supernet, smallest, make_batches()[0])


def test_distances_compare_what_both_train() -> None:
    one, two = gradient([3, 4], [100, 0]), gradient([4, 3], None)
    for distances in DISTANCES.values():
        assert distances(products(one, two))[0, 1].item() == pytest.approx(1 - 24 / 25), (
            "an untied layer's own gradient does not count"
        )
        assert distances(products(gradient([1], None), gradient(None, [1])))[0, 1] == 0, "nothing in common"
    one, two = gradient([1000, 0], [1, 0]), gradient([1000, 0], [-1, 0])
    assert DISTANCES["global"](products(one, two))[0, 1] < 1e-5, "the large Parameter's"
    assert DISTANCES["per_tensor"](products(one, two))[0, 1].item() == pytest.approx(1), "half of it the small one's"


def gradient(*parts: list[float] | None) -> Gradient:
    """A gradient by its Parameters, None where one is not trained."""
    return [None if part is None else torch.tensor(part, dtype=torch.float32) for part in parts]


def products(*gradients: Gradient) -> Products:
    return Products.of(gradients.__getitem__, len(gradients), held=len(gradients))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 7), st.integers(1, 8), st.integers(0, 10_000))
def test_products_are_those_of_flat_gradients_however_few_are_held(count: int, held: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(count, 4, generator=generator) < 0.7
    kept[:, 0] = True
    made = [[torch.randn(3, n + 1, generator=generator) if kept[i, n] else None for n in range(4)] for i in range(count)]
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    def make(n: int) -> Gradient:
        nonlocal most
        parts = [None if part is None else part.clone() for part in made[n]]
        alive.append(weakref.ref(next(part for part in parts if part is not None)))
        most = max(most, sum(ref() is not None for ref in alive))
        return parts

    found = Products.of(make, count, held)
    assert most <= held + 1
    assert len(alive) == count or held < count - 1
    flat = torch.stack([torch.cat([torch.zeros(3 * n + 3) if p is None else p.flatten() for n, p in enumerate(g)]) for g in made])
    torch.testing.assert_close(found.dots.sum(-1).float(), flat @ flat.T)
    assert torch.equal(found.trained.bool(), kept)
    assert torch.equal(found.dots, products(*made).dots)


def test_comparisons_are_the_same_however_few_gradients_are_held() -> None:
    space = SplitTree().space_of(make_space(SPACES["all"]), "0")
    supernet, rows, rng = make_supernet(space), make_batches()[0], random.Random(0)
    setting = {name: rng.choice(options) for name, options in space.options.items()}
    given = Comparison(space, {name: options for name, options in space.options.items() if len(options) > 1}, setting, rows)
    (found, tokens), (again, same) = compare(supernet, given), compare(supernet, given, held_bytes=0)
    assert tokens == same
    assert all(torch.equal(found[name], again[name]) for name in found)
    assert any(matrix.any() for matrix in found.values())


def test_conflicts_are_the_mean_over_batches_of_plain_distances() -> None:
    space = make_space("ffn: {sources: previous, layers: [3]}", depth=4)
    supernet, batches, name = make_supernet(space), make_batches(3), "layer_3.ffn"
    options = space.options[name]
    compare, whole = in_process({"0": supernet}), SplitTree().space_of(space, "0")
    found, tokens = conflicts(compare, whole, {name: options}, batches, random.Random(0))
    configs = [space.decode(lambda _, __, option=option: option)[0] for option in options]
    for i, j in product(range(len(options)), repeat=2):
        plain = [plain_distance(supernet, (configs[i], configs[j]), rows) for rows in batches]
        assert found[name][i, j].item() == pytest.approx(sum(plain) / 3, abs=2e-5)
    assert tokens == 3 * len(options) * 2 * 8, "each option runs once on each batch"


def test_options_that_compute_the_same_and_closed_decisions_have_no_conflict() -> None:
    space = tiny.restrict(make_space("kv: {sources: previous}"), "layer_1.kv", (0,))
    found, _ = conflicts_of(space, "layer_2.kv")
    own, zero, one = range(3)
    assert found[zero, one] == 0
    assert found[own, zero] > 0
    never = make_space("tie: {sources: previous, layers: [1]}, ffn: {sources: previous, layers: [1]}")
    found, tokens = conflicts_of(tiny.restrict(never, "layer_1.tie", (0,)), "layer_1.ffn")
    assert not found.any()
    assert tokens == 2 * 2 * 8, "the setting's own gradient, once a batch"


def conflicts_of(space: SearchSpace, decision: str) -> tuple[Tensor, int]:
    leaf, decisions = SplitTree().space_of(space, "0"), {decision: space.options[decision]}
    found, tokens = conflicts(in_process({"0": make_supernet(space)}), leaf, decisions, make_batches(2), random.Random(0))
    return found[decision], tokens


def test_looking_leaves_no_trace() -> None:
    space = make_space(SPACES["all"])
    supernet = make_supernet(space)
    before = {name: weight.clone() for name, weight in supernet.state_dict().items()}
    state = torch.get_rng_state(), random.getstate()
    split_leaves(SplitSpec(), SplitTree().spaces(space), in_process({"0": supernet}), make_batches(), random.Random(0))
    assert all(torch.equal(weight, before[name]) for name, weight in supernet.state_dict().items())
    assert all(weight.grad is None for weight in supernet.parameters())
    assert torch.equal(torch.get_rng_state(), state[0])
    assert random.getstate() == state[1]


# The tree


@pytest.mark.parametrize("method", METHODS)
def test_the_leaves_partition_the_space(method: str) -> None:
    check_leaves(method, SPACES["heads"], "private")


@pytest.mark.slow
def test_the_leaves_partition_every_space() -> None:
    for method, choices, norms in product(METHODS, SPACES.values(), ["private", "[tied, private]"]):
        check_leaves(method, choices, norms)


def check_leaves(method: str, choices: str, norms: str) -> None:
    space = make_space(choices, norms=norms)
    tree = grow(SplitSpec(method=method, splits=2, batches=1), space)
    spaces, rng = tree.spaces(space), random.Random(5)
    configs, routes = every_config(space), {}
    for config in configs:
        routes[config] = [name for name, leaf in spaces.items() if leaf.contains(config)]
        assert routes[config] == [tree.route(space, config)]
    for name, leaf in spaces.items():
        mine = {config for config in configs if routes[config] == [name]}
        assert mine, "no leaf is empty"
        assert {leaf.sample(rng) for _ in range(20)} <= mine
        assert leaf.size(MemorySpec(), width=100_000).count == len(mine)
        assert leaf.largest() in mine
        assert leaf.extreme(MemorySpec(), "weight_bytes", 1, width=1) in mine, "also where the beam ends in a dead end"
        for limit in ("weight_bytes", "memory_bytes"):
            sizes = [measure(space.shape, config, MemorySpec()).to_data()[limit] for config in mine]
            for sign, size in ((1, min(sizes)), (-1, max(sizes))):
                extreme = leaf.extreme(MemorySpec(), limit, sign, width=100_000)
                assert extreme in mine
                assert measure(space.shape, extreme, MemorySpec()).to_data()[limit] == size


def test_a_tree_comes_from_its_seed_and_survives_json() -> None:
    space = make_space(SPACES["heads"])
    for method in METHODS:
        spec = SplitSpec(method=method, splits=2, batches=2)
        tree = grow(spec, space, seed=7)
        assert tree == grow(spec, space, seed=7)
        assert SplitTree.from_data(json.loads(json.dumps(tree.to_data()))) == tree


def test_each_round_doubles_the_leaves_while_there_is_a_decision_left() -> None:
    few = make_space("ffn: {sources: previous, layers: [2]}")
    for method in ("random", "gradient-matching"):
        for splits in (1, 2):
            tree = grow(SplitSpec(method=method, splits=splits, batches=1), make_space(SPACES["all"]))
            assert len(tree.leaves()) == 2**splits
        tree = grow(SplitSpec(method=method, splits=3, batches=1), few)
        assert len(tree.leaves()) == 3, "one leaf for each of layer 2's three options"


def test_gradient_matching_splits_where_its_own_figures_say() -> None:
    space = make_space(SPACES["heads"])
    for similarity, criterion in product(DISTANCES, CRITERIA):
        split = grow(SplitSpec(batches=3, similarity=similarity, criterion=criterion), space).split
        assert split is not None
        side, score = best_partition(torch.tensor(split.distances, dtype=torch.float64), criterion)
        assert tuple(split.group_of(option) for option in split.options) == side
        assert score == pytest.approx(split.scores[split.decision])
        assert split.scores[split.decision] == max(split.scores.values()) > 0


def test_few_shot_gives_each_option_of_one_decision_a_leaf() -> None:
    space = make_space(SPACES["all"])
    given = grow(SplitSpec(method="exhaustive", decision="layer_2.tie"), space)
    assert given.split == Split("layer_2.tie", (("own",), (0,), (1,)))
    assert given.leaves() == ("0-0", "0-1", "0-2")
    default = grow(SplitSpec(method="exhaustive", splits=1), space).split
    assert default is not None
    assert default.decision == "layer_1.tie", "the first that every config is asked, of two options"


def test_where_a_decision_is_not_open_a_config_goes_with_the_first_option() -> None:
    space = make_space(SPACES["all"])
    tree = grow(SplitSpec(method="exhaustive", decision="layer_2.ffn"), space)
    tied = SharingConfig.make(space.shape, [{}, {}, {"tie": 1}])
    shared = SharingConfig.make(space.shape, [{}, {}, {"ffn": 1}])
    assert "layer_2.ffn" not in (space.encode(tied) or {})
    assert tree.route(space, tied) == tree.route(space, space.largest()) == "0-0"
    assert tree.route(space, shared) == "0-2"


def test_a_config_from_another_space_is_refused() -> None:
    space = make_space(SPACES["heads"])
    with pytest.raises(UserError, match="not in this search space"):
        grow(SplitSpec(method="random"), space).route(space, SharingConfig.make(space.shape, [{}, {"ffn": 0}, {}]))


def test_leaves_keep_to_the_limits() -> None:
    spec, free = MemorySpec(), make_space(SPACES["all"])
    reach = free.size(spec)
    half = (reach.least["memory_bytes"] + reach.most["memory_bytes"]) // 2
    space = SearchSpace(free.shape, free.options, {"memory_bytes": half})
    tree = grow(SplitSpec(splits=2, batches=1), space, memory=spec)
    rng = random.Random(0)
    for leaf in tree.spaces(space, spec).values():
        assert all(measure(space.shape, leaf.sample(rng), spec).memory_bytes <= half for _ in range(20))


def test_a_leafs_ancestor_is_its_parent_after_a_round_and_goes_by_path() -> None:
    space = make_space(SPACES["heads"])
    once, twice = (grow(SplitSpec(method="random", splits=splits), space) for splits in (1, 2))
    assert twice.leaves() == ("0-0-0", "0-0-1", "0-1-0", "0-1-1")
    for leaf in twice.leaves():
        assert ancestor(leaf, once.leaves()) == leaf[:3]
        assert ancestor(leaf, twice.leaves()) == leaf, "a leaf that is not split continues from itself"
    assert ancestor("0-11", ["0", "0-1"]) == "0"


# What a user may write


def test_stages_add_up() -> None:
    assert SplitSpec(method="none").stages(100) == (100,)
    for method, splits in product(METHODS, [1, 2, 3]):
        spec = SplitSpec(method=method, splits=splits, at=0.4)
        stages = spec.stages(101)
        assert sum(stages) == 101
        assert len(stages) == spec.rounds + 1
        assert spec.rounds == 0 or sum(stages[:-1]) == 40


def test_a_wrong_setting_is_refused_with_its_place() -> None:
    wrong = {"method": "gradient-maching", "criterion": "means", "similarity": "globl", "splits": 0, "batches": 0, "batch": 0}
    for name, value in (wrong | {"at": 1.0, "decision": "layer_1.kv"}).items():
        with pytest.raises(UserError) as caught:
            SplitSpec(**{name: value})
        assert caught.value.where.endswith(name)


def test_a_decision_that_the_space_or_its_limits_do_not_leave_open_is_refused() -> None:
    space, memory = make_space(SPACES["all"], norms="[tied, private]"), MemorySpec()
    for decision in ("layer_9.kv", "layer_0.kv", "layer_2.kvs", "norms"):
        spec = SplitSpec(method="exhaustive", decision=decision)
        with pytest.raises(UserError, match=r"split\.decision"):
            spec.check(space)
        assert grow(spec, space).split is None
    space, spec = make_space(SPACES["all"], depth=2), SplitSpec(method="exhaustive", decision="layer_1.tie")
    spec.check(space, memory)
    tied = SharingConfig.make(space.shape, [{}, {"tie": 0}])
    tight = replace(space, limits={"weight_bytes": measure(space.shape, tied, memory).weight_bytes})
    refused(lambda: spec.check(tight, memory), "split.decision: fewer than two options of layer_1.tie are in use")


def test_splits_near_the_front_leave_out_what_is_ruled_out() -> None:
    """An option that is hopeless alone is compared with none; otherwise the same seed gives the same split."""
    space, memory = make_space(SPACES["parts"]), MemorySpec()
    singles = list(single_decisions(space, memory))
    hopeless = next(one for one in singles if one.decision.endswith(".ffn"))
    costs = (replace(one, loss_increase=9.0 if one == hopeless else 0.1) for one in singles)
    space = replace(space, measured=tuple(costs))
    spec = SplitSpec(batches=2, configs="near_front")
    one, other = (grow(spec, space, seed=3, memory=memory) for _ in range(2))
    assert one == other
    assert one.split is not None
    leaf = SplitTree().space_of(space, "0", memory)
    in_use = options_in_use(leaf, draw_assignments(leaf, random.Random(0), configs="near_front"))
    assert hopeless.option not in in_use.get(hopeless.decision, ())
    assert hopeless.option in options_in_use(leaf, draw_assignments(leaf, random.Random(0)))[hopeless.decision]
