"""Training a supernet: which subnets a step samples, and the step.

Owns `STRATEGIES` and `SupernetStep`. Samples follow from the random generator alone, whose state is saved with a training's.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..model.decoder import Decoder
from ..model.supernet import Supernet
from ..sharing.distribution import ConfigDistribution
from ..sharing.memory import MemorySpec
from ..sharing.sharing_config import SharingConfig
from ..sharing.space import SearchSpace
from .evaluation import token_losses
from .loop import TrainSpec, teacher_probabilities, token_logits

TRIES = 100  # draws of a subnet within the limits before any is taken


class SubnetRandom(random.Random):
    """The generator of a supernet's subnets. Its state has the decks of options that are dealt without replacement, too."""

    decks: dict[str, list[Any]]

    def seed(self, a: Any = None, version: int = 2) -> None:
        """See `random.Random`: a new seed is without decks."""
        super().seed(a, version)
        self.decks = {}

    def deal(self, name: str, options: Sequence[Any]) -> Any:
        """An option, from a shuffled deck of them that is made anew when it is used up."""
        if not self.decks.get(name):
            self.decks[name] = self.sample(options, len(options))
        return self.decks[name].pop()

    def getstate(self) -> tuple[Any, ...]:
        """See `random.Random`; plain data."""
        return super().getstate(), {name: list(deck) for name, deck in self.decks.items()}

    def setstate(self, state: tuple[Any, ...]) -> None:
        generator, decks = state
        super().setstate(generator)
        self.decks = {name: list(deck) for name, deck in decks.items()}


Draw = Callable[[SubnetRandom], list[SharingConfig]]  # samples the configs of one step


def _uniform(space: SearchSpace, memory: MemorySpec) -> Draw:
    return lambda rng: [space.sample(rng, lambda config: space.meets_limits(config, memory))]


def _dense_biased(space: SearchSpace, memory: MemorySpec) -> Draw:
    dense, uniform = space.least_sharing(), _uniform(space, memory)

    def draw(rng: SubnetRandom) -> list[SharingConfig]:
        def pick(name: str, options: tuple[Any, ...]) -> Any:
            return dense[name] if dense[name] in options and rng.random() < 0.5 else rng.choice(options)

        for _ in range(TRIES):
            config = space.decode(pick)[0]
            if space.contains(config) and space.meets_limits(config, memory):
                return [config]
        return uniform(rng)

    return draw


def _near_front(space: SearchSpace, memory: MemorySpec) -> Draw:
    distribution = ConfigDistribution.of(space, memory)
    return lambda rng: [distribution.draw(rng)]


def _sandwich(space: SearchSpace, memory: MemorySpec) -> Draw:
    largest, smallest = space.largest(), space.extreme(memory, "memory_bytes", 1)
    uniform = _uniform(space, memory)
    return lambda rng: [largest, *uniform(rng), *uniform(rng), smallest]


def _fair(space: SearchSpace, memory: MemorySpec) -> Draw:
    count = max(map(len, space.options.values()), default=1)

    def draw(rng: SubnetRandom) -> list[SharingConfig]:
        dealt = [space.decode(rng.deal)[0] for _ in range(count)]
        return [config for config in dealt if space.contains(config)] or [space.sample(rng)]

    return draw


STRATEGIES: dict[str, Callable[[SearchSpace, MemorySpec], Draw]] = {
    "uniform": _uniform,
    "dense_biased": _dense_biased,
    "near_front": _near_front,
    "sandwich": _sandwich,
    "fair": _fair,
}
"""How a supernet step samples its subnets. A new strategy is a row here, and nothing elsewhere.

`uniform`: one random subnet (SPOS, 1904.00420). `dense_biased`: one subnet that takes at each decision, with probability 1/2,
the option that shares least; under `uniform`, a layer that may use any of five others' weights uses its own in one step of six,
and they are hardly trained. `near_front`: one subnet of `ConfigDistribution`, every amount of memory equally likely and cheap
sharing likelier. `sandwich`: the largest, two random and the smallest (1903.05134). `fair`: as many subnets as the
widest decision has options, each decision dealing its options from a shuffled deck without replacement, so that the counts of its
options never differ by more than one (FairNAS, 1907.01845, extended to decisions that are not always open); limits do not apply.
"""


@dataclass
class SupernetStep:
    """The `Backward` of a supernet: one batch through several subnets, whose gradients add up in the shared weights.

    A subnet that is drawn twice runs once and counts twice. If `teacher` is a config, its subnet learns from the text and every
    other from its probabilities (1903.05134, section 3.3); if it is a model, which is not trained, every subnet learns from it.
    """

    supernet: Supernet
    spec: TrainSpec
    draw: Draw
    rng: SubnetRandom
    teacher: SharingConfig | Decoder | None = None
    subnets: int = 0  # the number of subnets that the last step ran

    def __call__(self, rows: Tensor) -> Tensor:
        """The mean loss of the step's subnets in nats a token; with a teacher, the cross-entropy with its probabilities."""
        drawn, soft = Counter(self.draw(self.rng)), None
        if isinstance(self.teacher, Decoder):
            soft = teacher_probabilities(self.teacher, rows, self.spec)
        elif self.teacher is not None:
            drawn = Counter([self.teacher]) | drawn
        self.subnets, losses = len(drawn), list[Tensor]()
        for config, times in drawn.items():
            logits = token_logits(self.supernet.subnet(config), rows, self.spec)
            loss = token_losses(logits, rows[:, 1:] if soft is None else soft).mean() * (times / drawn.total())
            loss.backward()
            losses.append(loss.detach())
            if self.teacher is not None and soft is None:
                soft = logits.detach().float().softmax(-1)
        return torch.stack(losses).sum()
