"""The shape of a decoder: every dimension that sharing does not change.

Owns `ModelShape`, in Hugging Face's names. What is shared between layers is `nas.sharing`'s.
"""

from __future__ import annotations

from dataclasses import dataclass

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
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"):
            _positive(name, getattr(self, name))
        for name in ("num_key_value_heads", "max_position_embeddings", "rope_theta", "rms_norm_eps"):
            _positive(name, getattr(self, name))
        if not self.head_dim:
            _divides(self.num_attention_heads, "num_attention_heads", self.hidden_size, "hidden_size")
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        _divides(self.num_key_value_heads, "num_key_value_heads", self.num_attention_heads, "num_attention_heads")
        if self.head_dim < 2 or self.head_dim % 2:
            raise UserError(
                f"head_dim={self.head_dim} is not an even number, and rotary positions turn pairs",
                where="head_dim" if self.head_dim < 2 else "hidden_size",
                remedy="make hidden_size / num_attention_heads even",
            )


def _positive(name: str, value: float) -> None:
    if value <= 0:
        raise UserError(f"{value} is not positive", where=name, remedy="use a number above zero")


def _divides(small: int, small_name: str, large: int, large_name: str) -> None:
    if small <= 0 or large % small:
        remedy = f"use {one_of(divisors(large))}"
        raise UserError(f"{small} does not divide {large_name}={large}", where=small_name, remedy=remedy)
