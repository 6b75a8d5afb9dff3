"""The figures of a search: its front, with the knee, its uncertainty and the presets; how it got there; its supernet's splits.

Which configs are a front is decided in `nas.report.measured`; `nas.report.page` shows the same data in a browser. Splits are
drawn of plain data, as `nas.splitting`'s trees and splits have it (`to_data`, `asdict`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..paired import NOISE
from ..pareto import front
from ..training.evaluation import Evaluation
from . import style as styles
from .measured import MeasuredConfig, Panel, budget, measured_at, panels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw_front(evaluations: Sequence[Evaluation], path: Path, title: str = "", size: tuple[int, int] | None = None) -> Path:
    """Draw evaluations of presets (those with a name) and of searched configs as the `.png` or `.svg` that the path asks for.

    `size` is in pixels (900 × 560 by default, and 240 more for each panel beyond the first); a PNG has twice as many a side. Each
    origin of weights gets a panel. Raises UserError for another format.
    """
    found = panels(evaluations)
    return styles.save(front_figure(found, title, size or (900, 560 + 240 * max(len(found) - 1, 0))), path)


def front_figure(found: Sequence[Panel], title: str, size: tuple[int, int]) -> Figure:
    """The figure, not yet written: one axes a panel."""
    figure, rows, head = styles.blank(size), len(found) or 1, 34 if title else 8
    grid = figure.add_gridspec(rows, 1, height_ratios=(5, *[3] * (rows - 1)), hspace=0.22)
    grid.update(left=64 / size[0], right=1 - 22 / size[0], top=1 - (head + 52) / size[1], bottom=56 / size[1])
    styles.write_title(figure, title)
    if not found:
        figure.text(0.5, 0.5, "nothing has been evaluated", color=styles.MUTED, ha="center")
        return figure
    shared: Axes | None = None
    for n, panel in enumerate(found):
        axes = figure.add_subplot(grid[n, 0], sharex=shared)
        shared = shared or axes
        _draw_panel(axes, panel, bottom=n == rows - 1)
    styles.scale_memory(figure.axes[0], [m.place[0] for panel in found for m in panel.all])
    for axes, panel in zip(figure.axes, found, strict=True):
        styles.scale_perplexity(axes, [m.perplexity for m in panel.all])
    styles.write_legend(figure, figure.axes[0], head)
    for axes, panel in zip(figure.axes, found, strict=True):
        _label(axes, panel)
    return figure


def axis_title(panel: Panel) -> str:
    """The title of the first objective's axis."""
    first = panel.all[0].objectives[0]
    where = measured_at(panel.all) if first.name == "memory_bytes" else ""
    return f"{first.axis} ({where})" if where else first.axis


def front_colours(panel: Panel) -> list[str]:
    """The colour of each member of the front that tells the second of three objectives; of two objectives none."""
    return [colour for row in panel.all[0].objectives[1:-1] for colour in styles.shades([m.value(row.name) for m in panel.front])]


def _colours_said(panel: Panel) -> str:
    found = [(row, sorted(m.value(row.name) for m in panel.front)) for row in panel.all[0].objectives[1:-1]]
    return "".join(f"; colour: {row.words}, {row.show(v[0])} (dark) to {row.show(v[-1])} (light)" for row, v in found)


def _draw_panel(axes: Axes, panel: Panel, bottom: bool) -> None:
    styles.style(axes, axis_title(panel) if bottom else "", styles.PERPLEXITY if panel.is_paired else styles.PERPLEXITY_ERROR)
    axes.set_title(caption(panel), loc="left", fontsize=9, color=styles.MUTED)
    if panel.runs:
        return _draw_runs(axes, panel)
    small = 4 if len(panel.searched) < 300 else 2.5
    _dots(axes, panel.searched, "o", "searched", ms=small, mew=0, color=styles.tint(styles.BLUE, 0.35), zorder=2)
    _steps(axes, panel.preset_front, color=styles.MUTED, lw=1.0, ls="--", label="presets alone")
    _errors(axes, panel, panel.presets, styles.MUTED)
    _dots(axes, panel.presets, "D", "preset", ms=5, mfc=styles.PAPER, mec=styles.MUTED, mew=1.3)
    _steps(axes, panel.front, color=styles.BLUE, lw=1.8)
    _errors(axes, panel, panel.front, styles.BLUE)
    sure = [m for m in panel.front if not panel.is_noise(m)]
    _dots(axes, [m for m in sure if not m.names], "o", "front", ms=5.5, color=styles.BLUE)
    _dots(axes, [m for m in sure if m.names], "D", "front, a preset", ms=5.5, color=styles.BLUE)
    for preset, sign, label in ((False, "o", "front, within noise"), (True, "D", "")):
        noise = [m for m in panel.front if panel.is_noise(m) and bool(m.names) is preset]
        _dots(axes, noise, sign, label, ms=5.5, mfc=styles.PAPER, mec=styles.BLUE, mew=1.3)
    for m, colour in zip(panel.front, front_colours(panel), strict=False):
        look = {"mfc": styles.PAPER if panel.is_noise(m) else colour, "mec": colour, "mew": 1.3}
        _dots(axes, [m], "D" if m.names else "o", "", ms=5.5, **look)
    _dots(axes, [panel.knee] if panel.knee else [], "o", "knee", ms=12, mfc="none", mec=styles.RED, mew=1.8)


