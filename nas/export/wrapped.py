"""A decoder as the model that `transformers` knows, by this package's copy of the code: no code of a folder is run."""

from __future__ import annotations

from dataclasses import asdict

from ..model.decoder import Decoder
from ..sharing.plan import weight_shapes
from .configuration_nas import NasConfig
from .hugging_face import hf_name
from .modeling_nas import NasForCausalLM


def hf_names(decoder: Decoder) -> dict[str, str]:
    """The name in `transformers` of each of a decoder's own weights."""
    return {name: hf_name(name) for name in weight_shapes(decoder.shape, decoder.plan)}


def as_transformers(decoder: Decoder) -> NasForCausalLM:
    """A copy of a decoder, in float32."""
    model, names = NasForCausalLM(NasConfig(**asdict(decoder.shape), plan=decoder.plan.to_data())).float(), hf_names(decoder)
    result = model.load_state_dict({names[name]: weight for name, weight in decoder.state_dict().items()}, strict=False)
    assert not result.unexpected_keys
    assert set(result.missing_keys) <= {"lm_head.weight"}, result.missing_keys  # the embedding, if they are tied
    return model
