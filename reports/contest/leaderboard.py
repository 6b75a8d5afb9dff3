"""How the models compare: each at its best rate, the hypervolume of each kind, who is left undominated; the page and its figure.

Owns `Result`, `Leaderboard` and what is shown of them. Which models are compared, and how they are trained, is `benchmark`'s.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nas.config import format_bytes
from nas.pareto import Point, front, hypervolume, reference_point
from nas.report.style import BLUE, GREEN, INK, MIB, MUTED, PURPLE, RED, YELLOW, blank, save, scale_memory, style
from nas.report.tables import Row, markdown_table

from ..grid import noise_of_seeds

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KINDS = {
    "search": ("o", RED),
    "search beside published": ("v", PURPLE),
    "published scheme": ("s", BLUE),
    "random config": ("^", YELLOW),
    "smaller dense model": ("D", GREEN),
}
"""Who proposes a model, and the mark of each kind."""
SEARCH, BESIDE, PUBLISHED, RANDOM, SMALLER = KINDS
SEARCHES = SEARCH, BESIDE
FIGURE = "contest.png"
LEGEND: dict[str, Any] = {"fontsize": 8.5, "frameon": False, "columnspacing": 1.4, "handletextpad": 0.3}
TITLE = "A search's front beside everybody else's"


@dataclass(frozen=True)
class Result:
    """One training: a model on a text, at one rate and with one seed."""

    text: str
    model: str
    memory_bytes: int
    weight_bytes: int
    kv_cache_bytes: int
    rate: float
    seed: int
    tokens: int
    loss_nats_per_token: float

    @property
    def training(self) -> tuple[str, str, float, int]:
        """Which training it is of."""
        return self.text, self.model, self.rate, self.seed

    @property
    def order(self) -> tuple[str, int, str, float, int]:
        """Where it stands in the table."""
        return self.text, self.memory_bytes, self.model, self.rate, self.seed


def best_rate(results: Iterable[Result]) -> float:
    """The rate with which a model's first seed ended best."""
    return min(results, key=lambda r: (r.seed, r.loss_nats_per_token, r.rate)).rate


@dataclass(frozen=True)
class Score:
    """A model at its first seed's best rate, every seed that was trained at it."""

    kind: str
    name: str
    results: tuple[Result, ...]

    @property
    def loss(self) -> float:
        """The mean over seeds, in nats a token."""
        return statistics.fmean(r.loss_nats_per_token for r in self.results)

    @property
    def noise(self) -> float:
        """The standard deviation over seeds, in nats; nan with one."""
        losses = [r.loss_nats_per_token for r in self.results]
        return statistics.stdev(losses) if len(losses) > 1 else math.nan

    @property
    def point(self) -> Point:
        """`(memory_bytes, perplexity)`."""
        return float(self.results[0].memory_bytes), math.exp(self.loss)


@dataclass(frozen=True)
class Leaderboard:
    """How models compare on one text: models as `(kind, name, key)`, all results, and the tokens of the search's proxy
    trainings."""

    text: str
    models: Sequence[tuple[str, str, str]]
    results: Sequence[Result]
    proxy_tokens: int

    @cached_property
    def scores(self) -> list[Score]:
        """Every model that was trained at every rate with the first seed and at the best with the others."""
        by_model: dict[str, list[Result]] = {}
        for r in self.results:
            by_model.setdefault(r.model, []).append(r)
        whole = max(map(len, by_model.values()), default=0)
        found = []
        for kind, name, model in self.models:
            mine = by_model.get(model, [])
            if mine and len(mine) == whole:
                rate = best_rate(mine)
                seeds = sorted((r for r in mine if r.rate == rate), key=lambda r: r.seed)
                found.append(Score(kind, name, tuple(seeds)))
        return found

    def of(self, *kinds: str) -> list[Score]:
        """Those of some kinds."""
        return [one for one in self.scores if one.kind in kinds]

    def tokens(self, *kinds: str) -> int:
        """Everything that kinds took: their models' trainings and, for a search, its proxy trainings."""
        mine = {model for of, _, model in self.models if of in kinds}
        return sum(r.tokens for r in self.results if r.model in mine) + self.proxy_tokens * any(
            kind in SEARCHES for kind in kinds
        )

    @cached_property
    def reference_point(self) -> Point:
        """A tenth beyond the worst of each coordinate, of all models."""
        return reference_point([one.point for one in self.scores])

    def volume(self, *kinds: str) -> float:
        """The hypervolume of some kinds' front over that of the published schemes; nan if those have none."""
        published = hypervolume([one.point for one in self.of(PUBLISHED)], self.reference_point)
        return hypervolume([one.point for one in self.of(*kinds)], self.reference_point) / published if published else math.nan

    @property
    def noise(self) -> float:
        """One training's deviation over seeds in nats (`noise_of_seeds`); nan with one."""
        found = {one.results[0].model: [r.loss_nats_per_token for r in one.results] for one in self.scores}
        return noise_of_seeds(np.array([*found.values()])) if found else math.nan

    @property
    def doubt(self) -> float:
        """The deviation of the difference of two models' losses, each the mean over seeds, in nats; nan with one seed."""
        seeds = max((len(one.results) for one in self.scores), default=1)
        return self.noise * (2 / seeds) ** 0.5

    def undominated(self, kind: str, *by: str) -> list[tuple[Score, float]]:
        """Those of a kind that no model of other kinds matches with as little memory, and by how many nats these fall short."""
        others = self.of(*by)
        found = []
        for one in self.of(kind):
            as_small = [other.loss for other in others if other.point[0] <= one.point[0]]
            short = min(as_small, default=math.inf) - one.loss
            if short > 0:
                found.append((one, short))
        return found


