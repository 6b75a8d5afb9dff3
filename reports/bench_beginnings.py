"""How far from zero weights should begin, and whether those that several layers use should learn more slowly.

- Matrices initialised with a standard deviation of √(2/5d), the default, end best on both texts: dense at 1.755 ± 0.020
  nats on Python's source and 1.920 ± 0.006 on Shakespeare after 400 steps.
- The usual 0.02 is too small for a width of 64: 2.021 and 2.084, and with one shared layer 2.262 and 2.770.
- 1/√d is a little worse than the default (1.812 and 1.938); the embedding alone at 0.02 loses most of the gain (2.197 and
  2.139).
- A lower learning rate for weights that several layers use helps only where they begin at 0.02; with the default it costs
  0.02 to 0.08 nats.
- The default is therefore used everywhere, and no parameter has a learning rate of its own.

    python -m reports.bench_beginnings [--text FILE] [--schemes NAME …] [--steps 400] [--seeds 2]

Published schemes of the ground truth's space (`search_spaces/ground_truth.yaml`: six layers of width d = 64) on the default text,
each trained alone for so many steps of 8 × 128 tokens at a rate of 0.004 that falls to a tenth. A row says with what deviation
matrices begin (those into the residual stream by a further 1/√12), and at which part of the rate what n layers use learns. Shown
is the loss on 128 held-out windows of 128 tokens, in nats a token: the mean over seeds, ± their standard deviation.
"""

from __future__ import annotations

import statistics
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.optim import AdamW

from nas.data import Corpus, DataSpec, eval_sequences, load_corpus, train_batches
from nas.model.decoder import Decoder, init_weights, initial_deviation
from nas.search.context import presets_in
from nas.sharing.plan import SLOTS, Plan
from nas.sharing.shape import ModelShape
from nas.sharing.space import SearchSpace
from nas.training.evaluation import measure_losses
from nas.training.loop import Trainer, TrainSpec, plain_backward
from reports.page import options, show

SPACE = Path(__file__).parents[1] / "search_spaces" / "ground_truth.yaml"
WIDTH = 64


@dataclass(frozen=True)
class Beginning:
    """Deviations of matrices and of the embedding, and by which power of n the rates of an attention's and an FFN's weights are
    divided, which n layers use."""

    matrices: float = initial_deviation(WIDTH)
    embedding: float = initial_deviation(WIDTH)
    attention: float = 0.0
    ffn: float = 0.0


BEGINNINGS = {
    "0.02": Beginning(0.02, 0.02),
    "0.02; shared attention at the rate /√n": Beginning(0.02, 0.02, 0.5),
    "√(2/5d), as everywhere": Beginning(),
    "√(2/5d), the embedding 0.02": Beginning(embedding=0.02),
    "1/√d": Beginning(WIDTH**-0.5, WIDTH**-0.5),
    "√(2/5d); shared attention at the rate /√n": Beginning(attention=0.5),
    "√(2/5d); shared attention and FFNs at the rate /√n": Beginning(attention=0.5, ffn=0.5),
}


def shares(plan: Plan, beginning: Beginning) -> dict[str, float]:
    """At which part of the rate each shared weight learns."""
    owned = [(slot, at) for p in plan.layers for slot, at in zip(SLOTS, p.owners, strict=True) if at is not None]
    uses = Counter(f"layers.{at}.{slot}.weight" for slot, at in owned)
    power = {True: beginning.attention, False: beginning.ffn}
    return {name: count ** -power["self_attn" in name] for name, count in uses.items()}


@torch.no_grad()
def begun(shape: ModelShape, plan: Plan, beginning: Beginning, generator: torch.Generator) -> Decoder:
    """A new model with these deviations."""
    model = init_weights(Decoder(shape, plan), generator)
    for name, weight in model.named_parameters():
        if weight.ndim > 1:
            weight.mul_((beginning.embedding if name.startswith("embed") else beginning.matrices) / initial_deviation(WIDTH))
    return model


def trained(shape: ModelShape, corpus: Corpus, plan: Plan, beginning: Beginning, spec: TrainSpec, seed: int) -> float:
    """The loss of one training."""
    generator = torch.Generator().manual_seed(seed)
    fit = Trainer(model := begun(shape, plan, beginning, generator), spec, generator)
    part = shares(plan, beginning)
    groups = [
        {"params": [param], "weight_decay": spec.weight_decay * (param.ndim > 1), "part": part.get(name, 1.0)}
        for name, param in model.named_parameters()
    ]
    fit.optimizer = Slowed(groups, betas=(0.9, 0.95), fused=True)
    for _ in fit.run(train_batches(corpus.train, spec.batch, spec.seq, generator), plain_backward(model, spec)):
        pass
    return measure_losses(model.eval(), eval_sequences(corpus.eval, spec.seq, 128), autocast=False).loss_nats_per_token


class Slowed(AdamW):
    """AdamW whose groups learn at their `part` of the rate that each step is given."""

    def step(self, closure: Any = None) -> Any:
        """One step."""
        for group in self.param_groups:
            group["lr"] *= group["part"]
        return super().step(closure)


def cell(losses: list[float]) -> str:
    """The losses of a scheme's trainings."""
    return f"{statistics.fmean(losses):.3f}" + (f" ± {statistics.stdev(losses):.3f}" if len(losses) > 1 else "")


def main(given: list[str] | None = None) -> int:
    """Print the table, a row for each beginning."""
    space = SearchSpace.load(SPACE)
    plans = {name: config.resolve(space.shape) for config, name in presets_in(space).items()}
    args = options(__doc__, given, text="python", schemes=["dense", "recurrent-stacking"], steps=400, seeds=2)
    corpus = load_corpus(DataSpec(args.text, max_bytes=4_000_000, tokenizer="bytes256"), space.shape.vocab_size, Path())
    spec, rows = TrainSpec(steps=args.steps, batch=8, learning_rate=0.004, autocast=False), []
    for name, beginning in BEGINNINGS.items():
        row = {"begins with": name}
        for scheme in args.schemes:
            if beginning.attention and {*shares(plans[scheme], beginning).values()} == {1.0}:
                row[scheme] = "the same"
                continue
            seeds = range(args.seeds)
            row[scheme] = cell([trained(space.shape, corpus, plans[scheme], beginning, spec, seed) for seed in seeds])
        rows.append(row)
    show("How weights begin", __doc__, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
