"""The weight-sharing supernet: one bank of weights, and every subnet a view of it.

Owns the banks and how a smaller weight is read from a larger one. A subnet is an ordinary `Decoder` that holds the supernet's own
Parameters: a value, not a mode, so nothing has to be set or reset. How subnets are chosen is `nas.space`'s, how they are trained
`nas.training`'s.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .model import Decoder, Plan, init_weights, weight_shapes
from .shape import ModelShape
from .sharing import SharingConfig


class View(nn.Module):
    """A linear map whose weight is computed from a bank's at every call, so that gradients reach the bank."""

    def __init__(self, bank: nn.Module, read: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.bank, self.read = bank, read

    @property
    def weight(self) -> Tensor:
        """`(out, in)`, a differentiable function of the bank's weight."""
        return self.read(self.bank.weight)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """`(…, in)` to `(…, out)`."""
        return F.linear(x, self.weight)


def mean_heads(weight: Tensor, heads: int, head_dim: int) -> Tensor:
    """Keys' or values' projection of fewer heads: the mean of each group of adjacent ones (GQA, 2305.13245, section 2.1)."""
    grouped = weight.unflatten(0, (heads, -1, head_dim))
    return grouped.mean(1).flatten(0, 1)


class Supernet(nn.Module):
    """Weight banks for every layer at full size; `subnet(config)` runs any config on them.

    The bank is a dense `Decoder`: its shape's `num_key_value_heads` is the most any layer can have.
    """

    def __init__(self, shape: ModelShape, generator: torch.Generator) -> None:
        super().__init__()
        self.shape = shape
        self.bank = init_weights(Decoder(shape, dense_plan(shape)), generator)

    def subnet(self, config: SharingConfig) -> Decoder:
        """A decoder that computes with this supernet's Parameters; training it trains them."""
        return Decoder(self.shape, config.resolve(self.shape), self._part)

    def _part(self, name: str, size: tuple[int, ...]) -> nn.Module:
        module = self.bank.get_submodule(name.removesuffix(".weight"))
        full: Any = module.weight
        if tuple(full.shape) == size:
            return module
        head_dim = self.shape.head_dim
        return View(module, lambda weight: mean_heads(weight, size[0] // head_dim, head_dim))


def dense_plan(shape: ModelShape) -> Plan:
    """The plan in which every layer owns everything."""
    return SharingConfig.make(shape, [{} for _ in range(shape.num_hidden_layers)]).resolve(shape)


@torch.no_grad()
def weights_of(model: Decoder) -> dict[str, Tensor]:
    """A copy of every weight a decoder owns, views computed; the names and shapes of a stand-alone model's state dict."""
    modules = {name: model.get_submodule(name.removesuffix(".weight")) for name in weight_shapes(model.shape, model.plan)}
    return {name: module.weight.detach().clone() for name, module in modules.items()}  # type: ignore[operator]


def standalone(model: Decoder) -> Decoder:
    """A decoder of the same plan with copies of a subnet's weights, and nothing of the supernet's."""
    alone = Decoder(model.shape, model.plan)
    alone.load_state_dict(weights_of(model))
    return alone
