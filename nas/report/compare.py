"""Presets compared, each at its best learning rate: a table, a CSV file, a figure of two panels, and the page of all three.

Owns `Compared` and `Comparison`, the columns shown and the page. Training is done in `nas.search.compare`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import format_bytes
from ..pareto import front
from ..sharing.label import names_of
from ..sharing.memory import MemorySpec
from ..sharing.shape import ModelShape
from . import style as styles
from .front import steps
from .measured import MeasuredConfig
from .tables import SAID, Row, Samples, markdown_table, samples_text, write_csv
from .write import command_without_folders, provenance_lines

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FIGURE, TABLE, PAGE = "compared.png", "compared.csv", "README.md"
KINDS = {"weights": ("o", styles.BLUE), "attention": ("D", styles.RED), "": ("s", styles.INK)}
"""The mark of each kind of preset, and of the dense model."""


@dataclass(frozen=True)
class Compared:
    """One config at its best learning rate: `measured` has the names of all presets that it is, and all its seeds.

    `kind` says whether it shares `weights` or what `attention` computes; `losses` are the mean validation losses in nats a token
    by learning rate, nan where a training failed; all else is of the test text. `against` is its perplexity over the dense
    model's, and the standard error of that ratio over the windows, which both met.
    """

    measured: MeasuredConfig
    kind: str
    papers: tuple[str, ...]
    learning_rate: float
    losses: Mapping[float, float]
    against: tuple[float, float] | None = None

    @property
    def end(self) -> str:
        """`lowest` or `highest` where the best rate is at an end of those tried, so that one beyond may be better yet."""
        tried = sorted(self.losses)
        ends = {tried[0]: "lowest", tried[-1]: "highest"} if len(tried) > 1 else {}
        return ends.get(self.learning_rate, "")

    @property
    def seconds(self) -> float:
        """Of one training at the best rate, the mean over seeds."""
        return sum(e.seconds for e in self.measured.evaluations) / len(self.measured.evaluations)

    def to_data(self) -> dict[str, Any]:
        """One flat row: the columns of the CSV and of `--json`. Nothing is rounded; None where there is none."""
        first = self.measured.first
        ratio, error = self.against or (None, None)
        head = {"presets": " = ".join(self.measured.names), "papers": ", ".join(self.papers), **names_of(first.config)}
        found = {
            "perplexity": self.measured.perplexity,
            "perplexity_standard_error": self.measured.standard_error,
            "perplexity_over_dense": ratio,
            "perplexity_over_dense_standard_error": error,
            "bits_per_byte": self.measured.bits_per_byte,
            "tokens": first.tokens,
            "seeds": len(self.measured.evaluations),
            "seconds": self.seconds,
            "learning_rate": self.learning_rate,
            "learning_rate_at_end": self.end,
        }
        losses = {f"loss_nats_per_token_at_{rate:g}": None if math.isnan(loss) else loss for rate, loss in self.losses.items()}
        return head | first.memory.to_data() | found | losses | {"config": first.config.to_data()}


@dataclass(frozen=True)
class Comparison:
    """A page's matter. Rows of `seq` tokens were trained on, and `windows` of as many evaluated; `failed` says what could not be
    trained at any rate, and why."""

    title: str
    command: str
    shape: ModelShape
    spec: MemorySpec
    seq: int
    windows: int
    rows: Sequence[Compared]
    failed: Mapping[str, str] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    samples: Samples = field(default_factory=dict)


def write_comparison(folder: Path, comparison: Comparison) -> Path:
    """Write the page, its figure and its table into a folder; returns the page's path. The same rows give the same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / TABLE).write_text(compared_csv(comparison.rows), encoding="utf-8")
    draw_compared(comparison.rows, folder / FIGURE, comparison.title)
    path = folder / PAGE
    path.write_text("\n".join(_page(comparison)).rstrip() + "\n", encoding="utf-8")
    return path


