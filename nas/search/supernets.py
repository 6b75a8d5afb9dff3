"""The supernet's stage: train it, split it, train the sub-supernets.

Owns the schedule of a supernet and its sub-supernets, and where their states lie: `supernet/STAGE.LEAF/fit.pt` in the run's
folder, and in a search from a base model `supernet/start.pt`, before any step. How a supernet is split is `nas.splitting`'s.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Hashable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..data import train_batches
from ..errors import RunFailed
from ..model.supernet import Supernet
from ..pretrained.conversions import init_from_pretrained
from ..splitting import Compare, Compared, Comparison, SplitSpec, SplitTree, ancestor, split_leaves
from ..training.device import find_device, on_device
from ..training.loop import Trainer
from ..workers import Failure, Pool, Task
from .context import Context
from .jobs import STATE, SupernetTraining, build_comparer, new_supernet, pack, read_supernet, train_supernet
from .progress import Stage
from .single_decisions import with_single_decisions
from .trial import train_spec


@dataclass(frozen=True)
class Supernets:
    """The trained sub-supernets: which config belongs to which, their weights and where these lie, and the tokens behind each.

    `spent` is all that training and splitting took, in tokens; each subnet's pass over a batch counts.
    """

    tree: SplitTree
    nets: Mapping[str, Supernet]
    states: Mapping[str, Path]
    tokens: Mapping[str, int]
    spent: int


@dataclass(frozen=True)
class LeafSchedule:
    """One leaf's training in a stage: steps `begun` to `until` of a schedule of `whole`, from the state at `start`."""

    leaf: str
    begun: int
    until: int
    whole: int
    start: Path | None


