"""Configs of every kind of sharing, exported: what the tests of folders, formats and trainers have in common."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from torch.nn import functional as F

from nas.data.tokenizer import bytes_json
from nas.export import ModelCard, export
from nas.model.decoder import Decoder
from nas.model.supernet import Supernet
from nas.presets import presets
from nas.sharing.primitives import PRIMITIVES
from nas.sharing.shape import ModelShape, RotaryScaling
from nas.sharing.sharing_config import SharingConfig
from nas.sharing.space import SearchSpace

SHAPE = replace(tiny.MHA, vocab_size=257)
UNTIED = replace(SHAPE, tie_word_embeddings=False)

BY_HAND: dict[str, list[dict[str, Any]]] = {
    "everything": [{}, {"kv_heads": 2}, {"kv": 1, "ffn": 0}, {"tie": 1}],
    "first reads the last": [{"kv": 3}, {"kv": 3}, {}, {}],
    "first keeps nothing": [{"drop": "attn"}, {"window": 4}, {"kv": 1, "window": 2}, {}],
    "keys and values apart": [{}, {"k_from": 0}, {"v_from": 1}, {"k_from": 0, "v_from": 1, "kv_heads": 4}],
    "a map of a window": [{"window": 3}, {"attn_map": 0}, {"window": 1}, {"attn_map": 2, "v_heads": 1}],
    "no attention": [{"drop": "attn"}] * 4,
    **{f"together-{n}": choices + [{}] * (4 - len(choices)) for n, choices in enumerate(tiny.TOGETHER)},
}
speller = tiny.Speller(SHAPE, seed=0)
SPELLED = {f"random-{n}": SharingConfig.make(SHAPE, choices, **whole) for n in range(20) for choices, whole in [speller.spell()]}
CONFIGS = dict(presets(SHAPE)) | {name: SharingConfig.make(SHAPE, layers) for name, layers in BY_HAND.items()} | SPELLED
KINDS = ["dense", "albert", "gqa-2", "cla-2", "lckv-2", "gemma3n-2", "moeut-2", "dictformer-2", *[*BY_HAND][:6]]
"""One config for each kind of sharing."""


def said(config: SharingConfig) -> dict[str, Any]:
    """Every choice of a config, by a search space's names."""
    layers = {f"layer_{i}.{name}": value for i, layer in enumerate(config.layers) for name, value in layer}
    return dict(config.model_choices) | layers


def primitives(config: SharingConfig) -> set[str]:
    return {name.rpartition(".")[2] for name in said(config)}


def covering() -> list[str]:
    """A few configs that use every primitive together."""
    chosen: list[str] = []
    missing = set(PRIMITIVES)
    while missing:
        chosen.append(max(CONFIGS, key=lambda name: len(primitives(CONFIGS[name]) & missing)))
        assert primitives(CONFIGS[chosen[-1]]) & missing, f"no config here uses {missing}"
        missing -= primitives(CONFIGS[chosen[-1]])
    return chosen


FEW = [*[*BY_HAND][:5], "dictformer-2", "moeut-2"]
COVERING = list(dict.fromkeys(["dense", "everything", "first reads the last", *covering()]))


def over(quick: list[str], slow: list[str]) -> Any:
    """Runs a test on a few configs' `names`, and marked slow, on the others."""
    others = [name for name in slow if name not in quick]
    parts = [pytest.param(quick, id="quick"), pytest.param(others, id="slow", marks=pytest.mark.slow)]
    return pytest.mark.parametrize("names", parts)


over_all, over_kinds = over(COVERING, [*CONFIGS]), over(FEW, [*KINDS, *COVERING])


def bold(decoder: Decoder) -> Decoder:
    """Weights so large that every part of the model changes the logits."""
    generator = torch.Generator().manual_seed(1)
    for weight in decoder.parameters():
        weight.data += 0.2 * torch.randn(weight.shape, generator=generator)
    return decoder


def supernet(shape: ModelShape, config: SharingConfig) -> Supernet:
    """A supernet of all that a config may choose."""
    space = SearchSpace(shape, {name: (value,) for name, value in said(config).items()})
    net = Supernet(shape, torch.Generator().manual_seed(0), space.extra_parameters())
    bold(net.bank)
    return net


