"""The presets that share weights: a layer uses another layer's parameters on its own input.

Owns `WEIGHTS` and the rules of its rows. Presets that share keys, values or softmax maps are in `nas.presets.attention`.
"""

from __future__ import annotations

from collections.abc import Callable

from ..sharing.shape import ModelShape
from .rows import (
    Layers,
    Parameter,
    Preset,
    Rule,
    alike,
    all_but,
    any_layers,
    any_rank,
    firsts,
    middle,
    together,
    use,
)

EXPERTS = 8  # experts of an FFN where a scheme has some; two of them run for a token


def _tie(block: Callable[..., int]) -> Rule:
    """A rule that ties layer i to the first layer with the same `block(i, num_hidden_layers, *size)`."""

    def rule(shape: ModelShape, *size: int) -> Layers:
        depth = shape.num_hidden_layers
        return use("tie", firsts([block(i, depth, *size) for i in range(depth)]))

    return rule


def _grouped(primitive: str) -> Rule:
    """A rule of `groups` runs of equal length, as far as possible; each run shares by `primitive` (ALBERT's grouping)."""

    def rule(shape: ModelShape, groups: int = 1) -> Layers:
        depth = shape.num_hidden_layers
        return use(primitive, firsts([i * groups // depth for i in range(depth)]))

    return rule


def _cycle_rev(i: int, depth: int, m: int) -> int:
    return i % m if i < depth - m else m - 1 - (i - (depth - m))


def _twice(i: int, depth: int, n: int) -> int:
    """Of the 2n middle layers, the second, fourth, … repeat the one before."""
    return i - 1 if i in middle(depth, 2 * n)[1::2] else i


def _wide_ffn(shape: ModelShape, multiple: int | None = None) -> Layers:
    width = (multiple or shape.num_hidden_layers) * shape.intermediate_size
    return [{"intermediate": width}, *[{"ffn": 0} for _ in range(1, shape.num_hidden_layers)]]


def _small_rank(shape: ModelShape) -> int:
    return max(1, shape.hidden_size // 16)


def _edgeformer(shape: ModelShape, m: int) -> Layers:
    light, rank = max(1, shape.hidden_size // 4), _small_rank(shape)
    return [{"intermediate": light} if i < m else {"ffn": i % m, "delta": rank} for i in range(shape.num_hidden_layers)]


def _zamba(shape: ModelShape, n: int) -> Layers:
    shared = {"tie": n - 1, "delta": _small_rank(shape)}
    return [shared if i >= n and i % n == n - 1 else {} for i in range(shape.num_hidden_layers)]


def _headwise(shape: ModelShape, percent: int) -> Layers:
    """`percent` of all heads are the layer below's same head: the odd layers' first, and a layer's last head last."""
    depth, heads = shape.num_hidden_layers, shape.num_attention_heads
    every = [(i, head) for head in range(heads) for i in range(1, depth)]
    every.sort(key=lambda pair: (pair[1] == heads - 1, pair[0] % 2 == 0))
    copies = set(every[: max(1, round(percent / 100 * depth * heads))])
    ties = [" ".join(f"{head}={i - 1}.{head}" for head in range(heads) if (i, head) in copies) for i in range(depth)]
    return [{"heads": tied} if tied else {} for tied in ties]


def _basis(shape: ModelShape, g: int, r: int) -> Layers:
    """K and V of fewer heads get a smaller rank, in proportion."""
    depth = shape.num_hidden_layers
    narrow = max(1, r * shape.num_key_value_heads // shape.num_attention_heads)
    grouped = depth - 1 if depth % g == 1 else depth
    ranks = "basis {r} at {at} for q gate up; basis {narrow} at {at} for k v"
    return [{"factor": ranks.format(r=r, narrow=narrow, at=i - i % g)} if i < grouped else {} for i in range(depth)]


def _dictformer(shape: ModelShape, atoms: int) -> Layers:
    depth = shape.num_hidden_layers
    lower = [i * atoms // depth for i in range(depth)]
    used = [sorted({atom, (atom + 1) % atoms}) if atoms > 2 else [atom] for atom in lower]
    return [{"factor": f"dictionary {atoms} at 0 for q k v o gate up down using {' '.join(map(str, few))}"} for few in used]


def _drop(shape: ModelShape, dropped: range) -> Layers:
    return [{"drop": "both"} if i in dropped else {} for i in range(shape.num_hidden_layers)]


def _foldgpt(shape: ModelShape, d: int) -> Layers:
    dropped = middle(shape.num_hidden_layers, d)
    left = [i for i in range(shape.num_hidden_layers) if i not in dropped]
    layers = _drop(shape, dropped)
    for below, above in zip(left[::2], left[1::2], strict=False):
        layers[above] = {"tie": below}
    return layers


def _bank(shape: ModelShape) -> dict[str, int]:
    """An FFN of experts, in place of the same width (less what the experts cannot divide)."""
    experts = min(EXPERTS, shape.intermediate_size)
    width = shape.intermediate_size // experts * experts
    return {"experts": experts} if width == shape.intermediate_size else {"experts": experts, "intermediate": width}


def _moe_cycle(shape: ModelShape, g: int = 1) -> Layers:
    return [_bank(shape) if i < g else {"tie": i % g, "router": i % g} for i in range(shape.num_hidden_layers)]


def _megrez(shape: ModelShape, n: int = 3) -> Layers:
    owners = [max(0, (i - 1) // n * n + 1) for i in range(shape.num_hidden_layers)]
    banks = [_bank(shape) if i == j != 0 else {} for i, j in enumerate(owners)]
    return together(use("ffn", owners), banks)


def _third_and_half(shape: ModelShape) -> list[int]:
    depth = shape.num_hidden_layers
    return [m for m in sorted({depth // 3, -(-depth // 2)}) if 1 < m < depth]


def most_heads(shape: ModelShape) -> int:
    """The percentage at which layers above the first keep one head each."""
    depth, heads = shape.num_hidden_layers, shape.num_attention_heads
    return 100 * (depth - 1) * (heads - 1) // (depth * heads) if shape.num_key_value_heads == heads else 0


def _albert(
    name: str, shares: str, primitive: str, tries: Callable[[ModelShape], list[int | None]] = lambda shape: [None]
) -> Preset:
    return Preset(
        name,
        "1909.11942",
        f"{shares}; small embedding",
        _grouped(primitive),
        (Parameter("G", any_layers),),
        tries,
        model_choices=lambda shape: {"norms": "tied", "embedding_rank": max(1, shape.hidden_size // 6)},
        note="without a size one group; the embedding's rank is a sixth of the width, as ALBERT-base's 128 of 768; the paper "
        "keeps it at 128 in wider models",
    )


_M = (Parameter("M", any_layers),)
_PAIRS = "without weights: the first heads of layers 1, 3, … are those of the layer below, then of layers 2, 4, …"
_PENALTY = "the paper's penalty on a pair's difference is training, before sharing"
_PRIVATE = "norms stay private, at next to no cost; the paper's are shared with the layer"
_EXPERTS = f"{EXPERTS} experts, 2 active, of an ordinary FFN's width together"
_CONVERT = "a conversion from a checkpoint chooses by its weights"

# fmt: off
WEIGHTS = (
    Preset("dense", "", "nothing", alike, layers=1),
    _albert("albert", "layers and norms", "tie", lambda shape: [None, 2] if shape.num_hidden_layers > 2 else [None]),
    _albert("albert-attn", "attention", "attn"),
    _albert("albert-ffn", "FFNs", "ffn"),
    Preset("universal", "1807.03819", "every layer; a vector a step", _grouped("tie"),
           model_choices=lambda shape: {"step_embedding": True},
           note=f"a decoder of fixed depth with a learned step vector; the paper's halting is per token; {_PRIVATE}"),
    Preset("recurrent-stacking", "1807.05353", "every layer", _grouped("tie"),
           note=f"a decoder alone; the paper stacks an encoder and a decoder; {_PRIVATE}"),
    Preset("sequence", "2104.06022", "runs of layers", _tie(lambda i, depth, m: i // -(-depth // m)), _M, _third_and_half, 3),
    Preset("cycle", "2104.06022", "layers in a cycle", _tie(lambda i, depth, m: i % m), _M, _third_and_half, 3),
    Preset("cycle-rev", "2104.06022", "a cycle, reversed at its end", _tie(_cycle_rev), _M, _third_and_half, 3),
    Preset("subformer", "2101.00234", "inner layers; small embedding", _tie(lambda i, depth: (i > 0) + (i == depth - 1)),
           layers=4, model_choices=lambda shape: {"embedding_rank": max(1, shape.hidden_size // 4)},
           note="a decoder alone; the embedding's rank is a fourth of the width, without the paper's attention over it (SAFE)"),
    Preset("mobilellm-ls", "2402.14905", "each block runs twice", _tie(lambda i, depth: i // 2)),
    Preset("mobillama", "2402.16840", "one FFN", _grouped("ffn")),
    Preset("one-wide-ffn", "2309.01826", "one wide FFN", _wide_ffn, (Parameter("multiple", any_layers),),
           note="as wide as all FFNs together, or a given multiple of one; a decoder alone: the paper drops its decoder's FFN"),
    Preset("edgeformer", "2202.07959", "a cycle of light FFNs; deltas", _edgeformer, (Parameter("M", all_but(1)),),
           lambda shape: [2], 3,
           note="a decoder alone, with the paper's light decoder FFN, a fourth of the width; deltas of rank width/16 (32 of "
                "512)"),
    Preset("relaxed-recursive", "2410.20672", "layers in a cycle; deltas",
           lambda shape, k, r: [{} if i < k else {"tie": i % k, "delta": r} for i in range(shape.num_hidden_layers)],
           (Parameter("K", all_but(1)), Parameter("r", any_rank)),
           lambda shape: [(-(-shape.num_hidden_layers // 2), max(1, shape.hidden_size // 8))],
           note="deltas from the second turn on (the paper: in the first too); how a checkpoint starts it is the conversion's"),
    Preset("zamba-shared", "Zamba2", "every n-th layer; deltas", _zamba,
           (Parameter("n", lambda shape: shape.num_hidden_layers // 2),),
           lambda shape: [n for n in (2, 6) if 2 * n <= shape.num_hidden_layers], 4,
           note="ordinary layers where the paper has Mamba; deltas of rank width/16; the block does not see the embedding again"),
    *(
        Preset(name, "2402.11819", "some heads", _headwise, (Parameter("percent", most_heads),),
               lambda shape: [min(30, most_heads(shape))] if most_heads(shape) else [], note=note)
        for name, note in (
            ("headwise-direct", f"{_PAIRS}; {_CONVERT}, the most similar heads. Only where every query head has its own K and V"),
            ("headwise-post", f"headwise-direct's config: {_PENALTY}; {_PAIRS}"),
        )
    ),
    Preset("basis", "2410.03765", "a basis of neighbours' matrices", _basis,
           (Parameter("g", any_layers), Parameter("r", any_rank)),
           lambda shape: [(2, min(any_rank(shape), max(1, shape.hidden_size // 2)))],
           note="a layer left alone keeps whole matrices; K and V of fewer heads have a rank in proportion; nothing is whitened"),
    Preset("masa", "2508.04581", "atoms of attention matrices",
           lambda shape, atoms: alike(shape, factor=f"dictionary {atoms} at 0 for q k v o"), (Parameter("S", any_layers),),
           lambda shape: [max(1, shape.num_hidden_layers // 3)]),
    Preset("dictformer", "ICLR 2022", "atoms of all matrices, few a layer", _dictformer, (Parameter("S", any_layers),),
           lambda shape: [shape.num_hidden_layers // 2],
           note="an atom is a whole matrix and a layer mixes two neighbouring ones (one, where S is 1 or 2); the paper's atoms "
                "are columns, and which are used is learned"),
    Preset("foldgpt", "2407.00928", "layers in pairs; d dropped", _foldgpt, (Parameter("d", all_but(2)),),
           lambda shape: [max(1, shape.num_hidden_layers // 6)], 3,
           note=f"without weights: the middle layers are dropped, neighbours among the rest tied; {_CONVERT}, the paper by "
                "gates"),
    Preset("merge-layers", "2406.16330", "d layers merged away",
           lambda shape, d: _drop(shape, range(shape.num_hidden_layers - 1 - d, shape.num_hidden_layers - 1)),
           (Parameter("d", all_but(2)),), lambda shape: [-(-shape.num_hidden_layers // 3)], 3,
           note=f"a merge leaves fewer layers: without weights, those before the last are dropped; {_CONVERT}, and merges"),
    Preset("fusegpt", "2411.14507", "d layers folded into neighbours",
           lambda shape, d: _drop(shape, middle(shape.num_hidden_layers, d)), (Parameter("d", all_but(2)),),
           lambda shape: [-(-shape.num_hidden_layers // 4)], 3,
           note=f"a fusion leaves fewer layers: without weights, the middle ones are dropped; {_CONVERT}, and folds"),
    Preset("moeut", "2405.16039", "layers in a cycle; experts", _moe_cycle, (Parameter("G", all_but(1)),),
           lambda shape: [min(2, shape.num_hidden_layers - 1)],
           note=f"{_EXPERTS}; the paper's bank is wider, its attention has experts too, and its norms stand elsewhere"),
    Preset("megrez", "Megrez2 report", "neighbours' experts, not routers", _megrez, (Parameter("n", any_layers),), layers=3,
           note=f"n = 3; layer 0 keeps an ordinary FFN, as in the released model; {_EXPERTS}"),
    Preset("sparse-universal", "2310.07096", "every layer; experts", _moe_cycle,
           note=f"fixed depth: the paper's halting is per token; {_EXPERTS}, and none in attention; {_PRIVATE}"),
    Preset("learngene-stage", "SWS", "the layers of a stage", _grouped("tie"), (Parameter("S", any_layers),),
           lambda shape: [min(3, shape.num_hidden_layers - 1)],
           note=f"stages of equal length; growing to another depth is the same preset at that depth, {_CONVERT}"),
    Preset("trol-static", "2406.12246", "n layers run twice", _tie(_twice),
           (Parameter("n", lambda shape: shape.num_hidden_layers // 2),), lambda shape: [max(1, shape.num_hidden_layers // 4)],
           note="in the middle, for every token, without mixing in the first pass; the paper decides per token"),
    Preset("dlo-static", "2407.11030", "every n-th layer skipped",
           lambda shape, n: _drop(shape, range(max(1, n - 1), shape.num_hidden_layers - 1, n)), (Parameter("n", all_but(1)),),
           lambda shape: [min(4, shape.num_hidden_layers - 1)], 3,
           note="for every token, never the ends; the paper decides per token, and first inserts copies of layers"),
)
# fmt: on
"""Every preset that shares weights. A new one is a row here."""
