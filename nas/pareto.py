"""Pareto fronts of points of which both coordinates are minimised: the front, its hypervolume and its knee."""

from __future__ import annotations

from collections.abc import Sequence

Point = tuple[float, float]


def front(points: Sequence[Point]) -> list[int]:
    """Indices of the points that no other dominates, by ascending first coordinate; of equal points the first."""
    order = sorted(range(len(points)), key=lambda i: (points[i], i))
    kept: list[int] = []
    for i in order:
        if not kept or points[i][1] < points[kept[-1]][1]:
            kept.append(i)
    return kept


def first_fronts(points: Sequence[Point], count: int) -> set[int]:
    """Indices of the points of the first fronts, each whole, until they are `count` or more: the front, that of the rest, and so
    on (non-dominated sorting, Deb et al., 2002)."""
    found: set[int] = set()
    while len(found) < min(count, len(points)):
        left = [i for i in range(len(points)) if i not in found]
        members = {points[left[n]] for n in front([points[i] for i in left])}
        found |= {i for i in left if points[i] in members}
    return found


def hypervolume(points: Sequence[Point], reference: Point) -> float:
    """The area between the points' front and a reference point; points no better than it add nothing (Zitzler & Thiele, 1998)."""
    area, floor = 0.0, reference[1]
    for i in front(points):
        width, height = reference[0] - points[i][0], floor - points[i][1]
        if width > 0 and height > 0:
            area, floor = area + width * height, points[i][1]
    return area


def reference_point(points: Sequence[Point]) -> Point:
    """A point a tenth beyond the worst of each coordinate: what a hypervolume of the points is measured against."""
    return 1.1 * max(x for x, _ in points), 1.1 * max(y for _, y in points)


def knee(points: Sequence[Point]) -> int:
    """The index of the front's knee: the member farthest below the chord between its ends, both axes scaled to 0…1
    (Das, 1999; the same rule as Kneedle's, Satopää et al., 2011). With two members or fewer, the one of lower first coordinate.
    """
    members = front(points)
    first, last = points[members[0]], points[members[-1]]
    if len(members) < 3:
        return members[0]
    width, height = last[0] - first[0], first[1] - last[1]
    return min(members, key=lambda i: (points[i][0] - first[0]) / width + (points[i][1] - last[1]) / height)
