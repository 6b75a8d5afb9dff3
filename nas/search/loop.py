"""The second stage: thousands of configs, asked for and judged.

Owns the loop of ask, judge and tell, what is asked first, and the journal. How configs are proposed is `nas.search.study`'s; who
judges them is `nas.search.predicted`'s and `nas.search.inherited`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..pareto import Point, front, hypervolume
from ..sharing.memory import Memory
from ..sharing.sharing_config import SharingConfig
from ..sharing.space import Assignment, SearchSpace
from ..training.evaluation import Evaluation
from ..workers import Failure
from .context import Context
from .final import reference
from .progress import Stage
from .study import Proposal, Study


def changes(space: SearchSpace, config: SharingConfig) -> dict[SharingConfig, Assignment]:
    """A config of the space and all that differ from it by one decision, each with its assignment; empty for another config."""
    decided = space.encode(config)
    if decided is None:
        return {}
    found = {config: decided}
    setting = {name: options[0] for name, options in space.options.items()} | decided
    for name, options in space.options.items():
        for option in options:
            changed = setting | {name: option}
            other, asked = space.decode(lambda name, options, changed=changed: changed[name])  # type: ignore[misc]
            found.setdefault(other, asked)
    return found


Evaluator = Callable[[Sequence[Proposal]], Iterator[tuple[Proposal, Evaluation | Failure]]]
"""Says of each config asked for what it is worth, or why it is worth nothing, as it comes to know."""


@dataclass
class Search:
    """The search under way: what is known of each config, and who says the rest. A dry_run leaves no trace.

    `first` are asked before the sampler proposes anything, after the published schemes.
    """

    ctx: Context
    judge: Evaluator
    first: Collection[SharingConfig] = ()
    dry_run: bool = False
    found: dict[SharingConfig, Evaluation] = field(default_factory=dict)
    failed: dict[SharingConfig, str] = field(default_factory=dict)
    _corner: Point | None = None

    def run(self) -> list[Evaluation]:
        """Every evaluation of the search, in the order in which configs were first asked for; none is done twice."""
        if not self.dry_run:
            self._read_journal()
        spec, seed = self.ctx.trial.file.search, self.ctx.trial.file.seed
        study = Study(self.ctx.trial.space, spec, seed)
        first = self._first()
        study.enqueue(first)
        asked_configs: dict[SharingConfig, int] = {}
        with self.ctx.progress.stage("rehearse" if self.dry_run else "search", spec.evaluations, "configs") as bar:
            done = 0
            while done < spec.evaluations:
                batch = study.ask(min(max(spec.batch, len(first) if not done else 0), spec.evaluations - done))
                for asked in batch:
                    asked_configs.setdefault(asked.config, asked.number)
                self._evaluate(batch, bar, done)
                for asked in batch:
                    self._tell(study, asked)
                done += len(batch)
                self._say(bar, done, self._found_of(asked_configs))
        return self._found_of(asked_configs)

    def _first(self) -> list[Assignment]:
        """What is asked before the sampler proposes anything: the published schemes, `first` and, of a checkpoint, each decision
        alone."""
        space, spec = self.ctx.trial.space, self.ctx.trial.file.search
        named = list(dict.fromkeys([*(self.ctx.presets if spec.presets else ()), *self.first]))
        found = [space.encode(config) or {} for config in named]
        if self.ctx.origin is None:
            return found
        alone = [a for config, a in changes(space, SharingConfig.dense(space.shape)).items() if config not in named]
        count = min(len(alone), spec.evaluations // 2)
        return found + [alone[n * len(alone) // count] for n in range(count)]

    def _found_of(self, configs: Iterable[SharingConfig]) -> list[Evaluation]:
        return [self.found[config] for config in configs if config in self.found]

    def _read_journal(self) -> None:
        for entry in self.ctx.run.journal().read():
            if "failure" in entry:
                self.failed[SharingConfig.from_data(self.ctx.trial.space.shape, entry["config"])] = entry["failure"]
            else:
                evaluation = Evaluation.from_data(self.ctx.trial.space.shape, entry)
                self.found[evaluation.config] = evaluation

    def _evaluate(self, batch: Sequence[Proposal], bar: Stage, done: int) -> None:
        """Evaluator the batch's configs that are new and within the limits; each is in the journal as soon as it is done."""
        space, memory = self.ctx.trial.space, self.ctx.trial.file.memory
        new: dict[SharingConfig, Proposal] = {}
        for asked in batch:
            if asked.config not in self.found and asked.config not in self.failed and space.meets_limits(asked.config, memory):
                new.setdefault(asked.config, asked)
        for count, (asked, result) in enumerate(self.judge(list(new.values())), 1):
            self._record(asked, result)
            bar.update(min(done + count, done + len(batch)))

    def _record(self, asked: Proposal, result: Evaluation | Failure) -> None:
        config = asked.config
        if isinstance(result, Failure):
            self.failed[config] = result.reason
            entry = {"number": asked.number, "hash": config.hash, "config": config.to_data(), "failure": result.reason}
        else:
            self.found[config] = result
            entry = result.to_data()
        if not self.dry_run:
            self.ctx.run.journal().append(entry)

    def _tell(self, study: Study, asked: Proposal) -> None:
        memory = self.ctx.memory(asked.config)
        if asked.config in self.found:
            loss: float | None = self.found[asked.config].losses.loss_nats_per_token
        else:
            loss = None if asked.config in self.failed else float("inf")
        values = None if loss is None else (float(memory.memory_bytes), loss)
        study.tell(asked.number, values, self._excess(memory))

    def _excess(self, memory: Memory) -> float:
        """How far beyond the limits, as a part of each; 0 within."""
        sizes: dict[str, Any] = memory.to_data()
        return float(sum(max(sizes[name] / limit - 1, 0.0) for name, limit in self.ctx.trial.space.limits.items()))

    def _say(self, bar: Stage, done: int, evaluations: Sequence[Evaluation]) -> None:
        """How the search stands; every hypervolume is against the corner of the first batch, so that they compare."""
        if not evaluations:
            return bar.update(done)
        self._corner = self._corner or reference(evaluations)
        points = [e.point for e in evaluations]
        members = front(points)
        bar.update(done, f"front of {len(members)}, perplexity from {points[members[-1]][1]:.2f}")
        if not self.dry_run:
            self.ctx.tracker.log_series("hypervolume", hypervolume(points, self._corner), done)
