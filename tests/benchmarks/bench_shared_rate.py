"""At which rate a weight that several layers use should learn.

    python -m tests.benchmarks.bench_shared_rate [--json] [--text FILE] [--steps 250] [--seeds 3]

Models of the ground truth's space (`search_spaces/ground_truth.yaml`: six layers of width 64) on the default text, each trained
alone for so many steps of 8 × 128 tokens at a constant rate of 0.004, a weight that n layers use at 0.004 n^-p. Shown is the loss
on 128 held-out windows of 128 tokens, in nats a token, for each p: the mean over seeds, ± their standard deviation. Without
shared weights p changes nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from nas.data import Corpus, DataSpec, eval_windows, load_corpus, train_batches
from nas.evaluate import measure_losses
from nas.model import Decoder, init_weights
from nas.search.context import published
from nas.sharing import SharingConfig
from nas.space import SearchSpace
from nas.training import Fit, TrainSpec, plain_backward

SPACE = Path(__file__).parents[2] / "search_spaces" / "ground_truth.yaml"
SCHEMES = {"recurrent-stacking": 6, "sequence-2": 2, "mobillama": 6, "dense": 1}
"""Published schemes, and how many layers use what they share: whole layers, but for mobillama's FFN."""
EXPONENTS = (0.0, 0.5, 1.0)


@dataclass(frozen=True)
class Row:
    """A scheme's loss with each seed, by the exponent."""

    scheme: str
    layers: int
    losses: dict[float, list[float]]


def trained(corpus: Corpus, config: SharingConfig, spec: TrainSpec, seed: int) -> float:
    """The loss of one training."""
    generator = torch.Generator().manual_seed(seed)
    model = init_weights(Decoder(config.shape, config.resolve(config.shape)), generator)
    fit = Fit(model, spec, generator)
    for _ in fit.run(train_batches(corpus.train, spec.batch, spec.seq, generator), plain_backward(model, spec)):
        pass
    return measure_losses(model.eval(), eval_windows(corpus.eval, spec.seq, 128), autocast=False).loss_nats_per_token


def rows(text: str, steps: int, seeds: int) -> Iterator[Row]:
    """One row a scheme."""
    space = SearchSpace.load(SPACE)
    corpus = load_corpus(DataSpec(text, max_bytes=4_000_000), space.shape.vocab_size, Path())
    configs = {name: config for config, name in published(space).items()}
    spec = TrainSpec(steps=steps, batch=8, learning_rate=0.004, decay=0, autocast=False)
    for scheme, layers in SCHEMES.items():
        exponents = EXPONENTS if layers > 1 else EXPONENTS[:1]
        losses = {p: [trained(corpus, configs[scheme], replace(spec, shared_rate=p), n) for n in range(seeds)] for p in exponents}
        yield Row(scheme, layers, losses)


def markdown(table: list[Row]) -> str:
    """The rows as a report's table."""
    head = ("scheme", "layers that use it", *(f"p = {p:g}" for p in EXPONENTS))
    lines = ["# The rate of shared weights", "", *(__doc__ or "").splitlines()[2:], ""]
    lines += [f"| {' | '.join(head)} |", "| --- |" + " ---: |" * (len(head) - 1)]
    for row in table:
        cells = [_cell(row.losses.get(p, [])) for p in EXPONENTS]
        lines.append(f"| {' | '.join((row.scheme, str(row.layers), *cells))} |")
    return "\n".join(lines)


def _cell(losses: list[float]) -> str:
    spread = f" ± {statistics.stdev(losses):.3f}" if len(losses) > 1 else ""
    return f"{statistics.fmean(losses):.3f}{spread}" if losses else ""


def main(argv: list[str] | None = None) -> int:
    """Print the table, as markdown or JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="machine-readable rows")
    parser.add_argument("--text", default="python", help="a text file, in place of the default text")
    parser.add_argument("--steps", type=int, default=250, help="of each training")
    parser.add_argument("--seeds", type=int, default=3, help="of each scheme at each exponent")
    given: Any = parser.parse_args(argv)
    torch.set_num_threads(1)
    table = list(rows(given.text, given.steps, given.seeds))
    sys.stdout.write((json.dumps([asdict(row) for row in table], indent=1) if given.json else markdown(table)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
