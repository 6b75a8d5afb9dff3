"""How sure gradient matching is of its split: how often two disjoint sets of batches lead to the same one.

- With the default (one cosine over all parameters, variance reduction) the decision to split on is stable from four batches
  on: disjoint sets of batches agree in 58% of pairs with one batch, 73% with two, 100% with four.
- The mean of cosines by tensor needs eight batches: 29%, 44%, 66%, 100%.
- The sum of disagreements agrees in 94% with one batch over all parameters, and by tensor in 75% with eight.
- Eight batches take 3.4 seconds on one core here.
- A stable split is not a better one: what splits are worth to a ranking is in [ranking](ranking/README.md).

    python -m tests.benchmarks.bench_splits [--json] [--steps 1500] [--batches 64]

A supernet of the ground truth's space (`search_spaces/ground_truth.yaml`) is trained uniformly on the default text, one subnet of
8 × 128 tokens a step; then the options of every decision are compared on each of many batches of 4 × 128 tokens, in one random
setting each. Sets of n batches are disjoint. Shown is the part of all pairs of sets that agree on the decision to split, and in
brackets on the partition of its options too, for each similarity of gradients (global, per tensor) and each criterion
(`nas.splitting`). Seconds are those of one set of n batches by one cosine.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nas.data import DataSpec, load_corpus, train_batches
from nas.model.supernet import Supernet
from nas.search.jobs import new_supernet
from nas.sharing.memory import MemorySpec
from nas.sharing.space import SearchSpace
from nas.splitting import SplitTree, conflicts, in_process
from nas.splitting.gradients import CRITERIA, DISTANCES, best_partition
from nas.splitting.methods import draw_assignments, options_in_use
from nas.training.loop import Trainer, TrainSpec
from nas.training.strategies import STRATEGIES, SubnetRandom, SupernetStep

SPACE = Path(__file__).parents[2] / "search_spaces" / "ground_truth.yaml"
SETS = (1, 2, 4, 8, 16, 32)
Matrices = Mapping[str, Tensor]


@dataclass(frozen=True)
class Row:
    """Of pairs of disjoint sets of `batches`, the parts that agree on the decision, and on the division too."""

    batches: int
    sets: int
    seconds: float
    same_decision: dict[str, float]
    same_split: dict[str, float]


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


def rows(steps: int, count: int) -> Iterator[Row]:
    """One row a size of set, as many sets as there are batches for."""
    space = SearchSpace.load(SPACE)
    tokens = load_corpus(DataSpec(max_bytes=4_000_000), space.shape.vocab_size, Path()).train
    found, seconds = distances(space, tokens, steps, count)
    for size in SETS:
        if count // size < 2:
            continue
        sets = range(count // size)
        decision, whole = {}, {}
        for (similarity, mine), criterion in itertools.product(found.items(), CRITERIA):
            splits = [best_split(mine[n * size : (n + 1) * size], criterion) for n in sets]
            pairs = list(itertools.combinations(splits, 2))
            name = f"{similarity}, {criterion}"
            decision[name] = sum(one[0] == other[0] for one, other in pairs) / len(pairs)
            whole[name] = sum(one == other for one, other in pairs) / len(pairs)
        yield Row(size, len(sets), seconds * size, decision, whole)


def markdown(table: list[Row]) -> str:
    """The rows as a report's table."""
    kinds = list(table[0].same_decision)
    head = ("batches", "sets", "seconds", *kinds)
    lines = ["# Splits by gradients", "", *(__doc__ or "").splitlines()[2:], ""]
    lines += [f"| {' | '.join(head)} |", "|" + " ---: |" * len(head)]
    for row in table:
        cells = [f"{row.same_decision[kind]:.0%} ({row.same_split[kind]:.0%})" for kind in kinds]
        lines.append(f"| {' | '.join((str(row.batches), str(row.sets), f'{row.seconds:.1f}', *cells))} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Print the table, as markdown or JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="machine-readable rows")
    parser.add_argument("--steps", type=int, default=1500, help="of the supernet")
    parser.add_argument("--batches", type=int, default=64, help="on which options are compared")
    given: Any = parser.parse_args(argv)
    table = list(rows(given.steps, given.batches))
    sys.stdout.write((json.dumps([asdict(row) for row in table], indent=1) if given.json else markdown(table)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
