"""Dynamic Layer Tying (2401.12819): an agent ties and unties whole layers while the one model trains.

Owns the agent and its trainings, a strategy to compare with samplers at equal tokens: a run costs what training one config alone
does, and finds one config. The paper's reward is the loss; here memory has a price too, so that prices spread runs over a front.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nas.model.supernet import Supernet
from nas.search.jobs import Array, Reports, token_batches
from nas.sharing.memory import MemorySpec, measure
from nas.sharing.shape import ModelShape
from nas.sharing.sharing_config import SharingConfig
from nas.training.device import find_device
from nas.training.evaluation import measure_losses
from nas.training.loop import Trainer, TrainSpec, plain_backward
from nas.workers import Session

from ..grid import Request, train_left
from .searches import Surrogate

PRICES = (0.0, 0.1, 0.3, 1.0, 3.0)
"""Nats a token that the dense model's memory costs."""
EVERY = 15
"""Steps between decisions."""
SETTLED = 0.8
"""The part of the steps after which nothing is tied or untied any more; until then exploring falls to none."""


@dataclass(frozen=True)
class TyingJob:
    """One model to train, and to tie on the way, at a price of memory."""

    shape: ModelShape
    spec: TrainSpec
    memory: MemorySpec
    price: float
    seed: int
    tokens: Array
    windows: Array


Decision = tuple[Tensor, int, float]
"""A state, the action taken in it, and the reward."""


@dataclass
class Agent:
    """A network that says what each layer's every choice is worth: `ties[i]` is the layer whose weights layer i computes with.

    A state is all ties and the layer in question; an action, that layer or one before it. A decision's value is the mean reward
    of the steps until the next one.
    """

    layers: int
    seed: int
    seen: deque[Decision] = field(default_factory=lambda: deque(maxlen=512))

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        self.rng, count = random.Random(self.seed), self.layers
        self.network = nn.Sequential(nn.Linear(count * count + count, 64), nn.ReLU(), nn.Linear(64, count))
        for weight in self.network.parameters():
            nn.init.normal_(weight, std=0.1, generator=generator)
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=1e-2)

    def state(self, ties: Sequence[int], layer: int) -> Tensor:
        """`(layers² + layers,)`: ones where a layer uses another, and at the layer in question."""
        rows = F.one_hot(torch.tensor([*ties, layer]), self.layers)
        return rows.flatten().float()

    @torch.no_grad()
    def decide(self, ties: Sequence[int], explore: float) -> tuple[list[int], list[tuple[Tensor, int]]]:
        """New ties, decided layer after layer, and what was decided in which state."""
        found, taken = list(ties), []
        for layer in range(1, self.layers):
            state = self.state(found, layer)
            values = self.network(state)[: layer + 1]
            action = self.rng.randint(0, layer) if self.rng.random() < explore else int(values.argmax())
            taken.append((state, action))
            found[layer] = layer if action == layer else found[action]  # a tied layer's weights are its owner's
        return found, taken

    def learn(self, taken: Sequence[tuple[Tensor, int]], reward: float) -> None:
        """Remember what decisions earned, and learn from some of all that is remembered."""
        self.seen.extend((state, action, reward) for state, action in taken)
        for _ in range(4):
            batch = self.rng.sample(list(self.seen), min(64, len(self.seen)))
            states, actions, rewards = torch.stack([s for s, _, _ in batch]), [a for _, a, _ in batch], [r for _, _, r in batch]
            said = self.network(states)[range(len(batch)), actions]
            loss = F.smooth_l1_loss(said, torch.tensor(rewards))
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()


def config_of(shape: ModelShape, ties: Sequence[int]) -> SharingConfig:
    """The config of ties to owners."""
    return SharingConfig.make(shape, [{} if j == i else {"tie": j} for i, j in enumerate(ties)])


@torch.no_grad()
def untie(net: Supernet, before: Sequence[int], after: Sequence[int]) -> None:
    """A layer that becomes its own begins with the weights that it used."""
    for i, (old, new) in enumerate(zip(before, after, strict=True)):
        if new == i and old != i:
            net.bank.layers[i].load_state_dict(net.bank.layers[old].state_dict())


