"""Tiny real models, spaces and texts that the laws are tried on.

Everything is made from the tables (`PRIMITIVES`, `PRESETS`), so that a new row is covered without a new test.
"""

import csv
import json
import math
import random
from collections import Counter
from collections.abc import Collection
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from nas.errors import UserError
from nas.model.decoder import Decoder
from nas.model.supernet import Supernet
from nas.presets import presets
from nas.sharing.memory import MemorySpec, measure
from nas.sharing.primitives import LAYER_ROWS, MODEL_ROWS, OWN, PRIMITIVES, Primitive
from nas.sharing.shape import ModelShape, RotaryScaling
from nas.sharing.sharing_config import SharingConfig
from nas.sharing.space import SearchSpace
from nas.training.evaluation import KINDS, Evaluation, is_value, losses_by_sequence, losses_over

Choices = list[dict[str, Any]]

MHA = ModelShape(
    vocab_size=64,
    hidden_size=32,
    num_hidden_layers=4,
    num_attention_heads=4,
    intermediate_size=48,
    max_position_embeddings=16,  # so that windows of a part of it are narrower than a test's text
)
GQA = replace(MHA, num_key_value_heads=2, tie_word_embeddings=False)
FAMILIES = replace(
    MHA,
    attention_bias=True,
    qk_norm=True,
    hidden_act="gelu_tanh",
    embedding_multiplier=32**0.5,
    rotary_scaling=RotaryScaling("llama3", factor=4.0, original_max_position_embeddings=8),
)
"""Everything in which the families of such decoders differ, at once."""
SHAPES = {
    "mha": MHA,
    "gqa-untied": GQA,
    "one-layer": replace(MHA, num_hidden_layers=1),
    "two-layers": replace(MHA, num_hidden_layers=2),
    "six-layers-gqa": replace(GQA, num_hidden_layers=6, tie_word_embeddings=True),
    "wide-heads": replace(MHA, num_hidden_layers=2, head_dim=12),
    "all-families": FAMILIES,
}


def options(row: Primitive, shape: ModelShape, i: int) -> list[Any]:
    """What a layer may choose of a primitive: earlier layers, or the row's own options, in banks kept at any earlier layer."""
    if row.sources:
        return [OWN, *range(i)]
    found = row.options(shape)
    if row.name == "factor":
        found = [OWN, *(text.replace(" at 0 ", f" at {j} ") for text in found if text != OWN for j in range(i + 1))]
    return found


FEW = ("norms", "tie", "attn", "ffn", "kv", "kv_heads")
"""Primitives of a space small enough to count, in which ties, sources and numbers meet."""


def whole_space(shape: ModelShape, names: Collection[str] = tuple(PRIMITIVES)) -> SearchSpace:
    """Every choice of every primitive (or of those named), at every layer and for the whole model."""
    found: dict[str, tuple[Any, ...]] = {row.name: tuple(row.options(shape)) for row in MODEL_ROWS if row.name in names}
    for i in range(shape.num_hidden_layers):
        found |= {f"layer_{i}.{row.name}": tuple(options(row, shape, i)) for row in LAYER_ROWS if row.name in names}
    return SearchSpace(shape, {name: values for name, values in found.items() if len(values) > 1})


def restrict(space: SearchSpace, name: str, options: tuple[Any, ...]) -> SearchSpace:
    """The same space with fewer options for one decision; a decision with one option left is not asked."""
    return replace(space, options={**space.options, name: options})


def random_space(rng: random.Random) -> SearchSpace:
    """A small space of any kind: a few primitives at some layers, some of their options, in any order, not always `own`."""
    heads = rng.choice([2, 4])
    shape = ModelShape(
        vocab_size=rng.choice([8, 200]),
        hidden_size=heads * rng.choice([4, 8]),
        num_hidden_layers=rng.choice([1, 2, 3, 4]),
        num_attention_heads=heads,
        intermediate_size=rng.choice([8, 100]),
        num_key_value_heads=rng.choice([1, 2]),
    )
    found = {}
    for name, full in whole_space(shape, rng.sample(list(PRIMITIVES), 5)).options.items():
        if rng.random() < 0.6:
            found[name] = tuple(rng.sample(full, rng.randint(1, min(len(full), 3))))
    return SearchSpace(shape, found)


