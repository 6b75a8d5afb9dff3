"""Laws of SharingConfig: one computation is one config, round trips return what went in, and every word says something."""

import itertools
import json
import random
import re
from collections import Counter
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import reference
import tiny
import torch
from commands import refused
from hypothesis import given
from hypothesis import strategies as st

from nas.errors import UserError
from nas.sharing.label import LONGEST, find_config, form, label, labels
from nas.sharing.memory import MemorySpec, measure
from nas.sharing.primitives import NORMS, PRIMITIVES, Primitive
from nas.sharing.shape import ModelShape
from nas.sharing.sharing_config import SharingConfig

Choices = list[dict[str, Any]]
SHAPES = pytest.mark.parametrize("shape", tiny.SHAPES.values(), ids=tiny.SHAPES)
SMALL = replace(tiny.MHA, vocab_size=16, hidden_size=16, intermediate_size=16)
SEQ = 6  # more than a window of a fourth of the context


@lru_cache
def bank(shape: ModelShape) -> dict[str, torch.Tensor]:
    return tiny.supernet(shape).bank.state_dict()


def computed(shape: ModelShape, choices: Choices, **whole: Any) -> torch.Tensor:
    return reference.logits(shape, choices, whole, bank(shape), tiny.tokens(shape, 1, SEQ))


def spelled(config: SharingConfig) -> tuple[Choices, dict[str, Any]]:
    return [dict(layer) for layer in config.layers], dict(config.model_choices)


@pytest.mark.slow
@pytest.mark.parametrize("heads", [4, 2], ids=["mha", "gqa"])
@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_one_hash_is_one_computation(depth: int, heads: int) -> None:
    """Configs are equal exactly when what they compute, by definition and not by plan, is equal, at the same cost."""
    shape = replace(SMALL, num_hidden_layers=depth, num_key_value_heads=heads)
    speller = tiny.Speller(shape, seed=depth)
    found: dict[SharingConfig, torch.Tensor] = {}
    for _ in range(count := 60):
        choices, whole = speller.spell()
        config, logits = SharingConfig.make(shape, choices, **whole), computed(shape, choices, **whole)
        torch.testing.assert_close(logits, found.setdefault(config, logits), msg=f"{choices} {whole} is not {config}")
        again, rest = spelled(config)
        torch.testing.assert_close(logits, computed(shape, again, **rest), msg=f"{choices} {whole} is not {again} {rest}")
    assert depth > 2 or len(found) < count, "no two spellings of one config were drawn"
    assert len({config.hash for config in found}) == len(found)
    for (one, a), (other, b) in itertools.combinations(found.items(), 2):
        if torch.allclose(a, b, atol=1e-7):
            costs = [measure(shape, config, MemorySpec()) for config in (one, other)]
            assert costs[0] != costs[1], f"{one} and {other} compute the same"


def test_every_primitive_is_drawn() -> None:
    """The laws above would say little of a primitive that no spelling has in the end."""
    shape = replace(SMALL, num_hidden_layers=4)
    speller, found = tiny.Speller(shape, seed=4), Counter[str]()
    for _ in range(100):
        choices, whole = speller.spell()
        config = SharingConfig.make(shape, choices, **whole)
        found.update(name for layer in (*config.layers, config.model_choices) for name, _ in layer)
    assert {name: found[name] for name in PRIMITIVES if found[name] < 3} == {}


def test_every_word_of_a_config_says_something() -> None:
    """Without it, the config is another one, and what it computes is another function."""
    shape = replace(SMALL, num_hidden_layers=3)
    for name, places in said(shape).items():
        check_word(shape, name, places)


def check_word(shape: ModelShape, name: str, places: list[tuple[SharingConfig, int | None]]) -> None:
    tried = 0
    for config, i in places:
        choices, whole = spelled(config)
        (whole if i is None else choices[i]).pop(name)
        try:
            without = SharingConfig.make(shape, choices, **whole)
        except UserError:
            continue  # something else needs it
        if (tried := tried + 1) > 3:
            return
        assert without != config, f"{name} says nothing in {config}"
        assert not torch.allclose(
            computed(shape, choices, **whole), computed(shape, *spelled(config)[:1], **dict(config.model_choices))
        )
    assert tried


