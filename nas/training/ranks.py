"""Data parallelism: several processes that train one model, each on its part of every batch.

Owns `Ranks`. All processes draw the same batches and the same subnets, and make the same step of the optimizer from the mean of
their gradients; so their weights stay equal, and the state that one saves is everybody's. Importing this does not import torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.distributed.distributed_c10d import Store

PATIENCE = timedelta(minutes=5)  # after so long without an answer from the others a training fails


class PeerLost(RuntimeError):
    """Another process of the training has ended, or does not answer."""


@dataclass(frozen=True)
class Ranks:
    """This process's place among the `size` that train one model: rank 0 leads, which reports and saves."""

    rank: int = 0
    size: int = 1

    def part(self, rows: Tensor) -> Tensor:
        """This process's part of a batch `(batch, …)`. Raises ValueError for a batch that is not divisible."""
        if len(rows) % self.size:
            raise ValueError(f"a batch of {len(rows)} is not divisible among {self.size} workers")
        return rows.chunk(self.size)[self.rank]

    def average(self, model: nn.Module, loss: Tensor) -> Tensor:
        """The mean loss `()` over all processes; the gradients of `model` become the mean of theirs. A weight that the step did
        not use has no gradient in any of them, and is not sent. Raises PeerLost."""
        if self.size == 1:
            return loss
        import torch
        from torch import distributed

        grads = [p.grad for p in model.parameters() if p.grad is not None]
        flat = torch.cat([loss.reshape(1), *(grad.flatten() for grad in grads)])
        try:
            distributed.all_reduce(flat)
        except RuntimeError as error:
            raise PeerLost(str(error)) from error
        flat /= self.size
        for grad, mean in zip(grads, flat[1:].split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(mean.view_as(grad))
        return flat[0]


ALONE = Ranks()


@contextmanager
def joined(store: Store, ranks: Ranks) -> Iterator[Ranks]:
    """The processes that meet at a store, connected while this lasts: by NCCL on GPUs, else by Gloo."""
    import torch
    from torch import distributed

    backend = "nccl" if torch.cuda.is_available() else "gloo"
    distributed.init_process_group(backend, store=store, rank=ranks.rank, world_size=ranks.size, timeout=PATIENCE)
    try:
        yield ranks
    finally:
        distributed.destroy_process_group()
