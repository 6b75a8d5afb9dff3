"""The published sharing schemes, each a rule over layers.

Owns `PRESETS`: a row is a paper's scheme, built for any depth by its rule. A rule gives each layer's primitives; what it means
to share them is `nas.sharing`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from .errors import UserError, did_you_mean
from .shape import ModelShape, divisors
from .sharing import SharingConfig

Layers = list[dict[str, Any]]


@dataclass(frozen=True)
class Preset:
    """A published scheme: `rule(shape, n)` gives its layers, `sizes(shape)` the n worth trying (`[None]` if it has none)."""

    name: str
    paper: str
    shares: str
    rule: Callable[[ModelShape, Any], Layers]
    sizes: Callable[[ModelShape], list[Any]] = lambda shape: [None]
    norms: str = "private"

    def build(self, shape: ModelShape, size: Any = None) -> SharingConfig:
        """The scheme as a config for this shape; `size` defaults to the first of `sizes`. Raises UserError if it has none."""
        sizes = [size] if size is not None else self.sizes(shape)
        if not sizes:
            raise UserError("needs more layers or heads than this model has", where=self.name)
        return SharingConfig.make(shape, self.rule(shape, sizes[0]), self.norms)


def _tie(owner: Callable[[int, int, int], int]) -> Callable[[ModelShape, Any], Layers]:
    """A rule by which layer i runs block `owner(i, num_hidden_layers, n)`: it ties to the first layer that runs that block."""

    def rule(shape: ModelShape, n: Any) -> Layers:
        depth = shape.num_hidden_layers
        blocks = [owner(i, depth, n) for i in range(depth)]
        return [{"tie": blocks.index(block)} if blocks.index(block) != i else {} for i, block in enumerate(blocks)]

    return rule


def _each(primitive: str, source: Callable[[int, Any], int]) -> Callable[[ModelShape, Any], Layers]:
    """A rule that gives every layer the same primitive, with the layer `source(i, n)`."""

    def rule(shape: ModelShape, n: Any) -> Layers:
        sources = [source(i, n) for i in range(shape.num_hidden_layers)]
        return [{primitive: j} if j != i else {} for i, j in enumerate(sources)]

    return rule


def _sequence(i: int, depth: int, m: int) -> int:
    run = -(-depth // m)
    return i // run * run


def _cycle_rev(i: int, depth: int, m: int) -> int:
    return i % m if i < depth - m else m - 1 - (i - (depth - m))


def _proper_divisors(shape: ModelShape) -> list[int]:
    return [m for m in divisors(shape.num_hidden_layers) if 1 < m < shape.num_hidden_layers]


def _groups(shape: ModelShape) -> list[int]:
    return [g for g in divisors(shape.num_key_value_heads)[::-1] if 1 < g < shape.num_key_value_heads]


def _kv_spans(shape: ModelShape) -> list[int]:
    return [n for n in (2, 3, 4) if n <= shape.num_hidden_layers]


def _cla(i: int, n: int) -> int:
    return i - i % n


PRESETS: dict[str, Preset] = {
    row.name: row
    for row in (
        Preset("dense", "", "nothing", lambda shape, n: [{} for _ in range(shape.num_hidden_layers)]),
        Preset("mqa", "1911.02150", "one KV head", lambda s, n: [{"kv_heads": 1}] * s.num_hidden_layers),
        Preset("gqa", "2305.13245", "KV heads in groups", lambda s, g: [{"kv_heads": g}] * s.num_hidden_layers, _groups),
        Preset("cla", "2405.12981", "KV of each n neighbours", _each("kv", _cla), _kv_spans),
        Preset("sequence", "2104.06022", "runs of layers", _tie(_sequence), _proper_divisors),
        Preset("cycle", "2104.06022", "layers in a cycle", _tie(lambda i, depth, m: i % m), _proper_divisors),
        Preset("cycle-rev", "2104.06022", "a cycle, reversed at its end", _tie(_cycle_rev), _proper_divisors),
        Preset("mobilellm-ls", "2402.14905", "each block runs twice", _tie(lambda i, depth, n: i - i % 2)),
        Preset("mobillama", "2402.16840", "one FFN", _each("ffn", lambda i, n: 0)),
        Preset("albert", "1909.11942", "every layer and norm", _tie(lambda i, depth, n: 0), norms="tied"),
        Preset("albert-attn", "1909.11942", "all attention", _each("attn", lambda i, n: 0), norms="tied"),
        Preset("albert-ffn", "1909.11942", "all FFNs", _each("ffn", lambda i, n: 0), norms="tied"),
        Preset("recurrent-stacking", "1807.05353", "every layer", _tie(lambda i, depth, n: 0)),
    )
}
"""Every preset. A new one is a row here, and nothing elsewhere."""


def preset(name: str, shape: ModelShape) -> SharingConfig:
    """A preset by its full name: `cla` at its first size, `cla-3`, or `cla-5` of any other size. Raises UserError."""
    configs = dict(presets(shape))
    if name in configs:
        return configs[name]
    base, _, size = name.rpartition("-")
    if name in PRESETS:
        return PRESETS[name].build(shape)
    if base in PRESETS and size.isdigit() and int(size) and PRESETS[base].sizes(shape) != [None]:
        return PRESETS[base].build(shape, int(size))
    raise UserError(f"no such preset: {name}", remedy=did_you_mean(name, {*configs, *PRESETS}))


def presets(shape: ModelShape) -> Iterator[tuple[str, SharingConfig]]:
    """Every preset at each of its sizes, with its full name (`cla-3`), for a model of this shape."""
    for row in PRESETS.values():
        for size in row.sizes(shape):
            yield (row.name if size is None else f"{row.name}-{size}"), row.build(shape, size)
