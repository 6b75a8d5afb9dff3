"""The configuration of a decoder whose layers share weights and KV caches.

An exported folder carries this file as it is, and `transformers` reads `config.json` with it.
"""

from __future__ import annotations

from dataclasses import field
from typing import Any

from transformers import PreTrainedConfig


class NasConfig(PreTrainedConfig):  # type: ignore[misc]
    """A Llama-style decoder's shape and, in `plan`, which layer owns each weight and each KV cache.

    `plan[i]` is layer i's: `owners` holds, for each of `decoder.SLOTS` in order, the layer whose weight it uses (null where it
    uses none); `kv` is the layer whose keys and values it attends to, and `kv_heads` how many heads those have.
    """

    model_type = "nas_sharing"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012

    vocab_size: int = 256
    hidden_size: int = 128
    num_hidden_layers: int = 0
    num_attention_heads: int = 4
    num_key_value_heads: int = 4
    head_dim: int = 32
    intermediate_size: int = 352
    max_position_embeddings: int = 2048
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = True
    initializer_range: float = 0.02
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    plan: list[dict[str, Any]] = field(default_factory=list)

    @property
    def kv_sharing_modes(self) -> list[str | None]:
        """For `transformers`' caches: `reuse` at a layer that reads another's keys and values, where nothing is to be kept."""
        return [None if layer["kv"] == i else "reuse" for i, layer in enumerate(self.plan)]
