"""Evaluations as tables: for the terminal, for a page in markdown, and as CSV for machines; and what models write, as text.

Owns the columns and the rounding of tables for people, and how samples are set. The CSV has the columns of `Evaluation.to_data`.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rich import box
from rich.console import Console, ConsoleOptions, RenderableType
from rich.table import Table
from tokenizers import Tokenizer

from ..config import format_bytes
from ..sharing.picture import Cost, Part
from ..training.evaluation import Evaluation
from .measured import MeasuredConfig, Panel, extra_figures, panels, rows_of, spell

Row = dict[str, str]
Keep = Literal["all", "front", "presets"]


def front_table(evaluations: Sequence[Evaluation], keep: Keep = "all") -> list[Row]:
    """One row a config for people, by the first objective, seeds taken together; the origins of weights never share a front.

    `place` says `front` or `knee`. `vs dense` is there if the dense model is among the evaluations, `vs neighbour` if windows'
    losses were kept, with `≈` where the difference is noise; `seeds` and `origin` where they say something. `keep` leaves out
    what others dominate (`front`), or what others dominate and is no preset (`presets`).
    """
    rows = [_row(m, panel) for panel in panels(evaluations) for m in sorted(panel.all, key=lambda m: m.point)]
    presets = {m.label for panel in panels(evaluations) for m in panel.presets}
    kept = [r for r in rows if keep == "all" or r["place"] or (keep == "presets" and r["name"] in presets)]
    return _without_dull_columns(kept, always=("name", "memory", "perplexity"))


def _row(m: MeasuredConfig, panel: Panel) -> Row:
    memory, dense, count = m.first.memory, panel.dense, len(m.evaluations)
    against_dense, against_neighbour = panel.differences(m)
    saved, worse = (
        "" if dense is None or m is dense else f"{getattr(m, name) / getattr(dense, name) - 1:{form}}"
        for name, form in (("memory_bytes", "+.0%"), ("perplexity", "+.1%"))
    )
    return {
        "name": m.label,
        "run": m.first.run,
        "place": "knee" if m is panel.knee else "front" if panel.is_member(m) else "",
        "origin": panel.weights,
        "memory": format_bytes(memory.memory_bytes),
        "weights": format_bytes(memory.weight_bytes),
        "KV cache": format_bytes(memory.kv_cache_bytes),
        **extra_figures(m),
        "perplexity": f"{m.perplexity:.3f}" if panel.is_paired else _with_error(m.perplexity, m.standard_error),
        "on validation": f"{m.point[-1]:.4g}" if m.first.validation_perplexity is not None else "",
        "bits per byte": f"{m.bits_per_byte:.3f}",
        "memory vs dense": saved,
        "perplexity vs dense": spell(against_dense) if against_dense else worse,
        "perplexity vs neighbour": "≈ " * panel.is_noise(m) + spell(against_neighbour) if against_neighbour else "",
        "seeds": "1" if count == 1 else f"{count}, spread {m.spread:.3f}",
    }


def _with_error(value: float, error: float) -> str:
    """`6.123 ± 0.045`: with 0 to 4 decimals, so that the error has two figures."""
    if not math.isfinite(error):
        return f"{value:.4g}"
    digits = min(max(1 - math.floor(math.log10(error)), 0), 4) if error > 0 else 4
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def _without_dull_columns(rows: list[Row], always: Iterable[str]) -> list[Row]:
    """Rows without the columns that say nothing: empty everywhere, or one seed, or one origin."""
    said = {name: {row[name] for row in rows} for name in (rows[0] if rows else ())}
    dull = {name for name, texts in said.items() if texts == {""} or (name == "origin" and len(texts) == 1)}
    dull |= {"seeds"} if said.get("seeds") == {"1"} else set()
    return [{name: text for name, text in row.items() if name not in dull or name in always} for row in rows]


def terminal_table(rows: Sequence[Mapping[str, str]], title: str = "", note: str = "") -> RenderableType:
    """Rows for a rich console: words to the left, figures to the right, the knee in bold and what is off the front dimmed.
    Where the console is narrow, the columns in `SPARED` go, first to last, until the rest fits. A note stands below."""
    return _Fitted(rows, title, note)


@dataclass(frozen=True)
class _Fitted:
    """A table that asks the console for its width."""

    rows: Sequence[Mapping[str, str]]
    title: str
    note: str

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table]:
        names = list(self.rows[0]) if self.rows else []
        for spared in SPARED:
            if sum(self._width(name) + 3 for name in names) > options.max_width:
                names = [name for name in names if name != spared]
        table = Table(title=self.title or None, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold", pad_edge=False)
        table.caption, table.caption_justify, table.caption_style = self.note or None, "left", "dim"
        for name in names:
            heading = name if len(name) <= self._width(name) else name.replace(" ", "\n", 1)
            table.add_column(heading, justify="left" if name in WORDS else "right", no_wrap=name != "name", overflow="fold")
        for row in self.rows:
            style = {"knee": "bold", "": "dim"}.get(row.get("place", "front"))
            table.add_row(*(row[name] for name in names), style=style)
        yield table

    def _width(self, name: str) -> int:
        return max(*map(len, name.split(" ", 1)), *(len(row[name]) for row in self.rows))


CERTAINTY = (
    "vs: perplexity beside the dense model's and the next smaller one's on the front, ± the standard error of the difference "
    "over the same windows (and seeds, if several); ≈ is noise, within two of them."
)
"""What the columns of differences mean, in a line for people."""

SPARED = (
    *("on validation", "bits per byte", "KV cache", "weights", "seeds", "memory vs dense"),
    *("perplexity vs dense", "perplexity vs neighbour"),
)
WORDS = (
    *("stage", "name", "run", "kind", "estimator", "sampler", "begins with"),
    *("place", "origin", "part", "value", "paper", "front"),
)
"""Columns of words."""


def markdown_table(rows: Sequence[Mapping[str, str]]) -> str:
    """Rows as a markdown table, its columns padded so that the text reads as a table too."""
    if not rows:
        return "(none)\n"
    names = list(rows[0])
    cells = [names, *([row[name].replace("|", r"\|") for name in names] for row in rows)]
    widths = [max(len(line[n]) for line in cells) for n in range(len(names))]
    rules = ["-" * width if name in WORDS else "-" * (width - 1) + ":" for name, width in zip(names, widths, strict=True)]
    padded = [[t.ljust(w) if n in WORDS else t.rjust(w) for t, w, n in zip(c, widths, names, strict=True)] for c in cells]
    return "".join(f"| {' | '.join(line)} |\n" for line in (padded[0], rules, *padded[1:]))


def front_csv(evaluations: Sequence[Evaluation]) -> str:
    """One line an evaluation, nothing rounded; the columns are those of `rows_of`, `config` as JSON."""
    rows = rows_of(evaluations)
    columns = dict.fromkeys(name for row in rows for name in row if name != "config")
    return write_csv(rows, [*columns, "config"])


def write_csv(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """Rows as CSV, nothing rounded; `config` as JSON."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows({**row, "config": json.dumps(row["config"])} for row in rows)
    return text.getvalue()


