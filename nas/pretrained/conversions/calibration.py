"""A pretrained model, and what is measured of it on a calibration text: similarities of layers, keys and values, and inputs.

Owns `PretrainedModel` and the measuring, in float32 and a few sequences at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ...model.attention import rotary
from ...model.decoder import Decoder, ForwardState
from ...presets.rows import Numbers as Numbers
from ...sharing.plan import DOWN_PROJ, GATE_PROJ, Q_PROJ
from ...sharing.shape import ModelShape
from ...sharing.sharing_config import SharingConfig

StateDict = dict[str, Tensor]
T = TypeVar("T")
Place = tuple[int, str]  # a layer and a slot
ROWS, TOKENS = 8, 1024  # sequences that go through a model at once, or as many as have so many tokens
PART = 256  # tokens whose cosines are taken at once, in float64
JITTER = 1e-6  # added to the inputs' second moment, times its mean diagonal: fewer tokens than the width leave it singular


@dataclass(frozen=True, eq=False)
class PretrainedModel:
    """A trained dense model in float32, and its calibration text: tokens `(sequences, seq)`."""

    model: Decoder
    calibration: Tensor
    _series: dict[Any, tuple[Iterator[Any], list[Any]]] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        assert self.model.plan == SharingConfig.dense(self.model.shape).resolve(self.model.shape)
        assert {weight.dtype for weight in self.model.parameters()} == {torch.float32}
        object.__setattr__(self, "calibration", self.calibration.to(self.device))

    @property
    def shape(self) -> ModelShape:
        return self.model.shape

    @property
    def device(self) -> torch.device:
        """Where the model lies, and everything is computed."""
        return self.model.embed_tokens.weight.device

    @cached_property
    def weights(self) -> StateDict:
        """The model's own weights, by name: to be read, and not changed."""
        return {name: weight.detach() for name, weight in self.model.state_dict().items()}

    @cached_property
    def moments(self) -> dict[Place, Tensor]:
        """Mean of x xᵀ over tokens, `(hidden, hidden)` in float64, of the inputs x of q and gate in each layer; measured once.
        k and v have q's inputs, and up has gate's."""
        places = [(i, slot) for i in range(self.shape.num_hidden_layers) for slot in (Q_PROJ, GATE_PROJ)]
        size = self.shape.hidden_size, self.shape.hidden_size
        found = {place: torch.zeros(size, dtype=torch.float64, device=self.device) for place in places}

        def add(place: Place, x: Tensor) -> None:
            x = x.double()
            found[place] += x.T @ x / self.calibration.numel()

        watch_inputs(self.model, self.calibration, places, add)
        return found

    def first(self, count: int, series: Callable[[PretrainedModel], Iterator[T]]) -> list[T]:
        """The first items of a series that a method finds in this model, `count` if there are so many; each is found once,
        whichever sizes and methods ask for it."""
        items, found = self._series.setdefault(series, (series(self), []))
        found += islice(items, max(count - len(found), 0))
        return found[:count]

    def matrix(self, i: int, slot: str) -> Tensor:
        """Layer i's matrix `(out, in)` in a slot."""
        return self.weights[f"layers.{i}.{slot}.weight"]

    def with_weights(self, weights: StateDict) -> PretrainedModel:
        """The same model and calibration text, with other weights, which are not copied."""
        model = Decoder(self.shape, self.model.plan)
        model.load_state_dict(weights, assign=True)
        return PretrainedModel(model, self.calibration)

    def subnet(self, config: SharingConfig) -> Decoder:
        """A decoder on the model's own Parameters, of a config that needs no others."""
        plan = config.resolve(self.shape)
        return Decoder(self.shape, plan, lambda name, size: self.model.get_submodule(name.removesuffix(".weight")))


