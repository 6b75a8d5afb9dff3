"""Differences of losses over the same evaluation windows, what error they have, and what would make them certain.

All models of a front are evaluated on the same windows. What is hard in a window is hard for all, so that a difference has a much
smaller error than either loss.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

NOISE = 2.0  # standard errors within which a difference is noise
Losses = Sequence[Sequence[float]] | NDArray[np.float64]  # losses `(seeds, windows)` in nats a token, of one config


@dataclass(frozen=True)
class Difference:
    """The mean loss of a config less that of another, in nats a token, the mean over seeds.

    `windows_standard_error` is over the `windows`, paired. `seeds_standard_error` is over the `seeds`, each seed's difference
    taken whole; nan with one seed, which says nothing of the next.
    """

    mean: float
    windows_standard_error: float
    seeds_standard_error: float
    windows: int
    seeds: int

    @property
    def standard_error(self) -> float:
        """Of the mean: both errors, as independent ones; over windows alone with one seed. nan with one window."""
        seeds = 0.0 if self.seeds == 1 else self.seeds_standard_error
        return math.hypot(self.windows_standard_error, seeds)

    @property
    def is_noise(self) -> bool:
        """Whether the difference is within `NOISE` standard errors."""
        return not abs(self.mean) > NOISE * self.standard_error

    @property
    def ratio(self) -> float:
        """The perplexity over the other's, less 1."""
        return math.expm1(self.mean)

    @property
    def ratio_standard_error(self) -> float:
        """Of `ratio`, to first order."""
        return math.exp(self.mean) * self.standard_error

    def windows_needed(self) -> int | None:
        """The windows that would tell a difference of this size from noise, with as many seeds; None if none would."""
        seeds = 0.0 if self.seeds == 1 else self.seeds_standard_error
        return _needed(self.windows, self.windows_standard_error, self.mean**2 / NOISE**2 - seeds**2)

    def seeds_needed(self) -> int | None:
        """The seeds that would, over the same windows; None if none would, or with one seed."""
        rest = self.mean**2 / NOISE**2 - self.windows_standard_error**2
        return None if self.seeds == 1 else _needed(self.seeds, self.seeds_standard_error, rest)


def _needed(count: int, error: float, allowed: float) -> int | None:
    """How many make a squared error that falls with their number less than `allowed`."""
    return math.floor(count * error**2 / allowed) + 1 if allowed > 0 and math.isfinite(error) else None


def difference(one: Losses, other: Losses) -> Difference:
    """The difference of two configs' losses `(seeds, windows)`, row for row of one seed and column for column of one window."""
    found = np.asarray(one, dtype=np.float64) - np.asarray(other, dtype=np.float64)
    over_windows, over_seeds = (_standard_error(means) for means in (found.mean(0), found.mean(1)))
    return Difference(float(found.mean()), over_windows, over_seeds, windows=found.shape[1], seeds=found.shape[0])


def _standard_error(values: NDArray[np.float64]) -> float:
    return float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.nan
