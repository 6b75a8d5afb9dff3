"""Where to put the labels of points so that nothing covers anything.

Owns a small search over places; it knows rectangles and no drawing library. Coordinates are pixels, y in either direction.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Rectangle = tuple[float, float, float, float]
"""Left, low, right, high."""

RADII, ANGLES = (6, 9, 14, 22, 34, 50, 70), 24
SWEEPS = 4


def place(
    anchors: Sequence[tuple[float, float]],
    sizes: Sequence[tuple[float, float]],
    obstacles: Sequence[Rectangle],
    frame: Rectangle,
) -> list[Rectangle]:
    """A rectangle of `sizes[n]` for the label of each anchor, near it, inside the frame, over no obstacle and no other label.

    Each label in turn takes its cheapest place given the others, a few times over: deterministic, and no worse with each turn.
    """
    candidates = [_candidates(anchor, size) for anchor, size in zip(anchors, sizes, strict=True)]
    leaders = [_leaders(places, anchor) for places, anchor in zip(candidates, anchors, strict=True)]
    fixed = np.array(obstacles, dtype=float).reshape(-1, 4)
    alone = [_cost(places, anchor, fixed, frame) for places, anchor in zip(candidates, anchors, strict=True)]
    alone = [cost + 6 * _crossed(lines, anchor, fixed) for cost, lines, anchor in zip(alone, leaders, anchors, strict=True)]
    chosen = [int(cost.argmin()) for cost in alone]
    for _ in range(SWEEPS):
        for n, places in enumerate(candidates):
            others = [m for m in range(len(candidates)) if m != n]
            words = np.array([candidates[m][chosen[m]] for m in others]).reshape(-1, 4)
            lines = np.array([leaders[m][chosen[m]] for m in others]).reshape(-1, 2)
            crossed = _inside(leaders[n], words).sum((1, 2)) + _inside(lines[None], places).sum((0, 1))
            chosen[n] = int((alone[n] + _overlap(places, words) + 20 * crossed).argmin())
    return [tuple(map(float, places[n])) for places, n in zip(candidates, chosen, strict=True)]  # type: ignore[misc]


def nearest(rectangle: Rectangle, point: tuple[float, float]) -> tuple[float, float]:
    """The point of a rectangle nearest to a point."""
    left, low, right, high = rectangle
    return min(max(point[0], left), right), min(max(point[1], low), high)


def _candidates(anchor: tuple[float, float], size: tuple[float, float]) -> Array:
    """Rectangles `(places, 4)` whose nearest edge or corner is a radius from the anchor, to every side."""
    found = []
    for radius in RADII:
        for turn in range(ANGLES):
            cos, sin = math.cos(turn * math.tau / ANGLES), math.sin(turn * math.tau / ANGLES)
            x = anchor[0] + radius * cos + size[0] * (cos - 1) / 2
            y = anchor[1] + radius * sin + size[1] * (sin - 1) / 2
            found.append((x, y, x + size[0], y + size[1]))
    return np.array(found)


def _offsets(places: Array, anchor: tuple[float, float]) -> Array:
    """From the anchor to the nearest point of each place `(places, 4)`; `(places, 2)`."""
    return np.clip(anchor, places[:, :2], places[:, 2:]) - np.array(anchor)


def _leaders(places: Array, anchor: tuple[float, float]) -> Array:
    """Points along the line from the anchor to each place; `(places, points, 2)`."""
    steps = np.linspace(0.15, 0.95, 9)[None, :, None]
    return np.array(anchor) + steps * _offsets(places, anchor)[:, None, :]


def _crossed(lines: Array, anchor: tuple[float, float], fixed: Array) -> Array:
    """How many points of each line `(places, points, 2)` lie on an obstacle that is not the anchor's own."""
    others = fixed[~_inside(np.array([[anchor]]), fixed)[0, 0]]
    crossed: Array = _inside(lines, others).sum((1, 2)).astype(float)
    return crossed


def _inside(points: Array, places: Array) -> NDArray[np.bool_]:
    """Whether points `(sets, points, 2)` lie in places `(places, 4)`; `(sets, points, places)`."""
    each = points[:, :, None, :]
    clear = np.minimum(each - places[:, :2], places[:, 2:] - each).min(-1)
    return np.asarray(clear > 0)


def _cost(places: Array, anchor: tuple[float, float], fixed: Array, frame: Rectangle) -> Array:
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
