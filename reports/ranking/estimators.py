"""Supernets as estimators of how good a config is, each for so many tokens.

Owns the table `SUPERNETS` (a supernet is trained, split or not, and each subnet may be adapted a little before it is judged), and
what a row of it spends. Estimators that train no supernet are read off the benchmark's table by `scores`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from annotated_types import Gt, Le

from nas.config import OneOf, PositiveInt, Strict, build, read_yaml
from nas.data import Corpus, eval_sequences
from nas.errors import UserError
from nas.model.decoder import Decoder
from nas.model.supernet import standalone
from nas.search.context import Context
from nas.search.jobs import token_batches
from nas.search.progress import Progress
from nas.search.run import Run
from nas.search.supernets import Supernets, train_supernets
from nas.search.trial import Trial
from nas.search.trial_file import FinalSpec, SupernetSpec, TrialFile
from nas.sharing.sharing_config import SharingConfig
from nas.splitting import SplitSpec
from nas.tracking import Tracker, TrackingSpec
from nas.training.device import find_device
from nas.training.evaluation import losses_by_sequence
from nas.training.loop import Trainer, TrainSpec, plain_backward
from nas.workers import executor

from ..grid import AtLeastTwo
from ..ground_truth.training import GroundTruth, WeightAverage


@dataclass(frozen=True)
class SupernetKind:
    """A supernet's training as an estimator: its sampling strategy, distillation and split, and what is done to a subnet before
    it is judged.

    `adapt` is how many steps each judged subnet is trained by itself, from the weights it inherits; their tokens count.
    """

    strategy: str = "uniform"
    distill: bool = False
    split: SplitSpec = field(default_factory=lambda: SplitSpec(method="none"))
    adapt: int = 0


def _split(method: str, splits: int, **settings: Any) -> SplitSpec:
    return SplitSpec(method=method, splits=splits, batches=8, **settings)


GRADIENTS, RANDOM, FEW = "gradient-matching", "random", "exhaustive"
SUPERNETS: dict[str, SupernetKind] = {
    "uniform": SupernetKind(),
    "dense-biased": SupernetKind("dense_biased"),
    "sandwich": SupernetKind("sandwich"),
    "fair": SupernetKind("fair"),
    "uniform, distilled": SupernetKind("uniform", True),
    "sandwich, distilled": SupernetKind("sandwich", True),
    "fair, distilled": SupernetKind("fair", True),
    "dense-biased, distilled": SupernetKind("dense_biased", True),
    "few-shot": SupernetKind(split=_split(FEW, 1)),
    **{f"random split {2**n}": SupernetKind(split=_split(RANDOM, n)) for n in (1, 2, 3)},
    **{f"gradient split {2**n}": SupernetKind(split=_split(GRADIENTS, n)) for n in (1, 2, 3)},
    "random split 4, restarted": SupernetKind(split=_split(RANDOM, 2, restart=True)),
    "gradient split 4, restarted": SupernetKind(split=_split(GRADIENTS, 2, restart=True)),
    "gradient split 4 by sum": SupernetKind(split=_split(GRADIENTS, 2, criterion="sum")),
    "gradient split 4 by mean": SupernetKind(split=_split(GRADIENTS, 2, criterion="mean")),
    "gradient split 4 by module": SupernetKind(split=_split(GRADIENTS, 2, similarity="per_tensor")),
    "dense-biased, gradient split 2": SupernetKind("dense_biased", split=_split(GRADIENTS, 1)),
    "dense-biased, random split 4": SupernetKind("dense_biased", split=_split(RANDOM, 2)),
    "dense-biased, gradient split 4": SupernetKind("dense_biased", split=_split(GRADIENTS, 2)),
    "uniform, adapted 25": SupernetKind(adapt=25),
    "dense-biased, adapted 25": SupernetKind("dense_biased", adapt=25),
    "sandwich, adapted 25": SupernetKind("sandwich", adapt=25),
    "gradient split 4, adapted 25": SupernetKind(split=_split(GRADIENTS, 2), adapt=25),
}
"""Supernets, each trained with the same tokens in all. A new one is a row here, and nothing elsewhere."""


@dataclass(frozen=True)
class RankFile(Strict):
    """A comparison of estimators as its YAML file has it: the benchmark's file, how supernets are trained, and their budget.

    `budget` is a part of the tokens that training every config of the benchmark takes; a supernet's steps follow from it,
    whatever `train.steps` says.
    """

    name: str
    benchmark: str
    train: TrainSpec
    budget: Annotated[float, Gt(0), Le(1)] = 0.1
    seeds: PositiveInt = 2
    windows: AtLeastTwo = 64
    supernets: list[Annotated[str, OneOf(SUPERNETS)]] | None = None

    @property
    def kinds(self) -> dict[str, SupernetKind]:
        """The supernets to train, by name."""
        return {name: SUPERNETS[name] for name in self.supernets or SUPERNETS}

    @staticmethod
    def load(path: Path) -> RankFile:
        """The file at a path. Raises UserError."""
        return build(RankFile, read_yaml(path))


@dataclass(frozen=True)
class Estimate:
    """What an estimator says: the loss of each config in nats a token, by its hash, and the tokens that it took in all."""

    losses: Mapping[str, float]
    tokens: int


@dataclass(frozen=True)
class SupernetEstimate:
    """One supernet to be trained and asked for every config that the benchmark is to have, however many are known yet."""

    file: RankFile
    truth: GroundTruth
    text: str
    kind: SupernetKind
    seed: int

    def trial(self) -> Trial:
        """The trial whose supernet this is, with as many steps as the budget has. Raises UserError if it has none."""
        spec, space = self.file.train, self.truth.space
        tokens = self.budget - len(self.truth.configs) * self.kind.adapt * spec.batch * spec.seq
        steps = tokens // (spec.batch * spec.seq * self.subnets)
        if steps < 1:
            message = f"{self.budget:,} tokens leave no step to a supernet whose subnets are adapted for {self.kind.adapt}"
            raise UserError(message, where="budget", hint="use a larger part, or leave the kind out of supernets")
        train = asdict(spec) | {"steps": steps, "strategy": self.kind.strategy, "distill": self.kind.distill}
        file = TrialFile(
            name=self.file.name,
            space={},
            supernet=SupernetSpec(**train),
            final=FinalSpec(steps=1),
            seed=self.seed,
            memory=self.truth.file.memory,
            split=self.kind.split,
            tracking=TrackingSpec(enabled=False),
        )
        return Trial(file, space, Path())

    @property
    def budget(self) -> int:
        """Tokens that it may take."""
        return round(self.file.budget * len(self.truth.configs) * self.truth.file.train.tokens)

    @property
    def subnets(self) -> int:
        """How many subnets a step runs, the teacher's included."""
        most = max(map(len, self.truth.space.options.values()))
        drawn = {"uniform": 1, "dense_biased": 1, "sandwich": 4, "fair": most}[self.kind.strategy]
        return drawn + (self.kind.distill and self.kind.strategy != "sandwich")

    def run(self, folder: Path, progress: Progress) -> Estimate:
        """Train it, from wherever it stands in its folder, and ask it for every config."""
        trial, corpus, run = self.trial(), self.truth.corpora[self.text], Run(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with Tracker(trial.file.tracking, folder, trial.file.name) as tracker, executor(self.truth.file.run) as executed:
            nets = train_supernets(Context(run, trial, corpus, progress, tracker, executed))
        with progress.stage("ask", len(self.truth.configs), "configs") as bar:
            losses = {}
            for config, loss in self.ask(nets, corpus):
                losses[config.hash] = loss
                bar.update(len(losses))
        adapted = len(self.truth.configs) * self.kind.adapt * self.file.train.batch * self.file.train.seq
        return Estimate(losses, nets.spent + adapted)

    def ask(self, nets: Supernets, corpus: Corpus) -> Iterator[tuple[SharingConfig, float]]:
        """Each config's loss on the weights it inherits, adapted or not."""
        spec, space = self.file.train, self.truth.space
        windows = eval_sequences(corpus.eval, spec.seq, self.file.windows)
        for net in nets.nets.values():
            net.to(find_device()).eval()
        for config in self.truth.configs:
            model = nets.nets[nets.tree.route(space, config)].subnet(config)
            if self.kind.adapt:
                model = self._adapted(standalone(model).to(find_device()), corpus)
            yield config, losses_by_sequence(model, windows, autocast=spec.autocast).mean().item()

    def _adapted(self, model: Decoder, corpus: Corpus) -> Decoder:
        """A subnet's copy after a few steps of its own, its weights averaged over the latter half; all see the same batches."""
        spec = replace(self.file.train, steps=self.kind.adapt, lr_decay_fraction=0.0, warmup=0.0)
        fit = Trainer(model, spec, torch.Generator().manual_seed(self.seed + 1))
        averages, mean = WeightAverage(model, 0.5, [spec.steps]), None
        for step, _ in fit.run(token_batches(corpus.train.numpy(), spec, fit.generator), plain_backward(model, spec)):
            mean = averages.step(step)
        model.load_state_dict(mean or {})
        return model.eval()
