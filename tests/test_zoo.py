"""Laws of the zoo: every preset is its rule, typed out here by hand, at any depth; known models have their known sizes."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch

from nas.errors import UserError
from nas.model.decoder import Decoder
from nas.presets import PRESETS, preset, presets
from nas.sharing.memory import Memory, MemorySpec, measure
from nas.sharing.plan import (
    ATTENTION_NORM,
    FFN_NORM,
    GATE_PROJ,
    K_PROJ,
    MATRICES,
    O_PROJ,
    Q_PROJ,
    ROUTER,
    V_PROJ,
    LayerPlan,
    Plan,
    weight_shapes,
)
from nas.sharing.shape import ModelShape
from nas.sharing.sharing_config import SharingConfig

SIX = ModelShape(
    vocab_size=256,
    hidden_size=64,
    num_hidden_layers=6,
    num_attention_heads=4,
    intermediate_size=192,
    max_position_embeddings=512,
)
DEPTHS = range(1, 9)


def deep(depth: int, shape: ModelShape = SIX) -> ModelShape:
    return replace(shape, num_hidden_layers=depth)


def plan_of(name: str, shape: ModelShape = SIX) -> Plan:
    return preset(name, shape).resolve(shape)


# --- every preset at six layers, by hand: what differs from the dense model, layer by layer

Facets = dict[str, list[Any]]
OWNERS = {
    **{"q": Q_PROJ, "k_proj": K_PROJ, "v_proj": V_PROJ, "o": O_PROJ, "ffn": GATE_PROJ, "router": ROUTER},
    **{"attention_norm": ATTENTION_NORM, "ffn_norm": FFN_NORM},
}
FIELDS = {
    **{"keys": "k", "values": "v", "map": "attn_map", "input": "kv_input", "residual": "value_residual"},
    **{name: name for name in ("k_heads", "v_heads", "window", "width", "experts", "heads", "delta")},
}


def facets(plan: Plan) -> Facets:
    columns = {name: [layer.owner(slot) for layer in plan.layers] for name, slot in OWNERS.items()}
    columns |= {name: [getattr(layer, field) for layer in plan.layers] for name, field in FIELDS.items()}
    return columns | {
        "factor": [factor(layer) for layer in plan.layers],
        "factored": [[slot for slot, one in zip(MATRICES, layer.factors, strict=True) if one] for layer in plan.layers],
        "embedding_rank": [plan.outside.embedding_rank],
        "step_embedding": [plan.outside.step_embedding],
    }


def factor(layer: LayerPlan) -> tuple[Any, ...] | None:
    kept = {(f.kind, f.size, f.at, f.used) for f in layer.factors if f}
    assert len(kept) <= 1
    return next(iter(kept), None)


def tied(*owners: int) -> Facets:
    return {slot: list(owners) for slot in ("q", "k_proj", "v_proj", "o", "ffn")}


def attn(*owners: int) -> Facets:
    return {slot: list(owners) for slot in ("q", "k_proj", "v_proj", "o")}


def norms(*owners: int) -> Facets:
    return {"attention_norm": list(owners), "ffn_norm": list(owners)}


def kv(*sources: int, heads: int = 4) -> Facets:
    own = [i == j for i, j in enumerate(sources)]
    made = {slot: [i if o else None for i, o in enumerate(own)] for slot in ("k_proj", "v_proj")}
    counts = {name: [heads if o else 0 for o in own] for name in ("k_heads", "v_heads")}
    return made | counts | {"keys": list(sources), "values": list(sources)}


def maps(*sources: int | None) -> Facets:
    own = [j is None for j in sources]
    made = {slot: [i if o else None for i, o in enumerate(own)] for slot in ("q", "k_proj", "keys")}
    return made | {"k_heads": [4 if o else 0 for o in own], "map": list(sources)}


def dropped(*layers: int) -> Facets:
    parts = ("q", "k_proj", "v_proj", "o", "ffn", "attention_norm", "ffn_norm", "keys", "values")
    gone = {part: [None if i in layers else i for i in range(6)] for part in parts}
    counts = {name: [0 if i in layers else 4 for i in range(6)] for name in ("k_heads", "v_heads")}
    return gone | counts | {"width": [0 if i in layers else 192 for i in range(6)]}


def windows(*full: int) -> Facets:
    return {"window": [None if i in full else 128 for i in range(6)]}


def experts(*layers: int) -> Facets:
    return {"experts": [8 if i in layers else 0 for i in range(6)]}


def heads(*ties: tuple[int, int, int]) -> Facets:
    """Query head `h` of layer `i` is layer `j`'s, for each `(i, h, j)`."""
    from_below = {(i, h): j for i, h, j in ties}
    return {
        "heads": [tuple((from_below.get((i, h), i), h) for h in range(4)) if i in {t[0] for t in ties} else () for i in range(6)]
    }


