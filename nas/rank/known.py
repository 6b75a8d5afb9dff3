"""A truth as arrays, and how far it can be trusted.

Owns `Known` and its reliability: two independent halves of the seeds against each other, and the order at each point of training
against the last.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from ..search.predictor import Numbers
from ..training.evaluation import noise_of_seeds
from .agreement import agreement, tau, tau_within
from .truth import TruthRow


@dataclass(frozen=True, eq=False)
class Known:
    """One text's truth: `losses` `(configs, seeds, points)` in nats a token, of the configs that two seeds were trained on.

    `memory` and `flops` are `(configs,)`; `tokens` those trained on by each point, ascending.
    """

    text: str
    hashes: tuple[str, ...]
    memory: Numbers
    weights: Numbers
    flops: Numbers
    tokens: tuple[int, ...]
    losses: Numbers

    @staticmethod
    def of(rows: Sequence[TruthRow], text: str) -> Known:
        """The truth in some rows: of the configs that have two seeds (or one, if none has more) those seeds that all of these
        have, so that one which is under way counts when it is through."""
        mine = [row for row in rows if row.text == text]
        tokens = sorted({row.tokens for row in mine})
        table = {(row.hash, row.seed, row.tokens): row for row in mine}
        whole: dict[str, set[int]] = {}
        for h, seed in dict.fromkeys((row.hash, row.seed) for row in mine):
            if all((h, seed, count) in table for count in tokens):
                whole.setdefault(h, set()).add(seed)
        enough = min(2, max(map(len, whole.values()), default=0))
        hashes = [h for h, found in whole.items() if len(found) >= enough]
        seeds = sorted(set.intersection(*(whole[h] for h in hashes))) if hashes else []
        first = [table[h, seeds[0], tokens[0]] for h in hashes]
        losses = [[[table[h, seed, count].loss_nats_per_token for count in tokens] for seed in seeds] for h in hashes]

        def column(name: str) -> Numbers:
            return np.array([getattr(row, name) for row in first], dtype=np.float64)

        return Known(
            text=text,
            hashes=tuple(hashes),
            memory=column("memory_bytes"),
            weights=column("weight_bytes"),
            flops=column("flops_per_token"),
            tokens=tuple(tokens),
            losses=np.array(losses, dtype=np.float64).reshape(len(hashes), len(seeds), len(tokens)),
        )

    @property
    def truth(self) -> Numbers:
        """`(configs,)`: the mean over seeds at the last point."""
        return self.losses[:, :, -1].mean(1)

    def without(self, seed: int) -> Numbers:
        """The truth of all seeds but one, by its place: what an estimate made with that seed is scored on."""
        return np.delete(self.losses[:, :, -1], seed, axis=1).mean(1)

    def halves(self) -> Iterator[tuple[list[int], list[int]]]:
        """Every way to cut the seeds in two halves, each once."""
        seeds = range(self.losses.shape[1])
        for one in combinations(seeds, len(seeds) // 2):
            other = [seed for seed in seeds if seed not in one]
            if 0 in one or len(one) != len(other):
                yield list(one), other


@dataclass(frozen=True)
class Reliability:
    """How two halves of the seeds agree on the last point: τ of each cut in two, overall and within quartiles of memory.

    `settled` are, for each point before the last, τ of one half there against the other half at the end, and within quartiles.
    `seed_to_rest` is each seed alone against the mean of the others, the ceiling of an estimate that costs one training of each
    config. `noise` is by how much one training's loss deviates over seeds, in nats (`nas.evaluate.noise_of_seeds`).
    """

    halves: tuple[float, ...]
    halves_within: tuple[float, ...]
    settled: dict[int, tuple[float, float]]
    seed_to_rest: tuple[float, ...]
    seed_to_rest_within: tuple[float, ...]
    noise: float


def reliability(known: Known) -> Reliability:
    """How far a truth can be trusted."""
    losses, memory = known.losses, known.memory
    cuts = list(known.halves())

    def across(point: int) -> list[tuple[float, float]]:
        pairs = [pair for one, other in cuts for pair in ((one, other), (other, one))]
        found = [(losses[:, one, point].mean(1), losses[:, other, -1].mean(1)) for one, other in pairs]
        return [(tau(a, b), tau_within(memory, a, b)) for a, b in found]

    last = across(-1)[::2]
    singles = [agreement(memory, known.without(s), losses[:, s, -1]) for s in range(losses.shape[1])]
    return Reliability(
        halves=tuple(whole for whole, _ in last),
        halves_within=tuple(within for _, within in last),
        settled={known.tokens[p]: tuple(np.mean(across(p), 0).tolist()) for p in range(len(known.tokens) - 1)},
        seed_to_rest=tuple(one.tau for one in singles),
        seed_to_rest_within=tuple(one.tau_within for one in singles),
        noise=noise_of_seeds(losses[:, :, -1]),
    )
