"""Folders of Llama's family: read as `transformers` reads them, written as it reads them, or refused in one line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from test_export import CONFIGS, SHAPE, UNTIED, bold, edit, reweigh, supernet, tokens
from torch import Tensor, nn

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from nas.checkpoint import FAMILIES, family_of, read_checkpoint, read_shape, tensors_of, written_out
from nas.checkpoint.extras import TEXTS, TOKEN_IDS
from nas.checkpoint.families import ACTIVATIONS, SIZES
from nas.data.tokenizer import bytes_json
from nas.errors import UserError
from nas.export import Card, export, load_export, read_config
from nas.memory import MemorySpec, measure
from nas.model import Decoder, init_weights
from nas.plan import weight_shapes
from nas.shape import ModelShape, RotaryScaling
from nas.sharing import SharingConfig
from nas.supernet import dense_plan

HEADS = {"mha": 4, "gqa": 2, "mqa": 1}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8,
    "rope_theta": 500.0,
}
LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}


@dataclass(frozen=True)
class Made:
    """A folder that transformers wrote."""

    family: str
    heads: str = "gqa"
    tied: bool = False
    shards: bool = False
    dtype: str = "float32"
    said: tuple[tuple[str, Any], ...] = ()

    def config(self) -> Any:
        """The configuration, by transformers' own class."""
        import transformers

        sizes = {
            "vocab_size": 260,  # more than the tokenizer's: padded
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": HEADS[self.heads],
            "max_position_embeddings": 64,
            "tie_word_embeddings": self.tied,
        }
        wide = {"head_dim": 16} if self.family in ("qwen3", "gemma") else {}
        kind = getattr(transformers, FAMILIES[self.family].architecture.replace("ForCausalLM", "Config"))
        return kind(**sizes | wide | dict(self.said))

    def write(self, folder: Path) -> Path:
        """Fill the folder with a model every weight of which tells, and a tokenizer."""
        import transformers

        model = getattr(transformers, FAMILIES[self.family].architecture)(self.config())
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(torch.randn(weight.shape, generator=generator) / (3 if weight.ndim == 1 else 6))
        model.to(getattr(torch, self.dtype)).save_pretrained(folder, **({"max_shard_size": "20KB"} if self.shards else {}))
        assert (folder / "model.safetensors.index.json").is_file() == self.shards
        (folder / "tokenizer.json").write_text(bytes_json())
        return folder


def theirs(folder: Path, **given: Any) -> nn.Module:
    """The model in a folder as transformers' own class, in float32; nothing missing, nothing left over."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, **given)
    assert not any(info.values()), info
    return model.eval()


@torch.no_grad()
def assert_same(folder: Path, seq: int = 40) -> None:
    """This project and transformers make the same logits of a folder."""
    x = tokens(2, seq)
    torch.testing.assert_close(load_export(folder).model.float()(x), theirs(folder)(x).logits, rtol=1e-4, atol=1e-4)


def pairs(made: Made) -> set[tuple[Any, Any]]:
    """What meets in a folder, two by two."""
    values = [(name, value) for name, value in vars(made).items() if name != "said"]
    return {(one, two) for n, one in enumerate(values) for two in values[n + 1 :]}


def gain(made: Made, met: set[tuple[Any, Any]]) -> int:
    """How much is new in a folder; a family is there three times only."""
    return sum(2 if one[0] == "family" else 1 for one, _ in pairs(made) - met)


def sparse() -> list[Made]:
    """Every family with every number of heads, each otherwise so that most of what has not met yet does."""
    chosen: list[Made] = []
    met: set[tuple[Any, Any]] = set()
    for family, heads in product(FAMILIES, HEADS):
        rest = product((False, True), (False, True), ("float32", "bfloat16"))
        chosen.append(max((Made(family, heads, *one) for one in rest), key=lambda made: gain(made, met)))
        met |= pairs(chosen[-1])
    return chosen


SPARSE = sparse()
FURTHER = {
    "llama 3.1": Made("llama", said=(("rope_parameters", LLAMA3),)),
    "linear": Made("llama", said=(("rope_parameters", LINEAR),)),
    "wide heads": Made("llama", said=(("head_dim", 20),)),
    "geglu": Made("llama", said=(("hidden_act", "gelu_pytorch_tanh"),)),
    "exact gelu": Made("mistral", said=(("hidden_act", "gelu"),)),
    "another base and epsilon": Made("qwen2", said=(("rope_parameters", {"rope_type": "default", "rope_theta": 99.0}), ("rms_norm_eps", 0.1))),
    "gemma's own word for it": Made("gemma", said=(("hidden_act", "gelu"),)),
    "gemma with silu": Made("gemma", said=(("hidden_act", "silu"),)),
    "a window as long as the text": Made("mistral", said=(("sliding_window", 64),)),
    "float16": Made("qwen3", dtype="float16"),
}  # fmt: skip


def test_every_two_things_that_a_folder_may_be_meet_in_one() -> None:
    every = product(FAMILIES, HEADS, (False, True), (False, True), ("float32", "bfloat16"))
    wanted = set().union(*(pairs(Made(*one)) for one in every))
    assert set().union(*map(pairs, SPARSE)) == wanted


# Reading


@pytest.mark.parametrize("made", [*SPARSE, *FURTHER.values()], ids=str)
def test_a_folder_of_transformers_is_the_same_model(made: Made, tmp_path: Path) -> None:
    folder = made.write(tmp_path)
    loaded = load_export(folder)
    assert_same(folder)
    assert not any(dict(layer) for layer in loaded.config.layers)
    assert loaded.shape.num_key_value_heads == HEADS[made.heads]
    assert read_config(folder) == (loaded.shape, loaded.config)
    read = {weight.dtype for weight in loaded.model.parameters()}
    assert read == {torch.float32 if loaded.notes else getattr(torch, made.dtype)}
    assert bool(loaded.notes) == (made.family == "gemma" and made.dtype != "float32")
    assert all(weight.requires_grad for weight in loaded.model.parameters())
