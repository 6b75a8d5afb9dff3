"""Conversions of one trained dense model: perplexity before, after, and after a short fine-tuning.

- Converting a trained dense model costs little where little is shared, and 60 steps of fine-tuning recover most of the
  rest: dense goes from perplexity 4.03 to 4.01, kvsharer 1 from 4.66 to 4.24, one dropped layer from 4.49 to 4.17, basis
  2x32 from 5.39 to 4.27.
- KV heads that are grouped by similarity and aligned (dha 2x2: 4.67) are better than the mean of neighbours (gqa 2: 4.79).
- Averaging is the worst initialisation of tied layers (sequence 3: 7.19; lower 5.18, stepwise 4.95); with deltas of rank 8
  the lower layer is the best (4.75).
- Distillation from the dense model instead of the text gains a further 0.11 of perplexity (gqa 2: 4.68; sequence 3: 5.06).
- One seed, six layers of width 64, a short fine-tuning: the order of methods may differ at other sizes.

    python -m reports.conversions [--only METHOD …]      # about ten minutes; reports/conversions.md holds all of it

A dense model of 6 layers of width 64 (4 heads, FFN 176, bytes) is trained for 900 steps of 16 × 128 bytes at 4e-3 on the standard
library's source (its first 4 MB; seed 0), and converted by every method of `nas convert` with 60 fine-tuning steps at 1e-3
(122,880 tokens; headwise-post: 100 steps of aligning before). Perplexity is per byte over 256 windows of 128 bytes that no
model was trained on, ± its standard error over them; the windows are the same for all rows. One seed. Bytes in bfloat16, a
cache of 1,024 tokens.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from nas.data import DataSpec, load_corpus, train_batches
from nas.data.tokenizer import bytes_json
from nas.export import ModelCard, export
from nas.model.decoder import Decoder, init_weights
from nas.search.convert import ConvertSettings, convert_export
from nas.sharing.shape import ModelShape
from nas.sharing.sharing_config import SharingConfig
from nas.training.loop import Trainer, TrainSpec, plain_backward
from reports.page import options, show

SHAPE = ModelShape(vocab_size=257, hidden_size=64, num_hidden_layers=6, num_attention_heads=4, intermediate_size=176)
TRAIN = TrainSpec(steps=900, batch=16, seq=128, learning_rate=4e-3)
TIES = [{"init": start} for start in ("lower", "stepwise", "average")]
RUNS: list[tuple[str, str, dict[str, Any]]] = [
    ("sequence", "6", {}),  # the control: nothing is shared, and only the fine-tuning is run
    *((name, size, {}) for name, size in (("gqa", "2"), ("gqa", "1"), ("mlkv", "3x2"), ("mlkv", "3x1"), ("mlkv", "2x4"))),
    *((name, size, {}) for name, size in (("dha", "2x2"), ("dha", "1x2"), ("dha", "2x4"), ("headwise-direct", "30"))),
    *((name, size, {}) for name, size in (("headwise-post", "30"), ("kvsharer", "1"), ("kvsharer", "3"), ("basis", "2x32"))),
    *((name, size, {}) for name, size in (("basis", "3x16"), ("drop", "1"), ("drop", "2"), ("foldgpt", "1"))),
    *((name, size, {}) for name, size in (("merge-layers", "1"), ("merge-layers", "2"))),
    *((name, size, more) for name, size in (("sequence", "3"), ("cycle", "3"), ("relaxed-recursive", "3x8")) for more in TIES),
    ("gqa", "2", {"distill": True}),
    ("sequence", "3", {"init": "lower", "distill": True}),
]


def dense_export(folder: Path) -> Path:
    """A trained dense model, as an export."""
    corpus = load_corpus(DataSpec(max_bytes=4_000_000), SHAPE.vocab_size, Path())
    generator = torch.Generator().manual_seed(0)
    model = init_weights(Decoder(SHAPE, SharingConfig.dense(SHAPE).resolve(SHAPE)), generator)
    batches = train_batches(corpus.train, TRAIN.batch, TRAIN.seq, generator)
    for _ in Trainer(model, TRAIN, generator).run(batches, plain_backward(model, TRAIN)):
        pass
    export(model, SharingConfig.of_plan(SHAPE, model.plan), bytes_json(), folder, ModelCard(title="dense"))
    return folder


def row(dense: Path, to: Path, method: str, size: str, more: dict[str, Any]) -> dict[str, str]:
    """One conversion as a row of the table."""
    settings = ConvertSettings(method=method, size=size, fine_tune=60, windows=256, **more)
    stages = [stage.to_data() for stage in convert_export(dense, "python", to, settings).stages]
    first, last, told = stages[0], stages[-1], " ".join(str(value) if name == "init" else name for name, value in more.items())
    found = {"name": method, "size": size, "settings": told}
    for name, stage in zip(("converted", "fine-tuned"), stages[1:], strict=True):
        found[name] = f"{stage['perplexity']:.3f} ± {stage['perplexity_standard_error']:.2f}"
    for name, key in (("weight bytes", "weight_bytes"), ("cache bytes", "kv_cache_bytes")):
        found |= {name: f"{last[key]:,}", f"{name} vs dense": f"{last[key] / first[key] - 1:+.0%}"}
    return found


def main(given: list[str] | None = None) -> int:
    """Print the table, of some methods if they are named."""
    args = options(__doc__, given, only=[*dict.fromkeys(method for method, *_ in RUNS)])
    with tempfile.TemporaryDirectory() as folder:
        dense = dense_export(Path(folder) / "dense")
        runs = [run for run in RUNS if run[0] in args.only]
        show("Conversions", __doc__, [row(dense, Path(folder) / f"{n}", *run) for n, run in enumerate(runs)])
    return 0


if __name__ == "__main__":
    sys.exit(main())
