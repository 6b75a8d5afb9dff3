"""Laws of `nas.pareto` and `nas.paired`: what no other dominates, and differences of losses over the same windows."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from nas.paired import NOISE, difference
from nas.pareto import Point, first_fronts, front, hypervolume, knee, reference_point

whole = st.integers(0, 6).map(float)
grid = st.tuples(whole, whole)
solid = st.tuples(whole, whole, whole)
smooth = st.tuples(st.floats(1, 1e9), st.floats(1, 1e3))
clouds = st.one_of(*(st.lists(kind, max_size=12) for kind in (grid, solid, smooth)))


def dominates(one: Point, other: Point) -> bool:
    return one != other and all(a <= b for a, b in zip(one, other, strict=True))


@given(clouds)
def test_the_front_is_what_nothing_dominates(points: list[Point]) -> None:
    members = front(points)
    best = [i for i, p in enumerate(points) if not any(dominates(q, p) for q in points)]
    assert {points[i] for i in members} == {points[i] for i in best}
    assert len(members) == len({points[i] for i in members}), "equal points stand on it once"
    assert all(points.index(points[i]) == i for i in members), "and as the first of them"
    assert members == sorted(members, key=lambda i: points[i])


@given(st.one_of(*(st.tuples(st.lists(kind, max_size=12), kind) for kind in (grid, solid))))
def test_hypervolume_counts_the_dominated_cells(given: tuple[list[Point], Point]) -> None:
    """On whole coordinates the volume is the number of unit cells that some point dominates, below the reference."""
    points, reference = given
    cells = itertools.product(*(range(int(end)) for end in reference))
    covered = [cell for cell in cells if any(all(x <= at for x, at in zip(p, cell, strict=True)) for p in points)]
    assert hypervolume(points, reference) == len(covered)


@given(clouds.filter(bool))
def test_the_knee_is_farthest_below_the_chord(points: list[Point]) -> None:
    members = front(points)
    found = knee(points)
    assert found in members
    if len(members) < 3:
        assert found == members[0]
        return
    ends = [(min(x), max(x)) for x in zip(*(points[i] for i in members), strict=True)]
    scaled = {i: [(x - low) / (high - low or 1) for x, (low, high) in zip(points[i], ends, strict=True)] for i in members}
    depth = {i: (1 - sum(at)) / len(at) ** 0.5 for i, at in scaled.items()}
    assert depth[found] == pytest.approx(max(depth.values()), abs=1e-9)


def test_the_reference_point_is_beyond_what_is_maximised_too() -> None:
    assert reference_point([(10.0, -20.0), (5.0, -50.0)]) == pytest.approx((11.0, -18.0))


@given(st.lists(grid, max_size=12) | st.lists(solid, max_size=12), st.integers(0, 9))
def test_the_first_fronts_are_whole_and_no_more_than_are_wanted(points: list[Point], count: int) -> None:
    """None that is left dominates one that is found; without their last front there are too few."""
    found = first_fronts(points, count)
    left = set(range(len(points))) - found
    assert len(found) >= min(count, len(points))
    assert not any(dominates(points[i], points[j]) for i in left for j in found)
    if found:
        last = {i for i in found if not any(dominates(points[i], points[j]) for j in found)}
        assert len(found - last) < count


Array = NDArray[np.float64]


def losses(seed: int, seeds: int, windows: int) -> tuple[Array, Array]:
    """Losses of two configs, of which most is how hard a window is; the second is worse by 0.02 nats."""
    rng = np.random.default_rng(seed)
    hard = rng.normal(3, 0.5, windows)
    one, other = (hard + rng.normal(size=(seeds, windows)) * 0.05 + rng.normal(size=(seeds, 1)) * 0.01 for _ in range(2))
    return one, other + 0.02


SIZES = st.tuples(st.integers(0, 999), st.integers(1, 4), st.integers(2, 60))


@given(SIZES)
def test_errors_are_numpys(size: tuple[int, int, int]) -> None:
    one, other = losses(*size)
    found, rows = difference(one, other), one - other
    assert found.mean == pytest.approx(one.mean() - other.mean())
    assert found.windows_standard_error == pytest.approx(np.std(rows.mean(0), ddof=1) / np.sqrt(rows.shape[1]))
    if len(rows) > 1:
        assert found.seeds_standard_error == pytest.approx(np.std(rows.mean(1), ddof=1) / np.sqrt(len(rows)))
        assert found.standard_error == pytest.approx(np.hypot(found.windows_standard_error, found.seeds_standard_error))
    else:
        assert math.isnan(found.seeds_standard_error)
        assert found.standard_error == found.windows_standard_error
    assert (found.seeds, found.windows) == rows.shape
    assert found.ratio == pytest.approx(np.exp(rows.mean()) - 1)


@given(SIZES)
def test_the_order_of_windows_and_seeds_says_nothing(size: tuple[int, int, int]) -> None:
    one, other = losses(*size)
    rng = np.random.default_rng(size[0])
    seeds, windows = rng.permutation(len(one)), rng.permutation(one.shape[1])
    a, b = difference(one, other), difference(one[seeds][:, windows], other[seeds][:, windows])
    pairs = ((getattr(a, name), getattr(b, name)) for name in ("mean", "standard_error", "seeds_standard_error"))
    assert all(x == pytest.approx(y, nan_ok=True) for x, y in pairs)
    assert difference(other, one).mean == -a.mean
    assert difference(other, one).standard_error == pytest.approx(a.standard_error)


@given(SIZES)
def test_what_is_common_to_both_is_no_error(size: tuple[int, int, int]) -> None:
    one, other = losses(*size)
    same = difference(one, one)
    assert (same.mean, same.standard_error, same.is_noise) == (0, 0, True)
    assert (same.windows_needed(), same.seeds_needed()) == (None, None)
    shifted = difference(one + 0.25, one)
    assert shifted.mean == pytest.approx(0.25)
    assert shifted.standard_error == pytest.approx(0, abs=1e-12)
    assert not shifted.is_noise
    harder = np.random.default_rng(0).normal(0, 10, one.shape[1])
    assert difference(one + harder, other + harder).standard_error == pytest.approx(difference(one, other).standard_error)


@given(SIZES)
def test_as_many_as_are_needed_would_tell_them_apart(size: tuple[int, int, int]) -> None:
    """And one fewer would not."""
    found = difference(*losses(*size))
    seeds_part = 0.0 if found.seeds == 1 else found.seeds_standard_error

    def error(windows: int, seeds: int) -> float:
        over_windows = found.windows_standard_error * math.sqrt(found.windows / windows)
        return math.hypot(over_windows, seeds_part * math.sqrt(found.seeds / seeds))

    def apart(windows: int, seeds: int) -> bool:
        return abs(found.mean) > NOISE * error(windows, seeds)

    if windows := found.windows_needed():
        assert apart(windows, found.seeds)
        assert windows == 1 or not apart(windows - 1, found.seeds)
        assert found.is_noise == (windows > found.windows)
    else:
        assert not apart(10**12, found.seeds)
    if seeds := found.seeds_needed():
        assert apart(found.windows, seeds)
        assert seeds == 1 or not apart(found.windows, seeds - 1)
    else:
        assert found.seeds == 1 or not apart(found.windows, 10**12)


def test_one_window_says_nothing() -> None:
    found = difference([[1.0]], [[3.0]])
    assert (found.mean, found.is_noise, found.windows_needed()) == (-2, True, None)
