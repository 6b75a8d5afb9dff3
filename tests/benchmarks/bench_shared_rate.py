"""At which rate weights that several layers use should learn.

    python -m tests.benchmarks.bench_shared_rate [--json] [--text FILE] [--scheme NAME] [--steps 250] [--seeds 3]

Published schemes of the ground truth's space (`search_spaces/ground_truth.yaml`: six layers of width 64) on the default text,
each trained alone for so many steps of 8 × 128 tokens at a constant rate of 0.004, at which weights learn that one layer uses; a
column says at which part of it those learn that n layers use. Shown is the loss on 128 held-out windows of 128 tokens, in nats a
token: the mean over seeds, ± their standard deviation.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.optim import AdamW

from nas.data import Corpus, DataSpec, eval_windows, load_corpus, train_batches
from nas.evaluate import measure_losses
from nas.model import Decoder, init_weights
from nas.plan import SLOTS, Plan
from nas.search.context import published
from nas.shape import ModelShape
from nas.space import SearchSpace
from nas.training import Fit, TrainSpec, plain_backward

SPACE = Path(__file__).parents[2] / "search_spaces" / "ground_truth.yaml"
SCHEMES = {"recurrent-stacking": "a layer, used by 6", "sequence-2": "3 layers, each used by 2", "mobillama": "an FFN, used by 6"}
"""Published schemes, and what of them is shared."""
RATES = {
    "full": (0.0, 0.0),
    "attention /√n": (0.5, 0.0),
    "attention /n": (1.0, 0.0),
    "FFN /√n": (0.0, 0.5),
    "both /√n": (0.5, 0.5),
}
"""By which power of n the rate of an attention's weights, and of an FFN's, is divided."""


@dataclass(frozen=True)
class Row:
    """A scheme's loss with each seed, by the rates."""

    scheme: str
    losses: dict[str, list[float]]


def trained(shape: ModelShape, corpus: Corpus, plan: Plan, powers: tuple[float, float], spec: TrainSpec, seed: int) -> float:
    """The loss of one training."""
    generator = torch.Generator().manual_seed(seed)
    model = init_weights(Decoder(shape, plan), generator)
    fit = Fit(model, spec, generator)
    uses = Counter(f"layers.{at}.{slot}.weight" for p in plan.layers for slot, at in zip(SLOTS, p.owners, strict=True))
    fit.optimizer = AdamW(
        [
            {"params": [param], "weight_decay": spec.weight_decay * (param.ndim > 1), "share": max(uses[name], 1) ** -power}
            for name, param in model.named_parameters()
            for power in [powers["self_attn" not in name]]
        ],
        betas=(0.9, 0.95),
        fused=True,
    )
    for _ in fit.run(train_batches(corpus.train, spec.batch, spec.seq, generator), plain_backward(model, spec)):
        pass
    return measure_losses(model.eval(), eval_windows(corpus.eval, spec.seq, 128), autocast=False).loss_nats_per_token


def rows(text: str, schemes: Sequence[str], steps: int, seeds: int) -> Iterator[Row]:
    """One row a scheme."""
    space = SearchSpace.load(SPACE)
    corpus = load_corpus(DataSpec(text, max_bytes=4_000_000), space.shape.vocab_size, Path())
    plans = {name: config.resolve(space.shape) for config, name in published(space).items()}
    spec = TrainSpec(steps=steps, batch=8, learning_rate=0.004, decay=0, autocast=False)
    for name in schemes:
        plan = plans[name]
        yield Row(name, {r: [trained(space.shape, corpus, plan, p, spec, n) for n in range(seeds)] for r, p in RATES.items()})


def markdown(table: list[Row]) -> str:
    """The rows as a report's table."""
    head = ("scheme", "what is shared", *RATES)
    lines = ["# The rate of shared weights", "", *(__doc__ or "").splitlines()[2:], ""]
    lines += [f"| {' | '.join(head)} |", "| --- | --- |" + " ---: |" * len(RATES)]
    for row in table:
        cells = map(_cell, row.losses.values())
        lines.append(f"| {' | '.join((row.scheme, SCHEMES[row.scheme], *cells))} |")
    return "\n".join(lines)


def _cell(losses: list[float]) -> str:
    spread = f" ± {statistics.stdev(losses):.3f}" if len(losses) > 1 else ""
    return f"{statistics.fmean(losses):.3f}{spread}"


def main(argv: list[str] | None = None) -> int:
    """Print the table, as markdown or JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="machine-readable rows")
    parser.add_argument("--text", default="python", help="a text file, in place of the default text")
    parser.add_argument("--scheme", action="append", choices=list(SCHEMES), help="this one alone; may be given again")
    parser.add_argument("--steps", type=int, default=250, help="of each training")
    parser.add_argument("--seeds", type=int, default=3, help="of each scheme at each exponent")
    given: Any = parser.parse_args(argv)
    torch.set_num_threads(1)
    table = list(rows(given.text, given.scheme or list(SCHEMES), given.steps, given.seeds))
    sys.stdout.write((json.dumps([asdict(row) for row in table], indent=1) if given.json else markdown(table)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
