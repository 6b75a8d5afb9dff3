"""The first stage: train the supernet, cut it, train what it was cut into.

Owns the schedule of a supernet and its sub-supernets, and where their states lie: `supernet/STAGE.LEAF/fit.pt` in the run's
folder. How a supernet is cut is `nas.splitting`'s.
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
from ..splitting import SplitSpec, SplitTree, ancestor, split_leaves
from ..supernet import Supernet
from ..training import TrainSpec
from ..workers import Failure
from ..workers.trainings import Job
from .context import Context
from .work import SupernetJob, read_supernet, train_supernet


@dataclass(frozen=True)
class Supernets:
    """The trained sub-supernets: which config belongs to which, their weights, and the tokens behind each.

    `spent` is all that training and cutting took, in tokens; each subnet's pass over a batch counts.
    """

    tree: SplitTree
    nets: Mapping[str, Supernet]
    tokens: Mapping[str, int]
    spent: int


@dataclass(frozen=True)
class Leg:
    """One leaf's part of a stage: steps `begun` to `until`, on a schedule of `whole` steps, from the state at `start`."""

    leaf: str
    begun: int
    until: int
    whole: int
    start: Path | None


def legs(split: SplitSpec, steps: int, stage: int, leaves: Sequence[str], before: Mapping[str, tuple[int, Path]]) -> list[Leg]:
    """Each leaf's leg of a stage. `before` holds the steps and state that the stage before left, by leaf.

    A stage's steps are divided among its leaves, so that a split search costs what an unsplit one does. The rate's schedule ends
    with the last stage, each coming cut taken to double the leaves.
    """
    coming = split.stages(steps)[stage:]
    ahead = [part // (len(leaves) << n) for n, part in enumerate(coming)]
    fresh = not before or (split.restart and len(coming) == 1)
    found = []
    for leaf in leaves:
        begun, start = (0, None) if fresh else before[ancestor(leaf, before)]
        found.append(Leg(leaf, begun, begun + ahead[0], begun + sum(ahead), start))
    return found


def train_supernets(ctx: Context) -> Supernets:
    """Train in stages, with a cut before each but the first; whatever is on disk already is taken."""
    file, tree, spent = ctx.trial.file, SplitTree(), 0
    before: dict[str, tuple[int, Path]] = {}
    for stage in range(len(file.split.stages(file.supernet.steps))):
        if stage:
            tree, tokens = _cut(ctx, stage, tree, before)
            spent += tokens
        found = legs(file.split, file.supernet.steps, stage, tree.leaves(), before)
        spent += _train(ctx, stage, tree, found)
        before = {leg.leaf: (leg.until, _state(ctx, stage, leg.leaf)) for leg in found}
    read = {leaf: read_supernet(ctx.trial.space, path) for leaf, (_, path) in before.items()}
    nets, tokens_of = ({leaf: pair[n] for leaf, pair in read.items()} for n in (0, 1))
    return Supernets(tree, nets, tokens_of, spent)  # type: ignore[arg-type]


def _state(ctx: Context, stage: int, leaf: str) -> Path:
    return (ctx.run.folder / "supernet" / f"{stage}.{leaf}" / "fit.pt").resolve()


def _train(ctx: Context, stage: int, tree: SplitTree, found: Sequence[Leg]) -> int:
    """Train every leaf's leg; the tokens that this stage took."""
    jobs = [Job(f"{stage}.{leg.leaf}", {"job": _job(ctx, tree, leg)}) for leg in found]
    steps = {job.key: leg.until - leg.begun for job, leg in zip(jobs, found, strict=True)}
    results = ctx.train("supernet", jobs, train_supernet, steps)
    for result in results.values():
        if isinstance(result, Failure):
            raise RunFailed(f"the supernet could not be trained: {result.reason}")
    return sum(result["stage_tokens"] for result in results.values() if not isinstance(result, Failure))


def _job(ctx: Context, tree: SplitTree, leg: Leg) -> SupernetJob:
    file = ctx.trial.file
    spec = TrainSpec(**{name: getattr(file.supernet, name) for name in TrainSpec.__dataclass_fields__})
    return SupernetJob(
        space=tree.space_of(ctx.trial.space, leg.leaf, file.memory),
        memory=file.memory,
        spec=replace(spec, steps=leg.whole),
        rule=file.supernet.rule,
        distill=file.supernet.distill,
        seed=file.seed,
        tokens=ctx.corpus.train.numpy(),
        until=leg.until,
        begun=leg.begun,
        start=leg.start,
    )


def _cut(ctx: Context, stage: int, tree: SplitTree, before: Mapping[str, tuple[int, Path]]) -> tuple[SplitTree, int]:
    """Cut every leaf of the tree, once: the result is kept in `split-STAGE.json`."""
    name, file = f"split-{stage}.json", ctx.trial.file
    if not ctx.run.has(name):
        nets = {leaf: read_supernet(ctx.trial.space, path)[0] for leaf, (_, path) in before.items()}
        generator = torch.Generator().manual_seed(file.seed + stage)
        stream = train_batches(ctx.corpus.train, file.split.batch, file.supernet.seq, generator)
        batches = list(islice(stream, file.split.batches))
        with ctx.progress.stage(f"cut by {file.split.method}", len(nets), "supernets") as bar:
            spaces, rng = tree.spaces(ctx.trial.space, file.memory), random.Random(f"{file.seed} cut {stage}")
            grown, tokens = split_leaves(file.split, spaces, nets, batches, rng)
            bar.update(len(nets), f"{len(grown.leaves())} sub-supernets")
        ctx.run.write_json(name, {"tokens": tokens, "tree": grown.to_data()})
    data = ctx.run.read_json(name)
    return SplitTree.from_data(data["tree"]), data["tokens"]
