"""Published sharing schemes, as presets that are built for any depth.

Owns `PRESETS`. A preset's rule gives the primitives of each layer. Its full name is its name and its size: `dense`, `cla-3`, or
with two numbers, in the order of its `parameters`, `mlkv-3x1`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from ..errors import UserError, did_you_mean
from ..sharing.shape import ModelShape
from ..sharing.sharing_config import SharingConfig
from .attention import ATTENTION
from .rows import Preset
from .weights import WEIGHTS

PRESETS: dict[str, Preset] = {row.name: row for row in (*WEIGHTS, *ATTENTION)}
"""Every preset. A new one is a row in one of the two tables, and nothing elsewhere."""

_SIZED = re.compile(r"(.+)-([1-9][0-9]*(?:x[1-9][0-9]*)?)")


def preset(name: str, shape: ModelShape) -> SharingConfig:
    """A preset by its full name: `cla` at its first size, `cla-3`, or `cla-5` of any other size. Raises UserError."""
    if name in PRESETS:
        return PRESETS[name].build(shape)
    sized = _SIZED.fullmatch(name)
    row = PRESETS.get(sized[1]) if sized else None
    if sized and row and row.parameters:
        return row.build(shape, tuple(map(int, sized[2].split("x"))))
    known = {row.full_name(size) for row in PRESETS.values() for size in row.sizes(shape)}
    raise UserError(f"no such preset: {name}", hint=did_you_mean(name, known | PRESETS.keys()))


def presets(shape: ModelShape) -> Iterator[tuple[str, SharingConfig]]:
    """Every preset at each of its sizes, with its full name (`cla-3`), for a model of this shape."""
    for row in PRESETS.values():
        for size in row.sizes(shape):
            yield row.full_name(size), row.build(shape, size)