def said(shape: ModelShape) -> dict[str, list[tuple[SharingConfig, int | None]]]:
    """Of each primitive, random configs that have it, and at which layer (None: of the whole model)."""
    speller, found = tiny.Speller(shape, seed=0), {name: [] for name in PRIMITIVES}
    for _ in range(60):
        choices, whole = speller.spell()
        config = SharingConfig.make(shape, choices, **whole)
        for i, layer in (*enumerate(config.layers), (None, config.model_choices)):
            for name, _ in layer:
                found[name].append((config, i))
    return found


SAME = [
    ("a tie to a tied layer", [{}, {"tie": 0}, {"tie": 1}], [{}, {"tie": 0}, {"tie": 0}]),
    ("attention and FFN of one layer", [{}, {"attn": 0, "ffn": 0}, {}], [{}, {"tie": 0}, {}]),
    ("a tie, its FFN taken back", [{}, {"tie": 0, "ffn": 1}, {}], [{}, {"attn": 0}, {}]),
    ("a tie, its attention taken back", [{}, {"tie": 0, "attn": 1}, {}], [{}, {"ffn": 0}, {}]),
    ("each projection of one layer", [{}, {"q": 0, "k": 0, "v": 0, "o": 0}, {}], [{}, {"attn": 0}, {}]),
    ("attention, one projection taken back", [{}, {"attn": 0, "o": 1}, {}], [{}, {"q": 0, "k": 0, "v": 0}, {}]),
    ("a projection of a sharer", [{}, {"q": 0}, {"q": 1}], [{}, {"q": 0}, {"q": 0}]),
    ("a tie to a layer that drops", [{}, {"drop": "both"}, {"tie": 1}], [{}, {"drop": "both"}, {"drop": "both"}]),
    ("dropped again", [{}, {"drop": "attn"}, {"attn": 1, "drop": "both"}], [{}, {"drop": "attn"}, {"drop": "both"}]),
    ("a tie to nothing, taken back", [{}, {"drop": "both"}, {"tie": 1, "attn": 2}], [{}, {"drop": "both"}, {"drop": "ffn"}]),
    ("heads at their default", [{"kv_heads": 4}, {}, {}], [{}, {}, {}]),
    ("heads of both sides", [{"k_heads": 2, "v_heads": 2}, {}, {}], [{"kv_heads": 2}, {}, {}]),
    ("heads of one side", [{"kv_heads": 2, "k_heads": 4}, {}, {}], [{"v_heads": 2}, {}, {}]),
    ("heads of the layer it reads", [{"kv_heads": 2}, {"kv": 0, "kv_heads": 2}, {}], [{"kv_heads": 2}, {"kv": 0}, {}]),
    ("heads that come with a tie", [{"kv_heads": 2}, {"tie": 0, "kv_heads": 2}, {}], [{"kv_heads": 2}, {"tie": 0}, {}]),
    ("a tie to a reader reads too", [{}, {"kv": 0}, {"tie": 1, "kv": 0}], [{}, {"kv": 0}, {"tie": 1}]),
    ("keys and values of one layer", [{}, {"k_from": 0, "v_from": 0}, {}], [{}, {"kv": 0}, {}]),
    ("a tie to one that reads a later layer", [{"kv": 2}, {"tie": 0}, {}], [{"kv": 2}, {"tie": 0, "kv": 2}, {}]),
    ("the map of one that reuses a map", [{}, {"attn_map": 0}, {"attn_map": 1}], [{}, {"attn_map": 0}, {"attn_map": 0}]),
    ("a tie to one that reuses a map", [{}, {"attn_map": 0}, {"attn": 1, "attn_map": 0}], [{}, {"attn_map": 0}, {"attn": 1}]),
    ("the output of the layer below", [{}, {"kv_input": 0}, {"kv_input": 1}], [{}, {}, {}]),
    ("the output of a layer that runs nothing", [{}, {"drop": "both"}, {"kv_input": 0}], [{}, {"drop": "both"}, {}]),
    ("a head of a tied head", [{}, {"heads": "2=0.1"}, {"heads": "0=1.2"}], [{}, {"heads": "2=0.1"}, {"heads": "0=0.1"}]),
    ("heads in another order", [{}, {"heads": "3=0.1 0=0.0"}, {}], [{}, {"heads": "0=0.0 3=0.1"}, {}]),
    ("the width as it is", [{"intermediate": 48}, {}, {}], [{}, {}, {}]),
    (
        "a width that comes with a tie",
        [{"intermediate": 24}, {"tie": 0, "intermediate": 24}, {}],
        [{"intermediate": 24}, {"ffn": 0, "attn": 0}, {}],
    ),
    ("two experts of four", [{"experts": 4, "active_experts": 2}, {}, {}], [{"experts": 4}, {}, {}]),
    ("its own router", [{"experts": 4}, {"ffn": 0, "router": 1}, {}], [{"experts": 4}, {"ffn": 0}, {}]),
    (
        "every atom",
        [{"factor": "dictionary 2 at 0 for k q using 1 0"}, {}, {}],
        [{"factor": "dictionary 2 at 0 for q k"}, {}, {}],
    ),
    (
        "factors one by one",
        [{"factor": "basis 8 at 0 for k; basis 8 at 0 for q"}, {}, {}],
        [{"factor": "basis 8 at 0 for q k"}, {}, {}],
    ),
    ("own everything", [{"tie": 0}, {"attn": 1, "ffn": 1, "kv": 1, "q": 1}, {"tie": 2, "k_from": 2}], [{}, {}, {}]),
]


