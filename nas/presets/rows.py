"""`Preset`, a row of the tables of presets, and helpers for the rules of both tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import UserError
from ..sharing.shape import ModelShape
from ..sharing.sharing_config import SharingConfig

Layers = list[dict[str, Any]]  # one `{primitive: value}` a layer

Rule = Callable[..., Layers]
"""`rule(shape, *size)` gives the layers. A rule of a preset that works without a size has a default for it."""


Numbers = tuple[int, ...]  # of a size, one or two


def spell(numbers: Numbers) -> str:
    """`3x8`: a size as it is written."""
    return "x".join(map(str, numbers))


@dataclass(frozen=True)
class Parameter:
    """A number of a preset's size: its name in the paper, and its range, from `least` to `most(shape)`."""

    name: str
    most: Callable[[ModelShape], int]
    least: int = 1


def any_layers(shape: ModelShape) -> int:
    """As many as the model has layers."""
    return shape.num_hidden_layers


def all_but(spared: int) -> Callable[[ModelShape], int]:
    """As many as the model has layers, less `spared`."""
    return lambda shape: shape.num_hidden_layers - spared


def any_kv_heads(shape: ModelShape) -> int:
    """As many as the model has key/value heads."""
    return shape.num_key_value_heads


def any_rank(shape: ModelShape) -> int:
    """As much as the narrowest matrix of a layer has, its K and V apart."""
    return min(shape.hidden_size, shape.num_attention_heads * shape.head_dim, shape.intermediate_size)


@dataclass(frozen=True)
class Preset:
    """A published scheme: `rule(shape, *size)` gives its layers, `model_choices(shape)` its primitives for the whole model.

    `tries(shape)` are the sizes worth trying (`[None]` if it needs none); `parameters` name and bound the numbers of a size. It
    needs at least `layers` layers. `note` says how it differs from the paper, or what the paper leaves open.
    """

    name: str
    paper: str
    shares: str
    rule: Rule
    parameters: tuple[Parameter, ...] = ()
    tries: Callable[[ModelShape], Sequence[int | Numbers | None]] = lambda shape: [None]
    layers: int = 2
    model_choices: Callable[[ModelShape], Mapping[str, Any]] = lambda shape: {}
    note: str = ""

    def sizes(self, shape: ModelShape) -> list[Numbers | None]:
        """The sizes worth trying in a model of this shape; empty if it is impossible, `[None]` if it needs no size."""
        tries = self.tries(shape) if shape.num_hidden_layers >= self.layers else []
        return [(size,) if isinstance(size, int) else size for size in tries]

    def full_name(self, size: Numbers | None) -> str:
        """The name with its size: `cla-3`, `mlkv-3x1`, `dense`."""
        return f"{self.name}-{spell(size)}" if size else self.name

    def build(self, shape: ModelShape, size: Numbers | None = None) -> SharingConfig:
        """The config for this shape; `size` is by default the first of `sizes`. Raises UserError if impossible."""
        if size is None:
            sizes = self.sizes(shape)
            if not sizes:
                raise self._refusal(shape)
            size = sizes[0]
        if size is not None:  # a rule may have a default for its size
            check_size(self.name, self.parameters, shape, size)
        return SharingConfig.make(shape, self.rule(shape, *(size or ())), **self.model_choices(shape))

    def _refusal(self, shape: ModelShape) -> UserError:
        if shape.num_hidden_layers < self.layers:
            rule = f"needs more layers than num_hidden_layers={shape.num_hidden_layers}"
            return UserError(rule, where=self.name, hint=f"use {self.layers} or more")
        heads = f"num_key_value_heads={shape.num_key_value_heads} of num_attention_heads={shape.num_attention_heads}"
        return UserError(f"needs more key/value heads than {heads}", where=self.name)


def check_size(name: str, parameters: Sequence[Parameter], shape: ModelShape, numbers: Numbers) -> None:
    """Raise UserError unless the numbers are a size of these parameters, for a model of this shape."""
    if len(numbers) != len(parameters):
        wanted = "x".join(row.name for row in parameters) or "no size"
        raise UserError(f"{spell(numbers)} is not its size", where=name, hint=f"give {wanted}")
    for row, number in zip(parameters, numbers, strict=True):
        least, most = row.least, row.most(shape)
        if not least <= number <= most:
            hint = f"use {least} to {most}" if most >= least else "use a larger model"
            raise UserError(f"{row.name}={number} does not fit this model", where=name, hint=hint)


def alike(shape: ModelShape, **primitives: Any) -> Layers:
    """The same primitives in every layer."""
    return [dict(primitives) for _ in range(shape.num_hidden_layers)]


def use(primitive: str, sources: Sequence[int]) -> Layers:
    """Layer i applies a primitive with source `sources[i]`, and nothing where that is itself."""
    return [{primitive: j} if j != i else {} for i, j in enumerate(sources)]


def together(*tables: Layers) -> Layers:
    """The primitives of several tables, layer by layer."""
    return [{name: value for layer in layers for name, value in layer.items()} for layers in zip(*tables, strict=True)]


def firsts(blocks: Sequence[int]) -> list[int]:
    """For each layer, the first layer with the same block."""
    return [blocks.index(block) for block in blocks]


def middle(depth: int, count: int) -> range:
    """The `count` layers in the middle."""
    return range((depth - count) // 2, (depth - count) // 2 + count)
