"""Configs judged on the weights that they inherit from the supernets.

Owns the workers that hold the supernets, and what becomes of their results. What is judged is `nas.search.loop`'s.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from types import TracebackType

from ..data import bits_per_byte
from ..training.evaluation import Evaluation, Losses
from ..workers import Failure, Pool, Task
from .context import Context
from .jobs import Inherited, SubnetTask, build_evaluator, pack
from .study import Proposal
from .supernets import Supernets


class SupernetEvaluator:
    """Measures subnets, as a context manager; its workers start with the first one."""

    def __init__(self, ctx: Context, supernets: Supernets) -> None:
        self.ctx, self.supernets = ctx, supernets
        self._pool: Pool[SubnetTask, tuple[Losses, float]] | None = None
        self._workers = ExitStack()

    def __enter__(self) -> SupernetEvaluator:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._workers.close()

    def __call__(self, asked: Sequence[Proposal]) -> Iterator[tuple[Proposal, Evaluation | Failure]]:
        """See `nas.search.loop.Evaluator`."""
        if not asked:
            return
        if self._pool is None:
            self._pool = self._workers.enter_context(self._start())
        space, by_number = self.ctx.trial.space, {one.number: one for one in asked}
        tasks = [Task(one.number, SubnetTask(one.config, self.supernets.tree.route(space, one.config))) for one in asked]
        for task, result in self._pool.run(tasks):
            one = by_number[int(str(task.key))]
            yield one, result if isinstance(result, Failure) else self._evaluation(one, task.data.supernet, *result)

    def _start(self) -> AbstractContextManager[Pool[SubnetTask, tuple[Losses, float]]]:
        file = self.ctx.trial.file
        payload = Inherited(self.ctx.trial.space, self.ctx.trial.supernet.autocast)
        weights = pack(self.supernets.nets, self.ctx.windows(file.evaluate.windows))
        return self.ctx.executor.pool(build_evaluator, payload, weights)

    def _evaluation(self, asked: Proposal, leaf: str, losses: Losses, seconds: float) -> Evaluation:
        return Evaluation(
            config=asked.config,
            memory=self.ctx.memory(asked.config),
            losses=losses,
            bits_per_byte=bits_per_byte(losses.loss_nats_per_token, self.ctx.corpus),
            weights="inherited",
            seed=self.ctx.trial.file.seed,
            tokens=self.supernets.tokens[leaf],
            seconds=seconds,
            number=asked.number,
            name=self.ctx.presets.get(asked.config, ""),
            supernet=leaf,
        )
