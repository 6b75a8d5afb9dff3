"""The families of Llama-like decoders, and the conversion between a `config.json` and a `ModelShape`.

Owns `FAMILIES`. The defaults of a row are those of the family's configuration class in `transformers`, which the tests check.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ..config import AGAIN, Document, build
from ..errors import UserError, one_of
from ..sharing.shape import ModelShape
from .files import TOKEN_IDS

ANOTHER = "give a model without it"

UNSUPPORTED: dict[str, tuple[str, str]] = {
    "quantization_config": ("the weights are quantised", "give the folder that it was quantised from"),
    "attention_bias": ("the attention's output projection has a bias, which this decoder has not", ANOTHER),
    "mlp_bias": ("the FFN's projections have biases, which this decoder has not", ANOTHER),
    "use_sliding_window": ("some layers see a window only", ANOTHER),
    "use_bidirectional_attention": ("tokens attend to later ones", ANOTHER),
    "attn_logit_softcapping": ("attention scores are capped, which this decoder does not do", ANOTHER),
    "final_logit_softcapping": ("logits are capped, which this decoder does not do", ANOTHER),
}
"""Keys of a `config.json` that the decoder cannot compute unless they are null, false or zero: the message and the hint."""

ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "gelu": "gelu"}
"""A `ModelShape`'s activation by its names in `transformers`, of which the first is written."""

SCALINGS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
"""The keys that each `rope_type` requires."""

SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings",
)  # fmt: skip

THETA = 10_000.0  # the default of `rope_theta`