def _page(given: Comparison) -> Iterator[str]:
    rows = given.rows
    yield from (f"# {given.title}", "", *_findings(rows), "", "```", command_without_folders(given.command), "```", "")
    yield given.shape.sentence
    first = rows[0].measured
    rates = ", ".join(f"{rate:g}" for rate in rows[0].losses)
    seeds = len(first.evaluations)
    yield f"Each preset was trained alone, from scratch, for {first.first.tokens:,} tokens of the same text in the same batches,"
    yield f"at each of the learning rates {rates}, with {seeds} seed{'s' * (seeds > 1)}. The rate of least"
    yield "validation loss is shown, and `loss at` is that loss; all else is of the test text, by which nothing was chosen."
    yield from ("", f"![Perplexity against weights, and against cache]({FIGURE})", "")
    yield f"Weights and the KV cache of {given.spec.context:,} tokens × {given.spec.batch}, {given.spec.dtype}; `read` is what"
    yield "decoding one token reads of the full cache. `front` says where no other has as little and a lower perplexity."
    yield f"± is one standard error over the {given.windows} test windows, the text's own variance; that of `vs dense` is"
    yield "over the differences window by window, since all met the same. Neither has in it what another seed would change."
    yield _ends(rows)
    yield from ("", markdown_table(compared_table(rows)))
    yield from (f"Everything, unrounded, with each config: [{TABLE}]({TABLE}).", "")
    yield from _warn_unused_windows(given)
    for name, reason in given.failed.items():
        yield from (f"{name} could not be trained at any rate: {reason}", "")
    text = samples_text(given.samples)
    if text:
        yield from ("<details>", f"<summary>{SAID}</summary>", "", "````", text, "````", "", "</details>", "")
    yield from provenance_lines(given.provenance)


def _warn_unused_windows(given: Comparison) -> Iterator[str]:
    """Attention to fewer tokens that no row was long enough to feel: it saves cache and seems to cost nothing."""
    idle = [
        row.measured.label
        for row in given.rows
        if any((layer.window or 0) >= given.seq for layer in row.measured.first.config.resolve(given.shape).layers)
    ]
    if idle:
        names = f"{', '.join(idle)} {'have' if len(idle) > 1 else 'has'}"
        yield from (f"Rows had {given.seq} tokens. {names} windows of as many or more: what those cost is not seen here.", "")


def _findings(rows: Sequence[Compared]) -> Iterator[str]:
    best = min(rows, key=lambda row: row.measured.perplexity)
    seeds = len(best.measured.evaluations)
    yield f"- Of {len(rows)} configs {best.measured.label} has the lowest perplexity, {best.measured.perplexity:.3f}."
    dense = next((row.measured for row in rows if not row.kind), None)
    ratios = [(row, *row.against) for row in rows if row.against]
    if dense and ratios:
        lower, higher = (sum(sign * (ratio - 1) > 2 * error for _, ratio, error in ratios) for sign in (-1, 1))
        found = f"- Dense has {dense.perplexity:.3f}; {lower} are lower and {higher} higher by more than two standard errors."
        small = min((row.measured for row, ratio, _ in ratios if ratio < 1.01), key=lambda m: m.memory_bytes, default=dense)
        yield f"{found} Within 1% of it"
        yield f"  the smallest is {small.label}, with {small.memory_bytes / dense.memory_bytes:.0%} of its memory."
    for axis in AXES:
        yield f"- Front of perplexity against {axis}: {', '.join(row.measured.label for row in _front(rows, axis))}."
    yield f"- One size of model, one text and {seeds} seed{'s' * (seeds > 1)}: how much another would change is not seen here."


def _ends(rows: Sequence[Compared]) -> str:
    """How far the grid of rates can be trusted."""
    counts = {end: sum(row.end == end for row in rows) for end in ("lowest", "highest")}
    said = " and ".join(f"{count} at the {end} (`{_SIGNS[end]}`)" for end, count in counts.items() if count)
    return f"Of {len(rows)} presets {said} of the rates did best: beyond it another may be better yet." if said else ""


_SIGNS = {"lowest": "↓", "highest": "↑", "": ""}


def compared_table(rows: Sequence[Compared]) -> list[Row]:
    """One row a config for people, by ascending memory."""
    fronts = {axis: _front(rows, axis) for axis in AXES}
    return [_row(row, [axis for axis, kept in fronts.items() if row in kept]) for row in _by_memory(rows)]


def _by_memory(rows: Sequence[Compared]) -> list[Compared]:
    return sorted(rows, key=lambda row: (row.measured.point, row.measured.first.config.hash))


