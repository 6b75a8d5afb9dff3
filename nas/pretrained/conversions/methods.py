"""The table of conversions (`METHODS`), how a row is applied, and the training before and after."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...data import train_batches
from ...errors import UserError, did_you_mean
from ...model.decoder import Decoder
from ...presets import PRESETS
from ...presets.rows import Parameter, all_but, check_size
from ...presets.rows import spell as spell
from ...sharing.label import label
from ...sharing.plan import Plan, weight_shapes
from ...sharing.shape import ModelShape
from ...sharing.sharing_config import SharingConfig
from ...training.evaluation import sequence_losses
from ...training.loop import Trainer, TrainSpec, backward_of, distillation_backward, plain_backward
from . import heads, layers
from .calibration import Numbers, PretrainedModel, StateDict
from .initialise import STARTS, initialise_basis, start_from


@dataclass(frozen=True)
class Conversion:
    """A way to make a model that shares of a dense one.

    parameters: what a size names, with bounds.
    usual: `(shape)`, the size where none is given.
    choose: `(dense, numbers)`, what the converted model shares; None where that is the preset of its name.
    initialise: `(dense, config, start)`, all weights of the stand-alone model; `start` is one of `starts`, where there are any.
    penalty: `(model, plan)`, what the dense model is first trained to reduce (`align_heads`).
    note: where the method differs from the paper's.
    like: the method whose measurements of the dense model it needs, too: one worker does the conversions of both.
    """

    name: str
    paper: str
    meaning: str
    parameters: tuple[Parameter, ...]
    usual: Callable[[ModelShape], Numbers]
    choose: Callable[[PretrainedModel, Numbers], SharingConfig] | None
    initialise: Callable[[PretrainedModel, SharingConfig, str], StateDict]
    starts: tuple[str, ...] = ()
    penalty: Callable[[Decoder, Plan], Tensor] | None = None
    note: str = ""
    like: str = ""

    @property
    def size_name(self) -> str:
        """The parameters of a size, as it is written: `Kxr`."""
        return "x".join(row.name for row in self.parameters)

    def read_size(self, shape: ModelShape, text: str | None) -> Numbers:
        """The numbers in `3x8`, or the usual ones. Raises UserError unless they fit a model of this shape."""
        if text is None:
            return self.usual(shape)
        if not re.fullmatch(r"\d+(x\d+)*", text):
            hint = f"write {self.size_name}, such as {spell(self.usual(shape))}"
            raise UserError(f"{text!r} is not a size", where=self.name, hint=hint)
        numbers = tuple(map(int, text.split("x")))
        check_size(self.name, self.parameters, shape, numbers)
        return numbers

    def preset(self, shape: ModelShape, numbers: Numbers) -> SharingConfig:
        """The preset of its name in a size. Raises UserError if it is impossible in this shape."""
        return PRESETS[self.name].build(shape, numbers)

    def read_start(self, given: str | None) -> str:
        """The start of that name, the method's first if none is given. Raises UserError."""
        if given is None:
            return self.starts[0] if self.starts else ""
        if not self.starts:
            raise UserError(f"{self.name} starts in one way only", where="init", hint="leave it out")
        if given not in self.starts:
            raise UserError(f"{self.name} has no start {given!r}", where="init", hint=did_you_mean(given, self.starts))
        return given


def _row(name: str, meaning: str, start: str = "lower", **others: Any) -> Conversion:
    """A row with the paper, parameters, first size and sharing of the preset of its name, unless `others` say otherwise. `start`
    is the row of `STARTS` where a user chooses none."""

    def usual(shape: ModelShape) -> Numbers:
        sizes = PRESETS[name].sizes(shape)
        if not sizes or sizes[0] is None:
            raise UserError("no size of it fits this model", where=name, hint="use another method, or a larger model")
        return sizes[0]

    preset = PRESETS.get(name)
    own: dict[str, Any] = {"paper": preset.paper, "parameters": preset.parameters} if preset else {}
    own |= {"usual": usual, "choose": None}
    own |= {"initialise": lambda dense, config, given: start_from(dense, config, given or start)}
    return Conversion(name=name, meaning=meaning, **own | others)


_TIES = tuple(STARTS)
_PERCENT = (Parameter("percent", heads.most_percent),)
_BASELINE = "a baseline: the paper trains from scratch"

