"""A decoder whose layers share weights, keys and values, as a model of `transformers`.

Owns what `transformers` needs around a forward: names of weights, masks, caches, generation and the loss. The forward itself is
the decoder's. A layer that reads another layer's keys and values keeps none in the cache.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.cache_utils import DummyLayer, DynamicLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from ..model.decoder import Decoder, ForwardState, init_parameter
from ..sharing.plan import Plan
from .configuration_nas import NasConfig

CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
"""The output's field for the cache; it is called `past_key_values` until transformers 5.23."""


class NasDecoder(Decoder):
    """The decoder as the backbone of a model of `transformers`.

    It can recompute its layers in the backward pass instead of storing their activations.
    """

    shape: NasConfig

    gradient_checkpointing = False  # `transformers` sets it

    def block(self, i: int, x: Tensor, state: ForwardState) -> Tensor:
        """See `Decoder.block`."""
        if self.gradient_checkpointing and self.training:
            # A layer may read keys and values of another layer; the reentrant kind would give those no gradient.
            return checkpoint(super().block, i, x, state, use_reentrant=False)
        return super().block(i, x, state)

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """The input of the head `(batch, seq, width)`, as `last_hidden_state`; arguments are those of `NasForCausalLM`.

        `trl` calls it by itself, and computes the loss from it and the head's weight.
        """
        _refuse(kwargs)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        x = self.widen(self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds)
        cache = self._cache(past_key_values, use_cache)
        steps = (0 if cache is None else cache.get_seq_length()) + torch.arange(x.shape[1], device=x.device)
        if not self.plan.kv_owners:  # a model without attention: its cache stays empty
            mask = None
        elif attention_mask is None and past_key_values is None and position_ids is not None:
            mask = apart(position_ids)
        else:
            mask = visible(attention_mask, steps, cache)
        kept = None if cache is None else KeptCache(self.plan, cache)
        hidden = self.hidden(x, steps[None] if position_ids is None else position_ids, mask, kept)
        hidden = self.narrow(hidden) if self.shape.tie_word_embeddings else hidden
        return BaseModelOutputWithPast(last_hidden_state=hidden, **{CACHE: cache})

    def _cache(self, given: Cache | None, wanted: bool | None) -> Cache | None:
        """The cache to read and fill: the given one, a new one, or None."""
        plan = self.plan
        if self.training and self.gradient_checkpointing:
            if plan.fixed_point_layers:
                raise ValueError("gradient checkpointing would compute a pass again from what later passes left; turn it off")
            if given is not None or wanted:
                raise ValueError("gradient checkpointing runs each layer twice and would fill a KV cache twice; use_cache=False")
            return None
        if wanted is None:
            wanted = self.shape.use_cache and not self.training
        if given is None and not wanted:
            return None
        cache = DynamicCache(config=self.shape) if given is None else given
        if not cache.layers:  # made without a config, it takes its length from its first layer, which may keep nothing
            cache.layers = [DynamicLayer() if mode is None else DummyLayer() for mode in self.shape.kv_sharing_modes]
        if cache.is_compileable:
            require_static(plan)
        return cache


