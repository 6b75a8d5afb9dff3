"""A tabular benchmark as arrays, and how reliable it is.

Owns `BenchmarkTable` and `Reliability`: the halves of the seeds against each other, and the order at each point of training
against the order at the end.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np

from nas.errors import UserError

from ..grid import Numbers, noise_of_seeds, read_table
from .agreement import agreement, tau, tau_within
from .training import TABLE, BenchmarkRow, GroundTruth

LEAST = 12
"""Configs that must be known before anything is scored: three in each quartile of memory."""


@dataclass(frozen=True, eq=False)
class BenchmarkTable:
    """One text's losses `(configs, seeds, points)` in nats a token, of the configs that two seeds were trained on.

    `memory`, `weights` (bytes) and `flops` (a token) are `(configs,)`; `tokens` are those trained on by each point, ascending.
    """

    text: str
    hashes: tuple[str, ...]
    memory: Numbers
    weights: Numbers
    flops: Numbers
    tokens: tuple[int, ...]
    losses: Numbers

    @staticmethod
    def of(rows: Sequence[BenchmarkRow], text: str) -> BenchmarkTable:
        """A text's table: of the configs that have two seeds (or one, if none has more) those seeds that all of these have. A
        training that is under way counts when it is through."""
        mine = {(row.hash, row.seed, row.tokens): row for row in rows if row.text == text}
        tokens = sorted({count for _, _, count in mine})
        whole: dict[str, set[int]] = {}
        for h, seed in dict.fromkeys((h, seed) for h, seed, _ in mine):
            if all((h, seed, count) in mine for count in tokens):
                whole.setdefault(h, set()).add(seed)
        enough = min(2, max(map(len, whole.values()), default=0))
        hashes = [h for h, found in whole.items() if len(found) >= enough]
        seeds = sorted(set.intersection(*(whole[h] for h in hashes))) if hashes else []
        losses = [[[mine[h, seed, count].loss_nats_per_token for count in tokens] for seed in seeds] for h in hashes]

        def column(name: str) -> Numbers:
            return np.array([getattr(mine[h, seeds[0], tokens[0]], name) for h in hashes], dtype=np.float64)

        return BenchmarkTable(
            text=text,
            hashes=tuple(hashes),
            memory=column("memory_bytes"),
            weights=column("weight_bytes"),
            flops=column("flops_per_token"),
            tokens=tuple(tokens),
            losses=np.array(losses, dtype=np.float64).reshape(len(hashes), len(seeds), len(tokens)),
        )

    @property
    def final(self) -> Numbers:
        """`(configs,)`: the mean over seeds at the last point."""
        return self.losses[:, :, -1].mean(1)

    def without(self, seed: int) -> Numbers:
        """`final` of all seeds but one, by its place: what an estimate made with that seed is scored on."""
        return np.delete(self.losses[:, :, -1], seed, axis=1).mean(1)

    def part(self, point: int) -> str:
        """How much of the tokens were trained on at a point, in words."""
        return f"{self.tokens[point] / self.tokens[-1]:.0%}"

    def halves(self) -> Iterator[tuple[list[int], list[int]]]:
        """Every way to divide the seeds in two halves, each once."""
        seeds = range(self.losses.shape[1])
        for one in combinations(seeds, len(seeds) // 2):
            other = [seed for seed in seeds if seed not in one]
            if 0 in one or len(one) != len(other):
                yield list(one), other


def read_tables(folder: Path, truth: GroundTruth) -> list[BenchmarkTable]:
    """The table of each of a benchmark's texts. Raises UserError where too little of one is known."""
    rows = read_table(folder / TABLE, BenchmarkRow)
    tables = [BenchmarkTable.of(rows, text) for text in truth.texts]
    for table in tables:
        if len(table.hashes) < LEAST:
            message = f"{len(table.hashes)} configs of {table.text} are known with every seed, and scores need {LEAST}"
            raise UserError(message, where=str(folder / TABLE), hint="go on with `python -m reports.ground_truth`")
    return tables


@dataclass(frozen=True)
class Reliability:
    """How two halves of the seeds agree on the last point: τ of each way to divide them, overall and within quartiles of memory.

    `settled` are, for each point before the last, τ of one half there against the other half at the end, and within quartiles.
    `seed_to_rest` is each seed alone against the mean of the others, the ceiling of an estimate that costs one training of each
    config. `noise` is the deviation of one training's loss over seeds, in nats (`noise_of_seeds`).
    """

    halves: tuple[float, ...]
    halves_within: tuple[float, ...]
    settled: dict[int, tuple[float, float]]
    seed_to_rest: tuple[float, ...]
    seed_to_rest_within: tuple[float, ...]
    noise: float


def reliability(table: BenchmarkTable) -> Reliability:
    """How reliable a table is."""
    losses, memory = table.losses, table.memory
    divided = list(table.halves())

    def across(point: int) -> list[tuple[float, float]]:
        pairs = [pair for one, other in divided for pair in ((one, other), (other, one))]
        found = [(losses[:, one, point].mean(1), losses[:, other, -1].mean(1)) for one, other in pairs]
        return [(tau(a, b), tau_within(memory, a, b)) for a, b in found]

    last = across(-1)[::2]
    singles = [agreement(memory, table.without(s), losses[:, s, -1]) for s in range(losses.shape[1])]
    return Reliability(
        halves=tuple(whole for whole, _ in last),
        halves_within=tuple(within for _, within in last),
        settled={table.tokens[p]: tuple(np.mean(across(p), 0).tolist()) for p in range(len(table.tokens) - 1)},
        seed_to_rest=tuple(one.tau for one in singles),
        seed_to_rest_within=tuple(one.tau_within for one in singles),
        noise=noise_of_seeds(losses[:, :, -1]),
    )
