"""The table of conversions from a trained model that shares nothing.

Owns `METHODS` and `convert`, which applies a row. How a row chooses and initialises is in `heads`, `layers` and `basis`.
"""

from __future__ import annotations

from ...errors import UserError, did_you_mean
from ...model.decoder import Decoder
from ...model.supernet import dense_config
from ...presets import Parameter
from ...presets.rows import all_but, any_kv_heads, any_layers, any_rank
from ...sharing.plan import weight_shapes
from ...sharing.shape import ModelShape
from ...sharing.sharing_config import SharingConfig
from . import basis, heads, layers
from .rows import Method, Numbers, PretrainedModel, Weights, built, spell, usual_of
from .weights import STARTS, start_from


def _mean(dense: PretrainedModel, config: SharingConfig, start: str) -> Weights:
    return start_from(dense, config, "average")


def _own(dense: PretrainedModel, config: SharingConfig, start: str) -> Weights:
    return start_from(dense, config, start or "lower")


_TIES = tuple(STARTS)
_PERCENT = (Parameter("percent", heads.most_percent),)
_RUNS = (Parameter("M", any_layers),)
_GREEDY = "measured again after each removal, which is how blocks' coupling counts here; the paper learns gates"
_TRUE_MEAN = "all heads and layers of a group count alike"

METHODS: dict[str, Method] = {
    row.name: row
    for row in (
        Method(
            "gqa",
            "2305.13245",
            "KV heads in groups, each the mean of its heads",
            (Parameter("g", any_kv_heads),),
            usual_of("gqa"),
            built("gqa"),
            _mean,
        ),
        Method(
            "mlkv",
            "2406.09297",
            "KV of m layers in g heads, each the mean over the layers and heads that read it",
            (Parameter("m", any_layers), Parameter("g", any_kv_heads)),
            usual_of("mlkv"),
            built("mlkv"),
            _mean,
            note=_TRUE_MEAN,
        ),
        Method(
            "dha",
            "2406.06567",
            "K in k heads and V in v, each the mean of similar ones, brought together first",
            (Parameter("k", any_kv_heads), Parameter("v", any_kv_heads)),
            usual_of("dha"),
            built("dha"),
            heads.initialise_dha,
            note="similar by what they make of the text; one order of heads serves K and V, all layers have as many, and heads "
            "are fused by their mean at once; the paper groups K and V apart, by weights, shares a budget out between layers, "
            "and learns the fusion step by step; biases go with their heads and are not compared",
        ),
        Method(
            "headwise-direct",
            "2402.11819",
            "the heads most like one of an earlier layer, by their q and k, become that one",
            _PERCENT,
            heads.usual_percent,
            heads.choose_headwise,
            _own,
            note="a match of a tied head is its root, and a layer keeps one head of its own; the paper has neither rule. Biases "
            "go with their heads and are not compared; a tied head goes through its own layer's norm of queries and keys",
        ),
        Method(
            "headwise-post",
            "2402.11819",
            "the same, after training that draws the pairs together",
            _PERCENT,
            heads.usual_percent,
            heads.choose_headwise,
            _own,
            penalty=heads.head_distance,
            note="as headwise-direct",
        ),
        Method(
            "kvsharer",
            "2410.18517",
            "n layers read the KV of earlier ones that theirs are least like, where the last hidden state bears it",
            (Parameter("n", all_but(1)),),
            usual_of("kvsharer"),
            layers.choose_kvsharer,
            _own,
        ),
        Method(
            "basis",
            "2410.03765",
            "q, k, v, gate and up of g neighbours in a basis of rank r, by an SVD that the text's inputs apply_attention_map",
            (Parameter("g", any_layers), Parameter("r", any_rank)),
            usual_of("basis"),
            built("basis"),
            basis.initialise,
            note="K and V of fewer heads have a rank in proportion; later layers' inputs are those of the dense model; "
            "biases and norms of heads stay each layer's own",
        ),
        Method(
            "drop",
            "2403.03853",
            "d layers of least block influence are not run",
            (Parameter("d", all_but(1)),),
            lambda shape: (max(1, shape.num_hidden_layers // 4),),
            layers.choose_drop,
            _own,
            note="influences are measured again after each removal; the paper ranks once",
        ),
        Method(
            "foldgpt",
            "2407.00928",
            "d layers of least block influence are not run, the others tied in pairs",
            (Parameter("d", all_but(2)),),
            usual_of("foldgpt"),
            layers.choose_foldgpt,
            _own,
            starts=("lower", "average"),
            note=f"influence is {_GREEDY}",
        ),
        Method(
            "merge-layers",
            "2406.16330",
            "d layers merged into the neighbour below whose output is most like theirs",
            (Parameter("d", all_but(1)),),
            usual_of("merge-layers"),
            layers.choose_merge,
            layers.initialise_merge,
            note="alike by the cosine of their outputs, measured again after each merge; the paper by mutual information on "
            "manifolds of them, measured once",
        ),
        Method(
            "sequence",
            "2104.06022",
            "runs of layers become one block of M",
            _RUNS,
            usual_of("sequence"),
            built("sequence"),
            _own,
            starts=_TIES,
            note="a baseline: the paper trains from scratch",
        ),
        Method(
            "cycle",
            "2104.06022",
            "layers in a cycle become one block of M",
            _RUNS,
            usual_of("cycle"),
            built("cycle"),
            _own,
            starts=_TIES,
            note="a baseline: the paper trains from scratch",
        ),
        Method(
            "relaxed-recursive",
            "2410.20672",
            "layers in a cycle of K, and deltas of rank r by the SVD of what is lost",
            (Parameter("K", all_but(1)), Parameter("r", any_rank)),
            usual_of("relaxed-recursive"),
            built("relaxed-recursive"),
            layers.initialise_relaxed,
            starts=_TIES,
            note="deltas from the second turn on (the paper: in the first too), so that it starts best from the lower layers",
        ),
    )
}
"""Every conversion. A new one is a row here, and nothing elsewhere."""


def find(name: str) -> Method:
    """The row of that name. Raises UserError."""
    if name not in METHODS:
        raise UserError(f"unknown method {name!r}", where="method", hint=did_you_mean(name, METHODS))
    return METHODS[name]


def require_dense(shape: ModelShape, config: SharingConfig, where: str) -> None:
    """Raise UserError if a model shares anything."""
    if config != dense_config(shape):
        message = f"it shares already (configuration {config.hash}), and a conversion starts from a model that shares nothing"
        raise UserError(message, where=where, hint="convert the dense model it comes from")


def choose(method: Method, dense: PretrainedModel, numbers: Numbers) -> SharingConfig:
    """What the converted model shares. Raises UserError, naming the method, if that is impossible in this model."""
    try:
        return method.choose(dense, numbers)
    except UserError as error:
        raise UserError(error.message, where=f"{method.name} {spell(numbers)}", hint=error.hint) from None


def convert(method: Method, dense: PretrainedModel, config: SharingConfig, start: str) -> Decoder:
    """The stand-alone model of a config that the method chose, initialised from the dense one's weights."""
    plan = config.resolve(dense.shape)
    weights = method.initialise(dense, config, start)
    model = Decoder(dense.shape, plan)
    assert {name: tuple(weight.shape) for name, weight in weights.items()} == weight_shapes(dense.shape, plan)
    model.load_state_dict(weights)
    return model
