"""Laws of SharingConfig and the zoo: one computation is one config, round trips return what went in, presets are their rules."""

from __future__ import annotations

import itertools
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import reference
import tiny
import torch

from nas.errors import UserError
from nas.memory import MemorySpec, measure
from nas.model import ATTENTION, FFN
from nas.shape import ModelShape
from nas.sharing import NORMS, PRIMITIVES, SharingConfig
from nas.supernet import dense_plan
from nas.zoo import PRESETS, preset, presets

Choices = list[dict[str, Any]]
SHAPES = pytest.mark.parametrize("shape", tiny.SHAPES.values(), ids=tiny.SHAPES)


def spelled_at_random(shape: ModelShape, rng: random.Random) -> tuple[Choices, str]:
    """Valid choices as a person might write them, canonical or not."""
    norms, choices = rng.choice(NORMS), []
    for i in range(shape.num_hidden_layers):
        for _ in range(100):
            layer = {}
            for row in rng.sample(list(PRIMITIVES.values()), rng.choice([0, 1, 1, 2, 3])):
                layer[row.name] = rng.randint(0, i) if row.sources else rng.choice(row.options(shape))
            try:
                SharingConfig.make(replace(shape, num_hidden_layers=i + 1), [*choices, layer], norms)
            except UserError:
                continue
            choices.append(layer)
            break
        else:
            choices.append({})
    return choices, norms


def computed(shape: ModelShape, choices: Choices, norms: str) -> torch.Tensor:
    return reference.logits(shape, choices, norms, tiny.supernet(shape).bank.state_dict(), tiny.tokens(shape, 1, 4))


@pytest.mark.parametrize("base", [tiny.MHA, tiny.GQA], ids=["mha", "gqa"])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_one_hash_is_one_computation(base: ModelShape, depth: int) -> None:
    """Configs are equal exactly when what they compute, by definition and not by plan, is equal."""
    shape, rng = replace(base, num_hidden_layers=depth), random.Random(depth)
    spellings = [spelled_at_random(shape, rng) for _ in range(60)]
    by_hash: dict[str, torch.Tensor] = {}
    for choices, norms in spellings:
        config, logits = SharingConfig.make(shape, choices, norms), computed(shape, choices, norms)
        torch.testing.assert_close(logits, by_hash.setdefault(config.hash, logits), msg=f"{choices} {norms} is not {config}")
    assert depth == 1 or len(by_hash) < len(spellings), "no two spellings of one config were drawn"
    for (one, a), (other, b) in itertools.combinations(by_hash.items(), 2):
        assert not torch.allclose(a, b, atol=1e-7), f"{one} and {other} compute the same"


SAME = [
    ("a tie to a tied layer", [{}, {"tie": 0}, {"tie": 1}], [{}, {"tie": 0}, {"tie": 0}]),
    ("attention and FFN of one layer", [{}, {"attn": 0, "ffn": 0}, {}], [{}, {"tie": 0}, {}]),
    ("a tie, its FFN taken back", [{}, {"tie": 0, "ffn": 1}, {}], [{}, {"attn": 0}, {}]),
    ("a tie, its attention taken back", [{}, {"tie": 0, "attn": 1}, {}], [{}, {"ffn": 0}, {}]),
    ("heads at their default", [{"kv_heads": 4}, {}, {}], [{}, {}, {}]),
    ("heads of the layer it reads", [{"kv_heads": 2}, {"kv": 0, "kv_heads": 2}, {}], [{"kv_heads": 2}, {"kv": 0}, {}]),
    ("heads that come with a tie", [{"kv_heads": 2}, {"tie": 0, "kv_heads": 2}, {}], [{"kv_heads": 2}, {"tie": 0}, {}]),
    ("a tie to a reader reads too", [{}, {"kv": 0}, {"tie": 1, "kv": 0}], [{}, {"kv": 0}, {"tie": 1}]),
    ("own everything", [{"tie": 0}, {"attn": 1, "ffn": 1, "kv": 1}, {"tie": 2}], [{}, {}, {}]),
]


@pytest.mark.parametrize(("one", "other"), [pytest.param(a, b, id=name) for name, a, b in SAME])
@pytest.mark.parametrize("norms", NORMS)
def test_spellings_of_one_config(one: Choices, other: Choices, norms: str) -> None:
    shape = replace(tiny.MHA, num_hidden_layers=3)
    a, b = (SharingConfig.make(shape, layers, norms) for layers in (one, other))
    assert a == b
    assert a.hash == b.hash
    torch.testing.assert_close(computed(shape, one, norms), computed(shape, other, norms))