def leaf_schedules(
    split: SplitSpec,
    steps: int,
    stage: int,
    leaves: Sequence[str],
    before: Mapping[str, tuple[int, Path]],
    first: Path | None = None,
) -> list[LeafSchedule]:
    """Each leaf's training in a stage. `before` holds the steps and state of the previous stage, by leaf; `first` is the state
    that a supernet is initialised with, if not at random.

    A stage's steps are divided among its leaves, so that a split search costs what an unsplit one does. The learning rate's
    schedule ends with the last stage, on the assumption that each split to come doubles the leaves.
    """
    coming = split.stages(steps)[stage:]
    ahead = [part // (len(leaves) << n) for n, part in enumerate(coming)]
    fresh = not before or (split.restart and len(coming) == 1)
    found = []
    for leaf in leaves:
        begun, start = (0, first) if fresh else before[ancestor(leaf, before)]
        found.append(LeafSchedule(leaf, begun, begun + ahead[0], begun + sum(ahead), start))
    return found


def train_supernets(ctx: Context) -> Supernets:
    """Train in stages, with a split before each but the first; whatever is on disk already is taken.

    From a base model the supernet is initialised with its weights; with no steps to train it keeps them, unsplit.
    """
    split, steps, tree, spent = ctx.trial.split, ctx.trial.supernet.steps, SplitTree(), 0
    first = initial_state(ctx) if ctx.base_model else None
    before: dict[str, tuple[int, Path]] = {}
    if first is not None and not steps:
        return _read(ctx, tree, dict.fromkeys(tree.leaves(), first), spent)
    if first is not None and "near_front" in (ctx.trial.supernet.strategy, split.configs):
        ctx = with_single_decisions(ctx, first)
    for stage in range(len(split.stages(steps))):
        if stage:
            tree, tokens = _split(ctx, stage, tree, before)
            spent += tokens
        schedules = {f"{stage}.{one.leaf}": one for one in leaf_schedules(split, steps, stage, tree.leaves(), before, first)}
        spent += _train(ctx, tree, schedules)
        before = {one.leaf: (one.until, _state(ctx, key)) for key, one in schedules.items()}
    return _read(ctx, tree, {leaf: path for leaf, (_, path) in before.items()}, spent)


def _state(ctx: Context, key: str) -> Path:
    return (ctx.run.folder / "supernet" / key / STATE).resolve()


def _read(ctx: Context, tree: SplitTree, states: Mapping[str, Path], spent: int) -> Supernets:
    read = {leaf: read_supernet(ctx.trial.space, path) for leaf, path in states.items()}
    nets, tokens = {leaf: net for leaf, (net, _) in read.items()}, {leaf: n for leaf, (_, n) in read.items()}
    return Supernets(tree, nets, states, tokens, spent)


def initial_state(ctx: Context) -> Path:
    """The state of a supernet with the base model's weights, in a search that has one."""
    assert ctx.base_model
    path = (ctx.run.folder / "supernet" / "start.pt").resolve()
    if not path.exists():
        space, seed = ctx.trial.space, ctx.trial.file.seed
        generator = torch.Generator().manual_seed(seed)
        net = new_supernet(space, generator)
        widths = [options for name, options in space.options.items() if name.endswith(".intermediate")]
        narrow = any(min(options) < space.shape.intermediate_size for options in widths)
        with on_device(ctx.base_model.model, find_device()):
            init_from_pretrained(net.to(find_device()), ctx.base_model.pretrained(ctx.trial, ctx.corpus), narrow=narrow)
        Trainer(net.to(ctx.base_model.dtype), train_spec(ctx.trial.supernet), generator).save(path, tokens=0)
    return path


def _train(ctx: Context, tree: SplitTree, schedules: Mapping[str, LeafSchedule]) -> int:
    """Train every leaf; the tokens that this stage took."""
    file, spec, tokens = ctx.trial.file, ctx.trial.supernet, ctx.train_tokens
    teacher = ctx.base_model.folder.resolve() if ctx.base_model else None
    settings = {
        key: SupernetTraining(
            space=tree.space_of(ctx.trial.space, one.leaf, file.memory),
            memory=file.memory,
            spec=replace(train_spec(spec), steps=one.whole),
            strategy=spec.strategy,
            distill=spec.distill,
            seed=file.seed,
            tokens=tokens,
            until=one.until,
            start=one.start,
            teacher=teacher,
            bos=ctx.corpus.bos,
        )
        for key, one in schedules.items()
    }
    steps = {key: one.until - one.begun for key, one in schedules.items()}
    spent = 0
    for result in ctx.train("supernet", settings, train_supernet, steps).values():
        if isinstance(result, Failure):
            raise RunFailed(f"the supernet could not be trained: {result.reason}")
        spent += result["stage_tokens"]
    return spent


def _split(ctx: Context, stage: int, tree: SplitTree, before: Mapping[str, tuple[int, Path]]) -> tuple[SplitTree, int]:
    """Split every leaf of the tree, once: the result is kept in `split-STAGE.json`."""
    name, file, split = f"split-{stage}.json", ctx.trial.file, ctx.trial.split
    if not ctx.run.has(name):
        generator = torch.Generator().manual_seed(file.seed + stage)
        stream = train_batches(ctx.corpus.train, split.batch, ctx.trial.supernet.seq, generator, ctx.corpus.bos)
        batches = list(itertools.islice(stream, split.batches))
        count = len(before) * split.batches
        with ctx.progress.stage(f"split by {split.method}", count, "batches") as bar, ExitStack() as stack:
            spaces, rng = tree.spaces(ctx.trial.space, file.memory), random.Random(f"{file.seed} cut {stage}")
            states = {leaf: path for leaf, (_, path) in before.items()}
            grown, tokens = split_leaves(split, spaces, _comparing(ctx, states, bar, stack), batches, rng)
            bar.update(count, f"{len(grown.leaves())} sub-supernets")
        ctx.run.write_json(name, {"tokens": tokens, "tree": grown.to_data()})
    data = ctx.run.read_json(name)
    return SplitTree.from_data(data["tree"]), data["tokens"]


def _comparing(ctx: Context, states: Mapping[str, Path], bar: Stage, stack: ExitStack) -> Compare:
    """Comparisons on workers, which start with the first of them and end with the stack. Raises RunFailed."""
    pools: list[Pool[Comparison, Compared]] = []
    done = itertools.count(1)

    def compare_all(given: Sequence[Comparison]) -> list[Compared]:
        if not pools:
            weights = pack({leaf: read_supernet(ctx.trial.space, path)[0] for leaf, path in states.items()})
            pools.append(stack.enter_context(ctx.executor.pool(build_comparer, ctx.trial.space, weights)))
        found: dict[Hashable, Compared] = {}
        for task, result in pools[0].run([Task(n, one) for n, one in enumerate(given)]):
            if isinstance(result, Failure):
                raise RunFailed(f"the supernet could not be split: {result.reason}")
            found[task.key] = result
            bar.update(next(done))
        return [found[n] for n in range(len(given))]

    return compare_all