@dataclass(frozen=True)
class Family:
    """One `model_type`.

    defaults: the values of keys that a `config.json` leaves out.
    derived: the keys that may be null, and then follow from others.
    features: the fields of a `ModelShape` that distinguish the family, given the hidden size.
    norm_offset: added to a norm's weight as the family stores it.
    windowed: whether `sliding_window` holds for every layer.
    ignores: keys of `UNSUPPORTED` that it does not read.
    activations: names of activations that have another meaning in it.
    """

    model_type: str
    architecture: str
    defaults: Mapping[str, Any]
    derived: tuple[str, ...]
    features: Callable[[int], dict[str, Any]] = lambda hidden_size: {}
    norm_offset: float = 0.0
    windowed: bool = False
    ignores: tuple[str, ...] = ()
    activations: Mapping[str, str] = field(default_factory=dict)

    def shape(self, data: Mapping[str, Any], name: str) -> tuple[ModelShape, tuple[str, ...]]:
        """The shape that a `config.json` describes, and notes for the user; `name` is the file's. Raises UserError."""
        self._check_supported(data, name)
        given = {key: data.get(key, default) for key, default in self.defaults.items()}
        values = {key: given[key] for key in SIZES} | {"hidden_act": self._activation(given["hidden_act"], name)}
        values |= {key: 0 for key in self.derived if values[key] is None}
        shape = build(ModelShape, Document(values | _rope(given | dict(data), name), name))
        shape = replace(shape, **self.features(shape.hidden_size))
        return _within_window(given["sliding_window"], shape, name) if self.windowed else (shape, ())

    def token_ids(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """The ids of special tokens, by their names in a `config.json`."""
        return {key: data.get(key, self.defaults[key]) for key in TOKEN_IDS}

    @property
    def names(self) -> dict[str, str]:
        return ACTIVATIONS | dict(self.activations)

    def fits(self, shape: ModelShape) -> bool:
        """Whether models of this shape are of the family."""
        wanted = {"attention_bias": False, "qk_norm": False, "embedding_multiplier": 1.0} | self.features(shape.hidden_size)
        return shape.hidden_act in self.names.values() and all(getattr(shape, name) == value for name, value in wanted.items())

    def config(self, shape: ModelShape) -> dict[str, Any]:
        """The `config.json` of a shape that fits, without token ids and dtype."""
        act = next(theirs for theirs, ours in self.names.items() if ours == shape.hidden_act)
        head = {"architectures": [self.architecture], "model_type": self.model_type}
        sizes = {key: getattr(shape, key) for key in SIZES}
        rope: dict[str, Any] = {"rope_theta": shape.rope_theta, "rope_scaling": None}
        if shape.rotary_scaling:
            kind = shape.rotary_scaling.rope_type
            scaling = asdict(shape.rotary_scaling)
            rope["rope_scaling"] = {"rope_type": kind} | {key: scaling[key] for key in SCALINGS[kind]}
        window = {"sliding_window": None} if self.windowed else {}
        return head | sizes | {"hidden_act": act} | rope | window

    def _check_supported(self, data: Mapping[str, Any], name: str) -> None:
        """Raise UserError if a `config.json` describes what this decoder cannot compute."""
        architectures = data.get("architectures") or [self.architecture]
        if not {self.architecture, self.architecture.replace("ForCausalLM", "Model")} & set(map(str, architectures)):
            message = f"{one_of(architectures)} is no {self.architecture}"
            raise UserError(message, where=f"{name}: architectures", hint=f"give a {self.architecture}'s folder")
        for key, (message, hint) in UNSUPPORTED.items():
            if data.get(key) and key not in self.ignores:
                raise UserError(message, where=f"{name}: {key}", hint=hint)
        others = [kind for kind in data.get("layer_types") or [] if kind != "full_attention"]
        if others:
            message = f"some layers are of the kind {others[0]}, and this decoder's are not"
            raise UserError(message, where=f"{name}: layer_types", hint=ANOTHER)

    def _activation(self, given: Any, name: str) -> str:
        if given not in self.names:
            message = f"{given!r} is an activation that this decoder has not"
            raise UserError(message, where=f"{name}: hidden_act", hint=f"give a model with {one_of(self.names)}")
        return self.names[given]


def _within_window(window: Any, shape: ModelShape, name: str) -> tuple[ModelShape, tuple[str, ...]]:
    """The shape for a context as long as every layer's window, within which a model with windows equals one without."""
    if window is None or (isinstance(window, int) and window >= shape.max_position_embeddings):
        return shape, ()
    if not isinstance(window, int) or window < 1:
        hint = "use a whole number above zero, or null"
        raise UserError(f"{window!r} will not do", where=f"{name}: sliding_window", hint=hint)
    longest = f"{shape.max_position_embeddings:,}"
    note = f"every layer sees the latest {window:,} tokens: read for a context of {window:,}, not {longest}, where it sees all"
    return replace(shape, max_position_embeddings=window), (note,)


def _rope(data: Mapping[str, Any], name: str) -> dict[str, Any]:
    """`rope_theta` and `rotary_scaling` of a `ModelShape`, from either spelling: `rope_parameters` (transformers 5), or
    `rope_theta` and `rope_scaling`."""
    key = "rope_scaling" if data.get("rope_scaling") else "rope_parameters"
    scaling = data.get(key) or {}
    if not isinstance(scaling, dict) or any(isinstance(value, dict) for value in scaling.values()):
        raise UserError("is not one scaling for all layers", where=f"{name}: {key}", hint=ANOTHER)
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind not in SCALINGS:
        message = f"{kind!r} is a scaling that this decoder has not"
        raise UserError(message, where=f"{name}: {key}", hint=f"give a model with {one_of(SCALINGS)}")
    if (scaling.get("partial_rotary_factor") or data.get("partial_rotary_factor") or 1.0) != 1.0:
        message = "a part of each head only is rotated, and this decoder rotates all of it"
        raise UserError(message, where=f"{name}: partial_rotary_factor", hint=ANOTHER)
    theta = {"rope_theta": scaling.get("rope_theta", data.get("rope_theta", THETA))}
    if kind == "default":
        return theta
    original = data.get("original_max_position_embeddings") or scaling.get("original_max_position_embeddings")
    scaling = scaling | {"original_max_position_embeddings": original or data["max_position_embeddings"]}
    for wanted in SCALINGS[kind]:
        if wanted not in scaling:
            raise UserError(f"{wanted} is missing", where=f"{name}: {key}", hint=AGAIN)
    return theta | {"rotary_scaling": {"rope_type": kind} | {wanted: scaling[wanted] for wanted in SCALINGS[kind]}}


# fmt: off
_LLAMA: dict[str, Any] = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": None, "head_dim": None, "hidden_act": "silu", "max_position_embeddings": 2048, "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None,
}
_MISTRAL = _LLAMA | {
    "intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096,
}
_QWEN2 = _LLAMA | {
    "vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32, "max_position_embeddings": 32768,
    "bos_token_id": None, "eos_token_id": None,
}
_GEMMA = _LLAMA | {
    "vocab_size": 256000, "hidden_size": 3072, "intermediate_size": 24576, "num_hidden_layers": 28, "num_attention_heads": 16,
    "num_key_value_heads": 16, "head_dim": 256, "hidden_act": "gelu_pytorch_tanh", "max_position_embeddings": 8192,
    "tie_word_embeddings": True, "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0,
}
# fmt: on

FAMILIES: dict[str, Family] = {
    row.model_type: row
    for row in (
        Family("llama", "LlamaForCausalLM", _LLAMA, derived=("num_key_value_heads", "head_dim")),
        Family("mistral", "MistralForCausalLM", _MISTRAL, derived=("head_dim",), windowed=True),
        Family(
            "qwen2",
            "Qwen2ForCausalLM",
            _QWEN2,
            derived=("num_key_value_heads", "head_dim"),
            features=lambda hidden_size: {"attention_bias": True},
            ignores=("attention_bias",),  # its biases are always those of q, k and v
        ),
        Family(
            "qwen3",
            "Qwen3ForCausalLM",
            _QWEN2 | {"head_dim": 128},
            derived=("num_key_value_heads",),
            features=lambda hidden_size: {"qk_norm": True},
        ),
        Family(
            "gemma",
            "GemmaForCausalLM",
            _GEMMA,
            derived=(),
            features=lambda hidden_size: {"embedding_multiplier": hidden_size**0.5},
            norm_offset=1.0,
            activations={"gelu": "gelu_tanh"},  # Google's releases say gelu and mean the approximation
        ),
    )
}
"""Every family that is read and written. A new one is a row here, and nothing elsewhere."""
