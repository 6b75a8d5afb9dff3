"""How fast every published scheme trains and decodes, beside the dense model and transformers' Llama of the same shape.

- Sharing weights hardly changes the speed of training: most presets train at 0.98 to 1.2 times the dense model's speed.
  Those that do less work (merged or dropped layers, narrow FFNs) train at up to 1.46 times.
- Decoding is faster where whole layers share weights, 1.4 to 1.8 times, since fewer bytes are read at this size.
- Presets in which a layer reads a later layer's KV cache (lckv, kv-sandwich, kv-lasagna and kv-pizza of the middle or top)
  train at 0.3 to 0.6 of the speed, because their training needs a fixed-point pass.
- Slow for what they save: one-wide-ffn (3.8 times the work), dictformer-3 (0.43 of the decoding speed), masa-2 (0.88).
- In training all others are faster than transformers' Llama of the same shape, 1.3 to 2.2 times; in decoding 0.9 to 1.9
  times.

    python -m tests.benchmarks.bench_presets [--repeats 5] [--only cla albert …]

One thread, timed by the processor's clock, which other processes hardly touch. Training is forward, backward and AdamW's step
on 4 rows of 128 tokens, in bfloat16 autocast; decoding is 32 tokens one after the other behind 192, in float32, with the cache
that a scheme keeps, whose bytes at the end are shown. A scheme, dense and Llama take turns, so that all three meet the same
noise: `vs` is the median ratio of their speeds over the turns, ± half of its interquartile range; dense against itself shows what
noise is left. Work is floating-point operations of decoding a token, against dense. A scheme of less work that is slower than
dense by more than its ± is named at the end.
"""

import copy
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nas.model.attention import KVCache
from nas.model.decoder import Decoder, init_weights
from nas.presets import PRESETS
from nas.sharing.memory import MemorySpec, measure
from nas.sharing.shape import ModelShape
from nas.sharing.sharing_config import SharingConfig
from nas.training.loop import TrainSpec, make_optimizer
from reports.page import options, show
from tests.benchmarks import Ratio, llama

SHAPE = ModelShape(
    vocab_size=1024,
    hidden_size=256,
    num_hidden_layers=6,
    num_attention_heads=8,
    intermediate_size=704,
    max_position_embeddings=256,
)
ROWS, SEQ, PROMPT, DECODED = 4, 128, 192, 32
LESS_WORK = 0.98
"""A scheme of up to this part of dense's operations has less work, and no excuse."""


def logits(model: nn.Module, tokens: Tensor, cache: Any = None) -> Tensor:
    """`(batch, seq, vocab)` of either kind of model."""
    if isinstance(model, Decoder):
        return model(tokens, cache=cache)
    return model(tokens, past_key_values=cache, use_cache=cache is not None).logits


def training(model: nn.Module) -> Callable[[], float]:
    """A function that trains a step and says how many seconds it took."""
    rows = torch.randint(SHAPE.vocab_size, (ROWS, SEQ + 1), generator=torch.Generator().manual_seed(0))
    optimizer = make_optimizer(model, TrainSpec(steps=1))

    def step() -> float:
        start = time.process_time()
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = logits(model, rows[:, :-1])
        F.cross_entropy(out.float().flatten(0, 1), rows[:, 1:].flatten()).backward()
        optimizer.step()
        return time.process_time() - start

    return step


def decoding(model: nn.Module) -> Callable[[], tuple[float, int]]:
    """A function that decodes behind a prompt: the seconds it took, and the bytes of the cache at the end."""
    from transformers import DynamicCache

    tokens = torch.randint(SHAPE.vocab_size, (1, PROMPT + DECODED), generator=torch.Generator().manual_seed(0))
    filled: Any = KVCache.of(model.plan) if isinstance(model, Decoder) else DynamicCache(config=model.config)
    with torch.no_grad():
        logits(model.eval(), tokens[:, :PROMPT], filled)

    @torch.no_grad()
    def decode() -> tuple[float, int]:
        cache = copy.deepcopy(filled)
        start = time.process_time()
        for n in range(PROMPT, PROMPT + DECODED):
            logits(model, tokens[:, n : n + 1], cache)
        return time.process_time() - start, cache.bytes if isinstance(cache, KVCache) else 0

    return decode


def speed(contestants: Sequence[Callable[[], float]], repeats: int, tokens: int) -> tuple[str, Ratio, Ratio]:
    """Tokens a second of a scheme, and its speed against dense and against Llama, in turns after one that does not count."""
    turns = [[run() for run in contestants] for _ in range(repeats + 1)][1:]
    mine, dense, other = (list(column) for column in zip(*turns, strict=True))
    return f"{tokens / statistics.median(mine):,.0f}", Ratio.of(mine, dense), Ratio.of(mine, other)


def configs(only: list[str]) -> dict[SharingConfig, str]:
    """Every scheme at its first size, and the names that each config has."""
    named: dict[SharingConfig, list[str]] = {}
    for row in PRESETS.values():
        if row.sizes(SHAPE) and row.name in (*only, "dense"):
            size = row.sizes(SHAPE)[0]
            named.setdefault(row.build(SHAPE, size), []).append(row.full_name(size))
    return {config: " = ".join(names) for config, names in named.items()}


def build(config: SharingConfig) -> Decoder:
    return init_weights(Decoder(SHAPE, config.resolve(SHAPE)), torch.Generator().manual_seed(0))


def main(given: list[str] | None = None) -> int:
    """Print the table, a row for each config."""
    args, dense = options(__doc__, given, repeats=5, only=list(PRESETS)), SharingConfig.dense(SHAPE)
    named, rows, slow = configs(args.only), [], []
    rivals = [build(dense), llama(SHAPE)]
    trainers, decoders = [training(model) for model in rivals], [decoding(model) for model in rivals]
    work = {config: measure(SHAPE, config, MemorySpec(context=PROMPT + DECODED)).flops_per_token for config in (dense, *named)}
    for config, names in named.items():
        model, part = build(config), work[config] / work[dense]
        train_rate, *trained = speed([training(model), *trainers], args.repeats, ROWS * SEQ)
        decode = decoding(model)
        runs = [lambda run=run: run()[0] for run in (decode, *decoders)]  # type: ignore[misc]
        decode_rate, *decoded = speed(runs, args.repeats, DECODED)
        row = {"name": names, "work": f"{part:.2f}", "train tokens/s": train_rate}
        row |= {"train vs dense": f"{trained[0]}", "train vs Llama": f"{trained[1]}", "decode tokens/s": decode_rate}
        row |= {"decode vs dense": f"{decoded[0]}", "decode vs Llama": f"{decoded[1]}", "cache KiB": f"{decode()[1] / 1024:.0f}"}
        rows.append(row)
        pairs = {"training": trained[0], "decoding": decoded[0]}.items()
        behind = [what for what, ratio in pairs if part < LESS_WORK and ratio.times + ratio.noise < 1]
        slow += [f"{names} ({' and '.join(behind)})"] * bool(behind)
    shape = f"{SHAPE.num_hidden_layers} layers of width {SHAPE.hidden_size}, {SHAPE.num_attention_heads} heads"
    shape += f", FFN width {SHAPE.intermediate_size}, vocabulary {SHAPE.vocab_size:,}; torch {torch.__version__}."
    said = f"Slower than dense with less work: {', '.join(slow) or 'none'}."
    show("Speed of the published schemes", __doc__, shape, rows, said)
    return 0


if __name__ == "__main__":
    sys.exit(main())
