"""The configuration of a decoder whose layers share weights, keys and values.

An exported folder has a copy of this file, and `transformers` reads `config.json` with it.
"""

from __future__ import annotations

import copy
from dataclasses import field
from typing import Any

from transformers import PreTrainedConfig


class NasConfig(PreTrainedConfig):  # type: ignore[misc]
    """A Llama-style decoder's shape and, in `plan`, which layer owns each weight and which keys and values each layer reads.

    `plan` holds a `Plan` of `plan.py` as plain data: `layers`, with the fields of a `LayerPlan`, and `outside`.
    """

    model_type = "nas_sharing"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]  # noqa: RUF012

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
    attention_bias: bool = False
    qk_norm: bool = False
    hidden_act: str = "silu"
    embedding_multiplier: float = 1.0
    rotary_scaling: dict[str, Any] | None = None
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    plan: dict[str, Any] = field(default_factory=dict)

    @property
    def initializer_range(self) -> float:
        """The deviation of new weights, `initial_deviation`: for those that `transformers` makes, such as tokens added later."""
        return (2 / (5 * self.hidden_size)) ** 0.5

    @property
    def kv_sharing_modes(self) -> list[str | None]:
        """For `transformers`' caches: `reuse` at a layer that keeps neither keys nor values.

        All are None in a model without attention: a cache needs one layer that keeps something to have a length.
        """
        keeps = [i in (layer["k"], layer["v"]) for i, layer in enumerate(self.plan["layers"])]
        return [None if kept or not any(keeps) else "reuse" for kept in keeps]

    @property
    def per_layer_config(self) -> list[Any]:
        """For `transformers`' caches: every layer's window as `sliding_window`, None where it attends to all tokens.

        It is the plan's plus one, because sliding layers of these caches keep one token less than `sliding_window`.
        """
        layers = [copy.copy(self) for _ in self.plan["layers"]]
        for config, layer in zip(layers, self.plan["layers"], strict=True):
            config.sliding_window = layer["window"] and layer["window"] + 1
        return layers