class KeptCache:
    """The decoder's `Cache`, stored in a cache of `transformers`."""

    def __init__(self, plan: Plan, cache: Cache) -> None:
        self.plan, self.cache = plan, cache

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """See `attention.Cache`."""
        kept = self.cache.update(*self._placed(layer_idx, key_states, value_states), layer_idx)
        return self._placed(layer_idx, *kept)

    def past(self, layer_idx: int) -> tuple[Tensor, Tensor] | None:
        """See `attention.Cache`."""
        layer = self.cache.layers[layer_idx]
        return self._placed(layer_idx, layer.keys, layer.values) if layer.get_seq_length() else None

    def _placed(self, i: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values to and from their places in the cache. A layer that keeps values alone stores them as keys, because
        `transformers` takes a layer's length from its keys."""
        return (k, v) if self.plan.layers[i].k == i else (v, k)


class NasForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """The decoder and its output head. Weights have Llama's names; a shared weight has one name."""

    config_class = NasConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["NasDecoder"]  # noqa: RUF012  # layers use one another's weights, so all are on one device
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: NasConfig) -> None:
        super().__init__(config)
        plan = Plan.from_data(config.plan)
        tied = plan.outside.tie_word_embeddings
        if tied != config.tie_word_embeddings:
            raise ValueError(f"tie_word_embeddings is {config.tie_word_embeddings}, and the plan's is {tied}; make them agree")
        # The decoder needs no head: it is here, where `transformers` looks for it.
        self.model = NasDecoder(config, replace(plan, outside=replace(plan.outside, tie_word_embeddings=True)))
        width = plan.outside.embedding_rank if tied else 0
        self.lm_head = nn.Linear(width or config.hidden_size, config.vocab_size, bias=False)
        self._names = {module: name for name, module in self.model.named_modules() if hasattr(module, "weight")}
        self.post_init()

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits `(batch, seq, vocab)` of `input_ids` `(batch, seq)`, with the arguments and the loss of every causal model.

        `attention_mask` is `(batch, past + seq)`, zero at padding on either side, or `(batch, 1, seq, keys)`. `position_ids` that
        start again separate documents in a row. `inputs_embeds` are outputs of `get_input_embeddings()`. `past_key_values` is
        `cache` by its older name; in evaluation, a cache is made and returned by default. Raises ValueError for what this model
        does not support.
        """
        _refuse(kwargs)
        given = cache if past_key_values is None else past_key_values
        out = self.model(input_ids, attention_mask, position_ids, given, inputs_embeds, use_cache)
        hidden = out.last_hidden_state
        hidden = hidden[:, slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep]
        logits = self.lm_head(hidden)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: getattr(out, CACHE)})

    def _get_candidate_generator(self, generation_config: Any, *args: Any, **kwargs: Any) -> Any:
        """See `GenerationMixin`. Raises ValueError for early exit."""
        if generation_config.assistant_early_exit is not None:
            raise ValueError(
                "assistant_early_exit is not supported by this model; use prompt_lookup_num_tokens or assistant_model"
            )
        return super()._get_candidate_generator(generation_config, *args, **kwargs)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """See `GenerationMixin`. Raises ValueError: its paged cache does not support layers that keep nothing."""
        raise ValueError("continuous batching (generate_batch) is not supported by this model; use generate with a padded batch")

    def _get_static_cache_init_shape(self) -> tuple[list[int], int]:
        """KV heads of each layer, and their size: for a static cache that is allocated before a prefill in chunks."""
        require_static(self.model.plan)
        return [layer.k_heads for layer in self.model.plan.layers], self.config.head_dim

    def _init_weights(self, module: Any) -> None:
        """As the decoder's own `init_weights`: a looped layer adds to the residual stream as often as it runs."""
        if module not in self._names:  # the head, or an embedding that has grown
            super()._init_weights(module)
        else:
            init_parameter(self._names[module], module.weight, self.config.initializer_range, self.config.num_hidden_layers, None)


def require_static(plan: Plan) -> None:
    """Raise ValueError if a static cache, which is allocated at full length, cannot serve a plan.

    Windows, and what is read of a later layer, count from the newest token back; `transformers`' static layers hold as many key
    heads as value heads.
    """
    reasons = {
        "has a window": [i for i, layer in enumerate(plan.layers) if layer.window],
        "reads the keys and values of a later layer": [i for i, layer in enumerate(plan.layers) if layer.reads_later_layer(i)],
        "keeps unlike numbers of keys and values": [i for i, layer in enumerate(plan.layers) if layer.k_heads != layer.v_heads],
    }
    for reason, layers in reasons.items():
        if layers:
            raise ValueError(f"a static cache cannot serve this model: layer {layers[0]} {reason}; use a dynamic cache")


def visible(attention_mask: Tensor | None, steps: Tensor, cache: Cache | None) -> Tensor | None:
    """Boolean `(batch or 1, 1, seq, keys)`, true where attended; None for plain causal attention, which has faster kernels.

    `steps` `(seq,)` are the new tokens' places in the cache. Padding attends to itself: a softmax over nothing is NaN.
    """
    if attention_mask is not None and attention_mask.ndim == 4:
        return attention_mask if attention_mask.dtype == torch.bool else attention_mask >= 0
    static = cache is not None and cache.is_compileable  # it is longer than what it holds
    held = 0 if cache is None else cache.get_max_length() if static else cache.get_seq_length()
    keys = held if static else held + len(steps)
    if attention_mask is not None and not static and attention_mask.shape[-1] != keys:
        raise ValueError(f"attention_mask has {attention_mask.shape[-1]} columns for {keys} tokens, those in the cache included")
    if not static and (attention_mask is None or _all_ones(attention_mask)):
        return None
    places = torch.arange(keys, device=steps.device)
    causal = (places <= steps[:, None])[None, None]
    if attention_mask is None:
        return causal
    real = F.pad(attention_mask.bool(), (0, keys - attention_mask.shape[-1]))[:, None, None]
    return (causal & real) | (places == steps[:, None])


def apart(position_ids: Tensor) -> Tensor | None:
    """Boolean `(batch, 1, seq, seq)`, causal within each document of a row; None if positions `(batch, seq)` are of one."""
    begins = position_ids.diff(dim=1, prepend=position_ids[:, :1] - 1) != 1
    if _all_ones(~begins):
        return None
    document = begins.cumsum(1)
    same = document[:, None, :, None] == document[:, None, None, :]
    return same.tril()


def _all_ones(mask: Tensor) -> bool:
    return not torch.compiler.is_compiling() and bool(mask.all())  # reading the values would break a compiled graph


def _refuse(asked: dict[str, Any]) -> None:
    """Raise ValueError for a request that would otherwise be ignored."""
    for name in ("output_attentions", "output_hidden_states"):
        if asked.pop(name, None):
            raise ValueError(f"{name} is not supported by this model")