ALL_RUNS = "front of all"  # the legend's word for the front of several runs


@dataclass(frozen=True)
class RunLook:
    """How a run's models are drawn: no two runs of thirty look the same, and a model that several trained shows each of them."""

    size: float
    colour: str
    sign: str
    plotly: str


def run_looks(count: int) -> Iterator[RunLook]:
    """One for each run, the largest marks first."""
    signs = (("o", "circle"), ("s", "square"), ("^", "triangle-up"), ("v", "triangle-down"), ("D", "diamond"))
    return (
        RunLook(5 + 2 * max(min(count, 4) - 1 - n, 0), styles.LAYERS[n % len(styles.LAYERS)], *signs[n % len(signs)])
        for n in range(count)
    )


def own_front(members: Sequence[MeasuredConfig]) -> list[MeasuredConfig]:
    """Those that no other among them dominates, by the first objective."""
    return [members[i] for i in front([m.point for m in members])]


def _draw_runs(axes: Axes, panel: Panel) -> None:
    """Each run's models and their front, over the front of all; what is on that is filled."""
    _steps(axes, panel.front, color=styles.FAINT, lw=8, label=f" {ALL_RUNS}", solid_joinstyle="round")
    _errors(axes, panel, panel.front, styles.MUTED)
    for (name, members), look in zip(panel.runs.items(), run_looks(len(panel.runs)), strict=True):
        _steps(axes, own_front(members), color=look.colour, lw=1.2)
        form = {"ms": look.size, "mec": look.colour, "mew": 1.2}
        _dots(axes, [m for m in members if not panel.is_member(m)], look.sign, "", mfc=styles.PAPER, **form)
        _dots(axes, [m for m in members if panel.is_member(m)], look.sign, "", mfc=look.colour, zorder=5, **form)
        axes.plot([], [], look.sign + "-", color=look.colour, lw=1.2, ms=5, label=styles.plain(name))
    _dots(axes, [panel.knee] if panel.knee else [], "o", "knee", ms=15, mfc="none", mec=styles.INK, mew=1.6)


def caption(panel: Panel) -> str:
    """What is above a panel: where weights are from, what they were trained on, and what whiskers mean."""
    said = f"bars: noise, {NOISE:g} standard errors" if panel.is_paired else ""
    seeds = "thin: seeds" if any(len(m.evaluations) > 1 for m in panel.all) else ""
    text = f"{panel.text}{', front by validation' * panel.chosen_by_validation}"
    return "; ".join(part for part in (f"{panel.title}, {budget(panel.all)}", text, said, seeds) if part) + _colours_said(panel)


def _dots(axes: Axes, configs: Sequence[MeasuredConfig], sign: str, label: str, **look: Any) -> None:
    if configs:
        axes.plot(*zip(*(m.place for m in configs), strict=True), sign, lw=0, label=label, **{"zorder": 4, **look})


def _steps(axes: Axes, members: Sequence[MeasuredConfig], **look: Any) -> None:
    """Between two members of a front the best that fits is the smaller one: a level line, then a drop. Of three objectives
    a front is no line."""
    if len(members) > 1 and len(members[0].objectives) == 2:
        axes.step(*zip(*(m.place for m in members), strict=True), where="post", zorder=3, **look)


def _errors(axes: Axes, panel: Panel, configs: Sequence[MeasuredConfig], colour: str) -> None:
    """A thick bar for what is noise, a thin one from the lowest to the highest seed."""
    for m in configs:
        x, _ = m.place
        if ends := panel.whisker(m):
            axes.plot([x, x], ends, color=colour, lw=2.6, alpha=0.35, solid_capstyle="butt", zorder=3)
        if len(m.evaluations) > 1:
            axes.plot([x, x], [min(m.perplexities), max(m.perplexities)], "_-", color=colour, lw=1, ms=5, zorder=3)


