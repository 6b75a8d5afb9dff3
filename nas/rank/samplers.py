"""Which sampler finds a front with fewest evaluations, on a truth as a lookup.

Owns the comparison and its page. The samplers are those of `nas search`, through the same study; each evaluation is told with the
noise that one training has, and what was found is judged without it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..pareto import Point, hypervolume
from ..report.tables import Row, markdown_table
from ..search.context import published
from ..search.study import Study
from ..search.trial import SAMPLERS, SearchSpec
from ..sharing.memory import measure
from ..sharing.sharing_config import SharingConfig
from .agreement import Agreement, corner
from .known import Known, reliability
from .spec import TruthPlan
from .surrogate import Surrogate
from .tying import PRICES, Tied

BATCH = 24
COUNTS = (5, 24, 48, 96, 192, 384)
"""Evaluations at which a sampler is judged."""
STARTS = {"the zoo": True, "nothing": False}
"""What is asked first: the published schemes that the space can express, or nothing."""
KINDS = tuple(itertools.product(SAMPLERS, STARTS))


Section = tuple["Lookup", Agreement, Sequence["Found"], Sequence[Tied]]
"""A text's lookup, how well it orders what it was not fitted to, what samplers found on it, and what tying while training did."""


@dataclass(frozen=True)
class Found:
    """The hypervolumes that one sampler's front has after each of `COUNTS`, with one seed."""

    sampler: str
    start: str
    seed: int
    volumes: tuple[float, ...]


@dataclass(frozen=True)
class Lookup:
    """What a search on the truth is told, and what it is judged by, of any config of the space; looked up once each."""

    surrogate: Surrogate
    noise: float
    corner: Point
    seen: dict[SharingConfig, tuple[int, float]]

    @staticmethod
    def of(plan: TruthPlan, known: Known) -> Lookup:
        """The lookup of one text's truth."""
        configs = {config.hash: config for config in plan.configs}
        surrogate = Surrogate(plan.space, plan.file.memory, known, tuple(configs[h] for h in known.hashes))
        return Lookup(surrogate, reliability(known).noise, corner(known.memory, known.truth), {})

    def __call__(self, config: SharingConfig) -> tuple[int, float]:
        """Memory in bytes, and loss in nats a token."""
        if config not in self.seen:
            space, spec = self.surrogate.space, self.surrogate.memory
            self.seen[config] = measure(space.shape, config, spec).memory_bytes, self.surrogate.loss(config)
        return self.seen[config]

    def noisy(self, config: SharingConfig, seed: int) -> tuple[float, float]:
        """The same with the noise of one training, which is one of a config and seed."""
        memory, loss = self(config)
        rng = np.random.default_rng([seed, int(config.hash, 16)])
        return float(memory), loss + float(rng.normal()) * self.noise

    def volume(self, configs: Sequence[SharingConfig]) -> float:
        """The hypervolume of some configs' front, by their true perplexity."""
        points = [(float(memory), float(np.exp(loss))) for memory, loss in map(self, configs)]
        return hypervolume(points, self.corner)


def search(lookup: Lookup, sampler: str, start: str, seed: int, counts: Sequence[int] = COUNTS) -> Found:
    """One sampler's search, to the last of `counts`."""
    space = lookup.surrogate.space
    study = Study(space, SearchSpec(evaluations=counts[-1], sampler=sampler, batch=BATCH), seed)
    first = list(published(space)) if STARTS[start] else []
    study.enqueue([space.assignment(config) or {} for config in first])
    asked: list[SharingConfig] = []
    while len(asked) < counts[-1]:
        batch = study.ask(min(max(BATCH, 0 if asked else len(first)), counts[-1] - len(asked)))
        for one in batch:
            study.tell(one.number, lookup.noisy(one.config, seed))
            asked.append(one.config)
    return Found(sampler, start, seed, tuple(lookup.volume(asked[:count]) for count in counts))


