"""Laws of `nas.paired`: errors of differences over the same windows."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from nas.paired import NOISE, difference

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