def labels(panel: Panel) -> dict[str, MeasuredConfig]:
    """The texts beside the front and the presets, the more important first: knee, front, presets' own front, dense, others."""

    def rank(m: MeasuredConfig) -> int:
        groups: tuple[Sequence[MeasuredConfig | None], ...] = (panel.front, panel.preset_front, [panel.dense])
        return next((n for n, group in enumerate(groups) if any(m is other for other in group)), len(groups))

    found = {}
    if knee := panel.knee:
        names = _joined(("knee", *(knee.names or [knee.label])))
        found[f"{names}: {knee.shown}, {knee.perplexity:.4g}"] = knee
    shown = panel.front if panel.runs else (*(m for m in panel.front if not m.names), *panel.presets)
    return found | {_joined(m.names or [m.label]): m for m in sorted(shown, key=rank) if m is not knee}


def _joined(names: Sequence[str]) -> str:
    """The names of one config, as many as fit beside a point."""
    kept = [name for n, name in enumerate(names) if n == 0 or len(" = ".join(names[: n + 1])) <= 50]
    return " = ".join((*kept, *(["…"] if len(kept) < len(names) else [])))


def _label(axes: Axes, panel: Panel) -> None:
    named = labels(panel)
    shown = panel.all if panel.runs else (*panel.presets, *panel.front)
    bars = [[(m.place[0], end) for end in (*(panel.whisker(m) or ()), *m.perplexities)] for m in shown]
    own = [own_front(members) for members in panel.runs.values()] or [panel.preset_front]
    lines = (panel.front, *own) if len(panel.all[0].objectives) == 2 else ()
    fronts = [steps([m.place for m in line]) for line in lines if len(line) > 1]
    places, marks = ([m.place for m in some] for some in (named.values(), shown))
    for text, m in zip(styles.write_labels(axes, places, [*named], marks, [*bars, *fronts]), named.values(), strict=True):
        if text and m is panel.knee and not panel.runs:
            text.set_color(styles.RED)