def test_spellings_of_one_config() -> None:
    shape = replace(tiny.MHA, num_hidden_layers=3)
    for (name, one, other), norms in itertools.product(SAME, NORMS):
        a, b = (SharingConfig.make(shape, layers, norms=norms) for layers in (one, other))
        assert (a, a.hash) == (b, b.hash), name
        torch.testing.assert_close(computed(shape, one, norms=norms), computed(shape, other, norms=norms), msg=name)


def test_norms_say_something_only_where_something_is_tied() -> None:
    shape = tiny.MHA
    for choices in ([{}] * 4, [{}, {"kv": 0}, {}, {"kv_heads": 2}]):
        assert SharingConfig.make(shape, choices, norms="tied") == SharingConfig.make(shape, choices, norms="private")
    tied = [{}, {"ffn": 0}, {}, {}]
    assert SharingConfig.make(shape, tied, norms="tied") != SharingConfig.make(shape, tied, norms="private")


def test_a_label_is_short_and_of_the_canonical_config() -> None:
    """Whatever way a config is spelled, at any depth, it has one label, of characters that a shell leaves alone."""
    for depth in (1, 4, 30):
        shape = replace(SMALL, num_hidden_layers=depth)
        speller, words = tiny.Speller(shape, seed=depth), set[str]()
        for _ in range(40):
            choices, whole = speller.spell()
            config = SharingConfig.make(shape, choices, **whole)
            again = SharingConfig.make(shape, [dict(layer) for layer in config.layers], **dict(config.model_choices))
            assert label(config) == label(again) == label(SharingConfig.from_yaml(shape, config.to_yaml()))
            assert len(label(config)) <= LONGEST
            assert re.fullmatch(r"[a-z0-9.]+(-[a-z0-9.]+)*", label(config))
            assert (label(config) == "dense") == config.is_dense
            words |= {re.sub(r"x?\d+$", "", word) for word in label(config).split("-")}
        assert depth == 1 or len(words) > 10