@dataclass(frozen=True)
class Case:
    """A supernet's subnet, exported as `hf`."""

    config: SharingConfig
    subnet: Decoder
    folder: Path

    @cached_property
    def model(self) -> Any:
        """As transformers loads it. A test that changes it loads its own."""
        model, info = from_pretrained(self.folder, output_loading_info=True)
        assert not any(info.values()), info
        return model


class Exports:
    """`exports(name, tied)`: a config's `Case`, each made once."""

    def __init__(self, root: Path) -> None:
        self.root, self.made = root, dict[tuple[str, bool], Case]()

    def __call__(self, name: str, tied: bool = True) -> Case:
        if (name, tied) not in self.made:
            config, folder = CONFIGS[name], self.root / f"{name.replace(' ', '-')}{'' if tied else '-untied'}"
            subnet = supernet(SHAPE if tied else UNTIED, config).subnet(config)
            export(subnet, config, bytes_json(), folder, ModelCard())
            self.made[name, tied] = Case(config, subnet, folder)
        return self.made[name, tied]


def from_pretrained(folder: Path, **kwargs: Any) -> Any:
    """By the code in the folder."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **kwargs)


def load(folder: Path, **kwargs: Any) -> Any:
    """By this package's class, which takes less time than the folder's code."""
    from nas.export.modeling_nas import NasForCausalLM

    return NasForCausalLM.from_pretrained(folder, **kwargs)


def tokens(batch: int, seq: int, seed: int = 0) -> Tensor:
    return torch.randint(256, (batch, seq), generator=torch.Generator().manual_seed(seed))


def greedy(model: Decoder, prompt: Tensor, count: int) -> Tensor:
    """The `count` likeliest tokens after a prompt `(seq,)`, one by one, without a cache."""
    for _ in range(count):
        prompt = torch.cat([prompt, model(prompt[None])[0, -1:].argmax(-1)])
    return prompt[-count:]


def batch_of(texts: list[Tensor], side: str = "left", pad: int = 0) -> tuple[Tensor, Tensor]:
    """Texts `(seq,)` in a batch, and its attention mask."""
    longest = max(len(text) for text in texts)
    before = [longest - len(text) if side == "left" else 0 for text in texts]
    sides = [(n, longest - n - len(text)) for n, text in zip(before, texts, strict=True)]
    x = [F.pad(text, side, value=pad) for text, side in zip(texts, sides, strict=True)]
    return torch.stack(x), torch.stack([F.pad(torch.ones_like(t), side) for t, side in zip(texts, sides, strict=True)])


FAMILIES: dict[str, Any] = {
    **{"attention_bias": True, "qk_norm": True, "hidden_act": "gelu_tanh", "embedding_multiplier": 3.0},
    "rotary_scaling": RotaryScaling("llama3", 2.0),
}
"""Everything in which families of decoders differ, at once."""

WITHOUT = """
import sys
from importlib.abc import MetaPathFinder

class Without(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {names}:
            raise ModuleNotFoundError(name=name)

sys.meta_path.insert(0, Without())
sys.path.insert(0, ".")
"""


def stranger(folder: Path, code: str, *words: str, without: tuple[str, ...] = ("nas",)) -> str:
    """What code prints in a folder, of a Python in which some packages are not."""
    env = {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder.parent / "hf")}
    command = [sys.executable, "-I", "-c", WITHOUT.replace("{names}", str(without)) + code, *words]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    assert "Error" not in done.stderr
    return done.stdout


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters()}


def rhyme(path: Path) -> Path:
    """A text that a small model learns in a few steps."""
    path.write_text("".join(f"{n} green bottles, hanging on the wall.\n" for n in range(400)))
    return path


# Ways to damage a folder


def edit(name: str, change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        data = json.loads((folder / name).read_text())
        change(data)
        (folder / name).write_text(json.dumps(data))

    return damage


def reweigh(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    from safetensors.torch import load_file, save_file

    def damage(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors")

    return damage


def copied(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to))