class Speller:
    """Draws valid choices as a person might write them, canonical or not; of what it has drawn least, more often."""

    def __init__(self, shape: ModelShape, seed: int) -> None:
        self.shape, self.rng, self.drawn = shape, random.Random(seed), Counter[str]()

    def spell(self) -> tuple[Choices, dict[str, Any]]:
        """Choices of each layer, and of the whole model."""
        rows = self._some(MODEL_ROWS, self.rng.choice([0, 1, 2]))
        whole = {row.name: self.rng.choice(row.options(self.shape)) for row in rows}
        choices: Choices = [{} for _ in range(self.shape.num_hidden_layers)]
        config = SharingConfig.make(self.shape, choices, **whole)
        for i in range(self.shape.num_hidden_layers):
            for _ in range(20):
                tried = [*choices[:i], self._layer(choices[:i]), *choices[i + 1 :]]
                try:
                    config = SharingConfig.make(self.shape, tried, **whole)
                except UserError:
                    continue
                choices = tried
                break
        self.drawn.update(name for layer in (*config.layers, config.model_choices) for name, _ in layer)
        return choices, whole

    def _layer(self, below: Choices) -> dict[str, Any]:
        """A layer's choices, some of them often an earlier layer's."""
        rows = self._some(LAYER_ROWS, self.rng.choice([0, 1, 1, 2, 2, 3, 4]))
        begun = self.rng.choice([{}, *below])
        return begun | {row.name: self._value(row, len(below)) for row in rows}

    def _some(self, rows: list[Primitive], count: int) -> list[Primitive]:
        weights = [1 / (1 + self.drawn[row.name]) ** 2 for row in rows]
        return list(dict.fromkeys(self.rng.choices(rows, weights, k=count)))

    def _value(self, row: Primitive, i: int) -> Any:
        if row.sources:
            return self.rng.randrange(self.shape.num_hidden_layers if row.name == "kv" else i + 1)
        if row.name == "heads":
            return self._heads(max(i, 1))
        value = self.rng.choice([option for option in options(row, self.shape, i) if option != OWN])
        if row.name == "factor" and value.startswith("dictionary"):
            value = value.replace("dictionary 2", "dictionary 3") + self.rng.choice(["", " using 0 2", " using 2 1"])
        return value

    def _heads(self, layers: int) -> str:
        heads = range(self.shape.num_attention_heads)
        tied = self.rng.sample(heads, self.rng.randint(1, max(len(heads) - 1, 1)))
        return " ".join(f"{head}={self.rng.randrange(layers)}.{self.rng.choice(heads)}" for head in tied)


TOGETHER: list[Choices] = [
    [{"factor": "dictionary 3 at 0 for q k v o using 0 2"}, {"attn": 0, "delta": 2}],
    [{"factor": "basis 8 at 0 for q gate down", "experts": 4}, {"tie": 0, "delta": 2, "router": 0}],
    [{"factor": "dictionary 3 at 0 for q up", "experts": 2}, {"factor": "dictionary 3 at 0 for q using 1", "ffn": 0, "delta": 2}],
    [{}, {"heads": "0=0.1 2=0.0"}, {"attn": 1, "delta": 2}, {"heads": "1=2.2 3=1.3"}],
    [{"kv_heads": 2}, {"kv": 3}, {"tie": 1, "delta": 2}, {"k_heads": 1, "kv_input": 0}],
    [{}, {"kv": 2}, {"value_residual": 0.5, "kv_input": 0}, {"attn_map": 2}],
    [{"kv": 3, "drop": "ffn"}, {"kv": 2}, {"v_heads": 1, "kv_input": 0}, {"factor": "basis 4 at 3 for k v"}],
    [{"window": 4}, {"window": 2, "kv": 0}, {"attn_map": 1}, {"window": 4, "k_from": 0, "value_residual": 0.5}],
    [{"window": 2}, {"attn_map": 0, "kv_input": 0}, {"attn": 1, "v": 0, "delta": 2}, {"window": 2, "v_from": 2}],
    [{"experts": 8, "active_experts": 1}, {"tie": 0}, {"ffn": 0, "router": 1}, {"intermediate": 24, "experts": 3}],
]
"""What meets in one layer and has to get on."""


