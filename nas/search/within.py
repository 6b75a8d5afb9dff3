"""The best config of a finished run within a limit that the run was not searched for.

Owns `Answer`. Nothing is trained or measured: the surrogate is fitted to the run's evaluations, and solved within the limit.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..errors import UserError, did_you_mean
from ..sharing.label import names_of
from ..sharing.memory import LIMITS
from ..sharing.objectives import DEFAULT, OBJECTIVES, QUALITY, config_costs, parse_value, plan_values
from ..sharing.sharing_config import SharingConfig
from .run import Run
from .surrogate import EPSILON, Known, Solver
from .trial import Trial

PROPOSALS = 12  # the search within the limit is that for so many proposals


@dataclass(frozen=True)
class Answer:
    """A config within the limit, the values of `LIMITS` and of what was limited, and its loss in the search in nats a token: as
    it was evaluated (`error` 0), or as expected, with a standard error."""

    config: SharingConfig
    values: Mapping[str, float]
    loss_nats_per_token: float
    error: float

    @property
    def evaluated(self) -> bool:
        """Whether the search evaluated it."""
        return self.error == 0

    def to_data(self) -> dict[str, Any]:
        """Plain data."""
        perplexity = math.exp(min(self.loss_nats_per_token, 700.0))
        loss = {"loss_nats_per_token": self.loss_nats_per_token, "error": self.error, "perplexity": perplexity}
        head = {**names_of(self.config), "evaluated": self.evaluated}
        return {**head, **loss, **self.values, "config": self.config.to_data()}


def parse_limit(text: str) -> tuple[str, float]:
    """A limit such as `memory_bytes=120MiB`. Raises UserError."""
    name, _, value = text.partition("=")
    known = [row.name for row in OBJECTIVES.values() if row.in_closed_form]
    if name not in known:
        raise UserError(f"unknown limit {name!r}", where=f"--limit {text}", hint=did_you_mean(name, known))
    return name, parse_value(name, value, f"--limit {text}")


def best_within(run: Run, limits: Mapping[str, float], seed: int = 0) -> Answer:
    """The config of the least expected loss within limits, by what a run's search evaluated. Raises UserError if none is."""
    trial, known = run.trial(), known_of(run)
    space = replace(trial.space, limits=dict(limits))
    space.require_reachable(space.size(trial.file.memory))
    solver = Solver(space, trial.file.memory, known, random.Random(seed), _objectives(trial))
    found = [*(one for one in known if space.meets_limits(one.config, trial.file.memory)), *solver.breed(PROPOSALS)]
    mean, deviation = solver.surrogate([one.decided for one in found])
    evaluated = {one.config for one in known}
    increase = np.exp(mean) - EPSILON
    errors = np.where([one.config in evaluated for one in found], 0.0, np.exp(mean) * np.expm1(deviation))
    losses = np.where(errors == 0, [one.loss for one in found], solver.surrogate.base + increase)
    best = int(np.argmin(losses + errors))
    plan, names = found[best].config.resolve(space.shape), dict.fromkeys((*LIMITS, *limits))
    return Answer(
        found[best].config, plan_values(space.shape, plan, trial.file.memory, names), float(losses[best]), float(errors[best])
    )


def known_of(run: Run) -> list[Known]:
    """The evaluations of a run's search."""
    trial = run.trial()
    space, memory, names = trial.space, trial.file.memory, _objectives(trial)[:-1]
    least, found = space.least_sharing(), []
    for e in run.searched():
        decided = {name: option for name, option in (space.encode(e.config) or {}).items() if option != least[name]}
        costs = config_costs(space.shape, e.config, memory, names)
        found.append(Known(e.config, decided, costs, e.losses.loss_nats_per_token))
    return found


def _objectives(trial: Trial) -> tuple[str, ...]:
    """The trial's objectives that a config without measurement has."""
    names = tuple(name for name in trial.objectives[:-1] if OBJECTIVES[name].in_closed_form)
    return *(names or DEFAULT[:1]), QUALITY
