"""The cross-entropy of each token, a piece of the vocabulary's logits at a time.

Of the logits, the largest tensor of a training step, no copy in float32 is made: each piece is converted, used and forgotten, on
a CPU while it is in its cache. The forward keeps one number a token for the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

PIECE = {"cpu": 2**18}
LARGE_PIECE = 2**24
"""Logits in a piece: as many as a core's cache holds, or enough to keep a GPU busy."""


def token_losses(logits: Tensor, target: Tensor) -> Tensor:
    """The cross-entropy `(…)`, in float32, of logits `(…, vocab)` with token ids `(…)` or probabilities `(…, vocab)`."""
    tokens = logits.shape[:-1]
    flat = target.flatten() if target.shape == tokens else target.flatten(0, -2)
    losses: Tensor = _TokenLosses.apply(logits.flatten(0, -2), flat)
    return losses.view(tokens)


class _TokenLosses(torch.autograd.Function):
    """log Σ exp x - x[t] for ids t, and log Σ exp x - p · x for probabilities p; its gradient is softmax(x) - p."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor) -> Tensor:
        """`(tokens,)` of `(tokens, vocab)` and `(tokens,)` or `(tokens, vocab)`."""
        rows, parts = _rows(logits), list[tuple[Tensor, Tensor]]()
        for x, t in zip(logits.split(rows), target.split(rows), strict=True):
            exact = x.float()
            given = exact.gather(1, t[:, None])[:, 0] if t.ndim == 1 else (exact * t).sum(-1)
            parts.append((exact.logsumexp(-1), given))
        norms, found = (torch.cat(part) for part in zip(*parts, strict=True))
        ctx.save_for_backward(logits, target, norms)
        return norms - found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        """The gradient of the logits, in their dtype."""
        logits, target, norms = ctx.saved_tensors
        rows, grad = _rows(logits), torch.empty_like(logits)
        pieces = (tensor.split(rows) for tensor in (logits, target, norms, upstream, grad))
        for x, t, norm, up, out in zip(*pieces, strict=True):
            p = (x.float() - norm[:, None]).exp_()
            p = p.scatter_add_(1, t[:, None], p.new_full((len(p), 1), -1.0)) if t.ndim == 1 else p.sub_(t)
            out.copy_(p.mul_(up[:, None]))
        return grad, None


def _rows(logits: Tensor) -> int:
    return max(PIECE.get(logits.device.type, LARGE_PIECE) // logits.shape[1], 1)
