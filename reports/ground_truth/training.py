"""Which configs a tabular benchmark holds, and how each is trained.

Trainings of one seed see the same batches and begin with the same weights, as far as they have the same.

    FOLDER/truth.csv       a row for each text, config, seed and point of evaluation: what a benchmark goes on from
    FOLDER/configs.json    each config by its hash
"""

from __future__ import annotations

import json
import random
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from annotated_types import Gt, Le
from torch import Tensor, nn

from nas.config import PositiveInt
from nas.errors import UserError
from nas.files import write_text
from nas.model.decoder import Decoder, init_weights
from nas.search.candidates import by_bins, in_turns
from nas.search.context import presets_in
from nas.search.jobs import Array, Reports, token_batches
from nas.sharing.memory import measure
from nas.sharing.shape import ModelShape
from nas.sharing.sharing_config import SharingConfig
from nas.training.device import find_device
from nas.training.evaluation import losses_by_sequence, losses_over
from nas.training.loop import Trainer, TrainSpec, plain_backward
from nas.workers import Session

from ..grid import AtLeastTwo, Grid, GridFile, Request, fill_table

TABLE, CONFIGS = "truth.csv", "configs.json"
DRAWS = 4_000
"""Configs drawn uniformly, of which each bin of memory takes its share."""
BLOCK = 8
"""Configs whose seeds are trained together: so that what is known first is known well."""


class WeightAverage:
    """The mean of a model's weights over the last `fraction` of the steps before each of some points, in float32.

    It approximates the decayed learning rate that a training of that many steps would have (LAWA, 2209.14981; 2405.18392), so
    that one training is evaluated at several lengths.
    """

    def __init__(self, model: nn.Module, fraction: float, points: Sequence[int]) -> None:
        self.model, self.fraction, self.points = model, fraction, sorted(points)
        self._sums: dict[str, Tensor] = {}
        self._count = 0

    @torch.no_grad()
    def step(self, done: int) -> dict[str, Tensor] | None:
        """After step `done`, counted from 1: the mean state dict if this is one of the points, else None."""
        point = next((point for point in self.points if done <= point), 0)
        if done > point - max(round(self.fraction * point), 1):
            self._count += 1
            for name, weight in self.model.state_dict().items():
                if self._count == 1:
                    self._sums[name] = weight.float().clone()
                else:
                    self._sums[name].lerp_(weight.float(), 1 / self._count)
        if done != point:
            return None
        mean, self._sums, self._count = self._sums, {}, 0
        return mean


@dataclass(frozen=True, kw_only=True)
class GroundTruthFile(GridFile):
    """A tabular benchmark as its YAML file has it.

    `configs` are drawn at random, as many from each of `bins` bins of memory (equal in ratio), besides every preset that the
    space can express. Each training is evaluated at `points` (fractions of the steps, ascending, the last 1), each time with its
    weights averaged over the last `average` of the steps so far.
    """

    configs: PositiveInt = 32
    bins: PositiveInt = 8
    seeds: AtLeastTwo = 4
    points: list[float] = field(default_factory=lambda: [0.25, 0.5, 0.75, 1.0])
    average: Annotated[float, Gt(0), Le(1)] = 0.2
    windows: AtLeastTwo = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        points = self.points
        if not points or points != sorted(set(points)) or points[0] <= 0 or points[-1] != 1:
            raise UserError(f"{points} do not ascend to 1", where="points", hint="use fractions such as [0.25, 0.5, 1.0]")
        if self.train.lr_decay_fraction:
            message = "a rate that falls makes the points before the last no trainings of their own"
            raise UserError(message, where="train.lr_decay_fraction", hint="write lr_decay_fraction: 0")


@dataclass(frozen=True)
class BenchmarkRow:
    """One config at one point of one training: `loss_nats_per_token` is of the averaged weights, over fixed windows."""

    text: str
    hash: str
    name: str
    memory_bytes: int
    weight_bytes: int
    kv_cache_bytes: int
    flops_per_token: int
    seed: int
    tokens: int
    loss_nats_per_token: float

    @property
    def training(self) -> tuple[str, str, int]:
        """Which training it is of."""
        return self.text, self.hash, self.seed

    @property
    def order(self) -> tuple[str, int, str, int, int]:
        """Where it stands in the table."""
        return self.text, self.memory_bytes, self.hash, self.seed, self.tokens


