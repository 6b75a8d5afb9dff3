"""Tiny real models, spaces and texts that the laws are tried on.

Everything is made from the tables (`PRIMITIVES`, `PRESETS`), so that a new row is covered without a new test.
"""

from __future__ import annotations

import random
from dataclasses import replace

import torch
from torch import Tensor

from nas.model import Decoder
from nas.shape import ModelShape
from nas.sharing import PRIMITIVES, SharingConfig
from nas.space import OWN, SearchSpace
from nas.supernet import Supernet
from nas.zoo import presets

MHA = ModelShape(vocab_size=64, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=48)
GQA = replace(MHA, num_key_value_heads=2, tie_word_embeddings=False)
SHAPES = {
    "mha": MHA,
    "gqa-untied": GQA,
    "one-layer": replace(MHA, num_hidden_layers=1),
    "two-layers": replace(MHA, num_hidden_layers=2),
    "six-layers-gqa": replace(GQA, num_hidden_layers=6, tie_word_embeddings=True),
    "wide-heads": replace(MHA, head_dim=12),
}


def whole_space(shape: ModelShape) -> SearchSpace:
    """Every choice of every primitive at every layer, norms either way."""
    options: dict[str, tuple[object, ...]] = {"norms": ("private", "tied")}
    for i in range(shape.num_hidden_layers):
        for row in PRIMITIVES.values():
            found = (OWN, *range(i)) if row.sources else tuple(row.options(shape))
            if len(found) > 1:
                options[f"layer_{i}.{row.name}"] = found
    return SearchSpace(shape, options)


def random_space(rng: random.Random) -> SearchSpace:
    """A small space of any kind: some primitives at some layers, some of their options, in any order, not always `own`."""
    heads = rng.choice([2, 4])
    shape = ModelShape(
        vocab_size=rng.choice([8, 200]),
        hidden_size=heads * rng.choice([4, 8]),
        num_hidden_layers=rng.choice([1, 2, 3, 4]),
        num_attention_heads=heads,
        intermediate_size=rng.choice([8, 100]),
        num_key_value_heads=rng.choice([1, 2]),
    )
    whole, options = whole_space(shape).options, {}
    for name, full in whole.items():
        if rng.random() < 0.6:
            options[name] = tuple(rng.sample(full, rng.randint(1, min(len(full), 3))))
    return SearchSpace(shape, options)


def configs(shape: ModelShape, count: int = 6, seed: int = 0) -> list[SharingConfig]:
    """Every preset at every size, and random configs of the whole space."""
    rng, space = random.Random(seed), whole_space(shape)
    found = [config for _, config in presets(shape)] + [space.sample(rng) for _ in range(count)]
    return list(dict.fromkeys(found))


def supernet(shape: ModelShape, seed: int = 0) -> Supernet:
    """A supernet whose every weight matters: nothing near zero, and no two norms alike."""
    generator = torch.Generator().manual_seed(seed)
    net = Supernet(shape, generator)
    with torch.no_grad():
        for weight in net.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(1 + noise / 3 if weight.ndim == 1 else noise / weight.shape[1] ** 0.5)
    return net


def tokens(shape: ModelShape, batch: int = 2, seq: int = 7, seed: int = 0) -> Tensor:
    """Random tokens `(batch, seq)`."""
    return torch.randint(shape.vocab_size, (batch, seq), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: Decoder, rows: Tensor) -> Tensor:
    """The model's logits, kept out of autograd."""
    return model(rows)