def _row(row: Compared, fronts: Sequence[str]) -> Row:
    memory, m = row.measured.first.memory, row.measured
    ratio, error = row.against or (math.nan, math.nan)
    losses = {
        f"loss at {rate:g}": "failed" if math.isnan(loss) else f"{loss:.3f}{_SIGNS[row.end] * (rate == row.learning_rate)}"
        for rate, loss in row.losses.items()
    }
    return {
        "name": m.label,
        "paper": ", ".join(row.papers),
        "weights": format_bytes(memory.weight_bytes),
        "cache": format_bytes(memory.kv_cache_bytes),
        "memory": format_bytes(memory.memory_bytes),
        "read": format_bytes(memory.kv_read_bytes_per_token),
        "MFLOP/token": f"{memory.flops_per_token / 1e6:.3g}",
        "perplexity": f"{m.perplexity:.3f} ± {m.standard_error:.3f}",
        "vs dense": "" if math.isnan(ratio) else f"{ratio - 1:+.1%} ± {error:.1%}",
        "front": ", ".join(fronts),
        "rate": f"{row.learning_rate:g}",
        **losses,
        "seconds": f"{row.seconds:.0f}",
    }


def compared_csv(rows: Sequence[Compared]) -> str:
    """One line a config, by ascending memory, nothing rounded; `config` as JSON."""
    data = [row.to_data() for row in _by_memory(rows)]
    return write_csv(data, list(data[0]))


# The figure.

AXES: dict[str, Callable[[Compared], int]] = {
    "weights": lambda row: row.measured.first.memory.weight_bytes,
    "cache": lambda row: row.measured.first.memory.kv_cache_bytes,
}
"""What perplexity is drawn against."""
_TITLES = {"weights": "weights, MiB", "cache": "KV cache, MiB"}
_SHARED = {"weights": "weights", "cache": "attention"}


def _front(rows: Sequence[Compared], axis: str) -> list[Compared]:
    return [rows[i] for i in front([(float(AXES[axis](row)), row.measured.perplexity) for row in rows])]


def draw_compared(rows: Sequence[Compared], path: Path, title: str = "") -> Path:
    """Perplexity against weights and against cache, side by side, as the `.png` or `.svg` that the path asks for. A preset is
    named in the panel of what it shares; those on a front and the dense model are named in both, with error bars."""
    width, height = 1500, 900
    figure = styles.blank((width, height))
    grid = figure.add_gridspec(1, 2, wspace=0.06)
    grid.update(left=60 / width, right=1 - 16 / width, top=1 - 72 / height, bottom=52 / height)
    styles.write_title(figure, title)
    shared: Axes | None = None
    for n, axis in enumerate(AXES):
        axes = figure.add_subplot(grid[0, n], sharey=shared)
        shared = shared or axes
        _draw_panel(axes, rows, axis)
        axes.tick_params(labelleft=n == 0)
    styles.write_legend(figure, figure.axes[0], 36)
    for axes, axis in zip(figure.axes, AXES, strict=True):
        members = _front(rows, axis)
        dense, others = ([row for row in rows if row.kind == kind and row not in members] for kind in ("", _SHARED[axis]))
        named = [*members, *dense, *others]
        places, marks, corners = ([_point(row, axis) for row in some] for some in (named, rows, members))
        styles.write_labels(axes, places, [row.measured.names[0] for row in named], marks, [steps(corners)])
    return styles.save(figure, path)


def _draw_panel(axes: Axes, rows: Sequence[Compared], axis: str) -> None:
    styles.style(axes, _TITLES[axis], styles.PERPLEXITY_ERROR if axis == "weights" else "")
    members = _front(rows, axis)
    for row in rows:
        m, (x, y), (mark, colour) = row.measured, _point(row, axis), KINDS[row.kind]
        if row in members or not row.kind:
            axes.plot([x, x], [y - m.standard_error, y + m.standard_error], color=styles.tint(colour, 0.35), lw=2, zorder=1)
        axes.plot(x, y, mark, ms=5, mfc=colour if row in members else styles.PAPER, mec=colour, mew=1.2, zorder=3)
    for kind, words in {"weights": "shares weights", "attention": "shares K, V or maps", "": "dense"}.items():
        mark, colour = KINDS[kind]
        axes.plot([], [], mark, ms=5, mfc=styles.PAPER, mec=colour, mew=1.2, label=words)
    corners = steps([_point(row, axis) for row in members])
    axes.plot(*zip(*corners, strict=True), color=styles.MUTED, lw=1.2, label="front (filled)", zorder=2)
    styles.scale_memory(axes, [_point(row, axis)[0] for row in rows])


def _point(row: Compared, axis: str) -> tuple[float, float]:
    return AXES[axis](row) / styles.MIB, row.measured.perplexity