@dataclass(frozen=True)
class BenchmarkTraining:
    """Train one config alone, from scratch, and evaluate it after each of `points` steps."""

    shape: ModelShape
    config: SharingConfig
    spec: TrainSpec
    average: float
    points: tuple[int, ...]
    seed: int
    tokens: Array
    windows: Array


def train_and_evaluate(job: BenchmarkTraining, session: Session) -> dict[str, Any]:
    """Do a `BenchmarkTraining`: the loss at each point, by the tokens trained on so far. One that was stopped begins again."""
    plan = job.config.resolve(job.shape)
    model = init_weights(Decoder(job.shape, plan), torch.Generator().manual_seed(job.seed)).to(find_device())
    twin = Decoder(job.shape, plan).to(find_device())
    fit = Trainer(model, job.spec, torch.Generator().manual_seed(job.seed))
    averages = WeightAverage(model, job.average, job.points)
    windows = torch.from_numpy(np.array(job.windows))
    reports, losses = Reports(session, job.spec.steps), {}
    for step, loss in fit.run(token_batches(job.tokens, job.spec, fit.generator), plain_backward(model, job.spec)):
        mean = averages.step(step)
        if mean is not None:
            twin.load_state_dict(mean)
            rows = losses_by_sequence(twin.eval(), windows, autocast=job.spec.autocast)
            losses[str(step * job.spec.batch * job.spec.seq)] = losses_over(rows).loss_nats_per_token
        reports.step(step, loss)
    return {"step": fit.step, "steps": fit.step, "losses": losses}


class GroundTruth(Grid[GroundTruthFile]):
    """A tabular benchmark that can be trained."""

    @cached_property
    def configs(self) -> dict[SharingConfig, str]:
        """The configs to be known, each with its preset's name or "": presets and random ones in turns, random ones from the bins
        in turns, so that any first part of them is spread over the memory as the whole is."""
        file, space, rng = self.file, self.space, random.Random(self.file.seed)
        named = presets_in(space)
        drawn = dict.fromkeys(space.sample(rng) for _ in range(DRAWS))
        chosen = [config for config in by_bins(space, file.memory, drawn, file.bins) if config not in named][: file.configs]
        presets = list(named)
        rng.shuffle(presets)
        return {config: named.get(config, "") for config in in_turns(chosen, presets)}

    @property
    def trainings(self) -> Iterator[tuple[str, SharingConfig, int]]:
        """Every training: a block of configs after the other, in a block the texts in turns, and seed after seed."""
        configs, file = list(self.configs), self.file
        for first in range(0, len(configs), BLOCK):
            for text in self.texts:
                for seed in range(file.seed, file.seed + file.seeds):
                    yield from ((text, config, seed) for config in configs[first : first + BLOCK])

    def train(self, asked: Request) -> list[BenchmarkRow]:
        """Train what the table in the folder lacks; returns all its rows."""
        by_hash = {config.hash: config for config in self.configs}
        listed = json.dumps({name: config.to_data() for name, config in by_hash.items()}, indent=1) + "\n"
        write_text(asked.to / CONFIGS, listed)
        file, shape = self.file, self.space.shape
        points = tuple(max(round(point * file.train.steps), 1) for point in file.points)
        jobs: dict[tuple[Hashable, ...], BenchmarkTraining] = {
            (text, config.hash, seed): BenchmarkTraining(
                shape, config, file.train, file.average, points, seed, *self.arrays[text]
            )
            for text, config, seed in self.trainings
        }

        def rows_of(training: tuple[Any, ...], result: Mapping[str, Any]) -> Iterator[BenchmarkRow]:
            text, name, seed = training
            config = by_hash[name]
            memory = measure(shape, config, file.memory)
            sizes = (memory.memory_bytes, memory.weight_bytes, memory.kv_cache_bytes, memory.flops_per_token)
            for tokens, loss in result["losses"].items():
                yield BenchmarkRow(text, name, self.configs[config], *sizes, seed, int(tokens), round(loss, 6))

        where = {"steps": file.train.steps, "work": asked.runs / file.name, "run": file.run, "progress": asked.progress}
        return fill_table(asked.to / TABLE, BenchmarkRow, jobs, rows_of, train=train_and_evaluate, **where)


def load(path: Path, asked: Request | None = None) -> GroundTruth:
    """The benchmark in a YAML file, as it is asked for. Raises UserError."""
    return GroundTruth.load(GroundTruthFile, path, asked)
