"""The model in a folder, loaded, run and saved with torch and safetensors alone.

It is the last part of the one file of the format `torch`; the plan and the decoder come before it there. A tokenizer that is not
of bytes needs `tokenizers`.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..model.attention import KVCache
from ..model.decoder import Decoder
from ..sharing.plan import Plan
from ..sharing.shape import ModelShape, RotaryScaling

HERE = Path(__file__).parent


def load(folder: str | Path = HERE) -> Decoder:
    """The model in a folder, in the dtype of its weights: an `nn.Module` in which each shared weight is one Parameter."""
    config = _config(folder)
    shape = {field.name: config[field.name] for field in fields(ModelShape)}
    scaling = shape["rotary_scaling"]
    model = Decoder(
        ModelShape(**shape | {"rotary_scaling": scaling and RotaryScaling(**scaling)}),
        Plan.from_data(config["plan"]),
    )
    model.load_state_dict(load_file(Path(folder) / "model.safetensors"), assign=True)
    return model


def save(model: Decoder, to: str | Path, folder: str | Path = HERE) -> None:
    """Save a model that was loaded from `folder` to another folder, with all that `load` needs."""
    Path(to).mkdir(parents=True, exist_ok=True)
    for name in ("model.py", "config.json", "sharing.yaml", "tokenizer.json"):
        shutil.copyfile(Path(folder) / name, Path(to) / name)
    save_file({name: weight.detach().cpu() for name, weight in model.state_dict().items()}, Path(to) / "model.safetensors")


def tokenizer(folder: str | Path = HERE) -> tuple[Callable[[str], list[int]], Callable[[list[int]], str]]:
    """Text to tokens, and tokens to text, for the model in a folder."""
    if _config(folder)["tokenizer"] == "bytes":
        spelt = b"<|endoftext|>" if end_tokens(folder) else b"\xff"  # UTF-8 has no byte 255

        def encode(text: str) -> list[int]:
            return [256 if byte == 255 else byte for byte in text.encode().replace(spelt, b"\xff")]

        return encode, lambda ids: bytes(i for i in ids if i < 256).decode(errors="replace")
    from tokenizers import Tokenizer

    found = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
    return lambda text: found.encode(text).ids, found.decode


def end_tokens(folder: str | Path = HERE) -> list[int]:
    """The tokens that end a text, for the model in a folder."""
    found = _config(folder).get("eos_token_id")
    return found if isinstance(found, list) else [] if found is None else [found]


def _config(folder: str | Path) -> dict[str, Any]:
    return dict(json.loads((Path(folder) / "config.json").read_text(encoding="utf-8")))


@torch.no_grad()
def generate(
    model: Decoder,
    tokens: Tensor,
    count: int,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
    ends: Sequence[int] = (),
) -> Tensor:
    """`(batch, seq + count)`: tokens `(batch, seq)` and `count` more, each sampled, or the likeliest if `temperature` is 0.

    A row ends at one of the tokens `ends`, which is repeated from there on; fewer tokens are added once all rows have ended. Only
    layers that own keys and values keep a cache.
    """
    cache, new, end = KVCache.of(model.plan), tokens, torch.tensor(list(ends), dtype=tokens.dtype, device=tokens.device)
    for step in range(count):
        last = tokens[:, -1:]
        ended = torch.isin(last, end) & (step > 0)
        if ended.all():
            break
        logits = model(new, cache=cache)[:, -1].float()
        if temperature:
            new = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
        else:
            new = logits.argmax(-1, keepdim=True)
        new = torch.where(ended, last, new)
        tokens = torch.cat([tokens, new], 1)
    return tokens


def main() -> None:
    """Print a prompt and the model's continuation."""
    parser = argparse.ArgumentParser(description="Print a prompt and the model's continuation.")
    parser.add_argument("prompt")
    parser.add_argument("--tokens", type=int, default=100, help="how many to add")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    encode, decode = tokenizer()
    tokens = torch.tensor([encode(given.prompt)])
    generator = torch.Generator().manual_seed(given.seed)
    print(decode(generate(load(), tokens, given.tokens, given.temperature, generator, end_tokens())[0].tolist()))


if __name__ == "__main__":
    main()
