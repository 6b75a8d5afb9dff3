"""The supernet's stage: train it, split it, train the sub-supernets.

Owns the schedule of a supernet and its sub-supernets, and where their states lie: `supernet/STAGE.LEAF/fit.pt` in the run's
folder, and for a search from a checkpoint `supernet/start.pt`, before any step. How a supernet is split is `nas.splitting`'s.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch

from ..data import train_batches
from ..errors import RunFailed
from ..model.supernet import Supernet
from ..pretrained.conversions import init_from_pretrained
from ..sharing.space import SearchSpace
from ..splitting import SplitSpec, SplitTree, ancestor, split_leaves
from ..training.loop import Trainer
from ..workers import Failure, Job
from .context import Context
from .jobs import SupernetTraining, new_supernet, read_supernet, train_supernet
from .trial import train_spec


@dataclass(frozen=True)
class Supernets:
    """The trained sub-supernets: which config belongs to which, their weights, and the tokens behind each.

    `spent` is all that training and splitting took, in tokens; each subnet's pass over a batch counts.
    """

    tree: SplitTree
    nets: Mapping[str, Supernet]
    tokens: Mapping[str, int]
    spent: int


@dataclass(frozen=True)
class LeafSchedule:
    """One leaf's part of a stage: steps `begun` to `until`, on a schedule of `whole` steps, from the state at `start`."""

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
    """Each leaf's leg of a stage. `before` holds the steps and state that the stage before left, by leaf; `first` is the state
    that a fresh supernet begins with, if there is one.

    A stage's steps are divided among its leaves, so that a split search costs what an unsplit one does. The rate's schedule ends
    with the last stage, each coming split taken to double the leaves.
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

    A search from a checkpoint begins with its weights; with no steps to train it stays with them, in one piece.
    """
    split, steps, tree, spent = ctx.trial.split, ctx.trial.supernet.steps, SplitTree(), 0
    first = _start(ctx)
    before: dict[str, tuple[int, Path]] = {}
    if first is not None and not steps:
        return _read(ctx, tree, dict.fromkeys(tree.leaves(), first), spent)
    for stage in range(len(split.stages(steps))):
        if stage:
            tree, tokens = _split(ctx, stage, tree, before)
            spent += tokens
        found = leaf_schedules(split, steps, stage, tree.leaves(), before, first)
        spent += _train(ctx, stage, tree, found)
        before = {leg.leaf: (leg.until, _state(ctx, stage, leg.leaf)) for leg in found}
    return _read(ctx, tree, {leaf: path for leaf, (_, path) in before.items()}, spent)


def _read(ctx: Context, tree: SplitTree, states: Mapping[str, Path], spent: int) -> Supernets:
    read = {leaf: read_supernet(ctx.trial.space, path) for leaf, path in states.items()}
    return Supernets(tree, {leaf: net for leaf, (net, _) in read.items()}, {leaf: n for leaf, (_, n) in read.items()}, spent)


def _start(ctx: Context) -> Path | None:
    """The state of a supernet made of the checkpoint; None without one."""
    if ctx.origin is None:
        return None
    path = (ctx.run.folder / "supernet" / "start.pt").resolve()
    if not path.exists():
        space, seed = ctx.trial.space, ctx.trial.file.seed
        generator = torch.Generator().manual_seed(seed)
        net = new_supernet(space, generator)
        init_from_pretrained(net, ctx.origin.dense(ctx.trial, ctx.corpus), narrow=_narrows(space))
        Trainer(net, train_spec(ctx.trial.supernet), generator).save(path, tokens=0)
    return path


def _narrows(space: SearchSpace) -> bool:
    """Whether a layer's FFN may be narrower than the model's."""
    widths = [options for name, options in space.options.items() if name.endswith(".intermediate")]
    return any(min(options) < space.shape.intermediate_size for options in widths)


def _state(ctx: Context, stage: int, leaf: str) -> Path:
    return (ctx.run.folder / "supernet" / f"{stage}.{leaf}" / "fit.pt").resolve()


def _train(ctx: Context, stage: int, tree: SplitTree, found: Sequence[LeafSchedule]) -> int:
    """Train every leaf's leg; the tokens that this stage took."""
    jobs = [Job(f"{stage}.{leg.leaf}", _job(ctx, tree, leg)) for leg in found]
    steps = {job.key: leg.until - leg.begun for job, leg in zip(jobs, found, strict=True)}
    results = ctx.train("supernet", jobs, train_supernet, steps)
    for result in results.values():
        if isinstance(result, Failure):
            raise RunFailed(f"the supernet could not be trained: {result.reason}")
    return sum(result["stage_tokens"] for result in results.values() if not isinstance(result, Failure))


def _job(ctx: Context, tree: SplitTree, leg: LeafSchedule) -> SupernetTraining:
    file = ctx.trial.file
    return SupernetTraining(
        space=tree.space_of(ctx.trial.space, leg.leaf, file.memory),
        memory=file.memory,
        spec=replace(train_spec(ctx.trial.supernet), steps=leg.whole),
        strategy=ctx.trial.supernet.strategy,
        distill=ctx.trial.supernet.distill,
        seed=file.seed,
        tokens=ctx.corpus.train.numpy(),
        until=leg.until,
        begun=leg.begun,
        start=leg.start,
        teacher=ctx.run.dense.resolve() if ctx.origin else None,
    )


def _split(ctx: Context, stage: int, tree: SplitTree, before: Mapping[str, tuple[int, Path]]) -> tuple[SplitTree, int]:
    """Split every leaf of the tree, once: the result is kept in `split-STAGE.json`."""
    name, file, split = f"split-{stage}.json", ctx.trial.file, ctx.trial.split
    if not ctx.run.has(name):
        nets = {leaf: read_supernet(ctx.trial.space, path)[0] for leaf, (_, path) in before.items()}
        generator = torch.Generator().manual_seed(file.seed + stage)
        stream = train_batches(ctx.corpus.train, split.batch, ctx.trial.supernet.seq, generator)
        batches = list(islice(stream, split.batches))
        with ctx.progress.stage(f"split by {split.method}", len(nets), "supernets") as bar:
            spaces, rng = tree.spaces(ctx.trial.space, file.memory), random.Random(f"{file.seed} cut {stage}")
            grown, tokens = split_leaves(split, spaces, nets, batches, rng)
            bar.update(len(nets), f"{len(grown.leaves())} sub-supernets")
        ctx.run.write_json(name, {"tokens": tokens, "tree": grown.to_data()})
    data = ctx.run.read_json(name)
    return SplitTree.from_data(data["tree"]), data["tokens"]