Q_K_V_O = [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]] * 6
PRIVATE_ROUTERS = {"router": [0, 1, 2, 3, 4, 5]}

BY_HAND: dict[str, Facets] = {
    "dense": {},
    "albert": tied(0, 0, 0, 0, 0, 0) | norms(0, 0, 0, 0, 0, 0) | {"embedding_rank": [10]},
    "albert-2": tied(0, 0, 0, 3, 3, 3) | norms(0, 0, 0, 3, 3, 3) | {"embedding_rank": [10]},
    "albert-4": tied(0, 0, 2, 3, 3, 5) | norms(0, 0, 2, 3, 3, 5) | {"embedding_rank": [10]},
    "albert-attn": attn(0, 0, 0, 0, 0, 0) | {"attention_norm": [0] * 6, "embedding_rank": [10]},
    "albert-ffn": {"ffn": [0] * 6, "ffn_norm": [0] * 6, "embedding_rank": [10]},
    "universal": tied(0, 0, 0, 0, 0, 0) | {"step_embedding": [True]},
    "recurrent-stacking": tied(0, 0, 0, 0, 0, 0),
    "sequence-2": tied(0, 0, 0, 3, 3, 3),
    "sequence-3": tied(0, 0, 2, 2, 4, 4),
    "sequence-4": tied(0, 0, 2, 2, 4, 4),
    "cycle-2": tied(0, 1, 0, 1, 0, 1),
    "cycle-3": tied(0, 1, 2, 0, 1, 2),
    "cycle-4": tied(0, 1, 2, 3, 0, 1),
    "cycle-rev-2": tied(0, 1, 0, 1, 1, 0),
    "cycle-rev-3": tied(0, 1, 2, 2, 1, 0),
    "subformer": tied(0, 1, 1, 1, 1, 5) | {"embedding_rank": [16]},
    "mobilellm-ls": tied(0, 0, 2, 2, 4, 4),
    "mobillama": {"ffn": [0] * 6},
    "one-wide-ffn": {"ffn": [0] * 6, "width": [6 * 192] * 6},
    "one-wide-ffn-2": {"ffn": [0] * 6, "width": [2 * 192] * 6},
    "edgeformer-2": {"ffn": [0, 1, 0, 1, 0, 1], "width": [16] * 6, "delta": [0, 0, 4, 4, 4, 4]},
    "relaxed-recursive-3x8": tied(0, 1, 2, 0, 1, 2) | {"delta": [0, 0, 0, 8, 8, 8]},
    "relaxed-recursive-2x5": tied(0, 1, 0, 1, 0, 1) | {"delta": [0, 0, 5, 5, 5, 5]},
    "zamba-shared-2": tied(0, 1, 2, 1, 4, 1) | {"delta": [0, 0, 0, 4, 0, 4]},
    "zamba-shared-3": tied(0, 1, 2, 3, 4, 2) | {"delta": [0, 0, 0, 0, 0, 4]},
    "headwise-direct-30": heads((1, 0, 0), (1, 1, 0), (1, 2, 0), (3, 0, 2), (3, 1, 2), (5, 0, 4), (5, 1, 4)),
    "headwise-direct-10": heads((1, 0, 0), (3, 0, 2)),
    "headwise-post-30": heads((1, 0, 0), (1, 1, 0), (1, 2, 0), (3, 0, 2), (3, 1, 2), (5, 0, 4), (5, 1, 4)),
    "basis-2x32": {
        "factor": [("basis", 32, at, ()) for at in (0, 0, 2, 2, 4, 4)],
        "factored": [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"]] * 6,
    },
    "masa-2": {"factor": [("dictionary", 2, 0, (0, 1))] * 6, "factored": Q_K_V_O},
    "dictformer-3": {
        "factor": [("dictionary", 3, 0, used) for used in ((0, 1), (0, 1), (1, 2), (1, 2), (0, 2), (0, 2))],
        "factored": [list(MATRICES)] * 6,
    },
    "foldgpt-1": dropped(2) | {slot: [0, 0, None, 3, 3, 5] for slot in ("q", "k_proj", "v_proj", "o", "ffn")},
    "merge-layers-2": dropped(3, 4),
    "fusegpt-2": dropped(2, 3),
    "moeut-2": tied(0, 1, 0, 1, 0, 1) | experts(0, 1, 2, 3, 4, 5) | {"router": [0, 1, 0, 1, 0, 1]},
    "megrez": {"ffn": [0, 1, 1, 1, 4, 4]} | experts(1, 2, 3, 4, 5) | {"router": [None, 1, 2, 3, 4, 5]},
    "sparse-universal": tied(0, 0, 0, 0, 0, 0) | experts(0, 1, 2, 3, 4, 5) | {"router": [0] * 6},
    "learngene-stage-3": tied(0, 0, 2, 2, 4, 4),
    "learngene-stage-4": tied(0, 0, 2, 3, 3, 5),
    "trol-static-1": tied(0, 1, 2, 2, 4, 5),
    "trol-static-2": tied(0, 1, 1, 3, 3, 5),
    "dlo-static-4": dropped(3),
    "dlo-static-2": dropped(1, 3),
    "mqa": {"k_heads": [1] * 6, "v_heads": [1] * 6},
    "gqa-2": {"k_heads": [2] * 6, "v_heads": [2] * 6},
    "cla-2": kv(0, 0, 2, 2, 4, 4),
    "cla-3": kv(0, 0, 0, 3, 3, 3),
    "cla-4": kv(0, 0, 0, 0, 4, 4),
    "mlkv-3x1": kv(0, 0, 2, 2, 4, 4, heads=1),
    "mlkv-2x4": kv(0, 0, 0, 3, 3, 3),
    "mlkv-4x2": kv(0, 1, 1, 3, 4, 4, heads=2),
    "lckv-2": kv(0, 4, 4, 4, 4, 5),
    "lckv-3": kv(0, 1, 4, 4, 4, 5),
    "kv-pizza-bottom-3": kv(0, 1, 2, 2, 2, 2),
    "kv-pizza-middle-3": kv(0, 1, 3, 3, 3, 3),
    "kv-pizza-top-3": kv(0, 1, 5, 5, 5, 5),
    "kv-sandwich-bottom-3": kv(0, 1, 1, 1, 1, 5),
    "kv-sandwich-middle-3": kv(0, 2, 2, 2, 2, 5),
    "kv-sandwich-top-3": kv(0, 4, 4, 4, 4, 5),
    "kv-sandwich-top-4": kv(0, 1, 4, 4, 4, 5),
    "kv-lasagna-bottom-3": kv(0, 0, 2, 2, 4, 4),
    "kv-lasagna-bottom-4": kv(0, 1, 1, 3, 4, 4),
    "kv-lasagna-middle-3": kv(0, 1, 1, 4, 4, 4),
    "kv-lasagna-top-3": kv(0, 2, 2, 5, 5, 5),
    "yoco": kv(0, 1, 2, 3, 3, 3) | windows(3, 4, 5),
    "mixattention-3": kv(0, 1, 1, 0, 4, 4) | windows(0, 3),
    "mixattention-6": kv(0, 1, 1, 3, 3, 3) | windows(0),
    "character-ai": kv(0, 1, 1, 3, 3, 3, heads=1) | windows(0),
    "character-ai-2": kv(0, 1, 0, 3, 0, 5, heads=1) | windows(0, 2, 4),
    "gemma3n-3": kv(0, 1, 2, 1, 1, 2) | windows(2, 5),
    "gemma3n-1": kv(0, 1, 2, 3, 4, 3) | windows(4),
    "gemma4-3": kv(0, 1, 2, 1, 1, 2) | windows(2, 5) | {"width": [96] * 3 + [192] * 3},
    "hymba-kv": kv(0, 1, 2, 3, 3, 5) | windows(0, 2, 5),
    "kvsharer-1": kv(0, 1, 2, 3, 4, 0),
    "kvsharer-3": kv(0, 1, 2, 2, 1, 0),
    "swiftkv-3x1": {"input": [None, None, None, None, 2, 2]},
    "swiftkv-3x2": kv(0, 1, 2, 3, 3, 5) | {"input": [None, None, None, None, None, 2]},
    "swiftkv-2x1": {"input": [None, None, None, 1, 1, 1]},
    "cll-attention-2": kv(0, 0, 2, 2, 4, 4)
    | {
        "factor": [("basis", 16, 0, ()), None, ("basis", 16, 2, ()), None, ("basis", 16, 4, ()), None],
        "factored": [["self_attn.k_proj", "self_attn.v_proj"], []] * 3,
    },
    "dha-1x2": {"k_heads": [1] * 6, "v_heads": [2] * 6},
    "shared-attention-2": maps(None, None, None, None, 3, None),
    "shared-attention-4": maps(None, None, 1, 1, 1, None),
    "echoatt-2": maps(None, None, 1, None, 3, None),
    "uniattn-4": maps(None, 0, 0, 0, None, 4),
    "xiao-san-3": maps(None, 0, 0, None, 3, 3),
    "svformer": {"v_proj": [0, *[None] * 5], "values": [0] * 6, "v_heads": [4, *[0] * 5]},
    "resformer": {"residual": [0.0, *[0.5] * 5]},
}


def test_a_preset_is_its_rule() -> None:
    own = list(range(6))
    dense = facets(plan_of("dense"))
    for slot in ("q", "k_proj", "v_proj", "o", "ffn", "attention_norm", "ffn_norm", "keys", "values"):
        assert dense[slot] == own
    for name, differs in BY_HAND.items():
        assert facets(plan_of(name)) == dense | differs, name


OTHER_DEPTHS: dict[str, list[tuple[str, int, list[int | None]]]] = {
    "ffn": [
        ("sequence-2", 2, [0, 1]),
        ("sequence-2", 3, [0, 0, 2]),
        ("sequence-3", 7, [0, 0, 0, 3, 3, 3, 6]),
        ("cycle-2", 5, [0, 1, 0, 1, 0]),
        ("cycle-3", 7, [0, 1, 2, 0, 1, 2, 0]),
        ("cycle-rev-2", 5, [0, 1, 0, 1, 0]),
        ("cycle-rev-3", 7, [0, 1, 2, 0, 2, 1, 0]),
        ("albert-3", 7, [0, 0, 0, 3, 3, 5, 5]),
        ("subformer", 4, [0, 1, 1, 3]),
        ("subformer", 7, [0, 1, 1, 1, 1, 1, 6]),
        ("mobilellm-ls", 3, [0, 0, 2]),
        ("mobilellm-ls", 7, [0, 0, 2, 2, 4, 4, 6]),
        ("trol-static-1", 2, [0, 0]),
        ("trol-static-2", 8, [0, 1, 2, 2, 4, 4, 6, 7]),
        ("foldgpt-1", 3, [0, None, 0]),
        ("foldgpt-1", 7, [0, 0, 2, None, 2, 5, 5]),
    ],
    "values": [
        ("cla-2", 5, [0, 0, 2, 2, 4]),
        ("cla-3", 7, [0, 0, 0, 3, 3, 3, 6]),
        ("mlkv-2x1", 5, [0, 0, 2, 2, 2]),
        ("mlkv-1x1", 2, [0, 0]),
        ("lckv-2", 4, [0, 2, 2, 3]),
        ("kv-pizza-top-2", 3, [0, 2, 2]),
        ("kv-sandwich-middle-4", 7, [0, 1, 3, 3, 3, 3, 6]),
        ("kv-lasagna-top-4", 7, [0, 2, 2, 4, 4, 6, 6]),
        ("kv-lasagna-bottom-4", 7, [0, 1, 1, 3, 3, 5, 5]),
        ("yoco", 3, [0, 1, 1]),
        ("yoco", 7, [0, 1, 2, 3, 3, 3, 3]),
        ("gemma3n-1", 3, [0, 1, 0]),
        ("mixattention-3", 4, [0, 1, 1, 0]),
        ("kvsharer-2", 5, [0, 1, 2, 1, 0]),
        ("swiftkv-2x3", 7, [0, 1, 2, 2, 2, 5, 5]),
    ],
}


def test_whose_ffn_and_whose_kv_at_other_depths() -> None:
    for facet, rows in OTHER_DEPTHS.items():
        for name, depth, expected in rows:
            shape = deep(depth)
            assert facets(preset(name, shape).resolve(shape))[facet] == expected, (name, depth)


def test_sequence_cycle_and_cycle_rev_coincide_at_both_ends() -> None:
    for depth in range(2, 8):
        for m, same in ((1, "recurrent-stacking"), (depth, "dense")):
            found = {preset(f"{name}-{m}", deep(depth)) for name in ("sequence", "cycle", "cycle-rev")}
            assert found == {preset(same, deep(depth))}


def test_schemes_that_are_other_schemes() -> None:
    """As the papers say: lasagna-bottom is CLA, sandwich-top is LCKV; and one KV head of every layer's is MQA."""
    shape = deep(12)
    for one, other in (
        ("kv-lasagna-bottom-6", "cla-2"),
        ("kv-lasagna-bottom-4", "cla-3"),
        ("kv-sandwich-top-3", "lckv-2"),
        ("kv-sandwich-top-7", "lckv-6"),
        ("mlkv-12x1", "mqa"),
        ("mlkv-6x4", "cla-2"),
        ("gqa-1", "mqa"),
        ("one-wide-ffn-1", "mobillama"),
        ("headwise-post-20", "headwise-direct-20"),
    ):
        assert preset(one, shape) == preset(other, shape), (one, other)


# --- as the authors' own code has it


def test_the_layer_types_of_lckv_s_code() -> None:
    """The examples in whyNLP/LCKV's README: which layer's KV each of 22 reads, `s` where it is windowed."""
    for name, layer_types in {
        "lckv-2": "0_20_20_20_20_20_20_20_20_20_20_20_20_20_20_20_20_20_20_20_20_21",
        "kv-sandwich-middle-3": "0_10_10_10_10_10_10_10_10_10_10_10_10_10_10_10_10_10_10_10_10_21",
        "cla-2": "0_0_2_2_4_4_6_6_8_8_10_10_12_12_14_14_16_16_18_18_20_20",
        "yoco": "0s_1s_2s_3s_4s_5s_6s_7s_8s_9s_10s_11_11_11_11_11_11_11_11_11_11_11",
        "mixattention-6": "0_1s_1s_3s_3s_3s_0_7s_7s_9s_9s_9s_12_13s_13s_15s_15s_15s_12_19s_19s_19s",
    }.items():
        assert "_".join(f"{p.v}{'s' if p.window else ''}" for p in plan_of(name, deep(22)).layers) == layer_types


def test_the_groups_of_hymba_s_config() -> None:
    """nvidia/Hymba-1.5B-Base's `kv_reuse_group` and `global_attn_idx`."""
    pairs = [[i, i + 1] for i in (*range(1, 15, 2), *range(19, 31, 2))]
    groups = sorted([*pairs, [16, 17, 18]])
    plan = plan_of("hymba-kv", deep(32))
    assert [i for i, layer in enumerate(plan.layers) if not layer.window] == [0, 15, 31]
    readers = {i: layer.v for i, layer in enumerate(plan.layers) if layer.v != i}
    assert readers == {i: group[0] for group in groups for i in group[1:]}


def test_the_kinds_of_gemma_s_configs() -> None:
    """Against what transformers makes of `num_kv_shared_layers`, and of Gemma 4's wide FFNs."""
    from transformers import Gemma3nTextConfig, Gemma4TextConfig

    for name, depth, shared in (("gemma3n", 35, 15), ("gemma3n", 30, 10), ("gemma4", 35, 20), ("gemma4", 42, 18)):
        made = Gemma3nTextConfig if name == "gemma3n" else Gemma4TextConfig
        config = made(num_hidden_layers=depth, num_kv_shared_layers=shared)
        plan = plan_of(f"{name}-{shared}", deep(depth))
        kinds = ["sliding_attention" if layer.window else "full_attention" for layer in plan.layers]
        assert kinds == config.layer_types
        for i, (layer, mode) in enumerate(zip(plan.layers, config.kv_sharing_modes, strict=True)):
            assert (layer.v != i) == (mode == "reuse")
            assert config.kv_sharing_modes[layer.v] == "store" or layer.v == i
            assert kinds[layer.v] == kinds[i]
            assert name == "gemma3n" or plan.layers[-1].width == layer.width * (1 if mode == "reuse" else 2)
    assert PRESETS["gemma3n"].sizes(deep(35)) == [(15,)]
    assert PRESETS["gemma4"].sizes(deep(35)) == [(20,)]


def test_shared_attention_is_the_paper_s_span_of_llama_2_7b() -> None:
    assert PRESETS["shared-attention"].sizes(deep(32)) == [(4,)]
    assert [i for i, layer in enumerate(plan_of("shared-attention-4", deep(32)).layers) if layer.attn_map == 27] == [28, 29, 30]


# --- known sizes

UNTIED = {"tie_word_embeddings": False}
LLAMA_2_7B = ModelShape(32000, 4096, 32, 32, 11008, **UNTIED)  # vocabulary, width, layers, heads, FFN, KV heads, head size
LLAMA_3_8B = ModelShape(128256, 4096, 32, 32, 14336, 8, **UNTIED)
TINY_LLAMA = ModelShape(32000, 2048, 22, 32, 5632, 4, **UNTIED)
GEMMA_2B = ModelShape(256000, 2048, 18, 8, 16384, 1, 256)
MOBILE_LLM_125M = ModelShape(32000, 576, 30, 9, 1536, 3)
MOBILE_LLM_350M = ModelShape(32000, 960, 32, 15, 2560, 5)
CLA_1B = ModelShape(50432, 2048, 20, 16, 5472, **UNTIED)
PYTHIA_160M = ModelShape(50304, 768, 12, 12, 3072, **UNTIED)
ALBERT_BASE = ModelShape(30000, 768, 12, 12, 2048, max_position_embeddings=512)


def memory(name: str, shape: ModelShape, spec: MemorySpec | None = None) -> Memory:
    return measure(shape, preset(name, shape), spec or MemorySpec())


def test_published_models() -> None:
    for shape, params in (
        (LLAMA_2_7B, 6_738_415_616),
        (LLAMA_3_8B, 8_030_261_248),
        (TINY_LLAMA, 1_100_048_384),
        (GEMMA_2B, 2_506_172_416),
        (MOBILE_LLM_125M, 124_635_456),
        (MOBILE_LLM_350M, 345_355_200),
    ):
        assert memory("dense", shape).unique_params == params
        with torch.device("meta"):
            model = Decoder(shape, preset("dense", shape).resolve(shape))
        assert sum(weight.numel() for weight in model.parameters()) == params


def test_mobilellm_ls_runs_twice_the_layers_on_the_same_weights() -> None:
    """MobileLLM-LS-125M and -350M: only the added layers' norms are new."""
    for shape in (MOBILE_LLM_125M, MOBILE_LLM_350M):
        twice = deep(2 * shape.num_hidden_layers, shape)
        more = memory("mobilellm-ls", twice).unique_params - memory("dense", shape).unique_params
        assert more == shape.num_hidden_layers * 2 * shape.hidden_size


def test_the_cache_of_cla_s_table_1() -> None:
    """H128-MHA, -GQA4, -GQA2, -MQA; -GQA4-CLA2, …, -MQA-CLA4: bytes a token in 16 bits (2405.12981)."""
    table = {
        "dense": {16: 163_840, 4: 40_960, 2: 20_480, 1: 10_240},
        "mqa": {16: 10_240},
        "cla-2": {4: 20_480, 2: 10_240, 1: 5_120},
        "cla-3": {1: 3_584},
        "cla-4": {1: 2_560},
    }
    for name, heads in table.items():
        found = {count: memory(name, replace(CLA_1B, num_key_value_heads=count)).kv_bytes_per_token for count in heads}
        assert found == heads, name


def test_the_kv_heads_of_mlkv_s_models() -> None:
    """MHA-144, GQA-48, MLKV-48, MQA-12, … of Pythia-160M: 2 · heads · head_dim numbers a token (2406.09297)."""
    heads = {"dense": 144, "gqa-4": 48, "mlkv-4x12": 48, "mqa": 12, "mlkv-4x3": 12, "mlkv-6x1": 6}
    heads |= {"mlkv-4x1": 4, "mlkv-2x1": 2, "mlkv-1x1": 1}
    for name, count in heads.items():
        assert memory(name, PYTHIA_160M).kv_bytes_per_token == 2 * count * 64 * 2


def test_albert_base() -> None:
    """ALBERT's table 4 at E = 128. Beside its layers it counts a pooler and embedded positions; a plain FFN of 3,072 has as many
    weights as a gated one of 2,048."""
    beside = 768 * 768 + 768 + 512 * 128
    for name, millions in {"albert": 12, "albert-attn": 64, "albert-ffn": 38}.items():
        assert plan_of(name, ALBERT_BASE).outside.embedding_rank == 128
        assert round((memory(name, ALBERT_BASE).unique_params + beside) / 1e6) == millions


def test_masa_saves_two_thirds_of_attention() -> None:
    """−66.7% of attention parameters at S = L / 3 (2508.04581, table 1), but for the mixing coefficients."""
    (name,) = [f"masa-{size}" for (size,) in PRESETS["masa"].sizes(PYTHIA_160M)]
    dense, shared = (
        {key: size for key, size in weight_shapes(PYTHIA_160M, plan_of(one, PYTHIA_160M)).items() if "self_attn" in key}
        for one in ("dense", name)
    )
    assert sum(size[0] * size[1] for size in dense.values()) == 12 * 4 * 768 * 768
    atoms = [size for key, size in shared.items() if "atoms" in key]
    assert atoms == [(4, 768, 768)] * 4
    assert memory("dense", PYTHIA_160M).unique_params - memory(name, PYTHIA_160M).unique_params == 8 * 4 * 768 * 768 - 12 * 4 * 4


def test_lckv_keeps_the_kv_of_its_warm_up_layers_and_of_one_more() -> None:
    """TinyLlama with w = 2 and 10 (2405.10637): of 22 layers' KV."""
    whole = memory("dense", TINY_LLAMA).kv_bytes_per_token
    for w, layers in ((2, 3), (10, 11)):
        assert memory(f"lckv-{w}", TINY_LLAMA).kv_bytes_per_token * 22 == whole * layers


def test_the_study_s_schemes_at_half_the_cache() -> None:
    """11 of TinyLlama's 22 layers own their KV (2410.14442, table 4), wherever they are."""
    for name in (name for name in PRESETS if name.startswith("kv-")):
        assert PRESETS[name].sizes(TINY_LLAMA) == [(11,)]
        assert 2 * memory(f"{name}-11", TINY_LLAMA).kv_bytes_per_token == memory("dense", TINY_LLAMA).kv_bytes_per_token


def test_yoco_caches_once() -> None:
    """One full layer, and 1,024 tokens of each windowed one (2405.05254)."""
    shape = replace(TINY_LLAMA, max_position_embeddings=65536)
    spec = MemorySpec(context=65536)
    a_token = memory("dense", shape, spec).kv_bytes_per_token // 22
    assert memory("yoco", shape, spec).kv_cache_bytes == a_token * (65536 + 11 * 1024)


def test_swiftkv_s_cache() -> None:
    """Llama-3.1-8B, half of whose layers take K and V from one: AcrossKV in groups of g (2410.03960)."""
    whole = memory("dense", LLAMA_3_8B).kv_bytes_per_token
    assert whole == 131_072
    for g, saved in {1: 0.0, 2: 0.25, 4: 0.375, 8: 0.4375, 16: 0.46875}.items():
        assert memory(f"swiftkv-16x{g}", LLAMA_3_8B).kv_bytes_per_token == whole * (1 - saved)


def test_one_wide_ffn_keeps_the_budget_of_all() -> None:
    """2309.01826: as many parameters as before."""
    assert memory("one-wide-ffn", LLAMA_2_7B).unique_params == memory("dense", LLAMA_2_7B).unique_params


def test_relaxed_recursive_gemma() -> None:
    """Gemma-2B's 1.98 billion parameters beside the embedding run twice over half of them (2410.20672); a delta's by hand."""
    embedding = 256000 * 2048
    dense = memory("dense", GEMMA_2B).unique_params - embedding
    recursive = memory("cycle-9", GEMMA_2B).unique_params - embedding
    assert (round(dense / 1e9, 2), round(recursive / 1e9, 2)) == (1.98, 0.99)
    a_rank = 2 * (2048 + 2048) + 2 * (2048 + 256) + 3 * (2048 + 16384)
    for rank in (64, 512):
        assert memory(f"relaxed-recursive-9x{rank}", GEMMA_2B).unique_params - embedding - recursive == 9 * rank * a_rank


def test_echoatt_s_tinyllama() -> None:
    """About 4% fewer parameters than TinyLlama (2409.14595)."""
    assert round(1 - memory("echoatt-2", TINY_LLAMA).unique_params / memory("dense", TINY_LLAMA).unique_params, 2) == 0.04


# --- every preset, at every depth

SHAPES = {"mha": SIX, "gqa": replace(SIX, num_key_value_heads=2), "mqa": replace(SIX, num_key_value_heads=1)}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_preset_builds_at_every_depth_or_says_why_not(shape: ModelShape) -> None:
    for (name, row), depth in itertools.product(PRESETS.items(), DEPTHS):
        model = deep(depth, shape)
        sizes = row.sizes(model)
        assert len(sizes) <= 3
        if not sizes:
            with pytest.raises(UserError, match=f"^{name}: needs more"):
                row.build(model)
        for size in sizes:
            config = row.build(model, size)
            assert config == preset(row.full_name(size), model)
            assert SharingConfig.of_plan(model, config.resolve(model)) == config
            assert config.resolve(model).layers[0].v in (0, None), "layer 0 owns its KV"


def test_a_model_of_one_layer_shares_nothing_between_layers() -> None:
    assert {name for name, row in PRESETS.items() if row.sizes(deep(1))} == {"dense", "mqa", "gqa", "dha"}


@pytest.mark.parametrize("shape", [SIX, tiny.MHA, LLAMA_2_7B], ids=["six", "tiny", "Llama-2-7B"])
def test_all_presets_together_are_few_and_save_memory(shape: ModelShape) -> None:
    named = list(presets(shape))
    assert len(dict(named)) == len(named) < 90
    dense, spec = named[0][1], MemorySpec()
    for name, config in named:
        assert (config == dense) == (name == "dense")
        assert measure(shape, config, spec).memory_bytes <= measure(shape, dense, spec).memory_bytes, name


SIZED = {name: row.parameters for name, row in PRESETS.items() if row.parameters}


def test_the_least_and_the_largest_size_fit() -> None:
    for (name, parameters), depth in itertools.product(SIZED.items(), (6, 7)):
        shape = deep(depth)
        for numbers in ([p.least for p in parameters], [p.most(shape) for p in parameters]):
            config = preset(f"{name}-{'x'.join(map(str, numbers))}", shape)
            assert config.resolve(shape).layers[0].v in (0, None)


def test_sizes_that_do_not_fit_are_refused() -> None:
    for name, parameters in SIZED.items():
        fits = [parameter.most(SIX) for parameter in parameters]
        for k, parameter in enumerate(parameters):
            numbers = [*fits[:k], fits[k] + 1, *fits[k + 1 :]]
            with pytest.raises(UserError, match=f"{name}: {parameter.name}={fits[k] + 1} does not fit this model; use "):
                preset(f"{name}-{'x'.join(map(str, numbers))}", SIX)
        other = "2x2" if len(fits) == 1 else "2"
        with pytest.raises(UserError, match=f"{name}: {other} is not its size; give {'x'.join(p.name for p in parameters)}"):
            preset(f"{name}-{other}", SIX)


def test_names() -> None:
    assert preset("mlkv-2x1", SIX) == PRESETS["mlkv"].build(SIX, (2, 1))
    assert PRESETS["mlkv"].full_name((2, 1)) == "mlkv-2x1"
    assert PRESETS["cla"].full_name((3,)) == "cla-3"
    assert preset("mlkv", SIX) == preset("mlkv-3x1", SIX)
    for name in ("mqa-2", "cla-0", "cla-x", "cla-2x", "mlkv-2x1x1", "nothing"):
        with pytest.raises(UserError, match=f"no such preset: {name}; "):
            preset(name, SIX)


def test_heads_divide_the_model_s() -> None:
    for name in ("gqa-3", "mlkv-2x3", "dha-1x3"):
        with pytest.raises(UserError, match="3 does not divide"):
            preset(name, SIX)


def test_experts_divide_the_width() -> None:
    """A width that they do not divide is cut to the next that they do."""
    odd = replace(SIX, intermediate_size=173)
    assert {layer.width for layer in plan_of("sparse-universal", odd).layers} == {168}


AS_PUBLISHED = {"dense", "sequence", "cycle", "cycle-rev", "mobilellm-ls", "mobillama", "masa"}
AS_PUBLISHED |= {"mqa", "gqa", "mlkv", "svformer", "resformer"}
AS_PUBLISHED |= {f"kv-{cut}-{target}" for cut in ("pizza", "sandwich", "lasagna") for target in ("bottom", "top")}


def test_a_row_says_where_it_is_from_and_what_was_taken() -> None:
    for row in PRESETS.values():
        assert 0 < len(row.shares) <= 40, "more cuts off what `nas zoo` prints beside it"
        assert bool(row.paper) == (row.name != "dense")
        assert row.note or row.name in AS_PUBLISHED - {"kv-lasagna-top"}, row.name
