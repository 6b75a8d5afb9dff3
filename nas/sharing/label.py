"""The names of configs: a label of a few letters, which says how much is shared, and a line that says all of it.

Owns both spellings, and how a label is told from an equal one. A row of `PRIMITIVES` brings its word (`Primitive.short`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import groupby
from operator import itemgetter
from typing import Any

from ..errors import UserError, one_of
from .primitives import LAYER_ROWS, PRIMITIVES, Primitive
from .sharing_config import SharingConfig

LONGEST = 28  # characters of a label; one that would be longer ends in `-etc`

READING = (
    "Names count layers: ffn3-kv2-gqa1x4 has ffn at 3, kv at 2, kv_heads of 1 at 4 (see `nas zoo --primitives`); "
    "@ and digits of the hash tell equal ones apart."
)
"""How a label is read, in a line for people."""


@lru_cache(maxsize=1 << 14)
def label(config: SharingConfig) -> str:
    """A config's name, such as `ffn3-kv2-gqa1x4`: the layers that state each primitive, in the order of `PRIMITIVES`, then what
    the whole model states; `dense` if nothing is shared. It stands in a shell, a path and a URL as it is."""
    counts: dict[str, int] = {}
    for row in LAYER_ROWS:
        values = [value for layer in config.layers for given, value in layer if given == row.name]
        for word in map(_word, [row] * len(values), sorted(values)):
            counts[word] = counts.get(word, 0) + 1
    words = [f"{word}{'x' * word[-1].isdigit()}{count}" for word, count in counts.items()]
    words += [_word(PRIMITIVES[name], value) for name, value in config.model_choices]
    kept = next((n for n in range(len(words), 0, -1) if len(_joined(words, n)) <= LONGEST), 1)
    return _joined(words, kept) or "dense"


def _joined(words: Sequence[str], kept: int) -> str:
    return "-".join((*words[:kept], *(["etc"] if kept < len(words) else [])))


def _word(row: Primitive, value: Any) -> str:
    """A primitive's word with its value, if that is a part of it: `kv`, `gqa2`, `noattn`."""
    return ("no" if value is False else "") + re.sub(r"[^\w.]", "", form(row).format(value))


def form(row: Primitive) -> str:
    """A primitive's word, with `{}` where the value stands."""
    return row.short or row.name.replace("_", "") + "{}" * (not row.sources)


def names_of(config: SharingConfig) -> dict[str, str]:
    """The names that stand in every row for machines."""
    return {"label": label(config), "hash": config.hash}


def labels(configs: Iterable[SharingConfig]) -> dict[SharingConfig, str]:
    """The name of each config among others: its label and, where another has the same, `@` and digits of its hash."""
    groups: dict[str, dict[SharingConfig, None]] = {}
    for config in configs:
        groups.setdefault(label(config), {})[config] = None
    return {config: name for same in groups.values() for config, name in _told_apart(list(same)).items()}


def _told_apart(same: Sequence[SharingConfig]) -> dict[SharingConfig, str]:
    digits = next(n for n in range(4, 13) if len({config.hash[:n] for config in same}) == len(same) or n == 12)
    return {config: label(config) + f"@{config.hash[:digits]}" * (len(same) > 1) for config in same}


def find_config(name: str, configs: Iterable[SharingConfig], where: str = "") -> SharingConfig | None:
    """The config of a hash, or of a label, with `@` and digits of the hash or without; None if there is none.

    Raises UserError for a label that several have.
    """
    wanted, _, digits = name.partition("@")
    every = list(dict.fromkeys(configs))
    found = [c for c in every if c.hash == name or (label(c) == wanted and c.hash.startswith(digits))]
    if len(found) > 1:
        hint = f"use {one_of(labels(found).values())}"
        raise UserError(f"{len(found)} configs are called {wanted}", where=where, hint=hint)
    return found[0] if found else None


def sharing_line(config: SharingConfig) -> str:
    """A config in one line, `kv 1→0 3→2 · kv_heads 2 at 0 2 · embedding_rank 8`: primitive by primitive, those of the whole model
    last; `nothing shared` for the dense one.
    """
    parts = []
    for row in LAYER_ROWS:
        stated = [(i, value) for i, layer in enumerate(config.layers) for given, value in layer if given == row.name]
        if stated:
            parts.append(f"{row.name} {_arrows(stated) if row.sources else _options(stated)}")
    return " · ".join([*parts, *(f"{name} {_spell(value)}" for name, value in config.model_choices)]) or "nothing shared"


def layer_line(choices: Sequence[tuple[str, Any]]) -> str:
    """What one layer states, or the whole model: `kv → 0 · kv_heads 2`; empty if nothing."""
    return " · ".join(f"{name} {'→ ' * PRIMITIVES[name].sources}{_spell(value)}" for name, value in choices)


def _arrows(stated: Sequence[tuple[int, int]]) -> str:
    """`1→0 3–5→2` for 1 with 0, and 3, 4 and 5 with 2."""
    runs = groupby(stated, key=itemgetter(1))
    found = ((j, spans([i for i, _ in run]).split()) for j, run in runs)
    return " ".join(f"{span}→{j}" for j, layers in found for span in layers)


def _options(stated: Sequence[tuple[int, Any]]) -> str:
    values = dict.fromkeys(value for _, value in stated)
    return ", ".join(f"{_spell(v)} at {spans([i for i, value in stated if value == v])}" for v in values)


def _spell(value: Any) -> str:
    """A value as YAML has it; in quotes if it is several words."""
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return f'"{text}"' if " " in text else text


def spans(layers: Sequence[int]) -> str:
    """`0–2 5` for 0, 1, 2 and 5."""
    runs: list[list[int]] = []
    for i in layers:
        runs = [*runs[:-1], [runs[-1][0], i]] if runs and runs[-1][1] == i - 1 else [*runs, [i, i]]
    return " ".join(str(first) if first == last else f"{first}–{last}" for first, last in runs)
