"""What a search learns its configs' losses from: a predictor, or the weights of a supernet.

Owns `EVALUATORS`: a new evaluator is a subclass of `Evaluator` and a row there, which a trial chooses by `search.evaluator`.
"""

from __future__ import annotations

import math
import random
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, ClassVar

import numpy as np

from ..errors import RunFailed
from ..sharing.distribution import ConfigDistribution, sums_of_single_decisions
from ..sharing.label import label
from ..sharing.sharing_config import SharingConfig
from ..splitting import SplitTree
from ..training.evaluation import Evaluation, Losses, Weights
from ..workers import Failure, Pool, Task
from .candidates import (
    Predictor,
    best_seen,
    by_bins,
    features,
    in_turns,
    select_best_of_bands,
    select_by_expected_hypervolume,
    shrink_to_observed,
)
from .context import Context
from .convert import conversions_of, convert_all
from .jobs import (
    ConvertedWeights,
    EvaluatorSettings,
    InheritedWeights,
    Start,
    SubnetTask,
    build_evaluator,
    pack,
    train_standalone,
)
from .loop import Evaluate, Proposal, SearchLoop
from .supernets import Supernets, initial_state, train_supernets, with_single_decisions
from .surrogate import HORIZON


class Evaluator(ABC):
    """Evaluates configs without training each.

    `spent` are the tokens that were trained on for it, `first` the configs that are proposed before the sampler proposes any,
    `conversions` what was measured beside the search, `tree` how the supernet was split.
    """

    weights: ClassVar[Weights]
    spent: int
    first: Collection[SharingConfig] = ()
    conversions: Sequence[Evaluation] = ()
    tree: SplitTree = SplitTree()

    def __init__(self, ctx: Context) -> None:
        self.ctx = ctx

    @classmethod
    @abstractmethod
    def train(cls, ctx: Context) -> Evaluator:
        """The evaluator of a run, after the trainings that it takes; those on disk are not run again. Raises RunFailed."""

    @abstractmethod
    def workers(self) -> AbstractContextManager[Evaluate]:
        """The function that evaluates proposals; what it works with ends with the context."""

    @abstractmethod
    def select(self, seen: Sequence[Evaluation], count: int, trained: Collection[SharingConfig]) -> list[SharingConfig]:
        """`count` of the configs that were `seen`, to be trained besides those that are trained anyway."""

    def search(self, dry_run: bool = False) -> list[Evaluation]:
        with self.workers() as evaluate:
            return SearchLoop(self.ctx, evaluate, self.first, dry_run).run()

    def compared(self, searched: Sequence[Evaluation]) -> list[Evaluation]:
        """Of the search and of the conversions, those whose losses compare: candidates are selected from them."""
        return [*self.conversions, *searched]

    def initial_weights(self, config: SharingConfig, seen: Evaluation | None) -> Start | None:
        """What makes the weights that a config's own training starts from, by its best evaluation; None from scratch."""
        return None