def test_norms_say_something_only_where_something_is_tied() -> None:
    shape = tiny.MHA
    for choices in ([{}] * 4, [{}, {"kv": 0}, {}, {"kv_heads": 2}]):
        assert SharingConfig.make(shape, choices, "tied") == SharingConfig.make(shape, choices, "private")
    tied = [{}, {"ffn": 0}, {}, {}]
    assert SharingConfig.make(shape, tied, "tied") != SharingConfig.make(shape, tied, "private")


@SHAPES
def test_round_trips(shape: ModelShape, tmp_path: Path) -> None:
    for config in tiny.configs(shape, 20):
        assert SharingConfig.of_plan(shape, config.resolve(shape)) == config
        assert SharingConfig.from_yaml(shape, config.to_yaml()) == config
        assert SharingConfig.from_data(shape, config.to_data()) == config
        assert SharingConfig.from_data(shape, json.loads(json.dumps(config.to_data()))).hash == config.hash
        (tmp_path / "sharing.yaml").write_text(config.to_yaml())
        assert SharingConfig.load(shape, tmp_path / "sharing.yaml") == config


@SHAPES
def test_the_canonical_form_is_its_own(shape: ModelShape) -> None:
    for config in tiny.configs(shape, 20):
        assert SharingConfig.make(shape, [dict(layer) for layer in config.layers], config.norms) == config


@pytest.mark.parametrize("name", PRIMITIVES)
def test_every_primitive_changes_the_computation(name: str) -> None:
    """At the last layer, each value that is not the layer's own is another config, and another function."""
    shape, row = replace(tiny.MHA, num_hidden_layers=2), PRIMITIVES[name]
    dense = computed(shape, [{}, {}], "private")
    for value in [0] if row.sources else row.options(shape):
        config = SharingConfig.make(shape, [{}, {name: value}])
        if config == SharingConfig.make(shape, [{}, {}]):
            assert value == shape.num_key_value_heads
        else:
            assert config.layers[1] == ((name, value),)
            assert not torch.allclose(computed(shape, [{}, {name: value}], "private"), dense)


def test_a_config_for_another_depth_is_refused() -> None:
    config = SharingConfig.make(tiny.MHA, [{}] * 4)
    with pytest.raises(UserError, match="4 layers for a model of num_hidden_layers=2"):
        config.resolve(replace(tiny.MHA, num_hidden_layers=2))


# --- the zoo, by hand: `w` is the layer whose weights layer i uses, `r` the one whose KV it reads


def owners(config: SharingConfig, shape: ModelShape, slot: str) -> list[int | None]:
    return [layer.owner(slot) for layer in config.resolve(shape).layers]


def deep(depth: int, **changes: int) -> ModelShape:
    return replace(tiny.MHA, num_hidden_layers=depth, **changes)


TIES = [
    ("sequence", 2, [0, 0, 0, 3, 3, 3]),
    ("sequence", 3, [0, 0, 2, 2, 4, 4]),
    ("cycle", 2, [0, 1, 0, 1, 0, 1]),
    ("cycle", 3, [0, 1, 2, 0, 1, 2]),
    ("cycle-rev", 2, [0, 1, 0, 1, 1, 0]),
    ("cycle-rev", 3, [0, 1, 2, 2, 1, 0]),
    ("mobilellm-ls", None, [0, 0, 2, 2, 4, 4]),
    ("mobilellm-ls", None, [0, 0, 2, 2, 4]),
    ("recurrent-stacking", None, [0] * 6),
    ("albert", None, [0] * 6),
    ("sequence", 2, [0, 0, 2, 2]),
    ("cycle", 2, [0, 1, 0, 1]),
    ("cycle-rev", 2, [0, 1, 1, 0]),
    ("dense", None, [0, 1, 2, 3]),
]


@pytest.mark.parametrize(("name", "size", "expected"), TIES)
def test_tying_presets(name: str, size: int | None, expected: list[int]) -> None:
    shape = deep(len(expected))
    config = PRESETS[name].build(shape, size)
    for slot in (*ATTENTION, *FFN):
        assert owners(config, shape, slot) == expected
    norms = owners(config, shape, "input_layernorm")
    assert norms == (expected if name == "albert" else list(range(len(expected))))
    assert config.resolve(shape).kv_owners == list(range(len(expected))), "a tied block keeps a KV slot for each time it runs"


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 6])
def test_sequence_cycle_and_cycle_rev_coincide_at_both_ends(depth: int) -> None:
    for size, expected in ((1, [0] * depth), (depth, list(range(depth)))):
        for name in ("sequence", "cycle", "cycle-rev"):
            assert owners(PRESETS[name].build(deep(depth), size), deep(depth), FFN[0]) == expected, name


