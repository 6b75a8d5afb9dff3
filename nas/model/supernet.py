"""The weight-sharing supernet: one set of shared weights, of which every subnet is a view.

Owns the shared weights and how a smaller weight is read from a larger one. A subnet is an ordinary `Decoder` that holds the
supernet's own Parameters: a value, not a mode, so nothing has to be set or reset.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..sharing.plan import ATTENTION, O_PROJ, LayerPlan, Plan, projection, weight_shapes
from ..sharing.primitives import FACTORED
from ..sharing.shape import ModelShape
from ..sharing.sharing_config import SharingConfig
from .decoder import Decoder, init_weights, new_module, set_submodule

Sizes = Mapping[str, tuple[int, ...]]


class SlicedWeight(nn.Module):
    """A linear map or embedding whose weight is computed from a shared one at every call, so that gradients reach it."""

    def __init__(self, shared: nn.Module, read: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.shared, self.read = shared, read

    @property
    def weight(self) -> Tensor:
        """A differentiable function of the shared weight; `(out, in)` for a matrix."""
        return self.read(self.shared.weight)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """`(…, in)` to `(…, out)`; rows of an embedding by tokens."""
        return F.linear(x, self.weight) if x.is_floating_point() else F.embedding(x, self.weight)


def mean_heads(weight: Tensor, heads: int, head_dim: int) -> Tensor:
    """Keys' or values' projection, or its bias, of fewer heads: the mean of each group of neighbours (GQA, 2305.13245, 2.1)."""
    return weight.unflatten(0, (heads, -1, head_dim)).mean(1).flatten(0, 1)


def some_heads(weight: Tensor, heads: list[int], head_dim: int, dim: int) -> Tensor:
    """The rows (`dim` 0) or columns (1) of some heads."""
    parts = weight.unflatten(dim, (-1, head_dim))
    return parts.index_select(dim, torch.tensor(heads, device=weight.device)).flatten(dim, dim + 1)


def reader(shape: ModelShape, plan: Plan, name: str, size: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
    """How a plan's weight of this name and size is read from a larger one. Outside attention it is the first entries along every
    dimension (slimmable networks, 1812.08928)."""
    dim, slot = shape.head_dim, name.removesuffix(".weight").split(".", 2)[-1]
    if projection(slot) not in ATTENTION:
        return lambda weight: weight[tuple(map(slice, size))]
    i = int(name.split(".")[1])
    layer: LayerPlan = plan.layers[i]
    if layer.heads:
        return lambda weight: some_heads(weight, layer.own_heads(i), dim, int(slot == O_PROJ))
    return lambda weight: mean_heads(weight, size[0] // dim, dim)


class Supernet(nn.Module):
    """The weights of every layer at full size (`bank`, a dense `Decoder`); `subnet(config)` runs any config on them.

    No layer can have more than the shape's `num_key_value_heads`. `extra_parameters` are the names and shapes of the weights that
    configs need beyond the dense model's, or wider (`SearchSpace.extra_parameters`). Without a generator nothing is initialised.
    """

    def __init__(self, shape: ModelShape, generator: torch.Generator | None, extra_parameters: Sizes | None = None) -> None:
        super().__init__()
        self.shape = shape
        self.bank = Decoder(shape, SharingConfig.dense(shape).resolve(shape))
        make = new_module(shape)
        for name, size in (extra_parameters or {}).items():
            set_submodule(self.bank, name.removesuffix(".weight"), make(name.replace(FACTORED, "embed_tokens.weight"), size))
        if generator is not None:
            init_weights(self.bank, generator)

    def subnet(self, config: SharingConfig) -> Decoder:
        """A decoder on this supernet's Parameters; training it trains them."""
        plan = config.resolve(self.shape)
        return Decoder(self.shape, plan, lambda name, size: self._part(plan, name, size))

    def _part(self, plan: Plan, name: str, size: tuple[int, ...]) -> nn.Module:
        factored = name == "embed_tokens.weight" and plan.outside.embedding_rank
        module = self.bank.get_submodule((FACTORED if factored else name).removesuffix(".weight"))
        full: Any = module.weight
        return module if tuple(full.shape) == size else SlicedWeight(module, reader(self.shape, plan, name, size))


@torch.no_grad()
def weights_of(model: Decoder) -> dict[str, Tensor]:
    """A copy of every weight that a decoder owns, views computed, by the names of a stand-alone model's state dict."""
    modules = {name: model.get_submodule(name.removesuffix(".weight")) for name in weight_shapes(model.shape, model.plan)}
    return {name: module.weight.detach().clone() for name, module in modules.items()}  # type: ignore[operator]


def standalone(model: Decoder) -> Decoder:
    """A decoder of the same plan with copies of a subnet's weights, on their device."""
    weights = weights_of(model)
    alone = Decoder(model.shape, model.plan).to_empty(device=weights["embed_tokens.weight"].device)
    alone.load_state_dict(weights)
    return alone
