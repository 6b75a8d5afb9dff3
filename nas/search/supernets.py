"""The supernet's stage: train it, split it, train the sub-supernets.

Owns the schedule of a supernet and its sub-supernets, and where their states lie: `supernet/STAGE.LEAF/fit.pt` in the run's
folder, and in a search from a base model `supernet/start.pt`, before any step. How a supernet is split is `nas.splitting`'s.
On the base model's own weights it measures what each option costs alone, once, in `single_decisions.json`; all that draws
configs near the front reads it from the space (`SearchSpace.measured`).
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Hashable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from ..data import train_batches
from ..errors import RunFailed
from ..model.supernet import Supernet
from ..pretrained.conversions import init_from_pretrained
from ..sharing.distribution import HOPELESS, ConfigDistribution, single_decisions
from ..sharing.sharing_config import SharingConfig
from ..sharing.space import SingleDecision
from ..splitting import Compare, Compared, Comparison, SplitSpec, SplitTree, ancestor, split_leaves
from ..training.device import find_device, on_device
from ..training.loop import Trainer
from ..workers import Failure, Pool, Task
from .context import Context
from .jobs import (
    STATE,
    EvaluatorSettings,
    SubnetTask,
    SupernetTraining,
    build_comparer,
    build_evaluator,
    new_supernet,
    pack,
    read_supernet,
    train_supernet,
)
from .progress import Stage
from .trial_file import train_spec


@dataclass(frozen=True)
class Supernets:
    """The trained sub-supernets: which config belongs to which, their weights and where these lie, and the tokens behind each.
    `spent` is all that training and splitting took, in tokens; each subnet's pass over a batch counts."""

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
    """Train in stages, with a split before each but the first; whatever is on disk already is taken. From a base model the
    supernet is initialised with its weights; with no steps to train it keeps them, unsplit."""
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


FILE = "single_decisions.json"

MOST = 400  # the most options that are measured; of more, so many are drawn. Another costs what the nearest of its primitive does


def with_single_decisions(ctx: Context, start: Path) -> Context:
    """The context with the costs in its space, on the weights of the supernet at `start`. Raises RunFailed."""
    space = ctx.trial.space
    if not ctx.run.has(FILE):
        found = single_decisions(space, ctx.trial.file.memory)
        if len(found) > MOST:
            drawn = random.Random(f"{ctx.trial.file.seed} single decisions").sample(list(found), MOST)
            found = {one: found[one] for one in drawn}
        losses = _losses(ctx, start, list(dict.fromkeys([space.largest(), *found.values()])))
        dense = losses[space.largest()]
        measured = [replace(one, loss_increase=min(losses[config] - dense, 10 * HOPELESS)) for one, config in found.items()]
        ctx.run.write_json(FILE, {"single_decisions": [asdict(one) for one in measured]})
    rows = ctx.run.read_json(FILE)["single_decisions"]
    space = replace(space, measured=tuple(SingleDecision(**row) for row in rows))
    ctx.progress.say(ConfigDistribution.of(space, ctx.trial.file.memory).summary)
    return replace(ctx, trial=replace(ctx.trial, space=space))


def _losses(ctx: Context, start: Path, configs: list[SharingConfig]) -> dict[SharingConfig, float]:
    """Configs' losses in nats a token, infinite where they are not finite."""
    settings = EvaluatorSettings(ctx.trial.space, ctx.trial.supernet.autocast)
    weights = pack({"0": read_supernet(ctx.trial.space, start)[0]}) | {"windows": ctx.windows(ctx.trial.file.evaluate.windows)}
    found = dict.fromkeys(configs, math.inf)
    with (
        ctx.progress.stage("single decisions", len(configs), "configs") as bar,
        ctx.executor.pool(build_evaluator, settings, weights) as pool,
    ):
        tasks = [Task(n, SubnetTask(config, "0")) for n, config in enumerate(configs)]
        for done, (task, result) in enumerate(pool.run(tasks), 1):
            if not isinstance(result, Failure):
                found[task.data.config] = result[0].loss_nats_per_token
            bar.update(done)
    if math.isinf(found[configs[0]]):
        raise RunFailed("the base model could not be evaluated, so that no option's cost is known")
    return found
