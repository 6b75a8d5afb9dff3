"""The shape of a decoder: every dimension that sharing does not change.

Owns `ModelShape`, in Hugging Face's names, and what the families of such decoders differ in. What is shared between layers is
`nas.sharing`'s.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from ..config import Ge, Le, OneOf, PositiveFloat, PositiveInt, Strict
from ..errors import UserError, one_of

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def divisors(n: int) -> list[int]:
    """The divisors of n, ascending."""
    return [d for d in range(1, n + 1) if n % d == 0]


MOST_LAYERS, MOST_WIDTH, MOST_TOKENS = 1024, 10**6, 10**9
"""Bounds of sizes, which hold before anything is computed of them: larger ones are a mistake, or an attack."""

ACTIVATIONS = ("silu", "gelu_tanh", "gelu")
"""Of the FFN's gate: SwiGLU (2002.05202; Llama), or GeGLU by the tanh approximation (Gemma) or exactly."""


@dataclass(frozen=True)
class RotaryScaling(Strict):
    """Rotary frequencies lowered for a context longer than the one first trained on.

    `linear` divides all of them by `factor` (2306.15595). `llama3` divides those whose wavelength is above
    `original_max_position_embeddings / low_freq_factor`, keeps those below `original_max_position_embeddings / high_freq_factor`,
    and goes smoothly from one to the other between (Llama 3.1, 2407.21783).
    """

    rope_type: Annotated[str, OneOf(("linear", "llama3"))]
    factor: PositiveFloat
    low_freq_factor: PositiveFloat = 1.0
    high_freq_factor: PositiveFloat = 4.0
    original_max_position_embeddings: PositiveInt = 8192

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rope_type == "llama3" and self.low_freq_factor >= self.high_freq_factor:
            message = f"{self.low_freq_factor:g} is not below high_freq_factor={self.high_freq_factor:g}"
            raise UserError(message, where="low_freq_factor", hint="use 1 and 4, as Llama 3.1 does")


@dataclass(frozen=True)
class ModelShape(Strict):
    """A Llama-style decoder's dimensions (RMSNorm, rotary positions, gated FFN, grouped heads).

    `num_key_value_heads` defaults to `num_attention_heads`, `head_dim` to `hidden_size / num_attention_heads`. `attention_bias`
    is of q, k and v (Qwen2); `qk_norm` an RMSNorm over the head dimension of queries and keys, before they are rotated (Qwen3);
    `embedding_multiplier` scales what tokens are embedded as (Gemma: the square root of `hidden_size`).
    """

    vocab_size: Annotated[int, Ge(1), Le(MOST_TOKENS)]
    hidden_size: Annotated[int, Ge(1), Le(MOST_WIDTH)]
    num_hidden_layers: Annotated[int, Ge(1), Le(MOST_LAYERS)]
    num_attention_heads: Annotated[int, Ge(1), Le(MOST_WIDTH)]
    intermediate_size: Annotated[int, Ge(1), Le(MOST_WIDTH)]
    num_key_value_heads: Annotated[int, Ge(0), Le(MOST_WIDTH)] = 0
    head_dim: Annotated[int, Ge(0), Le(MOST_WIDTH)] = 0
    max_position_embeddings: Annotated[int, Ge(1), Le(MOST_TOKENS)] = 2048
    rope_theta: PositiveFloat = 10000.0
    rms_norm_eps: PositiveFloat = 1e-5
    tie_word_embeddings: bool = True
    attention_bias: bool = False
    qk_norm: bool = False
    hidden_act: Annotated[str, OneOf(ACTIVATIONS)] = "silu"
    embedding_multiplier: PositiveFloat = 1.0
    rotary_scaling: RotaryScaling | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.num_key_value_heads:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        if not self.head_dim:
            _divides(self.num_attention_heads, "num_attention_heads", self.hidden_size, "hidden_size")
            _even("hidden_size", self.hidden_size // self.num_attention_heads, "make hidden_size / num_attention_heads even")
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        _even("head_dim", self.head_dim, f"use {self.head_dim + 1}")
        _divides(self.num_key_value_heads, "num_key_value_heads", self.num_attention_heads, "num_attention_heads")

    @property
    def words(self) -> str:
        """The size, for a person."""
        return f"{self.num_hidden_layers} layers of width {self.hidden_size}"

    @property
    def sentence(self) -> str:
        """The size in all that a page says of it."""
        heads = f"{self.num_attention_heads} heads, FFN width {self.intermediate_size}"
        return f"A model of {self.words}, {heads}, vocabulary {self.vocab_size:,}."


def _even(where: str, head_dim: int, hint: str) -> None:
    if head_dim % 2:
        raise UserError(f"head_dim={head_dim} is odd, and rotary positions turn pairs", where=where, hint=hint)


def _divides(small: int, small_name: str, large: int, large_name: str) -> None:
    if large % small:
        hint = f"use {one_of(divisors(large))}"
        raise UserError(f"{small} does not divide {large_name}={large}", where=small_name, hint=hint)
