"""Benchmarks. Here is what they share: options, a page on stdout, and the ratio of two speeds that were measured in turns."""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from nas.report.tables import markdown_table
from nas.sharing.shape import ModelShape


def options(doc: str | None, given: list[str] | None, **defaults: Any) -> argparse.Namespace:
    """Options by their defaults: a list takes several values, words only those of its default."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in defaults.items():
        first = default[0] if isinstance(default, list) else default
        many = {"nargs": "*", "choices": default if isinstance(first, str) else None} if isinstance(default, list) else {}
        parser.add_argument(f"--{name}", type=type(first), default=default, **many)
    torch.set_num_threads(1)
    return parser.parse_args(given)


def show(title: str, doc: str | None, *parts: str | Sequence[Mapping[str, str]]) -> None:
    """Print a page: what was found and how, without the first line of `doc`, then tables and words."""
    words = [f"# {title}", (doc or "").partition("\n\n")[2].strip()]
    sys.stdout.write("\n\n".join([*words, *(p if isinstance(p, str) else markdown_table(p).strip() for p in parts)]) + "\n")


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
