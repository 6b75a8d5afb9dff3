"""Pareto fronts of points of which every coordinate is minimised: the front, its hypervolume and its knee."""

from __future__ import annotations

from collections.abc import Sequence

Point = tuple[float, ...]


def front(points: Sequence[Point]) -> list[int]:
    """Indices of the points that no other dominates, by ascending coordinates; of equal points the first."""
    if not points:
        return []
    from moocore import is_nondominated

    kept = is_nondominated([list(point) for point in points], keep_weakly=False)
    return sorted((i for i, member in enumerate(kept) if member), key=lambda i: points[i])


def first_fronts(points: Sequence[Point], count: int) -> set[int]:
    """Indices of the points of the first fronts, each whole, until they are `count` or more: the front, that of the rest, and so
    on (non-dominated sorting, Deb et al., 2002)."""
    if not points or count < 1:
        return set()
    from moocore import pareto_rank

    ranks = pareto_rank([list(point) for point in points]).tolist()
    last = sorted(ranks)[min(count, len(points)) - 1]
    return {i for i, rank in enumerate(ranks) if rank <= last}


def hypervolume(points: Sequence[Point], reference: Point) -> float:
    """The volume between the points' front and a reference point; points no better than it add nothing (Zitzler & Thiele,
    1998)."""
    if not points:
        return 0.0
    from moocore import hypervolume as volume

    return float(volume([list(point) for point in points], ref=reference))


def reference_point(points: Sequence[Point]) -> Point:
    """A point a tenth beyond the worst of each coordinate: what a hypervolume of the points is measured against."""
    return tuple(max(1.1 * worst, 0.9 * worst) for worst in map(max, zip(*points, strict=True)))


def knee(points: Sequence[Point]) -> int:
    """The index of the front's knee: the member of the least sum of coordinates, each scaled to 0…1 over the front. With two
    coordinates it is the farthest below the chord between the front's ends (Das, 1999; the same rule as Kneedle's, Satopää et
    al., 2011). With two members or fewer, the one of lower first coordinate.
    """
    members = front(points)
    if len(members) < 3:
        return members[0]
    columns = list(zip(*(points[i] for i in members), strict=True))
    lows = [min(column) for column in columns]
    widths = [max(column) - low or 1.0 for column, low in zip(columns, lows, strict=True)]
    return min(members, key=lambda i: sum((x - low) / width for x, low, width in zip(points[i], lows, widths, strict=True)))
