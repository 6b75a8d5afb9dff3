"""Pictures of a split: how far a decision's options pull apart, and the tree of sub-supernets that came of it.

Owns the drawings. They are made of plain data, as `nas.splitting`'s trees and splits have it (`to_data`, `asdict`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .scene import Box, Line, Scene, Words
from .style import BLUE, FAINT, INK, MUTED, PAPER, RED, blank, plain, save, tint

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Mark = Box | Line | Words

MARGIN, WIDTH, GAP, PITCH, HEIGHT = 20, 156, 190, 54, 38
ANNOTATED = 14
"""Up to so many options, every distance is written into its cell."""


def draw_agreement(split: Mapping[str, Any], path: Path) -> Path:
    """Draw the distances between a decision's options as the `.png` or `.svg` that the path asks for.

    `split` holds `decision`, `options`, `groups`, and `distances`, a row an option: 1 − cosine of their gradients, so 0 pull the
    same way, 1 have nothing in common, more pull against each other. Options are sorted by group, and each group is framed.
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
    figure.text(16 / width, 1 - 22 / height, plain(split["decision"]), fontsize=12, weight="bold", color=INK, va="center")
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

    start = 0.0
    for size in sizes:
        frame = Rectangle((start - 0.5, start - 0.5), size, size, fill=False, ec=RED, lw=2, clip_on=False)
        axes.add_patch(frame)
        start += size


def draw_tree(tree: Mapping[str, Any], path: Path) -> Path:
    """Draw a split tree, from left to right, as the `.png` or `.svg` that the path asks for.

    A node holds `name`; a node that was split also `split` (with `decision` and `groups`) and `children`, one for each group.
    """
    return tree_scene(tree).write(path)


def tree_scene(tree: Mapping[str, Any]) -> Scene:
    """The drawing's marks and size."""
    leaves, depth = _leaves(tree), _depth(tree)
    marks = tuple(_node(tree, 0, 0.0))
    width = max(2 * MARGIN + WIDTH + depth * (WIDTH + GAP), 300)
    words = f"{leaves} sub-supernets" if leaves > 1 else "one supernet, not split"
    head = Words(MARGIN, 24, words, size=14, bold=True)
    return Scene(width, 48 + leaves * PITCH + 10, (head, *marks), words)


def _leaves(tree: Mapping[str, Any]) -> int:
    return sum(map(_leaves, tree.get("children", ()))) or 1


def _depth(tree: Mapping[str, Any]) -> int:
    return 1 + max(map(_depth, tree["children"])) if tree.get("children") else 0


def _node(tree: Mapping[str, Any], depth: int, top: float) -> Iterator[Mark]:
    """A node, its children and the lines to them; `top` counts leaves from the top."""
    x, y = MARGIN + depth * (WIDTH + GAP), _middle(tree, top)
    children = tree.get("children", ())
    colour = FAINT if children else tint(BLUE, 0.25)
    yield Box(x, y - HEIGHT / 2, WIDTH, HEIGHT, colour, "none" if children else BLUE, data={"node": tree["name"]})
    if children:
        yield Words(x + 10, y - 8, tree["name"], INK, 11, bold=True)
        yield Words(x + 10, y + 8, f"split by {tree['split']['decision']}", INK, 11)
    else:
        yield Words(x + 10, y, tree["name"], INK, 11, bold=True)
    for n, child in enumerate(children):
        end = _middle(child, top)
        bend = x + WIDTH + 18
        yield Line(((x + WIDTH, y), (bend, y), (bend, end), (x + WIDTH + GAP - 2, end)), MUTED, 1.2)
        yield Words(bend + 6, end - 9, _listed(tree["split"]["groups"][n]), MUTED, 10.5)
        yield from _node(child, depth + 1, top)
        top += _leaves(child)


def _middle(tree: Mapping[str, Any], top: float) -> float:
    return 48 + PITCH * (top + _leaves(tree) / 2)


def _listed(options: Sequence[Any]) -> str:
    """The options, as many as there is room for."""
    words = ", ".join(map(str, options))
    return words if len(words) <= 26 else f"{words[:20].rpartition(',')[0]}, … ({len(options)})"
