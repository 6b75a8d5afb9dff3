"""Pictures of a split: how far a decision's options pull apart, and the tree of sub-supernets that came of it.

Owns the drawings. They are made of plain data, as `nas.splitting`'s trees and splits have it (`to_data`, `asdict`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .style import BLUE, FAINT, INK, MUTED, PAPER, RED, blank, check_format, plain, save, tint, write_title

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARGIN, WIDTH, GAP, PITCH, HEIGHT = 20, 156, 190, 54, 38
ANNOTATED = 14  # up to so many options, every distance is written into its cell


def draw_agreement(split: Mapping[str, Any], path: Path) -> Path:
    """Draw the distances between a decision's options as the `.png` or `.svg` that the path asks for.

    `split` holds `decision`, `options`, `groups`, and `distances`, a row an option: 1 − cosine of their gradients, so 0
    means equal directions, 1 orthogonal ones, more than 1 opposed ones. Options are sorted by group, and each group is framed.
    """
    options, groups = list(split["options"]), [list(group) for group in split["groups"]]
    ranked = sorted(options, key=lambda option: next((n for n, g in enumerate(groups) if option in g), len(groups)))
    places = [options.index(option) for option in ranked]
    distances = [[float(split["distances"][i][j]) for j in places] for i in places]
    side = min(max(38 * len(options), 180), 640)
    width, height = max(side + 160, 400), side + 104
    figure = blank((width, height))
    axes = figure.add_axes((72 / width, 32 / height, side / width, side / height))
    bar = figure.add_axes(((72 + side + 22) / width, 32 / height, 14 / width, side / height))
    _matrix(axes, bar, distances, [str(option) for option in ranked])
    _frames(axes, [sum(option in group for option in ranked) for group in groups])
    words = "distance of gradients (1 − cosine); framed: trained together"
    write_title(figure, split["decision"])
    figure.text(16 / width, 1 - 45 / height, words, fontsize=8, color=MUTED, va="center")
    return save(figure, path)


def _matrix(axes: Axes, bar: Axes, distances: Sequence[Sequence[float]], labels: Sequence[str]) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    colours = LinearSegmentedColormap.from_list("distance", [PAPER, tint(BLUE, 0.55), BLUE, "#16304d"])
    most = max(1.0, *(d for row in distances for d in row))
    image = axes.imshow(distances, cmap=colours, vmin=0, vmax=most, interpolation="nearest")
    for place in (axes.set_xticks, axes.set_yticks):
        place(range(len(labels)), labels)
    axes.tick_params(length=0, labelsize=8.5 if len(labels) <= 20 else 6.5, labelcolor=INK)
    axes.spines[:].set_visible(False)
    if len(labels) <= ANNOTATED:
        for i, row in enumerate(distances):
            for j, d in enumerate(row):
                axes.text(j, i, f"{d:.2f}", ha="center", va="center", fontsize=7.5, color=INK if d < 0.5 * most else PAPER)
    axes.figure.colorbar(image, cax=bar).outline.set_visible(False)
    bar.tick_params(length=0, labelsize=8, labelcolor=MUTED)


def _frames(axes: Axes, sizes: Sequence[int]) -> None:
    from matplotlib.patches import Rectangle

    start = -0.5
    for size in sizes:
        axes.add_patch(Rectangle((start, start), size, size, fill=False, ec=RED, lw=2, clip_on=False))
        start += size


def draw_tree(tree: Mapping[str, Any], path: Path) -> Path:
    """Draw a split tree, from left to right, as the `.png` or `.svg` that the path asks for.

    A node holds `name`; a node that was split also `split` (with `decision` and `groups`) and `children`, one for each group.
    """
    check_format(path)
    return save(tree_figure(tree), path)


def tree_figure(tree: Mapping[str, Any]) -> Figure:
    """The figure, not yet written; coordinates are pixels from the top left."""
    leaves = _leaves(tree)
    width, height = max(2 * MARGIN + WIDTH + _depth(tree) * (WIDTH + GAP), 300), 58 + leaves * PITCH
    figure = blank((width, height))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
    axes.set_axis_off()
    words = f"{leaves} sub-supernets" if leaves > 1 else "one supernet, not split"
    axes.text(MARGIN, 24, words, fontsize=10, weight="bold", color=INK, va="center")
    _draw_node(axes, tree, MARGIN, 48)
    return figure


def _draw_node(axes: Axes, tree: Mapping[str, Any], x: float, top: float) -> float:
    """Draw a node with its children below `top` and the lines to them; returns the height of its middle."""
    from matplotlib.patches import FancyBboxPatch

    y, children = top + PITCH * _leaves(tree) / 2, tree.get("children", ())
    fill, edge = (FAINT, "none") if children else (tint(BLUE, 0.25), BLUE)
    box = FancyBboxPatch((x, y - HEIGHT / 2), WIDTH, HEIGHT, "round,pad=0,rounding_size=3", fc=fill, ec=edge, gid=tree["name"])
    axes.add_patch(box)
    axes.text(x + 10, y - (8 if children else 0), tree["name"], fontsize=8, weight="bold", color=INK, va="center")
    if children:
        axes.text(x + 10, y + 8, plain(f"split by {tree['split']['decision']}"), fontsize=8, color=INK, va="center")
    for n, child in enumerate(children):
        bend, right = x + WIDTH + 18, x + WIDTH + GAP
        end = _draw_node(axes, child, right, top)
        axes.plot([x + WIDTH, bend, bend, right - 2], [y, y, end, end], color=MUTED, lw=0.9)
        axes.text(bend + 6, end - 9, plain(_listed(tree["split"]["groups"][n])), fontsize=7.5, color=MUTED, va="center")
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