def parts_rows(parts: Sequence[Part]) -> list[Row]:
    """Bytes by part, for people."""
    return [
        {
            "part": part.part,
            "parameters": f"{part.params:,}" if part.params else "–",
            "bytes": format_bytes(part.bytes),
            "of dense": share(part.share_of_dense),
        }
        for part in parts
    ]


def cost_rows(costs: Sequence[Cost]) -> list[Row]:
    """What a config costs beside the dense model, for people."""
    return [{"cost": c.words, "this config": c.value, "dense": c.dense, "of dense": share(c.share)} for c in costs]


def share(of_dense: float | None) -> str:
    """`83%`; nothing where the dense model has none."""
    return "" if of_dense is None else f"{of_dense:.0%}"


SAID = "What each model writes after three prompts of the test text, greedily; ⏎ is a new line"


@dataclass(frozen=True)
class Sample:
    """A prompt, what follows it in the text, and what a model writes after it."""

    prompt: str
    text: str
    written: str

    @staticmethod
    def read(row: Mapping[str, Any], tokenizer: Tokenizer) -> Sample:
        """The sample in a row of a training's result, which has tokens."""
        return Sample(*(tokenizer.decode(list(row[name]), skip_special_tokens=False) for name in ("prompt", "text", "written")))


Samples = Mapping[str, Sequence[Sample]]  # the samples of each model, by its label: the same prompts


def samples_text(samples: Samples) -> str:
    """A block for each prompt: the prompt, how the text goes on, and a line a model. Empty without samples."""
    models = {label: found for label, found in samples.items() if found}
    first = next(iter(models.values()), ())
    blocks = []
    for n, sample in enumerate(first):
        lines = {"prompt": sample.prompt, "the text": sample.text} | {label: found[n].written for label, found in models.items()}
        width = max(map(len, lines))
        blocks.append("\n".join(f"{name:<{width}}  {_line(text)}" for name, text in lines.items()))
    return "\n\n".join(blocks)


def _line(text: str) -> str:
    """A text in one line of what can be seen."""
    return "".join(c if c.isprintable() else "·" for c in text.replace("\n", "⏎").replace("\t", "⇥"))
