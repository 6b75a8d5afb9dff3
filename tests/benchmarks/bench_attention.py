"""Attention in training on a CPU: written out against torch's fused kernel.

- On a CPU, plain attention is faster in training than PyTorch's fused kernel for short sequences.
- The fused kernel takes 4.5 to 5.1 times as long at 64 tokens, 2.8 to 3.7 times at 128, 1.2 to 2.8 times at 256.
- At 512 tokens it depends on the head size: 0.88 of the time with heads of 16, 2.8 times with heads of 64.
- So `nas.model.attention` attends plainly up to 256 tokens (`PLAIN_UP_TO`), and calls the fused kernel beyond, which needs
  less memory.
- Measured in bfloat16 on one thread of one machine. Anywhere else, and in evaluation, the fused kernel is always used.

    python -m tests.benchmarks.bench_attention

bfloat16, one thread, 2,048 tokens in a batch, forward and backward, both in turn in one run; the median of seven. It is why
`nas.model.attention` attends plainly up to `PLAIN_UP_TO` tokens.
"""

import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from nas.model.attention import PLAIN_UP_TO, attend_plainly
from reports.page import options, show

SHAPES = [(seq, dim) for seq in (64, 128, 256, 512) for dim in (16, 64)]


def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def seconds(attend: Callable[[Tensor, Tensor, Tensor], Tensor], seq: int, dim: int) -> float:
    heads = 128 // dim
    q, k, v = (torch.randn(2048 // seq, heads, seq, dim, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    start = time.perf_counter()
    attend(q, k, v).sum().backward()
    return time.perf_counter() - start


def ratio(seq: int, dim: int) -> tuple[float, float]:
    """Milliseconds written out, and how many times as long the fused kernel takes."""
    pairs = [(seconds(attend_plainly, seq, dim), seconds(fused, seq, dim)) for _ in range(8)][1:]
    plain, torchs = (statistics.median(times) for times in zip(*pairs, strict=True))
    return 1000 * plain, torchs / plain


def main(given: list[str] | None = None) -> int:
    """Print the table."""
    options(__doc__, given)
    rows = []
    for seq, dim in SHAPES:
        plain, times = ratio(seq, dim)
        row = {"tokens": f"{seq}", "head size": f"{dim}", "written out (ms)": f"{plain:.2f}"}
        rows.append(row | {"fused / written out": f"{times:.2f}", "used": "written out" if seq <= PLAIN_UP_TO else "fused"})
    show("Attention on a CPU", __doc__, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