def steps(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The corners of a step line through points: level, then down."""
    corners = [(x, before) for (_, before), (x, _) in itertools.pairwise(points)]
    return [points[0], *(p for pair in zip(corners, points[1:], strict=True) for p in pair)]


def draw_progress(curves: Mapping[str, Sequence[float]], path: Path, size: tuple[int, int] = (900, 380)) -> Path:
    """Draw the hypervolume after each evaluation, a curve for each search, as the `.png` or `.svg` that the path asks for.
    Values are divided by the largest, since only their ratios mean anything. `size` is in pixels."""
    figure = styles.blank(size)
    axes = styles.style(figure.add_subplot(), "evaluations", "hypervolume (largest = 1)")
    figure.subplots_adjust(left=62 / size[0], right=1 - 18 / size[0], bottom=50 / size[1], top=1 - 18 / size[1])
    largest = max((max(values) for values in curves.values() if len(values)), default=1.0) or 1.0
    for n, (name, values) in enumerate(curves.items()):
        shown, colour = [value / largest for value in values], styles.LAYERS[n % len(styles.LAYERS)]
        axes.step(range(1, len(shown) + 1), shown, where="post", color=colour, lw=1.8, label=styles.plain(name))
    if curves:
        axes.legend(loc="lower right", fontsize=9, labelcolor=styles.INK, frameon=False)
    return styles.save(figure, path)


MARGIN, WIDTH, GAP, PITCH, HEIGHT = 20, 156, 190, 54, 38
ANNOTATED = 14  # up to so many options, every distance is written into its cell


def draw_agreement(split: Mapping[str, Any], path: Path) -> Path:
    """Draw the distances between a decision's options as the `.png` or `.svg` that the path asks for.

    `split` holds `decision`, `options`, `groups`, and `distances`, a row an option: 1 − cosine of their gradients, so 0
    means equal directions, 1 orthogonal ones, more than 1 opposed ones. Options are sorted by group, and each group is framed.
    """
    from matplotlib.patches import Rectangle

    options, groups = list(split["options"]), [list(group) for group in split["groups"]]
    ranked = sorted(options, key=lambda option: next((n for n, g in enumerate(groups) if option in g), len(groups)))
    places = [options.index(option) for option in ranked]
    distances = [[float(split["distances"][i][j]) for j in places] for i in places]
    side = min(max(38 * len(options), 180), 640)
    width, height = max(side + 160, 400), side + 104
    figure = styles.blank((width, height))
    axes = figure.add_axes((72 / width, 32 / height, side / width, side / height))
    bar = figure.add_axes(((72 + side + 22) / width, 32 / height, 14 / width, side / height))
    _matrix(axes, bar, distances, [str(option) for option in ranked])
    start = -0.5
    for size in (sum(option in group for option in ranked) for group in groups):
        axes.add_patch(Rectangle((start, start), size, size, fill=False, ec=styles.RED, lw=2, clip_on=False))
        start += size
    words = "distance of gradients (1 − cosine); framed: trained together"
    styles.write_title(figure, split["decision"])
    figure.text(16 / width, 1 - 45 / height, words, fontsize=8, color=styles.MUTED, va="center")
    return styles.save(figure, path)


def _matrix(axes: Axes, bar: Axes, distances: Sequence[Sequence[float]], labels: Sequence[str]) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    shades = [styles.PAPER, styles.tint(styles.BLUE, 0.55), styles.BLUE, "#16304d"]
    colours = LinearSegmentedColormap.from_list("distance", shades)
    most = max(1.0, *(d for row in distances for d in row))
    image = axes.imshow(distances, cmap=colours, vmin=0, vmax=most, interpolation="nearest")
    for place in (axes.set_xticks, axes.set_yticks):
        place(range(len(labels)), labels)
    axes.tick_params(length=0, labelsize=8.5 if len(labels) <= 20 else 6.5, labelcolor=styles.INK)
    axes.spines[:].set_visible(False)
    if len(labels) <= ANNOTATED:
        for i, row in enumerate(distances):
            for j, d in enumerate(row):
                ink = styles.INK if d < 0.5 * most else styles.PAPER
                axes.text(j, i, f"{d:.2f}", ha="center", va="center", fontsize=7.5, color=ink)
    axes.figure.colorbar(image, cax=bar).outline.set_visible(False)
    bar.tick_params(length=0, labelsize=8, labelcolor=styles.MUTED)


def draw_tree(tree: Mapping[str, Any], path: Path) -> Path:
    """Draw a split tree, from left to right, as the `.png` or `.svg` that the path asks for. A node holds `name`; a node that
    was split also `split` (with `decision` and `groups`) and `children`, one for each group."""
    return styles.save(tree_figure(tree), path)


def tree_figure(tree: Mapping[str, Any]) -> Figure:
    """The figure, not yet written; coordinates are pixels from the top left."""
    leaves = _leaves(tree)
    width, height = max(2 * MARGIN + WIDTH + _depth(tree) * (WIDTH + GAP), 300), 58 + leaves * PITCH
    figure = styles.blank((width, height))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
    axes.set_axis_off()
    words = f"{leaves} sub-supernets" if leaves > 1 else "one supernet, not split"
    axes.text(MARGIN, 24, words, fontsize=10, weight="bold", color=styles.INK, va="center")
    _draw_node(axes, tree, MARGIN, 48)
    return figure


def _draw_node(axes: Axes, tree: Mapping[str, Any], x: float, top: float) -> float:
    """Draw a node with its children below `top` and the lines to them; returns the height of its middle."""
    from matplotlib.patches import FancyBboxPatch

    y, children = top + PITCH * _leaves(tree) / 2, tree.get("children", ())
    fill, edge = (styles.FAINT, "none") if children else (styles.tint(styles.BLUE, 0.25), styles.BLUE)
    box = FancyBboxPatch((x, y - HEIGHT / 2), WIDTH, HEIGHT, "round,pad=0,rounding_size=3", fc=fill, ec=edge, gid=tree["name"])
    axes.add_patch(box)
    axes.text(x + 10, y - (8 if children else 0), tree["name"], fontsize=8, weight="bold", color=styles.INK, va="center")
    if children:
        axes.text(x + 10, y + 8, styles.plain(f"split by {tree['split']['decision']}"), fontsize=8, color=styles.INK, va="center")
    for n, child in enumerate(children):
        bend, right = x + WIDTH + 18, x + WIDTH + GAP
        end = _draw_node(axes, child, right, top)
        axes.plot([x + WIDTH, bend, bend, right - 2], [y, y, end, end], color=styles.MUTED, lw=0.9)
        said = styles.plain(_listed(tree["split"]["groups"][n]))
        axes.text(bend + 6, end - 9, said, fontsize=7.5, color=styles.MUTED, va="center")
        top += PITCH * _leaves(child)
    return y


def _leaves(tree: Mapping[str, Any]) -> int:
    return sum(map(_leaves, tree.get("children", ()))) or 1


def _depth(tree: Mapping[str, Any]) -> int:
    return 1 + max(map(_depth, tree["children"])) if tree.get("children") else 0


def _listed(options: Sequence[Any]) -> str:
    """The options, as many as there is room for."""
    words = ", ".join(map(str, options))
    return words if len(words) <= 26 else f"{words[:20].rpartition(',')[0]}, … ({len(options)})"
