"""Fronts, hypervolumes and knees against their definitions, tried one point at a time."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nas.pareto import Point, first_fronts, front, hypervolume, knee

grid = st.tuples(st.integers(0, 6), st.integers(0, 6)).map(lambda p: (float(p[0]), float(p[1])))
smooth = st.tuples(st.floats(1, 1e9), st.floats(1, 1e3))
clouds = st.lists(grid, min_size=1, max_size=12) | st.lists(smooth, min_size=1, max_size=12)


def dominates(a: Point, b: Point) -> bool:
    return a[0] <= b[0] and a[1] <= b[1] and a != b


@given(clouds)
def test_the_front_is_what_nothing_dominates(points: list[Point]) -> None:
    members = front(points)
    best = [i for i, p in enumerate(points) if not any(dominates(q, p) for q in points)]
    assert {points[i] for i in members} == {points[i] for i in best}
    assert len(members) == len({points[i] for i in members}), "equal points stand on it once"
    assert all(points.index(points[i]) == i for i in members), "and as the first of them"
    assert members == sorted(members, key=lambda i: points[i][0])


@given(st.lists(grid, max_size=12), st.permutations(range(12)))
def test_the_front_does_not_depend_on_the_order(points: list[Point], order: list[int]) -> None:
    shuffled = [points[i] for i in order if i < len(points)]
    assert [points[i] for i in front(points)] == [shuffled[i] for i in front(shuffled)]


@given(st.lists(grid, max_size=12), grid)
def test_hypervolume_counts_the_dominated_cells(points: list[Point], reference: Point) -> None:
    """On whole coordinates the area is the number of unit cells that some point dominates, below the reference."""
    cells = itertools.product(range(int(reference[0])), range(int(reference[1])))
    covered = [(x, y) for x, y in cells if any(p[0] <= x and p[1] <= y for p in points)]
    assert hypervolume(points, reference) == len(covered)


@given(st.lists(smooth, max_size=10), smooth, smooth)
def test_hypervolume_never_falls_with_another_point(points: list[Point], extra: Point, reference: Point) -> None:
    before, after = hypervolume(points, reference), hypervolume([*points, extra], reference)
    assert 0 <= before <= after * (1 + 1e-12)


@given(clouds)
def test_the_knee_is_farthest_below_the_chord(points: list[Point]) -> None:
    members = front(points)
    found = knee(points)
    assert found in members
    if len(members) < 3:
        assert found == members[0]
        return
    (x0, y0), (x1, y1) = points[members[0]], points[members[-1]]
    scaled = {i: ((points[i][0] - x0) / (x1 - x0), (points[i][1] - y1) / (y0 - y1)) for i in members}
    depth = {i: (1 - x - y) / 2**0.5 for i, (x, y) in scaled.items()}
    assert depth[found] == pytest.approx(max(depth.values()), abs=1e-9)


def test_a_knee_by_hand() -> None:
    assert knee([(0.0, 10.0), (1.0, 2.0), (5.0, 1.0), (10.0, 0.0), (3.0, 9.0)]) == 1


def test_no_points_have_no_front() -> None:
    assert front([]) == []
    assert hypervolume([], (1.0, 1.0)) == 0


@given(st.lists(grid, max_size=12), st.integers(0, 9))
def test_the_first_fronts_are_whole_and_no_more_than_are_wanted(points: list[Point], count: int) -> None:
    """None that is left dominates one that is found; without their last front there are too few."""
    found = first_fronts(points, count)
    left = set(range(len(points))) - found
    assert len(found) >= min(count, len(points))
    assert not any(_dominates(points[i], points[j]) for i in left for j in found)
    if found:
        last = {i for i in found if not any(_dominates(points[i], points[j]) for j in found)}
        assert len(found - last) < count


def _dominates(one: Point, other: Point) -> bool:
    return one != other and all(a <= b for a, b in zip(one, other, strict=True))
