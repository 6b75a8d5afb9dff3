"""What a conversion is: a row of the table, and the trained model it starts from.

Owns `PretrainedModel`, `Method` and how a size is read. The methods themselves are in `heads`, `layers` and `basis`, the table
of them in `methods`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ...errors import UserError, did_you_mean
from ...model.decoder import Decoder
from ...model.supernet import dense_plan, weights_of
from ...presets import PRESETS, Parameter
from ...presets.rows import check_size
from ...sharing.plan import Plan
from ...sharing.shape import ModelShape
from ...sharing.sharing_config import SharingConfig

Weights = dict[str, Tensor]
Numbers = tuple[int, ...]
"""A method's size: one number or two."""


@dataclass(frozen=True, eq=False)
class PretrainedModel:
    """A trained model that shares nothing, in float32, and the text it is looked at through: tokens `(windows, seq)`."""

    model: Decoder
    calibration: Tensor

    def __post_init__(self) -> None:
        assert self.model.plan == dense_plan(self.model.shape)
        assert {weight.dtype for weight in self.model.parameters()} == {torch.float32}

    @property
    def shape(self) -> ModelShape:
        """The model's."""
        return self.model.shape

    @cached_property
    def weights(self) -> Weights:
        """A copy of all of the model's weights, by name."""
        return weights_of(self.model)

    def matrix(self, i: int, slot: str) -> Tensor:
        """Layer i's matrix `(out, in)` in a slot."""
        return self.weights[f"layers.{i}.{slot}.weight"]

    def borrowed(self, config: SharingConfig) -> Decoder:
        """A decoder of a config that needs none but the model's own weights, on the model's own Parameters."""
        plan = config.resolve(self.shape)
        return Decoder(self.shape, plan, lambda name, size: self.model.get_submodule(name.removesuffix(".weight")))


@dataclass(frozen=True)
class Method:
    """A way to make a model that shares of one that does not.

    `choose(dense, numbers)` is what the model will share, of the size that `parameters` name and bound; `usual(shape)` is the
    size where none is given. `initialise(dense, config, start)` are the stand-alone model's weights, whole; `start` is one of
    `starts`, where there is a choice. A method with a `penalty(model, plan)` first trains the dense model to make it small.
    `note` says where this is not what the paper does.
    """

    name: str
    paper: str
    meaning: str
    parameters: tuple[Parameter, ...]
    usual: Callable[[ModelShape], Numbers]
    choose: Callable[[PretrainedModel, Numbers], SharingConfig]
    initialise: Callable[[PretrainedModel, SharingConfig, str], Weights]
    starts: tuple[str, ...] = ()
    penalty: Callable[[Decoder, Plan], Tensor] | None = None
    note: str = ""

    @property
    def size_name(self) -> str:
        """What a size is made of, as it is written: `Kxr`."""
        return "x".join(row.name for row in self.parameters)

    def read_size(self, shape: ModelShape, text: str | None) -> Numbers:
        """The numbers in `3x8`, or the usual ones. Raises UserError unless they are right for a model of this shape."""
        if text is None:
            return self.usual(shape)
        if not re.fullmatch(r"\d+(x\d+)*", text):
            raise UserError(
                f"{text!r} is not a size", where=self.name, hint=f"write {self.size_name}, such as {self.example(shape)}"
            )
        numbers = tuple(map(int, text.split("x")))
        check_size(self.name, self.parameters, shape, numbers)
        return numbers

    def read_start(self, given: str | None) -> str:
        """The start of that name, the method's first if none is given. Raises UserError."""
        if given is None:
            return self.starts[0] if self.starts else ""
        if not self.starts:
            raise UserError(f"{self.name} starts in one way only", where="init", hint="leave it out")
        if given not in self.starts:
            raise UserError(f"{self.name} has no start {given!r}", where="init", hint=did_you_mean(given, self.starts))
        return given

    def example(self, shape: ModelShape) -> str:
        """The usual size, as it is written."""
        return spell(self.usual(shape))


def spell(numbers: Numbers) -> str:
    """`3x8`: a size as it is written."""
    return "x".join(map(str, numbers))


def usual_of(preset: str) -> Callable[[ModelShape], Numbers]:
    """The first size that the zoo would try of a preset. Raises UserError where the scheme is impossible."""

    def usual(shape: ModelShape) -> Numbers:
        sizes = PRESETS[preset].sizes(shape)
        if not sizes or sizes[0] is None:
            raise UserError("no size of it fits this model", where=preset, hint="use another method, or a larger model")
        return sizes[0] if isinstance(sizes[0], tuple) else (sizes[0],)

    return usual


def built(preset: str) -> Callable[[PretrainedModel, Numbers], SharingConfig]:
    """A choice that asks nothing of the weights: the zoo's preset of that size."""
    row = PRESETS[preset]
    return lambda dense, numbers: SharingConfig.make(dense.shape, row.rule(dense.shape, *numbers), **row.whole(dense.shape))
