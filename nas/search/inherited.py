"""The second stage: thousands of configs measured on weights inherited from the supernets.

Owns the loop of ask, evaluate and tell, what is asked first, and the journal. How configs are proposed is `nas.search.study`'s.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from ..data import bits_per_byte
from ..evaluate import Evaluation, Losses
from ..memory import Memory
from ..pareto import Point, front, hypervolume
from ..sharing import SharingConfig
from ..space import Assignment, SearchSpace
from ..supernet import dense_config
from ..workers import Failure
from ..workers.pool import Pool, Task
from .context import Context
from .final import reference
from .progress import Stage
from .study import Asked, Study
from .supernets import Supernets
from .work import Inherited, SubnetTask, build_evaluator, pack


def changes(space: SearchSpace, config: SharingConfig) -> dict[SharingConfig, Assignment]:
    """A config of the space and all that differ from it by one decision, each with its assignment; empty for another config."""
    decided = space.assignment(config)
    if decided is None:
        return {}
    found = {config: decided}
    setting = {name: options[0] for name, options in space.options.items()} | decided
    for name, options in space.options.items():
        for option in options:
            changed = setting | {name: option}
            other, asked = space.walk(lambda name, options, changed=changed: changed[name])  # type: ignore[misc]
            found.setdefault(other, asked)
    return found


@dataclass
class InheritedSearch:
    """The search under way: what is known of each config, which workers find out the rest."""

    ctx: Context
    supernets: Supernets
    found: dict[SharingConfig, Evaluation] = field(default_factory=dict)
    failed: dict[SharingConfig, str] = field(default_factory=dict)
    _pool: Pool[SubnetTask, tuple[Losses, float]] | None = None
    _corner: Point | None = None

    def run(self) -> list[Evaluation]:
        """Every evaluation of the search, in the order in which configs were first asked for; none is done twice."""
        self._read_journal()
        spec, seed = self.ctx.trial.file.search, self.ctx.trial.file.seed
        study = Study(self.ctx.trial.space, spec, seed)
        first = self._first()
        study.enqueue(first)
        asked_configs: dict[SharingConfig, int] = {}
        with self.ctx.progress.stage("search", spec.evaluations, "configs") as bar, ExitStack() as workers:
            done = 0
            while done < spec.evaluations:
                batch = study.ask(min(max(spec.batch, len(first) if not done else 0), spec.evaluations - done))
                for asked in batch:
                    asked_configs.setdefault(asked.config, asked.number)
                self._evaluate(batch, workers, bar, done)
                for asked in batch:
                    self._tell(study, asked)
                done += len(batch)
                self._say(bar, done, self._found_of(asked_configs))
        return self._found_of(asked_configs)

    def _first(self) -> list[Assignment]:
        """What is asked before the sampler proposes anything: the published schemes and, of a checkpoint, each decision alone."""
        space, spec = self.ctx.trial.space, self.ctx.trial.file.search
        named = list(self.ctx.presets) if spec.presets else []
        found = [space.assignment(config) or {} for config in named]
        if self.ctx.origin is None:
            return found
        alone = [a for config, a in changes(space, dense_config(space.shape)).items() if config not in named]
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

    def _evaluate(self, batch: Sequence[Asked], workers: ExitStack, bar: Stage, done: int) -> None:
        """Measure the batch's configs that are new and within the limits; each is in the journal as soon as it is done."""
        space, memory = self.ctx.trial.space, self.ctx.trial.file.memory
        new: dict[SharingConfig, int] = {}
        for asked in batch:
            if asked.config not in self.found and asked.config not in self.failed and space.meets_limits(asked.config, memory):
                new.setdefault(asked.config, asked.number)
        if not new:
            return
        if self._pool is None:
            self._pool = workers.enter_context(self._workers())
        tasks = [Task(n, SubnetTask(config, self.supernets.tree.route(space, config))) for config, n in new.items()]
        for count, (task, result) in enumerate(self._pool.run(tasks), 1):
            self._record(task, result)
            bar.update(min(done + count, done + len(batch)))

    def _workers(self) -> Pool[SubnetTask, tuple[Losses, float]]:
        file = self.ctx.trial.file
        payload = Inherited(self.ctx.trial.space, file.supernet.autocast)
        weights = pack(self.supernets.nets, self.ctx.windows(file.evaluate.windows))
        return Pool(file.run, build_evaluator, payload, weights)

    def _record(self, task: Task[SubnetTask], result: tuple[Losses, float] | Failure) -> None:
        config, journal = task.data.config, self.ctx.run.journal()
        if isinstance(result, Failure):
            self.failed[config] = result.reason
            journal.append({"number": task.key, "hash": config.hash, "config": config.to_data(), "failure": result.reason})
            return
        losses, seconds = result
        leaf = task.data.supernet
        evaluation = Evaluation(
            config=config,
            memory=self.ctx.memory(config),
            losses=losses,
            bits_per_byte=bits_per_byte(losses.loss_nats_per_token, self.ctx.corpus),
            weights="inherited",
            seed=self.ctx.trial.file.seed,
            tokens=self.supernets.tokens[leaf],
            seconds=seconds,
            number=int(str(task.key)),
            name=self.ctx.presets.get(config, ""),
            supernet=leaf,
        )
        self.found[config] = evaluation
        journal.append(evaluation.to_data())

    def _tell(self, study: Study, asked: Asked) -> None:
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
        self.ctx.tracker.log_series("hypervolume", hypervolume(points, self._corner), done)
