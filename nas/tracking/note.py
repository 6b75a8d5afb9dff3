"""The words beside a search: its description, its front as a table, one line for a config.

Owns the Markdown that MLflow shows. Pure text: nothing here speaks to MLflow.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from ..sharing.label import READING, sharing_line
from ..sharing.objectives import OBJECTIVES, Objective
from ..sharing.sharing_config import SharingConfig
from ..training.evaluation import Evaluation

Names = Mapping[SharingConfig, str]

NOTE_LIMIT = 8000  # characters that a run's tag holds; an experiment's holds more
LINE_LIMIT = 300  # characters of a config's line in the front's table; single heads tied in many layers take thousands
GAP = "&emsp;"  # between the table's cells, which MLflow sets without any

SIZES = ("memory_bytes", "weight_bytes", "kv_cache_bytes")
"""What the front's table has of every search; the other objectives follow."""


def front_note(facts: Mapping[str, str], front: Sequence[Evaluation], run: str, names: Names | None = None) -> str:
    """A search's description in Markdown: its front in a sentence, what was searched (`facts`, in their order), how to take a
    member home, the front as a table. MLflow folds all but the first lines away. `run` is what a shell takes for the run,
    `names` tells labels apart.
    """
    members = sorted(front, key=lambda e: e.point)
    lines = [*_headline(members), *(f"- **{name}**: {value}" for name, value in facts.items())]
    if members:
        rows = [OBJECTIVES[name] for name in dict.fromkeys((*SIZES, *members[0].objectives[:-1]))]
        columns = ("config", *(row.words for row in rows), "perplexity", "bits per byte", "sharing")
        lines += ["", "```", *_commands(run, members), "```", "", _line(columns), _line(["---"] * len(columns))]
        lines += [_line(_cells(e, e.name or (names or {}).get(e.config, e.label), rows)) for e in members]
        lines += ["", READING]
    return clip("\n".join(lines))


def _headline(members: Sequence[Evaluation]) -> list[str]:
    if not members:
        return []
    first = OBJECTIVES[members[0].objectives[0]]
    ends = [f"{first.show(e.value(first.name))} at perplexity {e.losses.perplexity:.2f}" for e in (members[0], members[-1])]
    count = f"**{len(members)} config{'s' * (len(members) > 1)} on the front**"
    return [f"{count}, from {ends[0]} to {ends[1]}" if len(members) > 1 else f"{count}: {ends[0]}", ""]


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell if cell == "---" else cell + GAP for cell in cells) + " |"


def _cells(e: Evaluation, name: str, rows: Sequence[Objective]) -> list[str]:
    error = e.losses.perplexity_standard_error
    perplexity = f"{e.losses.perplexity:.2f}" + (f" ± {error:.2f}" if math.isfinite(error) else "")
    sizes = [row.show(e.value(row.name)) for row in rows]
    return [f"`{name}`", *sizes, perplexity, f"{e.bits_per_byte:.3f}", _shortened(sharing_line(e.config))]


def _shortened(line: str) -> str:
    return line if len(line) <= LINE_LIMIT else line[: LINE_LIMIT - 2].rsplit(" ", 1)[0] + " …"


def _commands(run: str, members: Sequence[Evaluation]) -> list[str]:
    budget = math.ceil(members[len(members) // 2].memory.memory_bytes / 2**20 * 10) / 10
    picks = ["knee", f"max-memory={budget:g}MiB"]
    return [f"nas front {run}", *(f"nas export {run} --pick {pick} --to DIR" for pick in picks)]


def clip(text: str, limit: int = NOTE_LIMIT) -> str:
    """The text, cut at the end of a line if it is longer than MLflow keeps; the cut is said."""
    if len(text) <= limit:
        return text
    last = "\n\n(cut here: `nas front` prints all of it)"
    return text[: text.rfind("\n", 0, limit - len(last))] + last
