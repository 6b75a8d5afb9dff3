"""The presets that share keys and values or softmax maps, between layers or heads.

Owns `ATTENTION` and the rules of its rows. Presets that share weights are in `nas.presets.weights`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..sharing.shape import ModelShape, divisors
from .rows import (
    Layers,
    Numbers,
    Parameter,
    Preset,
    Rule,
    alike,
    all_but,
    any_kv_heads,
    any_layers,
    together,
    use,
)


def _window(shape: ModelShape) -> int:
    """The papers' 1,024 tokens, or a fourth of the context if that is less."""
    return max(1, min(1024, shape.max_position_embeddings // 4))


def _windowed(shape: ModelShape, full: Sequence[int]) -> Layers:
    return [{} if i in full else {"window": _window(shape)} for i in range(shape.num_hidden_layers)]


def _runs(primitive: str) -> Rule:
    """A rule by which each run of n layers shares with its first layer."""

    def rule(shape: ModelShape, n: int) -> Layers:
        return use(primitive, [i - i % n for i in range(shape.num_hidden_layers)])

    return rule


def _at_owners(sources: Sequence[int], primitives: dict[str, int]) -> Layers:
    return [dict(primitives) if i == j else {} for i, j in enumerate(sources)]


def _mlkv(shape: ModelShape, m: int, g: int) -> Layers:
    depth = shape.num_hidden_layers
    owners = [j * depth // m for j in range(m)]
    sources = [max(owner for owner in owners if owner <= i) for i in range(depth)]
    return together(use("kv", sources), _at_owners(sources, {"kv_heads": g}))


# --- A Systematic Study of Cross-Layer KV Sharing (2410.14442): three ways to cut the layers, three to place the target


def _pizza(depth: int, n: int, target: str) -> list[range]:
    return [*(range(i, i + 1) for i in range(n - 1)), range(n - 1, depth)]


def _sandwich(depth: int, n: int, target: str) -> list[range]:
    first, last = n // 2, depth - (n - 1) // 2
    return [*(range(i, i + 1) for i in range(first)), range(first, last), *(range(i, i + 1) for i in range(last, depth))]


def _lasagna(depth: int, n: int, target: str) -> list[range]:
    """n runs; unless their targets are at the bottom, the first of them is layer 0 alone, which has to own its KV."""
    alone = 0 if target == "bottom" else 1
    starts = [alone + j * (depth - alone) // (n - alone) for j in range(n - alone)]
    ends = [*starts[1:], depth]
    return [*(range(i, i + 1) for i in range(alone)), *(range(*ends) for ends in zip(starts, ends, strict=True))]


_CUTS = {"pizza": _pizza, "sandwich": _sandwich, "lasagna": _lasagna}
_TARGETS: dict[str, Callable[[range], int]] = {
    "bottom": lambda run: run[0],
    "middle": lambda run: (run[0] + run[-1]) // 2,
    "top": lambda run: run[-1],
}


def _cut(cut: str, target: str) -> Rule:
    """A rule by which the layers of each of n runs read the KV of the run's target layer."""

    def rule(shape: ModelShape, n: int) -> Layers:
        runs = _CUTS[cut](shape.num_hidden_layers, n, target)
        return use("kv", [_TARGETS[target](run) for run in runs for _ in run])

    return rule


_PARTS = {"pizza": "the upper layers", "sandwich": "the inner layers", "lasagna": "runs of layers"}
_LOWER_MIDDLE = "the middle of a run of even length is its lower one, as in the authors' code"
_LAYER_0_OWNS = "layer 0 is a run of its own: the paper's models fall off where it does not own its KV"


def _study(cut: str, target: str) -> Preset:
    notes = [_LAYER_0_OWNS] * (cut == "lasagna" and target != "bottom") + [_LOWER_MIDDLE] * (target == "middle")
    return Preset(
        f"kv-{cut}-{target}",
        "2410.14442",
        f"KV of {_PARTS[cut]}: their {target}'s",
        _cut(cut, target),
        (Parameter("l", any_layers, 1 if target == "bottom" else 2),),
        lambda shape: [max(2, -(-shape.num_hidden_layers // 2))],
        3,
        note="; ".join(notes),
    )


# --- windows and shared KV


def _yoco(shape: ModelShape) -> Layers:
    half = shape.num_hidden_layers // 2
    sources = [min(i, half) for i in range(shape.num_hidden_layers)]
    return together(use("kv", sources), _windowed(shape, range(half, shape.num_hidden_layers)))


def _neighbours(layers: range) -> list[int]:
    """The source of each of some consecutive layers, in pairs; with an odd number, the last joins the last pair."""
    pairs = max(1, len(layers) // 2)
    return [layers[2 * min(k // 2, pairs - 1)] for k in range(len(layers))]


def _between_full(shape: ModelShape, n: int, full_sources: Sequence[int]) -> list[int]:
    """Layers 0, n, 2n, … read `full_sources`; those between them read each other, in pairs."""
    depth, sources = shape.num_hidden_layers, []
    for start, source in zip(range(0, depth, n), full_sources, strict=True):
        sources += [source, *_neighbours(range(start + 1, min(start + n, depth)))]
    return sources


def _mixattention(shape: ModelShape, n: int) -> Layers:
    full = range(0, shape.num_hidden_layers, n)
    sources = _between_full(shape, n, [full[k - k % 2] for k in range(len(full))])
    return together(use("kv", sources), _windowed(shape, full))


def _character_ai(shape: ModelShape, n: int = 6) -> Layers:
    full = range(0, shape.num_hidden_layers, n)
    sources = _between_full(shape, n, [0 for _ in full])
    return together(use("kv", sources), _at_owners(sources, {"kv_heads": 1}), _windowed(shape, full))


def _every(shape: ModelShape, shared: int, period: int) -> set[int]:
    """The full layers: one in `period`, or in as many as own their KV if these are fewer."""
    period = min(period, shape.num_hidden_layers - shared)
    return {*range(period - 1, shape.num_hidden_layers, period)}


def _latest_of_its_kind(shape: ModelShape, shared: int, full: set[int]) -> Layers:
    """The last `shared` layers read the KV of the latest owner that is full, or windowed, as they are."""
    own = shape.num_hidden_layers - shared
    latest = {kind: max(j for j in range(own) if (j in full) == kind) for kind in (True, False)}
    sources = [i if i < own else latest[i in full] for i in range(shape.num_hidden_layers)]
    return together(use("kv", sources), _windowed(shape, sorted(full)))


def _gemma4(shape: ModelShape, shared: int) -> Layers:
    last = shape.num_hidden_layers - 1
    half = max(1, shape.intermediate_size // 2)
    narrow = [{"intermediate": half} if i <= last - shared else {} for i in range(last + 1)]
    return together(_latest_of_its_kind(shape, shared, _every(shape, shared, 6) | {last}), narrow)


def _pairs_after_odd(layers: range) -> list[int]:
    """The source of each of some consecutive layers, in pairs; with an odd number, the first pair has three."""
    odd = len(layers) % 2
    return [layers[0 if k < 2 + odd else k - (k - odd) % 2] for k in range(len(layers))]


def _hymba(shape: ModelShape) -> Layers:
    last = shape.num_hidden_layers - 1
    half = last // 2
    sources = [0, *_pairs_after_odd(range(1, half)), half, *_pairs_after_odd(range(half + 1, last)), last]
    return together(use("kv", sources), _windowed(shape, (0, half, last)))


# --- from a checkpoint, and keys apart from values


def _kvsharer(shape: ModelShape, n: int) -> Layers:
    depth = shape.num_hidden_layers
    return use("kv", [i if i < depth - n else depth - 1 - i for i in range(depth)])


def _swiftkv(shape: ModelShape, own: int, g: int) -> Layers:
    depth = shape.num_hidden_layers
    sources = [i if i < own else i - (i - own) % g for i in range(depth)]
    inputs = [{"kv_input": own - 1} if i == j >= own else {} for i, j in enumerate(sources)]
    return together(use("kv", sources), inputs)


def _cll(shape: ModelShape, n: int) -> Layers:
    rank = max(1, shape.num_key_value_heads * shape.head_dim // 4)
    return [{"kv": i - i % n} if i % n else {"factor": f"basis {rank} at {i} for k v"} for i in range(shape.num_hidden_layers)]


def _fewer_kv_heads(shape: ModelShape) -> list[int]:
    """The numbers of KV heads between all and one, descending."""
    return divisors(shape.num_key_value_heads)[-2:0:-1]


def _fewer_keys_than_values(shape: ModelShape) -> list[Numbers]:
    heads = shape.num_key_value_heads
    fewer = [*_fewer_kv_heads(shape), 1][:2] if heads > 1 else []
    return [(fewer[-1], fewer[0] if len(fewer) > 1 else heads)] if fewer else []


# --- softmax maps


def _late_span(shape: ModelShape, n: int) -> Layers:
    last = shape.num_hidden_layers - 1
    return use("attn_map", [last - n if last - n <= i < last else i for i in range(last + 1)])


def _inner_runs(shape: ModelShape, n: int) -> Layers:
    last = shape.num_hidden_layers - 1
    return use("attn_map", [i - (i - 1) % n if 0 < i < last else i for i in range(last + 1)])


_N = (Parameter("n", any_layers),)
_WINDOW = "windows of 1,024 tokens, or a fourth of the context if that is less"
_MAPS = "a reader keeps its own v and o"

# fmt: off
ATTENTION = (
    Preset("mqa", "1911.02150", "one KV head", lambda shape: alike(shape, kv_heads=1), layers=1),
    Preset("gqa", "2305.13245", "KV heads in groups", lambda shape, g: alike(shape, kv_heads=g), (Parameter("g", any_kv_heads),),
           lambda shape: _fewer_kv_heads(shape)[:3], layers=1),
    Preset("cla", "2405.12981", "KV of each n neighbours", _runs("kv"), _N,
           lambda shape: [n for n in (2, 3, 4) if n <= shape.num_hidden_layers],
           note="heads as the model has them; the paper's best takes one KV head beside it"),
    Preset("mlkv", "2406.09297", "KV of m layers, in g heads", _mlkv, (Parameter("m", any_layers), Parameter("g", any_kv_heads)),
           lambda shape: [
               (shape.num_hidden_layers // 2, 1),
               *([(shape.num_hidden_layers // 3, shape.num_key_value_heads)] if shape.num_hidden_layers > 2 else []),
           ]),
    Preset("lckv", "2405.10637", "KV of the top of all but w layers", lambda shape, w: _cut("sandwich", "top")(shape, w + 1),
           (Parameter("w", all_but(2)),), lambda shape: [2], 4,
           note="only readers leave the token itself out, as in the authors' later code; the layer that is read sees it"),
    *(_study(cut, target) for cut in _CUTS for target in _TARGETS),
    Preset("yoco", "2405.05254", "KV of the upper half; windows", _yoco, layers=3,
           note=f"the lower half is windowed (the paper's other choice is gated retention); {_WINDOW}; K and V come from layer "
                "L/2 with its own norm"),
    Preset("mixattention", "2409.15012", "KV of neighbours; windows", _mixattention, _N,
           lambda shape: [n for n in (3, 6) if n <= shape.num_hidden_layers], 3,
           note=f"the paper's Pairs: one full layer in n, the others in pairs, the odd one out with the last pair; {_WINDOW}"),
    Preset("character-ai", "Character.AI 2024", "one KV head of neighbours; windows", _character_ai, _N, layers=3,
           note=f"one full layer in n = 6, the first; all full layers read layer 0 (the post leaves open which); {_WINDOW}"),
    Preset("gemma3n", "Gemma 3n", "KV of the last S layers; windows",
           lambda shape, shared: _latest_of_its_kind(shape, shared, _every(shape, shared, 5)), (Parameter("S", all_but(2)),),
           lambda shape: [max(1, round(shape.num_hidden_layers * 3 / 7))], 3,
           note="one full layer in five, or in as many as own their KV if these are fewer; one RoPE base for both kinds; "
                f"{_WINDOW}"),
    Preset("gemma4", "Gemma 4 2026", "KV of last layers; FFN widths; windows", _gemma4, (Parameter("S", all_but(2)),),
           lambda shape: [max(1, min(shape.num_hidden_layers - 2, round(shape.num_hidden_layers * 4 / 7)))], 3,
           note="as E2B, whose layers that own KV have FFNs of half the others' width; one full layer in six, or in as many as "
                "own their KV if these are fewer, and the last; one RoPE base and head width; without per-layer embeddings; "
                f"{_WINDOW}"),
    Preset("hymba-kv", "2411.13676", "KV of pairs; windows", _hymba, layers=6,
           note="first, middle and last full, sharing nothing; an odd one joins the first pair; no state-space heads; "
                f"{_WINDOW}"),
    Preset("kvsharer", "2410.18517", "KV of n pairs far apart", _kvsharer,
           (Parameter("n", lambda shape: shape.num_hidden_layers // 2),), lambda shape: [max(1, shape.num_hidden_layers // 4)],
           note="without weights, layers far apart are taken as unlike: the last reads the first, the one before it the second; "
                "a conversion from a checkpoint measures how unlike they are"),
    Preset("swiftkv", "2410.03960", "input of upper K and V, KV of each g", _swiftkv,
           (Parameter("l", all_but(2)), Parameter("g", any_layers)),
           lambda shape: [(max(1, shape.num_hidden_layers // 2), g) for g in (1, 2)], 3,
           note="each owner norms the l-th layer's output with its own norm, where the paper has one norm for all"),
    Preset("cll-attention", "2410.15252", "low-rank KV of each n neighbours", _cll, _N, lambda shape: [2],
           note="K and V are each of a fourth of their rank and are cached whole; the paper caches one latent for both"),
    Preset("dha", "2406.06567", "K heads and V heads in groups", lambda shape, k, v: alike(shape, k_heads=k, v_heads=v),
           (Parameter("k", any_kv_heads), Parameter("v", any_kv_heads)), _fewer_keys_than_values, layers=1,
           note="without weights: the same in every layer, fewer keys than values; a conversion from a checkpoint fuses heads"),
    Preset("shared-attention", "2407.12866", "softmax map of n late layers", _late_span, (Parameter("n", all_but(1)),),
           lambda shape: [max(2, shape.num_hidden_layers // 8)], 3,
           note=f"the span ends below the last layer (27 to 30 of Llama-2-7B's 32, as in the paper); {_MAPS}"),
    Preset("echoatt", "2409.14595", "softmax map of inner layers", _inner_runs, (Parameter("n", all_but(2)),), lambda shape: [2],
           4, note=f"runs of n inner layers; the paper chooses them by similarity and distils; {_MAPS}"),
    Preset("uniattn", "2502.00439", "softmax map of superblocks", _runs("attn_map"), _N,
           lambda shape: [min(4, shape.num_hidden_layers)],
           note=f"runs of n layers from the first, without the paper's linear compensation; {_MAPS}"),
    Preset("xiao-san", "1906.11024", "softmax map of blocks", _runs("attn_map"), _N,
           lambda shape: [min(3, shape.num_hidden_layers)], note=f"blocks of n layers, where the paper learns them; {_MAPS}"),
    Preset("svformer", "2410.17897", "the first layer's values", lambda shape: use("v_from", [0] * shape.num_hidden_layers)),
    Preset("resformer", "2410.17897", "half of the first layer's values",
           lambda shape: [{}, *alike(shape, value_residual=0.5)[1:]]),
)
# fmt: on
"""Every preset that shares keys, values or softmax maps. A new one is a row here."""