class PredictorEvaluator(Evaluator):
    """Predicts losses from those of a few proxy trainings; a config of these has its own loss as well.

    From a base model a proxy training is a short fine-tuning, and what a config's decisions cost alone on the base model's
    weights, added up, is its first feature.
    """

    weights = "predicted"

    def __init__(self, ctx: Context, losses: Mapping[SharingConfig, float], base: SupernetEvaluator | None = None) -> None:
        super().__init__(ctx)
        self.losses, self.base = losses, base
        self.conversions = base.conversions if base else ()
        converted = [e.config for e in self.conversions if ctx.trial.space.contains(e.config)]
        self.first = (*losses, *converted)  # so that they are among the search's evaluations
        self.spent = len(losses) * ctx.trial.proxy_training.tokens + (base.spent if base else 0)
        self.tree = base.tree if base else SplitTree()
        if losses:
            self.predictor = Predictor.fit(self._features(list(losses)), np.array(list(losses.values())))

    @classmethod
    def train(cls, ctx: Context) -> PredictorEvaluator:
        """Train in rounds: the first is spread over the memory, from a base model near the front, without the presets; each later
        one is where the front is predicted to be."""
        spec, base = ctx.trial.predictor, None
        if ctx.base_model:
            base = SupernetEvaluator.train(ctx)
            ctx = with_single_decisions(ctx, initial_state(ctx))
        fitted, losses = cls(ctx, {}, base), dict[SharingConfig, float]()
        for n in range(1, spec.rounds + 1):
            if losses:
                seen, count = fitted.search(dry_run=True), spec.configs * n // spec.rounds - len(losses)
                wanted = fitted.select(seen, count, excluded=losses)
            else:
                wanted = in_turns(_spread(ctx), () if base else ctx.presets)[: spec.configs // spec.rounds]
            losses |= fitted._train_proxies(wanted)
            fitted = cls(ctx, losses, base)
            ctx.progress.say(fitted.summary)
        return fitted

    @property
    def summary(self) -> str:
        """How good the predictor is, for a person."""
        error, spread = self.predictor.error, float(np.std(list(self.losses.values())))
        found = f"predictor of {len(self.losses)} configs: leave-one-out RMSE {error:.3f} nats (standard deviation {spread:.3f})"
        return found if error < spread else f"{found}: no better than their mean; longer proxy trainings help (predictor.steps)"

    def _features(self, configs: Sequence[SharingConfig]) -> np.ndarray:
        space = self.ctx.trial.space
        rows = features(space.shape, configs, self.ctx.trial.file.memory)
        return np.column_stack([-np.array(sums_of_single_decisions(space, configs)), rows]) if self.base else rows

    def compared(self, searched: Sequence[Evaluation]) -> list[Evaluation]:
        """See `Evaluator`: losses before fine-tuning do not compare with predicted ones after it."""
        return list(searched)

    def initial_weights(self, config: SharingConfig, seen: Evaluation | None) -> Start | None:
        """In a search from a base model its weights: by the conversion that gives the config, or as a subnet inherits them."""
        return self.base.initial_weights(config, best_seen(self.conversions).get(config)) if self.base else None

    def _train_proxies(self, configs: Sequence[SharingConfig]) -> dict[SharingConfig, float]:
        """Proxy trainings in `predictor/HASH`: the loss of each config that could be trained. Raises RunFailed."""
        ctx, spec, wanted = self.ctx, self.ctx.trial.proxy_training, {config.hash: config for config in configs}
        windows = ctx.windows(ctx.trial.file.evaluate.windows).numpy()
        starts = {key: self.initial_weights(config, None) for key, config in wanted.items()}
        settings = {key: ctx.training(wanted[key], spec, windows, start=start, keep=False) for key, start in starts.items()}
        found = {}
        for key, result in ctx.train("predictor", settings, train_standalone, dict.fromkeys(wanted, spec.steps)).items():
            if isinstance(result, Failure):
                ctx.progress.say(f"{label(wanted[key])} failed: {result.reason}")
            else:
                found[wanted[key]] = Losses.of(result).loss_nats_per_token
        if len(found) + len(self.losses) < 2:
            raise RunFailed("no predictor can be fitted: every proxy training failed")
        return found

    def workers(self) -> AbstractContextManager[Evaluate]:
        return nullcontext(self.predict)

    def predict(self, proposals: Sequence[Proposal]) -> Iterator[tuple[Proposal, Evaluation]]:
        """Each proposal with its predicted loss; the standard error of its perplexity is the predictor's."""
        if not proposals:
            return
        own = np.array([self.losses.get(one.config, math.nan) for one in proposals])
        predicted = shrink_to_observed(self.predictor(self._features([one.config for one in proposals])), own)
        for one, loss in zip(proposals, predicted.tolist(), strict=True):
            perplexity = math.exp(min(loss, 700.0))
            losses = Losses(loss, perplexity, perplexity * self.predictor.error)
            tokens = self.ctx.trial.proxy_training.tokens
            yield one, self.ctx.evaluation(one.config, losses, self.weights, tokens, number=one.number)

    def select(
        self,
        seen: Sequence[Evaluation],
        count: int,
        trained: Collection[SharingConfig] = (),
        excluded: Collection[SharingConfig] = (),
    ) -> list[SharingConfig]:
        """By `select_by_expected_hypervolume`, from a base model as on its own weights; `excluded` ones are not selected."""
        if self.base:
            return self.base.select([e for e in seen if e.config not in excluded], count, trained)
        costs = np.array([e.costs for e in seen], dtype=np.float64)
        losses = np.array([e.losses.loss_nats_per_token for e in seen])
        known, left_out = ([n for n, e in enumerate(seen) if e.config in some] for some in (trained, excluded))
        chosen = select_by_expected_hypervolume(costs, losses, self.predictor.error, count, known, left_out)
        return [seen[n].config for n in chosen]


DRAWS = 8  # random configs drawn for each proxy training; each bin of memory takes its share of them


def _spread(ctx: Context) -> list[SharingConfig]:
    """Random configs within the limits, spread over the memory. From a base model they are drawn near the front, and those whose
    decisions lose more than `HORIZON` nats by themselves are left out, as they are among candidates."""
    space, spec, count = ctx.trial.space, ctx.trial.file.memory, ctx.trial.predictor.configs
    rng = random.Random(f"{ctx.trial.file.seed} predictor")
    if not ctx.base_model:
        drawn = [space.sample(rng, lambda config: space.meets_limits(config, spec)) for _ in range(DRAWS * count)]
        return by_bins(space, spec, drawn, count)
    distribution = ConfigDistribution.of(space, spec)
    drawn = [distribution.draw(rng) for _ in range(DRAWS * count)]
    lost = sums_of_single_decisions(space, drawn)
    kept = [config for config, loss in zip(drawn, lost, strict=True) if loss <= HORIZON]
    return by_bins(space, spec, kept or drawn, count, float)


class SupernetEvaluator(Evaluator):
    """Measures subnets on the weights that they inherit from supernets; workers start with the first of them."""

    weights = "inherited"

    def __init__(self, ctx: Context, supernets: Supernets, conversions: Sequence[Evaluation] = ()) -> None:
        super().__init__(ctx)
        self.supernets, self.conversions = supernets, conversions
        self.spent, self.tree = supernets.spent, supernets.tree

    @classmethod
    def train(cls, ctx: Context) -> SupernetEvaluator:
        """Convert the base model, if there is one, and train the supernets."""
        conversions = convert_all(ctx)
        return cls(ctx, train_supernets(ctx), conversions)

    @contextmanager
    def workers(self) -> Iterator[Evaluate]:
        with ExitStack() as stack:
            ctx, started = self.ctx, list[Pool[SubnetTask, tuple[Losses, float]]]()

            def evaluate(proposals: Sequence[Proposal]) -> Iterator[tuple[Proposal, Evaluation | Failure]]:
                if proposals and not started:
                    given = pack(self.supernets.nets) | {"windows": ctx.windows(ctx.trial.file.evaluate.windows)}
                    settings = EvaluatorSettings(ctx.trial.space, ctx.trial.supernet.autocast)
                    started.append(stack.enter_context(ctx.executor.pool(build_evaluator, settings, given)))
                by_number = {one.number: one for one in proposals}
                subnets = {one.number: SubnetTask(one.config, self._leaf(one.config)) for one in proposals}
                tasks = [Task(n, subnet, ctx.memory(subnet.config).flops_per_token) for n, subnet in subnets.items()]
                for task, result in started[0].run(tasks) if tasks else ():
                    one = by_number[int(str(task.key))]
                    yield one, result if isinstance(result, Failure) else self._evaluation(one, task.data.supernet, *result)
                if ctx.trial.measured:  # what measures the next batch needs the workers' room
                    stack.close()
                    started.clear()

            yield evaluate

    def _evaluation(self, one: Proposal, leaf: str, losses: Losses, seconds: float) -> Evaluation:
        tokens = self.supernets.tokens[leaf]
        rest: dict[str, Any] = {"seconds": seconds, "number": one.number, "supernet": leaf}
        return self.ctx.evaluation(one.config, losses, self.weights, tokens, **rest)

    def _leaf(self, config: SharingConfig) -> str:
        return self.tree.route(self.ctx.trial.space, config)

    def select(self, seen: Sequence[Evaluation], count: int, trained: Collection[SharingConfig]) -> list[SharingConfig]:
        """By `select_best_of_bands`. From a base model the bands are equal in bytes, since sizes near its own are what is asked
        for, and configs that lose more than `HORIZON` nats to the best are left out: no fine-tuning mends them."""
        best = list(best_seen(seen).values())
        if not self.ctx.base_model:
            return select_best_of_bands(best, count, trained)
        return select_best_of_bands(working(best), count, trained, float)

    def initial_weights(self, config: SharingConfig, seen: Evaluation | None) -> Start | None:
        """Those of the best conversion, or those of the subnet; none if the trial starts from scratch."""
        base, trial = self.ctx.base_model, self.ctx.trial
        if not trial.inherits:
            return None
        if base and seen is not None and seen.weights == "converted":
            calibration = base.pretrained(trial, self.ctx.corpus).calibration.numpy()
            return ConvertedWeights(base.folder.resolve(), conversions_of(trial.space.shape)[seen.supernet], calibration)
        return InheritedWeights(trial.space, self.supernets.states[self._leaf(config)])


def working(evaluations: Sequence[Evaluation]) -> list[Evaluation]:
    """Those that lose at most `HORIZON` nats a token to the best."""
    least = min((e.losses.loss_nats_per_token for e in evaluations), default=0.0)
    return [e for e in evaluations if e.losses.loss_nats_per_token <= least + HORIZON]


EVALUATORS: dict[str, type[Evaluator]] = {"predictor": PredictorEvaluator, "supernet": SupernetEvaluator}
"""The evaluators by name."""
