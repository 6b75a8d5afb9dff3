"""The families of plain decoders: how each one's `config.json` says a shape, and what it calls its weights.

Owns `FAMILIES`. A row is a `model_type`; a new family is a row here, and nothing elsewhere. Defaults are those of the family's
configuration class in `transformers` (5.24), for what a config.json leaves out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import UserError, one_of
from ..plan import BESIDE, projection
from ..shape import ModelShape, RotaryScaling

SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "max_position_embeddings",
    "rms_norm_eps",
    "tie_word_embeddings",
)
ACTS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}
"""Activations by their names in a config.json."""

NEVER = {
    "mlp_bias": "biases in the FFN",
    "quantization_config": "quantised weights",
    "attn_logit_softcapping": "soft-capped attention",
    "final_logit_softcapping": "soft-capped logits",
    "use_bidirectional_attention": "attention to later tokens",
    "use_sliding_window": "a sliding window in some layers",
    "auto_map": "code of its own",
}
"""What no family here has, by the key that switches it on."""

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Family:
    """A `model_type`. `defaults` are for what a config.json leaves out; `shape` are the fields of `ModelShape` that all models of
    the family have so; `bias` says whether `attention_bias` may be asked for (then it is of o too, which this decoder has not);
    `norm_offset` is what the family adds to a norm's weight before it scales by it."""

    name: str
    architecture: str
    defaults: Mapping[str, Any]
    shape: Mapping[str, Any] = field(default_factory=dict)
    norm_offset: float = 0.0

    def read(self, config: Config) -> ModelShape:
        """The shape in a config.json. Raises UserError, naming the key, for what this decoder cannot be."""
        for key, words in NEVER.items():
            if config.get(key):
                raise UserError(f"the model has {words}", where=key, remedy="use a checkpoint without")
        if config.get("attention_bias"):
            raise UserError("the model has a bias in its output projections", where="attention_bias", remedy="use one without")
        sliding = [kind for kind in config.get("layer_types") or [] if kind != "full_attention"]
        if sliding:
            raise UserError(f"the model has layers of {sliding[0]}", where="layer_types", remedy="use one of full attention")
        said: dict[str, Any] = {key: config[key] if config.get(key) is not None else self.defaults.get(key) for key in SIZES}
        said["num_key_value_heads"] = said["num_key_value_heads"] or said["num_attention_heads"]
        missing = [key for key, value in said.items() if value is None and key != "head_dim"]
        if missing:
            raise UserError(f"{missing[0]} is missing", where=missing[0], remedy="take the config.json of the checkpoint itself")
        said["head_dim"] = said["head_dim"] or 0
        scale: dict[str, Any] = {"embedding_multiplier": said["hidden_size"] ** 0.5} if self.name == "gemma" else {}
        theta, scaling = read_rope(config, said["max_position_embeddings"])
        window = config.get("sliding_window", self.defaults.get("sliding_window"))
        if window:
            said["max_position_embeddings"] = min(window, said["max_position_embeddings"])
        said |= {"hidden_act": self._act(config), "rope_theta": theta, "rotary_scaling": scaling}
        return ModelShape(**said, **self.shape, **scale)

    def notes(self, config: Config) -> list[str]:
        """What a person should know of how a config.json was read."""
        window, longest = config.get("sliding_window", self.defaults.get("sliding_window")), config.get("max_position_embeddings")
        if window and window < (longest or self.defaults["max_position_embeddings"]):
            return [f"layers look back {window:,} tokens: taken as a model of so much context, which is the same up to there"]
        return []

    def _act(self, config: Config) -> str:
        name = config.get("hidden_act") or config.get("hidden_activation") or self.defaults["hidden_act"]
        if name not in ACTS:
            raise UserError(f"unknown activation {name!r}", where="hidden_act", remedy=f"use a model with {one_of(ACTS)}")
        return ACTS[name]

    def write(self, shape: ModelShape) -> dict[str, Any]:
        """A config.json of a shape: the inverse of `read`, for a shape that the family has."""
        act = next(name for name, ours in ACTS.items() if ours == shape.hidden_act)
        rope: dict[str, Any] = {"rope_type": "default", "rope_theta": shape.rope_theta}
        if shape.rotary_scaling is not None:
            rope |= vars(shape.rotary_scaling)
        sizes = {key: getattr(shape, key) for key in SIZES}
        head = {"architectures": [self.architecture], "model_type": self.name}
        window = {"sliding_window": None} if "sliding_window" in self.defaults else {}
        return head | sizes | window | {"hidden_act": act, "rope_parameters": rope, "rope_theta": shape.rope_theta}

    def has(self, shape: ModelShape) -> bool:
        """Whether a shape is one of the family's."""
        scale = shape.hidden_size**0.5 if self.name == "gemma" else 1.0
        wanted = {"attention_bias": False, "qk_norm": False} | dict(self.shape)
        alike = all(getattr(shape, key) == value for key, value in wanted.items())
        return alike and math.isclose(shape.embedding_multiplier, scale)