@pytest.mark.parametrize("name", ["sequence", "cycle", "cycle-rev"])
@pytest.mark.parametrize("depth", [1, 2, 3, 4, 5, 6, 7])
def test_tying_presets_have_as_many_blocks_as_they_say(name: str, depth: int) -> None:
    for size in range(1, depth + 1):
        blocks = set(owners(PRESETS[name].build(deep(depth), size), deep(depth), FFN[0]))
        assert len(blocks) <= size
        assert name == "sequence" or len(blocks) == size


def test_presets_that_share_one_part() -> None:
    shape = deep(4)
    for name, shared, norm in (
        ("mobillama", FFN, [0, 1, 2, 3]),
        ("albert-ffn", FFN, [0, 0, 0, 0]),
        ("albert-attn", ATTENTION, [0, 1, 2, 3]),
    ):
        config = PRESETS[name].build(shape)
        for slot in (*ATTENTION, *FFN):
            assert owners(config, shape, slot) == ([0] * 4 if slot in shared else [0, 1, 2, 3]), (name, slot)
        assert owners(config, shape, "post_attention_layernorm") == norm
    assert owners(PRESETS["albert-attn"].build(shape), shape, "input_layernorm") == [0] * 4


@pytest.mark.parametrize(
    ("size", "expected"), [(2, [0, 0, 2, 2, 4, 4]), (3, [0, 0, 0, 3, 3, 3]), (4, [0, 0, 0, 0, 4, 4]), (3, [0, 0, 0, 3])]
)
def test_cla(size: int, expected: list[int]) -> None:
    shape = deep(len(expected))
    plan = PRESETS["cla"].build(shape, size).resolve(shape)
    assert [layer.kv for layer in plan.layers] == expected
    assert [layer.owner("self_attn.k_proj") for layer in plan.layers] == [i if i == kv else None for i, kv in enumerate(expected)]
    assert [layer.owner("self_attn.q_proj") for layer in plan.layers] == list(range(len(expected)))


def test_head_groups() -> None:
    shape = deep(3, num_attention_heads=8)
    assert [layer.kv_heads for layer in PRESETS["mqa"].build(shape).resolve(shape).layers] == [1] * 3
    assert dict(presets(replace(shape, num_key_value_heads=8))).keys() >= {"gqa-4", "gqa-2", "mqa"}
    assert [layer.kv_heads for layer in preset("gqa-2", replace(shape, num_key_value_heads=8)).resolve(shape).layers] == [2] * 3


@pytest.mark.parametrize("name", PRESETS)
@SHAPES
def test_every_preset_builds_wherever_it_has_a_size(name: str, shape: ModelShape) -> None:
    row, spec = PRESETS[name], MemorySpec()
    dense = measure(shape, PRESETS["dense"].build(shape), spec)
    sizes = row.sizes(shape)
    if not sizes:
        with pytest.raises(UserError, match=f"{name}: needs more"):
            row.build(shape)
    for size in sizes:
        found = measure(shape, row.build(shape, size), spec)
        assert found.memory_bytes <= dense.memory_bytes
        assert preset(name if size is None else f"{name}-{size}", shape) == row.build(shape, size)


def test_the_dense_plan_is_the_dense_preset() -> None:
    assert PRESETS["dense"].build(tiny.MHA).resolve(tiny.MHA) == dense_plan(tiny.MHA)


def test_an_unknown_preset_is_refused() -> None:
    with pytest.raises(UserError, match=r"no such preset: albert-atn; did you mean albert-attn\?"):
        preset("albert-atn", tiny.MHA)
    for name in ("mqa-2", "cla-0", "cla-x", "nothing"):
        with pytest.raises(UserError, match=f"no such preset: {name}; "):
            preset(name, tiny.MHA)
    with pytest.raises(UserError, match="3 does not divide"):
        preset("gqa-3", tiny.MHA)


def test_a_preset_of_any_size() -> None:
    shape = deep(6)
    assert preset("cla-5", shape) == PRESETS["cla"].build(shape, 5)
    assert preset("cla", shape) == PRESETS["cla"].build(shape, 2)
