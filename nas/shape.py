"""The shape of a decoder: every dimension that sharing does not change.

Owns `ModelShape`, in Hugging Face's names. What is shared between layers is `nas.sharing`'s.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from .errors import UserError, one_of
from .loading import Strict

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def divisors(n: int) -> list[int]:
    """The divisors of n, ascending."""
    return [d for d in range(1, n + 1) if n % d == 0]


@dataclass(frozen=True)
class ModelShape(Strict):
    """A Llama-style decoder's dimensions (RMSNorm, rotary positions, SwiGLU, grouped heads).

    `num_key_value_heads` defaults to `num_attention_heads`, `head_dim` to `hidden_size / num_attention_heads`.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    num_key_value_heads: int = 0
    head_dim: int = 0
    max_position_embeddings: int = 2048
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = True

    def __post_init__(self) -> None:
        if not self.num_key_value_heads:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        for field in fields(self):
            if field.name not in ("head_dim", "tie_word_embeddings"):
                _positive(field.name, getattr(self, field.name))
        if not self.head_dim:
            _divides(self.num_attention_heads, "num_attention_heads", self.hidden_size, "hidden_size")
            _even("hidden_size", self.hidden_size // self.num_attention_heads, "make hidden_size / num_attention_heads even")
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        _positive("head_dim", self.head_dim)
        _even("head_dim", self.head_dim, f"use {self.head_dim + 1}")
        _divides(self.num_key_value_heads, "num_key_value_heads", self.num_attention_heads, "num_attention_heads")


def _positive(name: str, value: float) -> None:
    if not value > 0:  # NaN is not either
        raise UserError(f"{value} is not positive", where=name, remedy="use a number above zero")


def _even(where: str, head_dim: int, remedy: str) -> None:
    if head_dim % 2:
        raise UserError(f"head_dim={head_dim} is odd, and rotary positions turn pairs", where=where, remedy=remedy)


def _divides(small: int, small_name: str, large: int, large_name: str) -> None:
    if small <= 0 or large % small:
        remedy = f"use {one_of(divisors(large))}"
        raise UserError(f"{small} does not divide {large_name}={large}", where=small_name, remedy=remedy)