FAMILIES: dict[str, Family] = {
    row.name: row
    for row in (
        Family(
            "llama",
            "LlamaForCausalLM",
            {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "hidden_act": "silu"},
        ),
        Family(
            "qwen2",
            "Qwen2ForCausalLM",
            {"max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "hidden_act": "silu"},
            {"attention_bias": True},
        ),
        Family(
            "qwen3",
            "Qwen3ForCausalLM",
            {"max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "hidden_act": "silu"}
            | {"head_dim": 128},
            {"qk_norm": True},
        ),
        Family(
            "gemma",
            "GemmaForCausalLM",
            {"max_position_embeddings": 8192, "rms_norm_eps": 1e-6, "tie_word_embeddings": True, "head_dim": 256}
            | {"hidden_act": "gelu_pytorch_tanh"},
            norm_offset=1.0,
        ),
        Family(
            "mistral",
            "MistralForCausalLM",
            {"max_position_embeddings": 131072, "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "hidden_act": "silu"}
            | {"num_key_value_heads": 8, "sliding_window": 4096},
        ),
    )
}
"""Every family; of those that have a shape, the first is the one that it is written as."""


def read_rope(config: Config, longest: int) -> tuple[float, RotaryScaling | None]:
    """The base of the rotary frequencies and what lowers them, in the spelling of `transformers` 4 or 5. Raises UserError."""
    said = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    theta = float(said.get("rope_theta") or config.get("rope_theta") or 10_000.0)
    kind = said.get("rope_type") or said.get("type") or "default"
    if (said.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0) != 1.0:
        raise UserError("only a part of each head is rotated", where="partial_rotary_factor", remedy="use a model without")
    if kind == "default":
        return theta, None
    if kind not in ("linear", "llama3"):
        raise UserError(f"positions are scaled by {kind!r}", where="rope_parameters", remedy="use a model with linear or llama3")
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    before = {"original_max_position_embeddings": longest} if kind == "llama3" else {}
    try:
        return theta, RotaryScaling(kind, **(before | {name: said[name] for name in names if name in said}))
    except TypeError:
        raise UserError("factor is missing", where="rope_parameters", remedy="take the checkpoint's own config.json") from None


def family_of(model_type: Any) -> Family:
    """The row of a `model_type`. Raises UserError."""
    if model_type not in FAMILIES:
        rule = f"model_type is {model_type!r}, which is no plain decoder that is known here"
        raise UserError(rule, where="model_type", remedy=f"use a checkpoint of {one_of(FAMILIES)}")
    return FAMILIES[str(model_type)]


def theirs(name: str) -> str:
    """A decoder's weight as the families call it."""
    if name.startswith("lm_head."):
        return name
    slot = name.removesuffix(".weight").split(".", 2)[-1]
    if slot in BESIDE and slot.endswith("_bias"):
        return f"model.{name.removesuffix(f'{slot}.weight')}{projection(slot)}.bias"
    return f"model.{name}"
