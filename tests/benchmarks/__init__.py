"""Benchmarks. Here is what they share: the ratio of two speeds that were measured in turns, and the model to be as fast as."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from torch import nn

from nas.sharing.shape import ModelShape


@dataclass(frozen=True)
class Ratio:
    """How many times as fast as another: the median over turns, and half the interquartile range."""

    times: float
    noise: float

    @staticmethod
    def of(mine: list[float], theirs: list[float]) -> Ratio:
        """From the seconds of each turn."""
        ratios = [other / own for own, other in zip(mine, theirs, strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else (0.0, 0.0, 0.0)
        return Ratio(statistics.median(ratios), (high - low) / 2)

    def __str__(self) -> str:
        return f"{self.times:.2f} ± {self.noise:.2f}"


def llama(shape: ModelShape) -> nn.Module:
    """Transformers' own model of the same shape."""
    from transformers import LlamaConfig, LlamaForCausalLM

    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    sizes = {name: getattr(shape, name) for name in (*names, "max_position_embeddings", "tie_word_embeddings")}
    return LlamaForCausalLM(LlamaConfig(**sizes, attn_implementation="sdpa"))
