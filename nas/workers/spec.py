"""What a person says about where work runs: the `run:` and `early_stopping:` keys of a trial.

Owns the settings and their rules. Nothing here imports Ray, so that a trial is checked in an instant.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from ..config import Ge, NonNegativeFloat, NonNegativeInt, PositiveInt, Strict
from ..errors import UserError


@dataclass(frozen=True)
class RunSpec(Strict):
    """Processes at work at once, where, and how often work lost with its process is done again.

    `address` names a Ray cluster (`host:6379`, or `auto` for the one this machine is part of); without it a local one is
    started and ended with the run. `retries` counts the times a lost task or training is done again elsewhere.
    """

    workers: PositiveInt = 2
    address: str | None = None
    cpus_per_worker: NonNegativeFloat = 1.0
    gpus_per_worker: NonNegativeFloat = 0.0
    retries: NonNegativeInt = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("cpus_per_worker", "gpus_per_worker"):
            share = getattr(self, name)
            if share > 1 and share != int(share):
                raise UserError(f"{share:g} cannot be reserved", where=name, hint="use a whole number, or a part of one")

    def threads(self, cores: int) -> int:
        """Torch's threads in each worker on a node of so many cores: as many as all the workers together keep within it."""
        return max(1, int(self.cpus_per_worker), cores // self.workers)


@dataclass(frozen=True)
class EarlyStopping(Strict):
    """Asynchronous successive halving (ASHA, 1810.05934) on a metric to be low.

    At `grace`, `grace * reduction`, … steps a training goes on only if it is among the best `1 / reduction` of those that came
    as far before it; at its last step nobody is stopped. It reads `step`, `steps` and `metric` from what trainings report.
    """

    grace: PositiveInt
    reduction: Annotated[int, Ge(2)] = 3
    metric: str = "perplexity"