def batches(tokens: Tensor) -> tuple[Tensor, ...]:
    """The calibration text `(sequences, seq)` in parts that go through a model at once."""
    return tokens.split(min(ROWS, max(1, TOKENS // tokens.shape[1])))


Pass = tuple[list[Tensor], ForwardState]
"""The residual stream `(batch, seq, hidden)` before each layer and after the last, and the state of the forward."""


@torch.no_grad()
def residual_stream(model: Decoder, rows: Tensor, before: Pass | None = None, first: int = 0) -> Pass:
    """The stream of rows, and the state. With that of a model which is the same below layer `first`, no layer below it runs."""
    assert not model.plan.fixed_point_layers
    if before is None:
        positions = torch.arange(rows.shape[1], device=rows.device)[None]
        stream, state = [model.embed(rows)], ForwardState(rotary(positions, model.shape), None, None)
    else:
        stream, known = before[0][: first + 1], before[1]
        state = replace(known, keys=dict(known.keys), values=dict(known.values))
    for i in range(len(stream) - 1, len(model.plan.layers)):
        stream.append(model.block(i, stream[-1], state))
    return stream, state


def passes(model: Decoder, tokens: Tensor, before: Sequence[Pass] = (), first: int = 0) -> list[Pass]:
    """The passes over all of a calibration text, after `before` as in `residual_stream`."""
    parts = batches(tokens)
    known: list[Pass | None] = [*before] or [None] * len(parts)
    return [residual_stream(model, rows, one, first) for rows, one in zip(parts, known, strict=True)]


def cosines(made: Iterable[Pass]) -> Tensor:
    """Mean cosine of the residual stream at two places, over the tokens of passes; `(layers + 1, layers + 1)`. Place i is
    before layer i, the last is after the last layer. `1 - [i, i + 1]` is layer i's block influence (ShortGPT, 2403.03853)."""
    total, count = torch.zeros((), device="cpu"), 0
    for stream, _ in made:
        for part in torch.stack(stream).flatten(1, 2).split(PART, 1):
            unit = F.normalize(part.double(), dim=-1)
            total = total.to(unit) + torch.einsum("ath,bth->ab", unit, unit)
            count += part.shape[1]
    return total / count


def mean_kv(model: Decoder, tokens: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Each layer's rotated keys and its values `(heads, seq, dim)`, averaged over sequences, as KVSharer's code does."""
    total: list[tuple[Tensor, Tensor]] = []
    for rows in batches(tokens):
        state = residual_stream(model, rows)[1]
        found = [(state.keys[i].sum(0), state.values[i].sum(0)) for i in range(len(model.plan.layers))]
        total = [(k + a, v + b) for (k, v), (a, b) in zip(total, found, strict=True)] if total else found
    return [(k / len(tokens), v / len(tokens)) for k, v in total]


def last_hidden(model: Decoder, made: Iterable[Pass]) -> Tensor:
    """The last hidden states of a model's passes, `(sequences, seq · hidden)`."""
    with torch.no_grad():
        return torch.cat([model.norm(stream[-1]).flatten(1) for stream, _ in made])


def watch_inputs(model: Decoder, tokens: Tensor, places: Iterable[Place], add: Callable[[Place, Tensor], None]) -> None:
    """Call `add` with the inputs `(tokens, in)` of a dense model's matrices, some sequences at a time."""

    def hook(place: Place) -> torch.utils.hooks.RemovableHandle:
        return model.part(*place).register_forward_pre_hook(lambda module, given: add(place, given[0].flatten(0, -2)))

    handles = [hook(place) for place in places]
    try:
        for rows in batches(tokens):
            residual_stream(model, rows)
    finally:
        for handle in handles:
            handle.remove()


def activities(model: Decoder, tokens: Tensor) -> dict[int, Tensor]:
    """Mean absolute activity of each FFN's neurons over tokens, `(width,)` in float64, by layer of a dense model."""
    shape = model.shape
    zeros = torch.zeros(shape.intermediate_size, dtype=torch.float64, device=tokens.device)
    found = {i: zeros.clone() for i in range(shape.num_hidden_layers)}

    def add(place: Place, x: Tensor) -> None:
        found[place[0]] += x.double().abs().sum(0) / tokens.numel()

    watch_inputs(model, tokens, [(i, DOWN_PROJ) for i in found], add)
    return found


def root(moment: Tensor) -> Tensor:
    """S, lower triangular, with S Sᵀ a second moment: the norm of W S is that of W x, on average over the inputs."""
    damp = JITTER * moment.diagonal().mean() * torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    return torch.linalg.cholesky(moment + damp)
