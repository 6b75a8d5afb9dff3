"""Measured objectives: a model of random weights at work on this process's device. Speed does not depend on what weights are.

Owns `measure_objectives`, and how a model is timed. What is measured is told by the rows of `nas.sharing.objectives`.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..model.attention import KVCache
from ..model.decoder import Decoder, init_weights
from ..sharing.memory import MemorySpec
from ..sharing.objectives import OBJECTIVES, SPREAD
from ..sharing.shape import ModelShape
from ..sharing.sharing_config import SharingConfig
from .device import find_device
from .evaluation import Stopwatch

WARMUP, SAMPLES = 2, 9  # samples that do not count, and those of which the median does
ENOUGH = 20.0  # seconds after which three samples are enough
READ = 8  # tokens that the decoder reads to fill a cache


def measure_objectives(shape: ModelShape, config: SharingConfig, spec: MemorySpec, names: Iterable[str]) -> dict[str, float]:
    """The medians of measured objectives by name, and by NAME_spread the distance between the quartiles of their samples."""
    model = init_weights(Decoder(shape, config.resolve(shape)), torch.Generator().manual_seed(0))
    work, found = ModelAtWork(model.to(find_device(), getattr(torch, spec.dtype)).eval(), spec), dict[str, float]()
    for name in names:
        measure = OBJECTIVES[name].measure
        assert measure is not None
        samples = sample(lambda measure=measure: measure(work))  # type: ignore[misc]
        low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
        found |= {name: median, name + SPREAD: high - low}
    return found


def sample(measure: Callable[[], float]) -> list[float]:
    """Samples of a measurement after warming up: `SAMPLES`, or fewer if they take long."""
    for _ in range(WARMUP):
        measure()
    watch, found = Stopwatch(), list[float]()
    while len(found) < SAMPLES and (len(found) < 3 or watch.seconds < ENOUGH):
        found.append(measure())
    return found


@dataclass(frozen=True)
class ModelAtWork:
    """A model of random weights at work on this process's device, with the sequences, the context and the dtype of `spec`."""

    model: Decoder
    spec: MemorySpec

    @property
    def device(self) -> torch.device:
        return self.model.embed_tokens.weight.device

    @cached_property
    def tokens(self) -> Tensor:
        """Random tokens `(batch, context)`."""
        size, generator = (self.spec.batch, self.spec.context), torch.Generator().manual_seed(0)
        return torch.randint(self.model.shape.vocab_size, size, generator=generator).to(self.device)

    @cached_property
    def cache(self) -> KVCache:
        """A cache of all tokens but the last."""
        return filled_cache(self.model, self.spec.context - 1, self.spec.batch)

    def prefill_seconds(self) -> float:
        """Seconds to read the context of all sequences, once."""
        return self._seconds(self._prefill)

    def decode_seconds(self) -> float:
        """Seconds to decode one token of all sequences at a full cache, once."""
        cache = self.cache  # made before the clock starts
        return self._seconds(lambda: self._decode(replace(cache, tensors=dict(cache.tensors))))

    def peak_bytes(self) -> float:
        """The most bytes that are held while the context is read and one more token decoded. On a GPU its allocator tells;
        elsewhere the bytes of all tensors that live at once are counted."""
        if self.device.type == "cuda":
            weights = {weight.data_ptr(): weight.nbytes for weight in self.model.parameters()}
            others = torch.cuda.memory_allocated() - sum(weights.values())
            torch.cuda.reset_peak_memory_stats()
            self._decode(self._prefill())
            return float(torch.cuda.max_memory_allocated() - others)
        with _LiveBytes(self.model.parameters()) as live:
            self._decode(self._prefill())
        return float(live.most)

    @torch.no_grad()
    def _prefill(self) -> KVCache:
        cache = KVCache.of(self.model.plan)
        self.model.logits(self.model.hidden(self.model.embed(self.tokens), cache=cache)[:, -1:])
        return cache

    @torch.no_grad()
    def _decode(self, cache: KVCache) -> None:
        self.model.logits(self.model.hidden(self.model.embed(self.tokens[:, -1:]), cache=cache))

    def _seconds(self, work: Callable[[], object]) -> float:
        self._wait()
        begun = time.perf_counter()
        work()
        self._wait()
        return time.perf_counter() - begun

    def _wait(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize()


class _LiveBytes(TorchDispatchMode):
    """The most bytes of tensors that lived at once, weights among them; each storage counts once."""

    def __init__(self, weights: Iterable[Tensor]) -> None:
        super().__init__()
        self._live = {StorageWeakRef(w.untyped_storage()): w.untyped_storage().nbytes() for w in weights}
        self.most = sum(self._live.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        storages = [leaf.untyped_storage() for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        self._live |= {StorageWeakRef(storage): storage.nbytes() for storage in storages}
        self._live = {reference: size for reference, size in self._live.items() if not reference.expired()}
        self.most = max(self.most, sum(self._live.values()))
        return out


@torch.no_grad()
def filled_cache(model: Decoder, context: int, batch: int) -> KVCache:
    """A decoder's cache that holds `context` tokens of `batch` sequences: the decoder reads a few, and the others repeat them.
    Bytes do not depend on the tokens, and a model that reads a later layer would need one pass for each token."""
    cache = KVCache.of(model.plan)
    read = min(READ, context)
    if not read:
        return cache
    model.hidden(model.embed(torch.zeros(batch, read, dtype=torch.long, device=model.embed_tokens.weight.device)), cache=cache)
    for i, held in dict(cache.tensors).items():
        k, v = (kept.repeat(1, 1, math.ceil(context / kept.shape[2]), 1)[:, :, : context - read] for kept in held)
        cache.update(k, v, i)
    cache.length = context
    return cache