def tie_while_training(job: TyingJob, session: Session) -> dict[str, Any]:
    """Do a `TyingJob`: the config that the agent settles on, and the loss of the model that was tied on the way to it."""
    layers = job.shape.num_hidden_layers
    net = Supernet(job.shape, torch.Generator().manual_seed(job.seed)).to(find_device())
    agent, ties = Agent(layers, job.seed), [0] * layers
    fit = Trainer(net, job.spec, torch.Generator().manual_seed(job.seed))
    reports, dense = Reports(session, job.spec.steps), _memory(job, list(range(layers)))
    model, cost = net.subnet(config_of(job.shape, ties)), job.price * _memory(job, ties) / dense
    usual, earned = 0.0, 0.0
    taken: list[tuple[Tensor, int]] = []

    def backward(rows: Tensor) -> Tensor:
        return plain_backward(model, job.spec)(rows)

    last = SETTLED * job.spec.steps
    for step, loss in fit.run(token_batches(job.tokens, job.spec, fit.generator), backward):
        usual = loss if step == 1 else 0.95 * usual + 0.05 * loss
        earned += (usual - loss - cost) / EVERY  # the loss falls by itself: only its turns count
        if step % EVERY == 0 and step <= last:
            if taken:
                agent.learn(taken, earned)
            found, taken = agent.decide(ties, max(1 - step / (last - EVERY), 0.0))
            untie(net, ties, found)
            ties, earned = found, 0.0
            model, cost = net.subnet(config_of(job.shape, ties)), job.price * _memory(job, ties) / dense
        reports.step(step, loss)
    losses = measure_losses(model.eval(), torch.from_numpy(np.array(job.windows)), autocast=job.spec.autocast)
    done = {"config": config_of(job.shape, ties).to_data(), "loss_nats_per_token": losses.loss_nats_per_token}
    return {"step": fit.step, "steps": fit.step} | done


def _memory(job: TyingJob, ties: Sequence[int]) -> int:
    return measure(job.shape, config_of(job.shape, ties), job.memory).memory_bytes


@dataclass(frozen=True)
class TyingRow:
    """What all runs on one text found, means and standard deviations: the hypervolume of each seed's front, which has a config
    for each price, as a part of the best that any sampler found; and how far the models that were tied on the way end from
    their configs trained alone, in nats."""

    text: str
    runs: int
    seeds: int
    configs: int
    hypervolume: float
    hypervolume_deviation: float
    loss_off: float
    loss_off_deviation: float


def run_tying(surrogate: Surrogate, best: float, seeds: int, asked: Request) -> TyingRow:
    """Every price with every seed on one text, as long as the benchmark's trainings; those on disk are taken as they are."""
    truth, text = surrogate.truth, surrogate.table.text
    file, shape = truth.file, truth.space.shape
    jobs: Mapping[tuple[Hashable, ...], TyingJob] = {
        (text, price, seed): TyingJob(shape, file.train, file.memory, price, seed, *truth.arrays[text])
        for seed in range(seeds)
        for price in PRICES
    }
    title, work = f"tie layers while training on {text}", asked.runs / f"{file.name}-tying"
    found = train_left(title, jobs, tie_while_training, file.train.steps, work, file.run, asked.progress)
    configs = {key: SharingConfig.from_data(shape, result["config"]) for key, result in found.items()}
    fronts = [[config for (_, _, by), config in configs.items() if by == seed] for seed in range(seeds)]
    parts = [surrogate.hypervolume(front) / best for front in fronts]
    off = [found[key]["loss_nats_per_token"] - surrogate(config)[1] for key, config in configs.items()]
    deviation = float(np.std(parts, ddof=1)) if seeds > 1 else 0.0
    means = (float(np.mean(parts)), deviation, float(np.mean(off)), float(np.std(off)))
    return TyingRow(text, len(found), seeds, len(set(configs.values())), *means)
