"""Where to put the labels of points so that nothing covers anything.

Owns a small search over places; it knows rectangles and no drawing library. Coordinates are pixels, y in either direction.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Pair = tuple[float, float]
Rectangle = tuple[float, float, float, float]
"""Left, low, right, high."""

RADII, ANGLES = (6, 9, 14, 22, 34, 50, 70), 24
SWEEPS = 6


def place(
    anchors: Sequence[Pair],
    sizes: Sequence[Pair],
    obstacles: Sequence[Rectangle],
    frame: Rectangle,
) -> list[Rectangle]:
    """A rectangle of `sizes[n]` for the label of each anchor, near it, inside the frame, over no obstacle and no other label.

    Each label in turn takes its cheapest place given the others, a few times over, in several orders; the cheapest outcome
    stands. Deterministic.
    """
    if not anchors:
        return []
    search = _Search(anchors, sizes, np.array(obstacles, dtype=float).reshape(-1, 4), frame)
    across, up = (sorted(range(len(anchors)), key=lambda n: anchors[n][axis]) for axis in (0, 1))
    chosen = min((search.settle(order) for order in (across, across[::-1], up, up[::-1])), key=search.total)
    return [tuple(map(float, places[n])) for places, n in zip(search.candidates, chosen, strict=True)]  # type: ignore[misc]


class _Search:
    """The places each label may take, and what a choice of places costs."""

    def __init__(self, anchors: Sequence[Pair], sizes: Sequence[Pair], fixed: Array, frame: Rectangle) -> None:
        self.candidates = [_candidates(anchor, size) for anchor, size in zip(anchors, sizes, strict=True)]
        pairs = list(zip(self.candidates, anchors, strict=True))
        self.leaders = [_leaders(places, anchor) for places, anchor in pairs]
        alone = [_cost(places, anchor, fixed, frame) for places, anchor in pairs]
        crossed = [_crossed(lines, anchor, fixed) for lines, anchor in zip(self.leaders, anchors, strict=True)]
        self.alone = [cost + 6 * count for cost, count in zip(alone, crossed, strict=True)]

    def settle(self, order: Sequence[int]) -> list[int]:
        """A choice in which no label gains by moving alone, or nearly so."""
        chosen = [int(cost.argmin()) for cost in self.alone]
        for _ in range(SWEEPS):
            before = list(chosen)
            for n in order:
                chosen[n] = int(self.cost(n, chosen).argmin())
            if chosen == before:
                break
        return chosen

    def cost(self, n: int, chosen: Sequence[int]) -> Array:
        """What each place of label n costs, the others staying: `(places,)`."""
        others = [m for m in range(len(chosen)) if m != n]
        words = np.array([self.candidates[m][chosen[m]] for m in others]).reshape(-1, 4)
        lines = np.array([self.leaders[m][chosen[m]] for m in others]).reshape(-1, 2)
        crossed = _inside(self.leaders[n], words).sum((1, 2)) + _inside(lines[None], self.candidates[n]).sum((0, 1))
        cost: Array = self.alone[n] + _overlap(self.candidates[n], words) + 45 * crossed
        return cost

    def total(self, chosen: Sequence[int]) -> float:
        """What a choice costs in all."""
        return float(sum(self.cost(n, chosen)[place] for n, place in enumerate(chosen)))


def nearest(rectangle: Rectangle, point: Pair) -> Pair:
    """The point of a rectangle nearest to a point."""
    left, low, right, high = rectangle
    return min(max(point[0], left), right), min(max(point[1], low), high)


def _candidates(anchor: Pair, size: Pair) -> Array:
    """Rectangles `(places, 4)` whose nearest edge or corner is a radius from the anchor, to every side."""
    found = []
    for radius in RADII:
        for turn in range(ANGLES):
            cos, sin = math.cos(turn * math.tau / ANGLES), math.sin(turn * math.tau / ANGLES)
            x = anchor[0] + radius * cos + size[0] * (cos - 1) / 2
            y = anchor[1] + radius * sin + size[1] * (sin - 1) / 2
            found.append((x, y, x + size[0], y + size[1]))
    return np.array(found)


def _offsets(places: Array, anchor: Pair) -> Array:
    """From the anchor to the nearest point of each place `(places, 4)`; `(places, 2)`."""
    return np.clip(anchor, places[:, :2], places[:, 2:]) - np.array(anchor)


def _leaders(places: Array, anchor: Pair) -> Array:
    """Points along the line from the anchor to each place; `(places, points, 2)`."""
    steps = np.linspace(0.15, 0.95, 9)[None, :, None]
    return np.array(anchor) + steps * _offsets(places, anchor)[:, None, :]


def _crossed(lines: Array, anchor: Pair, fixed: Array) -> Array:
    """How many points of each line `(places, points, 2)` lie on an obstacle that is not the anchor's own."""
    others = fixed[~_inside(np.array([[anchor]]), fixed)[0, 0]]
    crossed: Array = _inside(lines, others).sum((1, 2)).astype(float)
    return crossed


def _inside(points: Array, places: Array) -> NDArray[np.bool_]:
    """Whether points `(sets, points, 2)` lie in places `(places, 4)`; `(sets, points, places)`."""
    x, y = points[..., 0, None], points[..., 1, None]
    left, low, right, high = places.T
    return np.asarray((x > left) & (x < right) & (y > low) & (y < high))


def _cost(places: Array, anchor: Pair, fixed: Array, frame: Rectangle) -> Array:
    """What each place costs by itself: distance, what it covers, and what sticks out of the frame."""
    left, low, right, high = frame
    outside = np.maximum(0, [left - places[:, 0], low - places[:, 1], places[:, 2] - right, places[:, 3] - high]).sum(0)
    beside = 2.0 * (places[:, 0] < anchor[0])  # of equal places, the right-hand one
    distance = np.linalg.norm(_offsets(places, anchor), axis=1)
    cost: Array = distance + beside + 50 * outside + _overlap(places, fixed)
    return cost


def _overlap(places: Array, others: Array) -> Array:
    """The area of each place `(places, 4)` that the others `(others, 4)` cover, with a fine for touching any."""
    low = np.maximum(places[:, None, :2], others[None, :, :2])
    high = np.minimum(places[:, None, 2:], others[None, :, 2:])
    area = np.clip(high - low, 0, None).prod(-1)
    fined: Array = (area + 40 * (area > 0)).sum(1)
    return fined