def test_a_label_counts_the_layers_of_each_primitive() -> None:
    """Every row of the table has a word of its own, without an entry elsewhere."""
    assert len({form(row) for row in PRIMITIVES.values()}) == len(PRIMITIVES)
    shape = replace(tiny.MHA, num_hidden_layers=6)
    rows = [{}, {"ffn": 0, "kv": 0}, {"ffn": 0, "kv_heads": 2}, {"kv_heads": 1}, {"tie": 0}, {"drop": "ffn", "kv_heads": 1}]
    assert label(SharingConfig.make(shape, rows)) == "tie1-ffn2-dropffn1-kv1-etc"
    assert label(SharingConfig.make(shape, [{}, *rows[1:4], {}, {}])) == "ffn2-kv1-gqa1x1-gqa2x1"
    assert label(SharingConfig.make(shape, [{}] * 6, tie_word_embeddings=False)) == "notiedhead"
    made = Primitive("new_way", "", "", lambda builder, value: None)
    assert (form(made), form(replace(made, sources=True)), form(replace(made, short="nw"))) == ("newway{}", "newway", "nw")


@given(st.sets(st.integers(0, 63), min_size=1), st.randoms(use_true_random=False))
def test_equal_labels_are_told_apart(readers: set[int], rng: random.Random) -> None:
    """By digits of the hash, and only where they must be; each name finds its config, and the hash always does."""
    shape = replace(tiny.MHA, num_hidden_layers=6)
    configs = [SharingConfig.make(shape, [{}] + [{"ffn": 0} if n >> i & 1 else {} for i in range(5)]) for n in readers]
    found = labels(rng.sample(configs, len(configs)))
    distinct = set(configs)
    assert found.keys() == distinct
    assert len(set(found.values())) == len(distinct)
    same = Counter(label(config) for config in distinct)
    for config, name in found.items():
        assert name.partition("@")[0] == label(config)
        assert ("@" in name) == (same[label(config)] > 1)
        assert find_config(name, configs) == find_config(config.hash, configs) == config
        assert find_config(f"{label(config)}@{config.hash[:8]}", configs) == config
        if same[label(config)] > 1:
            said = f"{same[label(config)]} configs are called {label(config)}; use {label(config)}@"
            with pytest.raises(UserError, match=said):
                find_config(label(config), configs)
    assert find_config("ffn6", configs) is None


@SHAPES
def test_round_trips(shape: ModelShape, tmp_path: Path) -> None:
    for config in tiny.configs(shape):
        assert SharingConfig.of_plan(shape, config.resolve(shape)) == config
        assert SharingConfig.from_yaml(shape, config.to_yaml()) == config
        assert SharingConfig.from_data(shape, config.to_data()) == config
        assert SharingConfig.from_data(shape, json.loads(json.dumps(config.to_data()))).hash == config.hash
        (tmp_path / "sharing.yaml").write_text(config.to_yaml())
        assert SharingConfig.load(shape, tmp_path / "sharing.yaml") == config


