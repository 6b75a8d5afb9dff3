"""The words beside a search: its description, its front as a table, one line for a config.

Owns the Markdown that MLflow shows. Pure text: nothing here speaks to MLflow.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from ..evaluate import Evaluation
from ..loading import format_bytes
from ..sharing import PRIMITIVES, SharingConfig

NOTE_LIMIT = 8000
"""Characters that a run's tag holds; an experiment's holds more."""

FRONT_HEAD = "| config | memory | weights | KV cache | perplexity | bits per byte | sharing |\n|:--|--:|--:|--:|--:|--:|:--|"


def sharing_line(config: SharingConfig) -> str:
    """A config in one line, `kv 1→0 3→2 · kv_heads 2 at 0 2`: primitive by primitive, `nothing shared` for the dense one."""
    parts = []
    for name, row in PRIMITIVES.items():
        stated = [(i, value) for i, layer in enumerate(config.layers) for given, value in layer if given == name]
        if stated:
            parts.append(_arrows(name, stated) if row.sources else _options(name, stated))
    return " · ".join(parts + ["norms tied"] * (config.norms == "tied")) or "nothing shared"


def _arrows(name: str, found: Iterable[tuple[int, int]]) -> str:
    return f"{name} " + " ".join(f"{i}→{j}" for i, j in found)


def _options(name: str, found: Sequence[tuple[int, int]]) -> str:
    values = dict.fromkeys(value for _, value in found)
    return ", ".join(f"{name} {v} at " + " ".join(str(i) for i, value in found if value == v) for v in values)


def front_note(facts: Mapping[str, str], front: Sequence[Evaluation], run: str) -> str:
    """A search's description in Markdown: what was searched (`facts`, in their order), its front, how to take one home."""
    lines = [f"- **{name}**: {value}" for name, value in facts.items()]
    if front:
        lines += ["", f"**The front**: {len(front)} configs that no other beats in both memory and perplexity", ""]
        lines += [FRONT_HEAD, *map(_front_row, sorted(front, key=lambda e: e.point))]
        lines += ["", "**Take one home**", "", "```", *_commands(run), "```"]
    return clip("\n".join(lines))


def _front_row(e: Evaluation) -> str:
    error = e.losses.perplexity_standard_error
    perplexity = f"{e.losses.perplexity:.2f}" + (f" ± {error:.2f}" if math.isfinite(error) else "")
    sizes = [format_bytes(n) for n in (e.memory.memory_bytes, e.memory.weight_bytes, e.memory.kv_cache_bytes)]
    return f"| `{e.label}` | " + " | ".join([*sizes, perplexity, f"{e.bits_per_byte:.3f}", sharing_line(e.config)]) + " |"


def _commands(run: str) -> list[str]:
    return [f"nas front {run}", f"nas export {run} --pick knee --to DIR", f"nas export {run} --pick max-memory=300MiB --to DIR"]


def clip(text: str, limit: int = NOTE_LIMIT) -> str:
    """The text, cut at the end of a line if it is longer than MLflow keeps; the cut is said."""
    if len(text) <= limit:
        return text
    last = "\n\n(cut here: `nas front` prints all of it)"
    return text[: text.rfind("\n", 0, limit - len(last))] + last