@lru_cache
def configs(shape: ModelShape, count: int = 12, seed: int = 0) -> tuple[SharingConfig, ...]:
    """Every preset at every size, random configs in which every primitive has its turn, and, of 4 layers, those in `TOGETHER`."""
    speller = Speller(shape, seed)
    spelled: list[tuple[Choices, dict[str, Any]]] = [speller.spell() for _ in range(count)]
    if shape.num_hidden_layers == 4 and shape.num_key_value_heads == 4:
        spelled += [([*choices, *[{} for _ in range(4 - len(choices))]], {"norms": "tied"}) for choices in TOGETHER]
    found = [config for _, config in presets(shape)]
    return tuple(dict.fromkeys([*found, *(SharingConfig.make(shape, choices, **whole) for choices, whole in spelled)]))


@lru_cache
def extras(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """What a supernet must keep for every config of `configs`, and for everything that can be spelled."""
    sizes = whole_space(shape).extra_parameters()
    said = [(i, *pair) for config in configs(shape) for i, layer in enumerate(config.layers) for pair in layer]
    said += [(0, *pair) for config in configs(shape) for pair in config.model_choices]
    for i in range(shape.num_hidden_layers):
        names = " ".join(PRIMITIVES["factor"].options(shape)[1].split()[5:])
        said += [(i, "factor", f"dictionary 3 at {j} for {names}") for j in range(i + 1)]
    for i, name, value in said:
        for weight, size in PRIMITIVES[name].supernet_parameters(shape, i, value):
            sizes[weight] = tuple(map(max, size, sizes.get(weight, size)))
    return sizes


def supernet(shape: ModelShape, seed: int = 0) -> Supernet:
    """A supernet for every config, whose every weight matters: nothing near zero, and no two norms alike."""
    generator = torch.Generator().manual_seed(seed)
    net = Supernet(shape, generator, extras(shape))
    with torch.no_grad():
        for weight in net.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(1 + noise / 3 if weight.ndim == 1 else noise / weight.shape[-1] ** 0.5)
    return net


def tokens(shape: ModelShape, batch: int = 2, seq: int = 7, seed: int = 0) -> Tensor:
    """Random tokens `(batch, seq)`."""
    return torch.randint(shape.vocab_size, (batch, seq), generator=torch.Generator().manual_seed(seed))


def read_csv(shape: ModelShape, text: str) -> list[Evaluation]:
    """The inverse of `nas.report.front_csv`."""
    rows = []
    for row in csv.DictReader(text.splitlines()):
        data = {name: cell for name, cell in row.items() if cell or name in ("name", "supernet", "part")}
        numbers = {name: (int if KINDS.get(name) is int else float)(data[name]) for name in data if _is_number(name)}
        rows.append(Evaluation.from_data(shape, data | numbers | {"config": json.loads(data["config"])}))
    return rows


def _is_number(column: str) -> bool:
    known = KINDS.get(column, str) is not str or column == "validation_perplexity"
    return known or is_value(column)


def evaluated(shape: ModelShape, step: int) -> list[Evaluation]:
    """Every so many of the presets, on inherited weights of a supernet, measured on random text."""
    net, windows, found = supernet(shape), tokens(shape, 4, 17), list[Evaluation]()
    for number, (name, config) in enumerate(list(presets(shape))[::step]):
        rows = losses_by_sequence(net.subnet(config), windows, autocast=False)
        losses, memory = losses_over(rows), measure(shape, config, MemorySpec(context=64))
        rest = {"part": "test", "validation_perplexity": 1.01 * losses.perplexity, "windows": tuple(rows.tolist())}
        bits = losses.loss_nats_per_token / math.log(2)
        found.append(Evaluation(config, memory, losses, bits, "inherited", 0, 1000, 0.25, number, name, **rest))
    return found


@torch.no_grad()
def logits(model: Decoder, rows: Tensor) -> Tensor:
    """The model's logits, kept out of autograd."""
    return model(rows)