REFUSED = [
    ([{"tie": 1}], "tie"),
    ([{}, {"kv": 0}, {"kv": 1}], "kv"),
    ([{}, {"kv": 0}, {"tie": 1, "kv": 2}], "kv"),
    ([{"kv": 1}, {"kv": 0}], "kv"),
    ([{}, {"drop": "attn"}, {"kv": 1}], "kv"),
    ([{}, {"k_from": 0}, {"kv": 1}], "kv"),
    ([{"kv": 2}, {}, {"drop": "attn"}], "2"),
    ([{"kv": 2, "window": 4}], "kv"),
    ([{"kv": 4}], "kv"),
    ([{}, {"k_from": 2}], "k_from"),
    ([{}, {"kv": 0}, {"k_from": 1}], "k_from"),
    ([{}, {"kv": 0}, {"k": 1}], "k"),
    ([{}, {"heads": "0=0.0"}, {"q": 1}], "q"),
    ([{}, {"heads": "0=0.0", "q": 0}], "heads"),
    ([{"kv_heads": 2}, {"heads": "0=0.0"}], "heads"),
    ([{}, {"heads": "0=0.0 1=0.1 2=0.2 3=0.3"}], "heads"),
    ([{}, {"heads": "0=0.4"}], "heads"),
    ([{}, {"heads": "0=1.0"}], "heads"),
    ([{}, {"attn_map": 0, "kv": 0}], "attn_map"),
    ([{}, {"attn_map": 0, "window": 4}], "attn_map"),
    ([{"kv": 1}, {}, {"attn_map": 0}], "attn_map"),
    ([{}, {"drop": "attn"}, {"attn_map": 1}], "attn_map"),
    ([{}, {}, {"kv": 0, "kv_input": 0}], "kv_input"),
    ([{}, {"kv_input": 1}], "kv_input"),
    ([{"kv_heads": 3}], "kv_heads"),
    ([{}, {"tie": 0, "kv_heads": 2}], "kv_heads"),
    ([{}, {"ffn": 0, "intermediate": 8}], "intermediate"),
    ([{"intermediate": 0}], "intermediate"),
    ([{"experts": 1}], "experts"),
    ([{"experts": 5}], "experts"),
    ([{"experts": 4, "active_experts": 5}], "active_experts"),
    ([{"active_experts": 1}], "active_experts"),
    ([{"experts": 4}, {"router": 0}], "router"),
    ([{"experts": 4}, {"experts": 2, "router": 0}], "router"),
    ([{"window": 0}], "window"),
    ([{"window": 16}], "window"),
    ([{"window": 4}, {"kv": 0}], "kv"),
    ([{"window": 2}, {"kv": 0, "window": 4}], "kv"),
    ([{"window": 4}, {"k_from": 0}], "k_from"),
    ([{"value_residual": 0.5}], "value_residual"),
    ([{}, {"value_residual": 1}], "value_residual"),
    ([{"v_heads": 2}, {"value_residual": 0.5}], "value_residual"),
    ([{}, {"v_from": 0, "value_residual": 0.5}], "value_residual"),
    ([{"factor": "dictionary 2 at 1 for q"}], "factor"),
    ([{}, {"factor": "dictionary 2 at 0 for q"}], "factor"),
    ([{"factor": "basis 4 at 0 for q"}, {"factor": "basis 8 at 0 for q"}], "factor"),
    ([{"factor": "dictionary 2 at 0 for k"}, {"kv_heads": 2, "factor": "dictionary 2 at 0 for k"}], "factor"),
    ([{}, {"tie": 0, "factor": "basis 4 at 1 for q"}], "factor"),
    ([{"factor": "dictionary 2 at 0 for q using 2"}], "factor"),
    ([{"factor": "basis 4 at 0 for q using 1"}], "factor"),
    ([{"factor": "lattice 4 at 0 for q"}], "factor"),
    ([{"factor": "dictionary 2 at 0 for q; basis 4 at 0 for q"}], "factor"),
    ([{"factor": "basis 4 at 0 for k q k"}], "factor"),
    ([{"delta": 2}], "delta"),
    ([{}, {"tie": 0, "delta": 0}], "delta"),
    ([{"wndow": 4}], "wndow"),
]


def test_what_cannot_be_is_refused_by_name() -> None:
    for choices, primitive in REFUSED:
        with pytest.raises(UserError) as caught:
            SharingConfig.make(tiny.MHA, [*choices, *[{} for _ in range(4 - len(choices))]])
        assert caught.value.where.endswith(f".{primitive}"), choices
        assert caught.value.hint, choices
        assert "None" not in str(caught.value)
    for whole, says in (
        ({"norms": "shared"}, "norms: 'shared' is not a way to treat norms; use private or tied"),
        ({"embedding_rank": 32}, "embedding_rank: 32 is not less than hidden_size=32"),
        ({"embedding_rank": -1}, "embedding_rank: -1 is not"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings: 1 is neither true nor false"),
        ({"step_embedding": "yes"}, "step_embedding: 'yes' is neither true nor false"),
        ({"tie": 0}, "tie: "),
    ):
        with pytest.raises(UserError) as caught:
            SharingConfig.make(tiny.MHA, [{}] * 4, **whole)
        assert str(caught.value).startswith(says)


def test_a_config_for_another_depth_is_refused() -> None:
    config = SharingConfig.make(tiny.MHA, [{}] * 4)
    refused(lambda: config.resolve(replace(tiny.MHA, num_hidden_layers=2)), "4 layers for a model of num_hidden_layers=2")