# fmt: off
METHODS: dict[str, Conversion] = {
    row.name: row
    for row in (
        _row("gqa", "KV heads in groups, each the mean of its heads", "average"),
        _row("mlkv", "KV of m layers in g heads, each the mean over the layers and heads that read it", "average",
             note="all heads and layers of a group have equal weight"),
        _row("dha", "K in k heads and V in v, each the mean of similar heads, which are first put side by side",
             initialise=heads.initialise_dha, like="basis",
             note="heads are compared by their outputs on the calibration text, in one order for K and V, with as many in every "
                  "layer, and fused by their mean at once; the paper groups K and V separately, by weights, distributes a "
                  "budget over layers, and learns the fusion gradually; biases follow their heads and are not compared"),
        _row("headwise-direct", "the heads most similar, by their q and k, to a head of an earlier layer are tied to it",
             parameters=_PERCENT, usual=heads.usual_percent, choose=heads.choose_headwise,
             note="a match of a tied head is its root, and a layer keeps one head of its own; the paper has neither rule. "
                  "Biases follow their heads and are not compared; a tied head uses its own layer's norm of queries and keys"),
        _row("headwise-post", "the same, after training that aligns the pairs", parameters=_PERCENT, usual=heads.usual_percent,
             choose=heads.choose_headwise, penalty=heads.head_distance, note="as headwise-direct"),
        _row("kvsharer",
             "n layers read the KV of the earlier layers least similar to theirs, while the last hidden state stays similar",
             parameters=(Parameter("n", all_but(1)),), choose=layers.choose_kvsharer),
        _row("basis", "q, k, v, gate and up of g neighbours in a basis of rank r, by an SVD weighted by the text's inputs",
             initialise=initialise_basis,
             note="K and V of fewer heads have a rank in proportion; later layers' inputs are those of the dense model; biases "
                  "and norms of heads stay each layer's own"),
        _row("drop", "d layers of least block influence are not run", paper="2403.03853",
             parameters=(Parameter("d", all_but(1)),), usual=lambda shape: (max(1, shape.num_hidden_layers // 4),),
             choose=layers.choose_drop,
             note="influences are measured again after each removal; the paper ranks once"),
        _row("foldgpt", "d layers of least block influence are not run, the others tied in pairs",
             choose=layers.choose_foldgpt, like="drop", starts=("lower", "average"),
             note="influence is measured again after each removal, which accounts for blocks' coupling; the paper learns gates"),
        _row("merge-layers", "d layers merged into the neighbour below whose output is most similar to theirs",
             parameters=(Parameter("d", all_but(1)),), choose=layers.choose_merge, initialise=layers.initialise_merge,
             note="similarity is the cosine of the outputs, measured again after each merge; the paper uses mutual information "
                  "on manifolds of them, measured once"),
        _row("sequence", "runs of layers become one block of M", starts=_TIES, note=_BASELINE),
        _row("cycle", "layers in a cycle become one block of M", starts=_TIES, note=_BASELINE),
        _row("relaxed-recursive", "layers in a cycle of K, and deltas of rank r by the SVD of what is lost",
             initialise=layers.initialise_relaxed, starts=_TIES,
             note="deltas from the second turn on (the paper: in the first too), so that it starts best from the lower layers"),
    )
}
# fmt: on
"""Every conversion. A new one is a row here, and nothing elsewhere."""


def find(name: str) -> Conversion:
    """The row of that name. Raises UserError."""
    if name not in METHODS:
        raise UserError(f"unknown method {name!r}", where="method", hint=did_you_mean(name, METHODS))
    return METHODS[name]


def require_dense(config: SharingConfig, where: str) -> None:
    """Raise UserError if a model shares anything."""
    if not config.is_dense:
        message = f"it shares already ({label(config)}), and a conversion starts from a model that shares nothing"
        raise UserError(message, where=where, hint="convert the dense model it comes from")


def choose(method: Conversion, dense: PretrainedModel, numbers: Numbers) -> SharingConfig:
    """What the converted model shares. Raises UserError, naming the method, if that is impossible in this model."""
    try:
        return method.choose(dense, numbers) if method.choose else method.preset(dense.shape, numbers)
    except UserError as error:
        raise UserError(error.message, where=f"{method.name} {spell(numbers)}", hint=error.hint) from None


def convert(method: Conversion, dense: PretrainedModel, config: SharingConfig, start: str) -> Decoder:
    """The model of a config that the method chose, initialised from the dense one's weights. What the method leaves as it is, is
    the dense model's own: `standalone` makes a copy that can be trained."""
    plan = config.resolve(dense.shape)
    weights = method.initialise(dense, config, start)
    model = Decoder(dense.shape, plan)
    assert {name: tuple(weight.shape) for name, weight in weights.items()} == weight_shapes(dense.shape, plan)
    model.load_state_dict(weights, assign=True)
    return model


Steps = Iterator[tuple[int, float]]  # `(steps done, loss)` after each step


def fine_tune(
    model: Decoder,
    spec: TrainSpec,
    tokens: Tensor,
    generator: torch.Generator,
    teacher: Decoder | None = None,
    bos: int | None = None,
) -> Steps:
    """Train a converted model on text `(tokens,)`, or on a teacher's probabilities there. Raises NotFinite."""
    backward = plain_backward(model, spec) if teacher is None else distillation_backward(model, teacher, spec)
    return Trainer(model, spec, generator).run(train_batches(tokens, spec.batch, spec.seq, generator, bos), backward)


def align_heads(
    model: Decoder,
    penalty: Callable[[Decoder], Tensor],
    spec: TrainSpec,
    tokens: Tensor,
    generator: torch.Generator,
    bos: int | None = None,
) -> Steps:
    """Train a dense model on half its loss and half a penalty, as PostShare does (2402.11819). Raises NotFinite."""
    backward = backward_of(lambda rows: (sequence_losses(model, rows, spec.autocast).mean() + penalty(model)) / 2)
    return Trainer(model, spec, generator).run(train_batches(tokens, spec.batch, spec.seq, generator, bos), backward)