def compare_samplers(
    lookup: Lookup, seeds: int, counts: Sequence[int] = COUNTS, tell: Callable[[int], None] = lambda done: None
) -> Iterator[Found]:
    """Every sampler from every start with every seed."""
    for done, (seed, (sampler, start)) in enumerate(itertools.product(range(seeds), KINDS), 1):
        yield search(lookup, sampler, start, seed, counts)
        tell(done)


def sampler_rows(lookup: Lookup, found: Sequence[Found], tied: Sequence[Tied] = (), counts: Sequence[int] = COUNTS) -> list[Row]:
    """One row a sampler and start: the hypervolume after so many evaluations, as a part of the best that any found; and one for
    tying while training, if it was tried, whose every run is a training too."""
    best = max(one.volumes[-1] for one in found)
    kinds: Mapping[tuple[str, str], list[Found]] = {
        key: [one for one in found if (one.sampler, one.start) == key]
        for key in dict.fromkeys((one.sampler, one.start) for one in found)
    }
    return [
        {"sampler": sampler, "begins with": start}
        | {f"{count} evaluations": _cell([one.volumes[n] / best for one in mine]) for n, count in enumerate(counts)}
        for (sampler, start), mine in kinds.items()
    ] + _tied_rows(lookup, tied, best, counts)


def _tied_rows(lookup: Lookup, tied: Sequence[Tied], best: float, counts: Sequence[int]) -> list[Row]:
    """The runs of one seed, one at each price, are the first evaluations."""
    if not tied:
        return []
    by_seed = [[one.config for one in tied if one.seed == seed] for seed in dict.fromkeys(one.seed for one in tied)]
    cells = dict.fromkeys((f"{count} evaluations" for count in counts), "")
    cells[f"{counts[0]} evaluations"] = _cell([lookup.volume(configs) / best for configs in by_seed])
    return [{"sampler": "Dynamic Layer Tying", "begins with": "all tied"} | cells]


def _cell(parts: Sequence[float]) -> str:
    return f"{np.mean(parts):.1%} ± {np.std(parts, ddof=1):.1%}" if len(parts) > 1 else f"{parts[0]:.1%}"


def samplers_page(command: str, sections: Mapping[str, Section]) -> str:
    """The page in markdown."""
    lines = ["# Samplers", "", f"Made by `{command}`.", "", EXPLAINED]
    for text, (lookup, held_out, found, tied) in sections.items():
        seeds = len({one.seed for one in found})
        lines += [
            *("", f"## {text}", ""),
            f"- {len(lookup.surrogate.configs)} configs are known; predicted from the others, they are ordered with τ "
            f"{held_out.tau:.2f}, within quartiles of memory {held_out.tau_within:.2f}.",
            f"- {seeds} seeds; one training's noise is {lookup.noise:.4f} nats.",
            *_tied_lines(lookup, tied),
            *("", markdown_table(sampler_rows(lookup, found, tied)).rstrip()),
        ]
    return "\n".join(lines) + "\n"


def _tied_lines(lookup: Lookup, tied: Sequence[Tied]) -> list[str]:
    if not tied:
        return []
    worse = [one.loss - lookup(one.config)[1] for one in tied]
    kinds, seeds = len({one.config for one in tied}), len({one.seed for one in tied})
    return [
        f"- Dynamic Layer Tying: {len(PRICES)} prices of memory, {seeds} seeds; {kinds} different configs in {len(tied)} runs. "
        f"The models that were tied on the way are {np.mean(worse):+.3f} nats from their configs trained alone (deviation "
        f"{np.std(worse):.3f}); the table counts the configs."
    ]


EXPLAINED = """Each sampler of `nas search` proposes configs of the truth's space, 24 at a time, and is told memory and loss. The
loss is looked up: a predictor fitted to the truth's trainings (as NAS-Bench-301's, 2008.09777), with the noise of one training
beside it. Shown is the hypervolume, by memory and looked-up perplexity without the noise, of the front of all that was asked, as
a part of the best that any search here found; ± is the standard deviation over seeds. What the predictor does not know of a
config, no sampler can show that it finds."""
