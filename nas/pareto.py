"""Fronts of points that are smaller-is-better in both coordinates.

Owns the front, its hypervolume and its knee; the points are `(memory_bytes, loss)` pairs, and what they stand for is the caller's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

Point = tuple[float, float]


def front(points: Sequence[Point]) -> list[int]:
    """Indices of the points that no other dominates, by ascending first coordinate; of equal points the first one."""
    order = sorted(range(len(points)), key=lambda i: (points[i], i))
    kept: list[int] = []
    for i in order:
        if not kept or points[i][1] < points[kept[-1]][1]:
            kept.append(i)
    return kept


def hypervolume(points: Sequence[Point], reference: Point) -> float:
    """The area between the points' front and a reference point that is worse than all that counts (Zitzler & Thiele, 1998)."""
    import moocore
    import numpy as np

    inside = [p for p in points if p[0] < reference[0] and p[1] < reference[1]]
    return float(moocore.hypervolume(np.array(inside, dtype=float), ref=np.array(reference))) if inside else 0.0


def knee(points: Sequence[Point]) -> int:
    """The index of the front's knee: the member farthest below the chord between its ends, both axes scaled to 0…1
    (Das, 1999; the same rule as Kneedle's, Satopää et al., 2011). With two members or fewer, the one of lower first coordinate.
    """
    members = front(points)
    first, last = points[members[0]], points[members[-1]]
    width, height = last[0] - first[0], first[1] - last[1]
    if len(members) < 3 or not width or not height:
        return members[0]
    gain = [1 - (points[i][0] - first[0]) / width - (points[i][1] - last[1]) / height for i in members]
    return members[max(range(len(members)), key=lambda n: gain[n] / math.sqrt(2))]
