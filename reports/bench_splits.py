"""How sure gradient matching is of its split: how often two disjoint sets of batches lead to the same one.

- With the default (one cosine over all parameters, variance reduction) the decision to split on is stable from four batches
  on: disjoint sets of batches agree in 58% of pairs with one batch, 73% with two, 100% with four.
- The mean of cosines by tensor needs eight batches: 29%, 44%, 66%, 100%.
- The sum of disagreements agrees in 94% with one batch over all parameters, and by tensor in 75% with eight.
- Eight batches take 3.4 seconds on one core here.
- A stable split is not a better one: what splits are worth to a ranking is in [ranking](ranking/README.md).

    python -m reports.bench_splits [--steps 1500] [--batches 64]

A supernet of the ground truth's space (`search_spaces/ground_truth.yaml`) is trained uniformly on the default text, one subnet of
8 × 128 tokens a step; then the options of every decision are compared on each of many batches of 4 × 128 tokens, in one random
setting each. Sets of n batches are disjoint. Shown is the part of all pairs of sets that agree on the decision to split, and in
brackets on the partition of its options too, for each similarity of gradients (global, per tensor) and each criterion
(`nas.splitting`). Seconds are those of one set of n batches by one cosine.
"""

from __future__ import annotations

import itertools
import random
import sys
import time
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from nas.data import DataSpec, load_corpus, train_batches
from nas.model.supernet import Supernet
from nas.search.jobs import new_supernet
from nas.sharing.memory import MemorySpec
from nas.sharing.space import SearchSpace
from nas.splitting import SplitTree, conflicts, draw_assignments, in_process, options_in_use
from nas.splitting.gradients import CRITERIA, DISTANCES, best_partition
from nas.training.loop import Trainer, TrainSpec
from nas.training.strategies import STRATEGIES, SubnetRandom, SupernetStep
from reports.page import options, show

SPACE = Path(__file__).parents[1] / "search_spaces" / "ground_truth.yaml"
SETS = (1, 2, 4, 8, 16, 32)
Matrices = Mapping[str, Tensor]


def trained(space: SearchSpace, tokens: Tensor, steps: int) -> Supernet:
    """A supernet after so many uniform steps."""
    generator = torch.Generator().manual_seed(0)
    spec = TrainSpec(steps=steps, batch=8, learning_rate=0.004, autocast=False)
    fit = Trainer(new_supernet(space, generator), spec, generator)
    assert isinstance(fit.model, Supernet)
    step = SupernetStep(fit.model, spec, STRATEGIES["uniform"](space, MemorySpec()), SubnetRandom(0))
    for _ in fit.run(train_batches(tokens, spec.batch, spec.seq, generator), step):
        pass
    return fit.model


def distances(space: SearchSpace, tokens: Tensor, steps: int, count: int) -> tuple[dict[str, list[Matrices]], float]:
    """For each way to similarity, each batch's distances by decision; and the seconds that one batch took by one cosine."""
    net, leaf = trained(space, tokens, steps), SplitTree().space_of(space, "0")
    decisions = options_in_use(leaf, draw_assignments(leaf, random.Random(0)))
    batches = list(islice(train_batches(tokens, 4, 128, torch.Generator().manual_seed(1)), count))
    found: dict[str, list[Matrices]] = {}
    seconds = 0.0
    for similarity in DISTANCES:
        start = time.process_time()
        found[similarity] = [
            conflicts(in_process({"0": net}), leaf, decisions, [rows], random.Random(n), similarity)[0]
            for n, rows in enumerate(batches)
        ]
        seconds = seconds or (time.process_time() - start) / count
    return found, seconds


def best_split(matrices: Sequence[Matrices], criterion: str) -> tuple[str, tuple[int, ...]]:
    """The decision and division that the mean of some batches' distances lead to."""
    means = {name: torch.stack([one[name] for one in matrices]).mean(0) for name in matrices[0]}
    found = {name: best_partition(matrix, criterion) for name, matrix in means.items()}
    best = max(found, key=lambda name: found[name][1])
    return best, found[best][0]


def main(given: list[str] | None = None) -> int:
    """Print the table: a row for each size of set, as many sets as there are batches for."""
    args = options(__doc__, given, steps=1500, batches=64)
    space, rows = SearchSpace.load(SPACE), []
    tokens = load_corpus(DataSpec(max_bytes=4_000_000, tokenizer="bytes256"), space.shape.vocab_size, Path()).train
    found, seconds = distances(space, tokens, args.steps, args.batches)
    for size in (size for size in SETS if args.batches // size > 1):
        count = args.batches // size
        row = {"batches": f"{size}", "sets": f"{count}", "seconds": f"{seconds * size:.1f}"}
        for (similarity, mine), criterion in itertools.product(found.items(), CRITERIA):
            splits = [best_split(mine[n * size : (n + 1) * size], criterion) for n in range(count)]
            pairs = list(itertools.combinations(splits, 2))
            same = [sum(one[: n + 1] == other[: n + 1] for one, other in pairs) / len(pairs) for n in range(2)]
            row[f"{similarity}, {criterion}"] = f"{same[0]:.0%} ({same[1]:.0%})"
        rows.append(row)
    show("Splits by gradients", __doc__, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
