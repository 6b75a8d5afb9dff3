"""A truth as a lookup for any config of its space: what samplers are compared on, where thousands of trainings cannot be had.

Owns the lookup. As in NAS-Bench-301 (2008.09777) it is a predictor fitted to real trainings; here the one of `predict`, on all
that is known. What it does not know of a config, no sampler can find.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ..search.predictor import Numbers, Predictor, features
from ..sharing.memory import MemorySpec
from ..sharing.sharing_config import SharingConfig
from ..sharing.space import SearchSpace
from .agreement import Agreement, agreement
from .known import Known


@dataclass(frozen=True, eq=False)
class Surrogate:
    """The truth's loss of any config of a space: of a known one too the fitted value, so that all are alike."""

    space: SearchSpace
    memory: MemorySpec
    known: Known
    configs: tuple[SharingConfig, ...]

    @cached_property
    def _rows(self) -> Numbers:
        return features(self.space.shape, self.configs, self.memory)

    @cached_property
    def _fitted(self) -> Predictor:
        return Predictor.fit(self._rows, self.known.truth)

    def loss(self, config: SharingConfig) -> float:
        """Nats a token at the truth's last point, the mean of all seeds."""
        return float(self._fitted(features(self.space.shape, [config], self.memory))[0])

    def held_out(self) -> Agreement:
        """How well it orders the known configs, each predicted from the others."""
        everyone = np.arange(len(self.configs))
        said = [
            Predictor.fit(self._rows[rest], self.known.truth[rest])(self._rows[[n]])[0]
            for n, rest in ((n, np.delete(everyone, n)) for n in everyone)
        ]
        return agreement(self.known.memory, self.known.truth, np.array(said))
