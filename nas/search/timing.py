"""How long a search's pieces of work take on its own workers: a handful of each, on random weights and random tokens.

Owns `Pass` and what it runs. How many passes a search takes is `nas.search.budget`'s.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from ..errors import RunFailed
from ..model.decoder import Decoder, init_weights
from ..sharing.memory import MemorySpec
from ..sharing.sharing_config import SharingConfig
from ..sharing.space import SearchSpace
from ..splitting.gradients import gradient_of
from ..training.device import find_device
from ..training.evaluation import Stopwatch, measure_losses
from ..training.loop import Backward, Trainer, TrainSpec, distillation_backward, plain_backward
from ..training.measured import measure_objectives
from ..training.strategies import STRATEGIES, SubnetRandom, SupernetStep
from ..workers import Executor, Failure, Task
from .jobs import new_supernet

SECONDS, MOST = 1.0, 5  # a pass is repeated for so long, but at most so often, after one that does not count
PATIENCE = 20.0  # seconds that are waited for workers beyond the first: a cluster may have no room for them yet
LONG = 5.0  # seconds of a first pass after which it does count: another would cost as much


@dataclass(frozen=True)
class Pass:
    """A piece of work of which a search does many. kind: a row of `KINDS`. spec: its batch, its length, and whether it computes
    in bfloat16. alone: the other workers are idle, and it has their threads."""

    kind: str
    spec: TrainSpec
    alone: bool = False

    @property
    def tokens(self) -> int:
        return self.spec.batch * self.spec.seq


@dataclass(frozen=True)
class Timed:
    """The seconds that a pass takes, and the most memory that its process held meanwhile."""

    seconds: float
    peak_bytes: int


@dataclass(frozen=True)
class TimedModels:
    """What passes are of: the space's dense model, and a supernet that is trained by a strategy. The teacher of a supernet is a
    base model, its own largest subnet (`distill` alone) or none."""

    space: SearchSpace
    memory: MemorySpec
    strategy: str = "uniform"
    distill: bool = False
    from_base: bool = False
    measured: tuple[str, ...] = ()
    workers: int = 1


def time_passes(passes: Collection[Pass], models: TimedModels, work: Executor) -> tuple[dict[Pass, Timed], float]:
    """Each pass on as many workers at once as will do it, and the seconds that workers take to start. Raises RunFailed."""
    watch, found = Stopwatch(), dict[Pass, Timed]()
    with work.pool(build_timer, models) as pool:
        waited = Stopwatch()
        while not pool.all_ready and waited.seconds < PATIENCE:
            time.sleep(0.1)
            list(pool.run([Task(0, None)]))
        start = watch.seconds
        for one in passes:
            timed = list[Timed]()
            for _, result in pool.run([Task(n, one) for n in range(1 if one.alone else models.workers)]):
                if isinstance(result, Failure):
                    raise RunFailed(f"a worker cannot do what this search needs ({one.kind}): {result.reason}")
                timed.append(result)
            found[one] = Timed(fmean(one.seconds for one in timed), max(one.peak_bytes for one in timed))
    return found, start


def build_timer(given: TimedModels, weights: dict[str, Tensor]) -> Callable[[Pass | None], Timed]:
    """The function that times a pass, in a worker; none takes no time."""
    threads, cores = torch.get_num_threads(), os.cpu_count() or 1

    def run(task: Pass | None) -> Timed:
        if task is None:
            return Timed(0.0, 0)
        torch.set_num_threads(min(threads * given.workers, max(cores, threads)) if task.alone else threads)
        _forget_peak()
        try:
            return Timed(seconds_of(KINDS[task.kind](given, task.spec)), _peak_bytes())
        finally:
            torch.set_num_threads(threads)

    return run


def seconds_of(work: Callable[[], object]) -> float:
    """The mean seconds of a piece of work."""

    def once() -> float:
        watch = Stopwatch()
        work()
        if find_device().type != "cpu":
            torch.accelerator.synchronize()
        return watch.seconds

    first, watch, found = once(), Stopwatch(), list[float]()
    while first < LONG and len(found) < MOST and watch.seconds < SECONDS:
        found.append(once())
    return fmean(found or [first])


def _dense(given: TimedModels) -> Decoder:
    shape = given.space.shape
    model = Decoder(shape, SharingConfig.dense(shape).resolve(shape))
    return init_weights(model, torch.Generator().manual_seed(0)).to(find_device())


def _rows(given: TimedModels, spec: TrainSpec) -> Tensor:
    size = (spec.batch, spec.seq + 1)
    return torch.randint(given.space.shape.vocab_size, size, generator=torch.Generator().manual_seed(0)).to(find_device())


def _steps(given: TimedModels, spec: TrainSpec, model: torch.nn.Module, backward: Backward) -> Callable[[], object]:
    trainer = Trainer(model, replace(spec, steps=1000), torch.Generator().manual_seed(0))
    steps: Iterator[tuple[int, float]] = trainer.run(itertools.repeat(_rows(given, spec)), backward)
    return lambda: next(steps)


def _train(given: TimedModels, spec: TrainSpec) -> Callable[[], object]:
    model = _dense(given)
    return _steps(given, spec, model, plain_backward(model, spec))


def _distill(given: TimedModels, spec: TrainSpec) -> Callable[[], object]:
    model, teacher = _dense(given), _dense(given).requires_grad_(False)
    return _steps(given, spec, model, distillation_backward(model, teacher, spec))


def _supernet(given: TimedModels, spec: TrainSpec) -> Callable[[], object]:
    supernet = new_supernet(given.space, torch.Generator().manual_seed(0)).to(find_device())
    teacher = _dense(given).requires_grad_(False) if given.from_base else given.space.largest()
    draw = STRATEGIES[given.strategy](given.space, given.memory)
    backward = SupernetStep(supernet, spec, draw, SubnetRandom("0"), teacher if given.distill else None)
    return _steps(given, spec, supernet, backward)


def _gradient(given: TimedModels, spec: TrainSpec) -> Callable[[], object]:
    supernet = new_supernet(given.space, torch.Generator().manual_seed(0)).to(find_device())
    config, rows = given.space.largest(), _rows(given, spec)
    return lambda: gradient_of(supernet, config, rows)


def _evaluate(given: TimedModels, spec: TrainSpec) -> Callable[[], object]:
    model, rows = _dense(given).eval(), _rows(given, spec)
    return lambda: measure_losses(model, rows, autocast=spec.autocast)


def _measure(given: TimedModels, spec: TrainSpec) -> Callable[[], object]:
    shape = given.space.shape
    return lambda: measure_objectives(shape, SharingConfig.dense(shape), given.memory, given.measured)


KINDS: dict[str, Callable[[TimedModels, TrainSpec], Callable[[], Any]]] = {
    "train": _train,
    "distill": _distill,
    "supernet": _supernet,
    "gradient": _gradient,
    "evaluate": _evaluate,
    "measure": _measure,
}
"""Passes by kind: a training step of the dense model, one that a teacher teaches, one of a supernet, a gradient of a split, an
evaluation, and the measurement of a config at work."""

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def _forget_peak() -> None:
    if find_device().type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif RESET.exists():
        RESET.write_text("5")


def _peak_bytes() -> int:
    """The most memory that this process held since then: on a GPU what its allocator held, else what was resident; 0 where the
    system does not tell."""
    if find_device().type == "cuda":
        return int(torch.cuda.max_memory_allocated())
    lines = STATUS.read_text().splitlines() if STATUS.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)
