"""Configs judged by what others like them have learnt: a few are trained alone for a while, and a predictor tells the rest.

Owns which configs are learnt from, their trainings (`predictor/HASH/` in the run's folder), and the judge. The predictor itself
is `nas.predict`'s.
"""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np

from ..data import bits_per_byte
from ..errors import RunFailed
from ..sharing.memory import MemorySpec, measure
from ..sharing.sharing_config import SharingConfig
from ..sharing.space import SearchSpace
from ..training.evaluation import Evaluation, Losses
from ..workers import Failure, Job
from .context import Context
from .jobs import StandaloneTraining, train_standalone
from .loop import Search
from .predictor import Predictor, features, select_by_expected_hypervolume, shrink_to_observed
from .study import Proposal

DRAWS = 8
"""Random configs drawn for each that is learnt from, of which each bin of memory takes its share."""


def by_bins(space: SearchSpace, spec: MemorySpec, configs: Iterable[SharingConfig], bins: int) -> Iterator[SharingConfig]:
    """Configs in such an order that any first part is spread over the memory as the whole is: from `bins` bins, equal in ratio,
    in turns, least memory first."""
    sizes = {config: math.log(measure(space.shape, config, spec).memory_bytes) for config in configs}
    low, width = min(sizes.values()), (max(sizes.values()) - min(sizes.values())) / bins or 1.0
    binned: dict[int, list[SharingConfig]] = {}
    for config, size in sizes.items():
        binned.setdefault(min(int((size - low) / width), bins - 1), []).append(config)
    for turn in zip_longest(*(binned[n] for n in sorted(binned))):
        yield from (config for config in turn if config is not None)


def in_turns(*kinds: Iterable[SharingConfig]) -> list[SharingConfig]:
    """One of each kind after the other, each config once."""
    return list(dict.fromkeys(config for turn in zip_longest(*kinds) for config in turn if config is not None))


@dataclass(frozen=True, eq=False)
class PredictorEvaluator:
    """A predictor, the losses that it was fitted to, and the tokens that they took. It is a judge; of a config that it was
    fitted to it asks the config's own loss, too."""

    ctx: Context
    losses: Mapping[SharingConfig, float]
    predictor: Predictor

    @staticmethod
    def of(ctx: Context, losses: Mapping[SharingConfig, float]) -> PredictorEvaluator:
        """What is learnt from losses in nats a token."""
        rows = features(ctx.trial.space.shape, list(losses), ctx.trial.file.memory)
        return PredictorEvaluator(ctx, losses, Predictor.fit(rows, np.array(list(losses.values()))))

    @property
    def spent(self) -> int:
        """Tokens that all trainings took."""
        return len(self.losses) * self.ctx.trial.lesson.tokens

    @property
    def words(self) -> str:
        """How good it is, for a person."""
        count, spread = len(self.losses), float(np.std(list(self.losses.values())))
        found = f"learnt from {count} configs; each is told from the others to {self.predictor.error:.3f} of {spread:.3f} nats"
        if self.predictor.error < spread:
            return found
        return f"{found}, no better than by their mean: longer trainings would teach more (predictor.steps)"

    def search(self, dry_run: bool = False) -> list[Evaluation]:
        """What a search by this judge finds; what it was fitted to is asked first, so that it is among it."""
        return Search(self.ctx, self, tuple(self.losses), dry_run).run()

    def select_candidates(
        self,
        seen: Sequence[Evaluation],
        count: int,
        there: Collection[SharingConfig] = (),
        out: Collection[SharingConfig] = (),
    ) -> list[SharingConfig]:
        """`count` of the configs that were judged, by what training them is expected to add to the front
        (`nas.predict.select_by_expected_hypervolume`).

        `there` are trained anyway; `out` are not to be picked.
        """
        memory = np.array([e.memory.memory_bytes for e in seen], dtype=np.float64)
        losses = np.array([e.losses.loss_nats_per_token for e in seen])
        anyway, left_out = ([n for n, e in enumerate(seen) if e.config in some] for some in (there, out))
        return [
            seen[n].config for n in select_by_expected_hypervolume(memory, losses, self.predictor.error, count, anyway, left_out)
        ]

    def __call__(self, asked: Sequence[Proposal]) -> Iterator[tuple[Proposal, Evaluation | Failure]]:
        """See `nas.search.loop.Evaluator`: the predicted loss (`nas.predict.shrink_to_observed`), its error that of the
        predictor."""
        if not asked:
            return
        trial = self.ctx.trial
        rows = features(trial.space.shape, [one.config for one in asked], trial.file.memory)
        own = np.array([self.losses.get(one.config, math.nan) for one in asked])
        for one, loss in zip(asked, shrink_to_observed(self.predictor(rows), own).tolist(), strict=True):
            perplexity = math.exp(min(loss, 700.0))
            evaluation = Evaluation(
                config=one.config,
                memory=self.ctx.memory(one.config),
                losses=Losses(loss, perplexity, perplexity * self.predictor.error),
                bits_per_byte=bits_per_byte(loss, self.ctx.corpus),
                weights="predicted",
                seed=trial.file.seed,
                tokens=trial.lesson.tokens,
                seconds=0.0,
                number=one.number,
                name=self.ctx.presets.get(one.config, ""),
            )
            yield one, evaluation


def learn(ctx: Context) -> PredictorEvaluator:
    """Train round after round, each where the front is by what the rounds before tell; trainings on disk are taken as they are.

    Raises RunFailed if too few could be trained.
    """
    spec = ctx.trial.predictor
    losses = _train(ctx, in_turns(_spread(ctx), ctx.presets)[: spec.configs // spec.rounds])
    for n in range(2, spec.rounds + 1):
        learned = PredictorEvaluator.of(ctx, losses)
        ctx.progress.say(learned.words)
        seen = learned.search(dry_run=True)
        losses |= _train(ctx, learned.select_candidates(seen, spec.configs * n // spec.rounds - len(losses), out=losses), losses)
    learned = PredictorEvaluator.of(ctx, losses)
    ctx.progress.say(learned.words)
    return learned


def _spread(ctx: Context) -> Iterator[SharingConfig]:
    """Random configs within the limits, spread over the memory."""
    space, spec, count = ctx.trial.space, ctx.trial.file.memory, ctx.trial.predictor.configs
    rng = random.Random(f"{ctx.trial.file.seed} predictor")
    drawn = [space.sample(rng, lambda config: space.meets_limits(config, spec)) for _ in range(DRAWS * count)]
    return by_bins(space, spec, drawn, count)


def _train(ctx: Context, configs: Sequence[SharingConfig], before: Collection[SharingConfig] = ()) -> dict[SharingConfig, float]:
    """Train configs alone for as long as a lesson takes; the loss of each that could be."""
    trial, spec = ctx.trial, ctx.trial.lesson
    tokens, windows = ctx.corpus.train.numpy(), ctx.windows(trial.file.evaluate.windows).numpy()
    wanted = {config.hash: config for config in configs}
    job = {
        key: StandaloneTraining(trial.space.shape, c, spec, trial.file.seed, tokens, windows, keep=False)
        for key, c in wanted.items()
    }
    results = ctx.train("predictor", [Job(key, job[key]) for key in wanted], train_standalone, dict.fromkeys(wanted, spec.steps))
    found = {}
    for key, result in results.items():
        if isinstance(result, Failure):
            ctx.progress.say(f"{key} failed: {result.reason}")
        else:
            found[wanted[key]] = Losses.of(result).loss_nats_per_token
    if len(found) + len(before) < 2:
        raise RunFailed("nothing can be learnt: every training failed")
    return found