def kind_rows(board: Leaderboard) -> list[Row]:
    """One row a kind: its models, its tokens, its best perplexity, and its hypervolume over that of the published schemes."""
    return [
        {
            "name": kind,
            "models": str(len(mine)),
            "tokens": f"{board.tokens(kind):,}",
            "lowest perplexity": f"{min(one.point[1] for one in mine):.3f}",
            "hypervolume vs published": _times(board.volume(kind)),
        }
        for kind in KINDS
        if (mine := board.of(kind))
    ]


def model_rows(board: Leaderboard) -> list[Row]:
    """One row a model, by memory; `front` says which are on the front of all."""
    ordered = sorted(board.scores, key=lambda one: one.point)
    members = {id(ordered[i]) for i in front([one.point for one in ordered])}
    return [
        {
            "name": one.name,
            "kind": one.kind,
            "weights": format_bytes(one.results[0].weight_bytes),
            "cache": format_bytes(one.results[0].kv_cache_bytes),
            "memory": format_bytes(one.results[0].memory_bytes),
            "perplexity": f"{one.point[1]:.3f}" + ("" if math.isnan(one.noise) else f" ± {one.point[1] * one.noise:.3f}"),
            "rate": f"{one.results[0].rate:g}",
            "front": "front" if id(one) in members else "",
        }
        for one in ordered
    ]


EXPLAINED = """Every model was trained alone, alike, at each of several learning rates with the first seed, and at the best of
these with each other seed (the best on the text that it is measured on, which flatters all alike). What is shown is the mean over
seeds, and ± their standard deviation, of which a part is common to all models. `tokens` are everything that a kind took; the
search's include the proxy trainings that its predictor was fitted to. Hypervolumes are by memory and perplexity; the reference
point is a tenth beyond the worst of each.
A model that two kinds proposed was trained once and counts for both. `search beside published` is the same search when the
published schemes are trained anyway, as `nas search` has it, and it proposes what is expected to add most to them: it counts with
them."""


def page(leaderboards: Sequence[Leaderboard]) -> Iterator[str]:
    """The page's lines."""
    yield from (EXPLAINED, "", f"![Perplexity against memory]({FIGURE})")
    for board in leaderboards:
        yield from ("", f"## {board.text}", "", markdown_table(kind_rows(board)).rstrip(), "")
        yield from _undominated_lines(board)
        yield from ("", markdown_table(model_rows(board)).rstrip())


def _undominated_lines(board: Leaderboard) -> Iterator[str]:
    noise = board.noise
    if not math.isnan(noise):
        yield (
            f"Over seeds one training deviates by {noise:.4f} nats beyond what all models of a seed have in common, the "
            f"difference of two models by {board.doubt:.4f}: that is σ below."
        )
    for kinds in ((SEARCH,), (SEARCH, PUBLISHED), (BESIDE, PUBLISHED)):
        if not all(map(board.of, kinds)):
            continue
        name = " and ".join(f"`{kind}`" for kind in kinds)
        if len(kinds) > 1:
            yield f"{name} as one: hypervolume {_times(board.volume(*kinds))}, {board.tokens(*kinds):,} tokens."
        for kind in [kind for kind in KINDS if kind not in (*SEARCHES, *kinds) and board.of(kind)]:
            left = board.undominated(kind, *kinds)
            names = ", ".join(f"{one.name} ({_short(short, board.doubt)})" for one, short in left)
            yield f"Not matched by {name} with as little memory, of {len(board.of(kind))} × {kind}: {names or 'none'}."


def _times(volume: float) -> str:
    return "" if math.isnan(volume) else f"{volume:.3f}"


def _short(nats: float, doubt: float) -> str:
    if not math.isfinite(nats):
        return "nothing of it is so small"
    return f"by {nats:.4f} nats" + (f", {nats / doubt:.1f} σ" if doubt > 0 else "")


def draw(leaderboards: Sequence[Leaderboard], path: Path) -> Path:
    """A panel a text: every model's perplexity against its memory, and the front of each kind."""
    return save(figure_of(leaderboards), path)


def figure_of(leaderboards: Sequence[Leaderboard]) -> Figure:
    """The figure, not yet written."""
    width = 520 * len(leaderboards) + 60
    figure = blank((width, 560))
    figure.text(12 / width, 0.965, TITLE, fontsize=12, weight="bold", color=INK, va="center")
    grid = figure.add_gridspec(1, len(leaderboards), wspace=0.16, left=60 / width, right=1 - 14 / width, top=0.83, bottom=0.1)
    for n, board in enumerate(leaderboards):
        axes = style(figure.add_subplot(grid[0, n]), "memory, MiB", "perplexity" if n == 0 else "")
        axes.set_title(board.text, loc="left", fontsize=9, color=MUTED)
        for kind, (mark, colour) in KINDS.items():
            points = [(x / MIB, y) for x, y in (one.point for one in board.of(kind))]
            if points:
                axes.plot(*zip(*points, strict=True), mark, ms=5, mfc="none", mec=colour, mew=1.2, ls="", label=kind)
                steps = [points[i] for i in front(points)]
                axes.step(*zip(*steps, strict=True), where="post", color=colour, lw=1.2)
        scale_memory(axes, [one.point[0] / MIB for one in board.scores])
    handles, words = figure.axes[0].get_legend_handles_labels()
    columns = len(words) if len(leaderboards) > 1 else 3
    figure.legend(handles, words, loc="upper left", bbox_to_anchor=(6 / width, 0.945), ncols=columns, **LEGEND)
    return figure
