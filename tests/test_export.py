"""Leaving the project: an exported folder is the subnet, for `transformers`, for a stranger, and for this project."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from nas.data import DataSpec, load_corpus
from nas.data.tokenizer import bytes_json
from nas.errors import UserError
from nas.export import FORMATS, ModelCard, export, load_export, read_config
from nas.export.hugging_face import carried_code, hf_name
from nas.model import attention as attention_module
from nas.model import decoder as model_module
from nas.model.decoder import Decoder, init_weights
from nas.model.supernet import Supernet, dense_plan, standalone
from nas.presets import presets
from nas.sharing import plan as plan_module
from nas.sharing.builder import PlanBuilder
from nas.sharing.memory import MemorySpec, measure
from nas.sharing.plan import FFN_NORM
from nas.sharing.primitives import LAYER_ROWS, MODEL_ROWS, OWN, PRIMITIVES
from nas.sharing.shape import ModelShape, RotaryScaling
from nas.sharing.sharing_config import SharingConfig, attempt
from nas.sharing.space import SearchSpace
from nas.training.evaluation import Evaluation, Losses

SHAPE = ModelShape(
    vocab_size=256,
    hidden_size=32,
    num_hidden_layers=4,
    num_attention_heads=4,
    intermediate_size=48,
    max_position_embeddings=16,  # so that windows are of 4 tokens and of 2
)
UNTIED = replace(SHAPE, tie_word_embeddings=False)


def random_config(seed: int) -> SharingConfig:
    """A few primitives together: each choice is taken where those before it leave room."""
    rng, draft = random.Random(seed), PlanBuilder(SHAPE)
    rows = rng.sample(LAYER_ROWS, 8)
    for row in MODEL_ROWS:
        attempt(draft, row, rng.choice(row.options(SHAPE)))
    draft.start()
    while draft.index < SHAPE.num_hidden_layers:
        for row in LAYER_ROWS:
            if row in rows and rng.random() < 0.6:
                above = SHAPE.num_hidden_layers if row.name == "kv" else draft.index
                values = [*range(above)] if row.sources else [value for value in row.options(SHAPE) if value != OWN]
                attempt(draft, row, rng.choice(values or [0]))
        try:
            draft.finish()
        except UserError:  # it does not keep the keys and values that a layer below reads
            draft.start()
    return SharingConfig.of_plan(SHAPE, draft.plan())


BY_HAND: dict[str, list[dict[str, Any]]] = {
    "everything": [{}, {"kv_heads": 2}, {"kv": 1, "ffn": 0}, {"tie": 1}],
    "first reads the last": [{"kv": 3}, {"kv": 3}, {}, {}],
    "first keeps nothing": [{"drop": "attn"}, {"window": 4}, {"kv": 1, "window": 2}, {}],
    "keys and values apart": [{}, {"k_from": 0}, {"v_from": 1}, {"k_from": 0, "v_from": 1, "kv_heads": 4}],
    "a map of a window": [{"window": 3}, {"attn_map": 0}, {"window": 1}, {"attn_map": 2, "v_heads": 1}],
    "no attention": [{"drop": "attn"}] * 4,
}
RANDOM = {f"random-{n}": random_config(n) for n in range(20)}
CONFIGS = dict(presets(SHAPE)) | {name: SharingConfig.make(SHAPE, layers) for name, layers in BY_HAND.items()} | RANDOM
KINDS = ["dense", "albert", "gqa-2", "cla-2", "lckv-2", "gemma3n-2", "moeut-2", "dictformer-2", *BY_HAND, "random-5", "random-9"]
"""The kinds of sharing, for laws that take longer."""


def said(config: SharingConfig) -> dict[str, Any]:
    """Every choice of a config, by a search space's names."""
    layers = {f"layer_{i}.{name}": value for i, layer in enumerate(config.layers) for name, value in layer}
    return dict(config.whole) | layers


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


@dataclass(frozen=True)
class Case:
    """A supernet's subnet and what became of it."""

    config: SharingConfig
    subnet: Decoder
    folder: Path
    model: Any
    info: dict[str, Any]


def bold(decoder: Decoder) -> Decoder:
    """Weights large enough that every part of the model tells."""
    generator = torch.Generator().manual_seed(1)
    for weight in decoder.parameters():
        weight.data += 0.2 * torch.randn(weight.shape, generator=generator)
    return decoder


def supernet(shape: ModelShape, config: SharingConfig) -> Supernet:
    """A supernet of all that a config may choose."""
    space = SearchSpace(shape, {name: (value,) for name, value in said(config).items()})
    net = Supernet(shape, torch.Generator().manual_seed(0), space.extras())
    bold(net.bank)
    return net


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Models this small only wait for a second one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Case]:
    """`case(name, tied)`: a config exported from a supernet and loaded by transformers, each once."""
    root = tmp_path_factory.mktemp("exports")
    made: dict[tuple[str, bool], Case] = {}

    def make(name: str, tied: bool = True) -> Case:
        if (name, tied) not in made:
            config, folder = CONFIGS[name], root / f"{name.replace(' ', '-')}{'' if tied else '-untied'}"
            subnet = supernet(SHAPE if tied else UNTIED, config).subnet(config)
            export(subnet, config, bytes_json(), folder, ModelCard())
            model, info = from_pretrained(folder, output_loading_info=True)
            made[name, tied] = Case(config, subnet, folder, model, info)
        return made[name, tied]

    return make


def from_pretrained(folder: Path, **kwargs: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **kwargs)


def tokens(batch: int, seq: int, seed: int = 0) -> Tensor:
    return torch.randint(256, (batch, seq), generator=torch.Generator().manual_seed(seed))


# What is loaded


WITH_HEADS = [*((name, True) for name in CONFIGS), *((name, False) for name in KINDS)]
"""Every config in a shape whose head is the embedding, some in one whose head is its own."""


@pytest.mark.parametrize(("name", "tied"), WITH_HEADS)
@torch.no_grad()
def test_transformers_loads_the_subnet(case: Callable[..., Case], name: str, tied: bool) -> None:
    made = case(name, tied)
    assert not any(made.info.values()), made.info
    x = tokens(2, 11)
    assert torch.equal(made.model(x).logits, made.subnet(x))


@pytest.mark.parametrize(("name", "tied"), WITH_HEADS)
def test_bytes_are_the_predicted_ones_in_memory_and_in_the_file(case: Callable[..., Case], name: str, tied: bool) -> None:
    made = case(name, tied)
    memory = measure(made.subnet.shape, made.config, MemorySpec(dtype="float32"))
    file = made.folder / "model.safetensors"
    with file.open("rb") as read:
        header = 8 + int.from_bytes(read.read(8), "little")
    assert sum(weight.numel() for weight in made.model.parameters()) == memory.unique_params
    assert sum(weight.nbytes for weight in made.model.parameters()) == memory.weight_bytes
    assert file.stat().st_size - header == memory.weight_bytes


@pytest.mark.parametrize(("name", "tied"), WITH_HEADS)
@torch.no_grad()
def test_this_project_loads_it_back(case: Callable[..., Case], name: str, tied: bool, tmp_path: Path) -> None:
    """Also what `save_pretrained` made of it."""
    from nas.export.modeling_nas import NasForCausalLM

    made = case(name, tied)
    head = made.subnet.plan.outside.tie_word_embeddings
    shape = replace(made.subnet.shape, tie_word_embeddings=head)
    made.model.save_pretrained(tmp_path / "again")
    shutil.copy(made.folder / "tokenizer.json", tmp_path / "again")
    alone = standalone(made.subnet).state_dict()
    for folder in (made.folder, tmp_path / "again"):
        loaded = load_export(folder)
        assert (loaded.config.resolve(shape), loaded.shape) == (made.subnet.plan, shape)
        assert loaded.config == made.config or head != made.subnet.shape.tie_word_embeddings
        assert read_config(folder) == (loaded.shape, loaded.config)
        assert loaded.model.state_dict().keys() == alone.keys()
        assert all(torch.equal(weight, alone[name]) for name, weight in loaded.model.state_dict().items())
        assert loaded.tokenizer.to_str() == type(loaded.tokenizer).from_str(bytes_json()).to_str()
    again, info = NasForCausalLM.from_pretrained(tmp_path / "again", output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(again(tokens(2, 5)).logits, made.subnet(tokens(2, 5)))


@pytest.mark.parametrize("name", ["dense", "gqa-2", "mqa"])
@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_what_shares_nothing_across_layers_is_a_llama(case: Callable[..., Case], name: str, tied: bool) -> None:
    from safetensors.torch import load_file
    from transformers import LlamaConfig, LlamaForCausalLM

    made = case(name, tied)
    data = json.loads((made.folder / "config.json").read_text())
    names = [key for key in ModelShape.__dataclass_fields__ if key != "rope_theta"]
    config = LlamaConfig(
        **{key: data[key] for key in names}, rope_parameters={"rope_type": "default", "rope_theta": data["rope_theta"]}
    )
    config.num_key_value_heads = made.subnet.plan.layers[0].k_heads
    llama = LlamaForCausalLM(config)
    missing, unexpected = llama.load_state_dict(load_file(made.folder / "model.safetensors"), strict=False)
    assert not unexpected
    assert missing == (["lm_head.weight"] if tied else [])
    x, mask = tokens(2, 9), torch.tensor([[0, 0, 0] + [1] * 6, [1] * 9])
    torch.testing.assert_close(made.model(x).logits, llama(x).logits)
    ours, theirs = made.model(x, attention_mask=mask).logits, llama(x, attention_mask=mask).logits
    torch.testing.assert_close(ours[mask.bool()], theirs[mask.bool()])


@torch.no_grad()
def test_every_dimension_of_the_shape_is_kept(tmp_path: Path, case: Callable[..., Case]) -> None:
    families = {"attention_bias": True, "qk_norm": True, "hidden_act": "gelu_tanh", "embedding_multiplier": 3.0}
    shape = ModelShape(300, 24, 3, 6, 40, 3, 10, 99, 500.0, 1e-2, False, **families, rotary_scaling=RotaryScaling("llama3", 2.0))
    config = SharingConfig.make(shape, [{}, {"kv": 0}, {"kv_heads": 1}], embedding_rank=7)
    model = bold(init_weights(Decoder(shape, config.resolve(shape)), torch.Generator().manual_seed(0)))
    export(model, config, bytes_json(), tmp_path / "out", ModelCard())
    x = tokens(2, 30)
    for _ in range(2):  # as it was exported, and as transformers saves it
        loaded = from_pretrained(tmp_path / "out")
        assert torch.equal(loaded(x).logits, model(x))
        assert load_export(tmp_path / "out").shape == shape
        loaded.save_pretrained(tmp_path / "out")


@torch.no_grad()
def test_it_loads_in_bfloat16(case: Callable[..., Case]) -> None:
    made = case("everything")
    model = from_pretrained(made.folder, dtype=torch.bfloat16)
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    x = tokens(2, 9)
    assert torch.equal(model(x).logits, standalone(made.subnet).bfloat16()(x))
    out = model.generate(x, max_new_tokens=4, return_dict_in_generate=True, do_sample=False)
    assert cache_bytes(out.past_key_values.layers) == measure(SHAPE, made.config, MemorySpec(12, 2, "bfloat16")).kv_cache_bytes


def test_the_tokenizer_gives_back_any_text(case: Callable[..., Case]) -> None:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    folder = case("dense").folder
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    assert isinstance(PreTrainedTokenizerFast.from_pretrained(folder), PreTrainedTokenizerFast)  # needs no trust

    @settings(max_examples=200, deadline=None)
    @given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])))
    def law(text: str) -> None:
        ids = tokenizer(text).input_ids
        assert ids == list(text.encode())
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode(ids, skip_special_tokens=True) == text

    law()
    assert tokenizer.decode(tokenizer("Ā ÿ <pad>").input_ids) == "Ā ÿ <pad>"
    padded = tokenizer(["a", "bcd"], padding=True)
    assert padded.input_ids == [[0, 0, ord("a")], list(b"bcd")]
    assert padded.attention_mask == [[0, 0, 1], [1, 1, 1]]


SPECIAL = {
    "own": (["<s>", "<pad>"], "<pad>"),
    "another special": (["<|endoftext|>"], "<|endoftext|>"),
    "none": ([], None),
}


@pytest.mark.parametrize("kind", SPECIAL)
def test_a_tokenizer_of_the_users_gets_a_padding_token_if_it_has_one(kind: str, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import AutoTokenizer

    special, pad = SPECIAL[kind]
    tokenizer = Tokenizer(models.WordLevel({"Ā": 0, "a": 1}, unk_token="a"))
    tokenizer.add_special_tokens(special)
    model = Decoder(SHAPE, dense_plan(SHAPE))
    export(init_weights(model, torch.Generator()), CONFIGS["dense"], tokenizer.to_str(), tmp_path / "out", ModelCard())
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert loaded.pad_token == pad
    data = json.loads((tmp_path / "out" / "config.json").read_text())
    assert data["pad_token_id"] == loaded.pad_token_id == (tokenizer.token_to_id(pad) if pad else None)


# The cache


def cache_bytes(layers: Sequence[Any]) -> int:
    tensors = [t for layer in layers for t in (layer.keys, layer.values) if t is not None]
    return sum(t.numel() * t.element_size() for t in tensors)


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


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_a_padded_batch_generates_what_the_subnet_does_without_a_cache(case: Callable[..., Case], name: str) -> None:
    made = case(name)
    texts = [tokens(1, n, seed=n)[0] for n in (3, 8)]
    x, mask = batch_of(texts)
    out = made.model.generate(x, attention_mask=mask, max_new_tokens=6, do_sample=False)
    for row, text in zip(out, texts, strict=True):
        assert torch.equal(row[8:], greedy(made.subnet, text, 6))


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_only_owners_keep_a_cache_of_the_predicted_bytes(case: Callable[..., Case], name: str) -> None:
    made = case(name)
    x = tokens(2, 7)
    out = made.model.generate(x, max_new_tokens=6, do_sample=False, return_dict_in_generate=True)
    assert torch.equal(out.sequences[0, 7:], greedy(made.subnet, x[0], 6))
    layers = out.past_key_values.layers
    assert [i for i, layer in enumerate(layers) if layer.keys is not None] == made.subnet.plan.kv_owners
    held = MemorySpec(context=7 + 6 - 1, batch=2, dtype="float32")  # the last token is never read
    assert cache_bytes(layers) == measure(SHAPE, made.config, held).kv_cache_bytes


@pytest.mark.parametrize("chunk", [None, 3])
@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_readers_keep_nothing_in_a_static_cache(case: Callable[..., Case], name: str, chunk: int | None) -> None:
    made = case(name)
    how = {"cache_implementation": "static", "prefill_chunk_size": chunk, "return_dict_in_generate": True, "do_sample": False}
    if name not in STATIC:
        with pytest.raises(ValueError, match=r"a static cache cannot serve this model: layer \d .*; use a dynamic cache"):
            made.model.generate(tokens(2, 7), max_length=30, **how)
        return
    cache = made.model.generate(tokens(2, 7), max_length=30, **how).past_key_values
    layers = cache.layers if made.subnet.plan.kv_owners else []
    assert [i for i, layer in enumerate(layers) if layer.keys is not None] == made.subnet.plan.kv_owners
    spec = MemorySpec(context=cache.get_max_length(), batch=2, dtype="float32") if layers else MemorySpec()
    assert cache_bytes(layers) == measure(SHAPE, made.config, spec).kv_cache_bytes


def is_static(config: SharingConfig) -> bool:
    """Whether no layer has a window, reads from above, or keeps unlike numbers of keys and values."""
    above = any(dict(layer).get("kv", 0) > i for i, layer in enumerate(config.layers))
    return not above and not {"window", "attn_map", "k_from", "v_from", "k_heads", "v_heads"} & primitives(config)


STATIC = [name for name in KINDS if is_static(CONFIGS[name])]


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(case: Callable[..., Case], name: str, side: str) -> None:
    made = case(name)
    texts = [tokens(1, n, seed=n)[0] for n in (3, 9, 6)]
    x, mask = batch_of(texts, side, pad=7)
    logits = made.model(x, attention_mask=mask).logits
    for row, real, text in zip(logits, mask.bool(), texts, strict=True):
        torch.testing.assert_close(row[real], made.model(text[None]).logits[0], rtol=1e-4, atol=1e-4)
    grads = gradients(made.model, made.model(x, attention_mask=mask, labels=x.masked_fill(mask == 0, -100)).loss)
    assert all(tensor.isfinite().all() for tensor in (logits, *grads.values()))


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_documents_in_a_row_are_kept_apart_by_their_positions(case: Callable[..., Case], name: str) -> None:
    made = case(name)
    texts = [tokens(1, n, seed=n) for n in (4, 1, 6)]
    positions = torch.cat([torch.arange(t.shape[1]) for t in texts])[None]
    logits = made.model(torch.cat(texts, 1), position_ids=positions).logits
    torch.testing.assert_close(logits, torch.cat([made.model(t).logits for t in texts], 1), rtol=1e-4, atol=1e-4)


MODES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "beams": ({"num_beams": 3, "do_sample": False}, {}),
    "beams of a group": ({"num_beams": 4, "num_return_sequences": 2, "do_sample": False, "length_penalty": 0.5}, {}),
    "sampling": ({"do_sample": True, "top_k": 20, "temperature": 0.8}, {}),
    "several samples": ({"do_sample": True, "num_return_sequences": 3}, {}),
    "static cache": ({"do_sample": False}, {"cache_implementation": "static"}),
    "prefill in chunks": ({"do_sample": False}, {"prefill_chunk_size": 3}),
    "static cache, prefill in chunks": ({"do_sample": False}, {"prefill_chunk_size": 3, "cache_implementation": "static"}),
    "prompt look-up": ({"do_sample": False}, {"prompt_lookup_num_tokens": 2}),
}
"""Ways to generate, and the options with which a cache is used otherwise than by default."""


WAYS = [(name, mode) for name in KINDS for mode in MODES if name in STATIC or "static" not in mode]


@pytest.mark.parametrize(("name", "mode"), WAYS)
@torch.no_grad()
def test_every_way_to_generate_gives_what_it_gives_without_a_cache(case: Callable[..., Case], name: str, mode: str) -> None:
    made = case(name)
    how, caching = MODES[mode]
    x = tokens(1, 4).repeat(1, 2)  # so that a look-up finds something
    torch.manual_seed(0)
    plain = made.model.generate(x, max_new_tokens=6, use_cache=False, **how)
    torch.manual_seed(0)
    assert torch.equal(made.model.generate(x, max_new_tokens=6, **how, **caching), plain)


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_decoding_in_pieces_gives_the_logits_of_the_whole(case: Callable[..., Case], name: str) -> None:
    from transformers import DynamicCache, StaticCache

    made = case(name)
    x = tokens(2, 10)
    whole = made.subnet(x)
    caches = [DynamicCache(), DynamicCache(config=made.model.config)]
    for cache in caches + [StaticCache(made.model.config, max_cache_len=16)] * (name in STATIC):
        parts = [made.model(part, past_key_values=cache).logits for part in x.split([4, 1, 3, 1, 1], 1)]
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["everything", "dictformer-2"])
@torch.no_grad()
def test_a_step_with_a_static_cache_is_one_graph(case: Callable[..., Case], name: str) -> None:
    """What `generate` compiles where there is an accelerator; the laws of compiled code are torch's."""
    from transformers import StaticCache

    made, x = case(name), tokens(2, 7)
    cache = StaticCache(made.model.config, max_cache_len=16)
    made.model(x[:, :6], past_key_values=cache)
    step = torch.compile(made.model.forward, backend="eager", fullgraph=True)
    mask = (torch.arange(16) < 7)[None, None, None]
    logits = step(x[:, 6:], past_key_values=cache, attention_mask=mask, position_ids=torch.tensor([[6]])).logits
    torch.testing.assert_close(logits, made.subnet(x)[:, 6:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_a_conversation_goes_on_from_its_cache(case: Callable[..., Case], name: str) -> None:
    from transformers import DynamicCache

    made = case(name)
    cache, said = DynamicCache(), tokens(1, 3)
    for turn in range(3):
        said = torch.cat([said, tokens(1, 2, seed=turn)], 1)
        wanted = greedy(made.subnet, said[0], 2)
        said = made.model.generate(said, past_key_values=cache, max_new_tokens=2, do_sample=False)
        assert torch.equal(said[0, -2:], wanted)


# The forward's other arguments


def test_the_loss_is_the_mean_of_the_next_tokens_in_float32(case: Callable[..., Case]) -> None:
    made = case("everything")
    x = tokens(2, 9)
    labels = x.clone()
    labels[0, :4] = -100
    out = made.model(x, labels=labels)
    wanted = F.cross_entropy(made.subnet(x)[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    torch.testing.assert_close(out.loss, wanted)
    half = from_pretrained(made.folder, dtype=torch.bfloat16)
    assert half(x, labels=labels).loss.dtype == torch.float32


@pytest.mark.parametrize("name", ["everything", "albert"])
@torch.no_grad()
def test_the_forward_takes_what_every_causal_model_takes(case: Callable[..., Case], name: str) -> None:
    model = case(name).model
    x = tokens(2, 9)
    logits = model(x).logits
    assert torch.equal(model(inputs_embeds=model.get_input_embeddings()(x)).logits, logits)
    torch.testing.assert_close(model(x, logits_to_keep=2).logits, logits[:, -2:])
    torch.testing.assert_close(model(x, logits_to_keep=torch.tensor([1, 4])).logits, logits[:, [1, 4]])
    torch.testing.assert_close(model(x, position_ids=torch.arange(9)[None] + 100).logits, logits, rtol=1e-3, atol=1e-3)
    causal = torch.ones(9, 9, dtype=torch.bool).tril()[None, None]
    torch.testing.assert_close(model(x, attention_mask=causal).logits, logits)
    torch.testing.assert_close(model(x, attention_mask=torch.where(causal, 0.0, -torch.inf)).logits, logits)
    assert torch.equal(model(x, return_dict=False)[0], logits)
    assert model(x, use_cache=False).past_key_values is None
    assert torch.equal(model.generate(inputs_embeds=model.get_input_embeddings()(x), max_new_tokens=3, do_sample=False)[:, :3],
                       model.generate(x, max_new_tokens=3, do_sample=False)[:, 9:])  # fmt: skip


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no input": ({"input_ids": None}, "either input_ids or inputs_embeds"),
    "attentions": ({"output_attentions": True}, "output_attentions is not supported"),
    "hidden states": ({"output_hidden_states": True}, "output_hidden_states is not supported"),
    "a mask too short": ({"attention_mask": torch.ones(1, 3)}, "3 columns for 5 tokens"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_the_forward_refuses_what_it_cannot_give(case: Callable[..., Case], what: str) -> None:
    given, says = REFUSED[what]
    with pytest.raises(ValueError, match=says):
        case("dense").model(**{"input_ids": tokens(1, 5)} | given)


def test_the_head_is_the_plans(case: Callable[..., Case]) -> None:
    with pytest.raises(ValueError, match="tie_word_embeddings is False, and the plan's is True; make them agree"):
        from_pretrained(case("dense").folder, tie_word_embeddings=False)


# Training


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters()}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("tied", [True, False])
def test_checkpointing_activations_changes_no_gradient(case: Callable[..., Case], name: str, tied: bool) -> None:
    made = case(name, tied)
    x = tokens(2, 9)
    model = from_pretrained(made.folder).train()
    alone = standalone(made.subnet)
    wanted = gradients(alone, F.cross_entropy(alone(x)[:, :-1].flatten(0, 1), x[:, 1:].flatten()))
    wanted = {hf_name(key): grad for key, grad in wanted.items()}
    runs: list[int] = []
    model.model.part(0, FFN_NORM).register_forward_hook(lambda *_: runs.append(1))
    torch.testing.assert_close(gradients(model, model(x, labels=x).loss), wanted)
    once = len(runs)
    for reentrant in (False, True):
        runs.clear()
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
        if made.subnet.plan.cycle:
            with pytest.raises(ValueError, match="compute a pass again from what later passes left; turn it off"):
                model(x, labels=x)
            continue
        torch.testing.assert_close(gradients(model, model(x, labels=x).loss), wanted)
        assert len(runs) == 2 * once
        with pytest.raises(ValueError, match="would fill a KV cache twice"):
            model(x, use_cache=True)
    assert torch.equal(model.eval()(x).logits, made.model(x).logits)
    assert model(x).past_key_values is not None


@pytest.mark.parametrize("tied", [True, False])
def test_the_trainer_trains_it_and_its_code_travels_on(case: Callable[..., Case], tied: bool, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, Trainer, TrainingArguments

    made = case("everything", tied)
    folder = tmp_path / "moved"
    shutil.copytree(made.folder, folder)
    model = from_pretrained(folder)
    rows = [{"input_ids": row, "labels": row} for row in tokens(1, 17).repeat(24, 1)]
    arguments = TrainingArguments(
        str(tmp_path / "trainer"),
        max_steps=3,
        learning_rate=1e-2,
        report_to="none",
        use_cpu=True,
        save_steps=2,
        disable_tqdm=True,
    )
    before = model(tokens(1, 17), labels=tokens(1, 17)).loss.item()
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    assert model(tokens(1, 17), labels=tokens(1, 17)).loss.item() < before
    assert sum(w.numel() for w in model.parameters()) == measure(made.subnet.shape, made.config, MemorySpec()).unique_params

    model.save_pretrained(tmp_path / "trained")
    AutoTokenizer.from_pretrained(folder, trust_remote_code=True).save_pretrained(tmp_path / "trained")
    shutil.rmtree(folder)
    again, info = from_pretrained(tmp_path / "trained", output_loading_info=True)
    assert not any(info.values())
    x = tokens(2, 9)
    with torch.no_grad():
        assert torch.equal(again(x).logits, model.eval()(x).logits)
        assert torch.equal(load_export(tmp_path / "trained").model(x), again(x).logits)
        checkpoint = from_pretrained(tmp_path / "trainer" / "checkpoint-2")
        assert torch.equal(checkpoint.generate(x, max_new_tokens=2, do_sample=False)[:, :9], x)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["everything", "albert"])
def test_its_vocabulary_can_grow(case: Callable[..., Case], name: str, tied: bool) -> None:
    made = case(name, tied)
    model = from_pretrained(made.folder)
    x = tokens(2, 5)
    before = model(x).logits
    model.resize_token_embeddings(260)
    torch.testing.assert_close(model(x).logits[..., :256], before)
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied


BEGIN_ALIKE = ["cla-2", "universal", "relaxed-recursive-2x4", "basis-2x16", "dictformer-2", "albert", "moeut-2"]


@pytest.mark.parametrize("name", BEGIN_ALIKE)
def test_a_model_from_its_config_alone_begins_as_the_searchs_do(case: Callable[..., Case], name: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(case(name).folder, trust_remote_code=True)
    config.hidden_size, config.head_dim = 256, 64
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    wanted = init_weights(Decoder(config, case(name).subnet.plan), torch.Generator().manual_seed(0)).state_dict()
    for key, weight in model.model.state_dict().items():
        if weight.numel() > 1000:  # fewer do not say much by their deviation
            torch.testing.assert_close(weight.std(), wanted[key].std(), rtol=0.1, atol=0)
        assert (weight == weight.flatten()[0]).all() == (wanted[key] == wanted[key].flatten()[0]).all()
    head = model.get_output_embeddings().weight
    torch.testing.assert_close(head.std(), wanted["embed_tokens.weight"].std(), rtol=0.1, atol=0)


# What a stranger gets

STRANGER = """
import sys
from importlib.abc import MetaPathFinder

class Without(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "nas":
            raise ModuleNotFoundError("No module named 'nas'", name=name)

sys.meta_path.insert(0, Without())
code = open("README.md").read().split("```python")[1].split("```")[0]
exec(code)

import torch
for folder, x, logits in torch.load(sys.argv[1], weights_only=True):
    model, info = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(model(x).logits, logits), folder
    assert torch.equal(model.generate(x, max_new_tokens=3)[:, :9], x)
assert not [name for name in sys.modules if name.split(".")[0] == "nas"]
print("the same logits")
"""


@torch.no_grad()
def test_a_stranger_without_this_project_runs_what_the_readme_says(case: Callable[..., Case], tmp_path: Path) -> None:
    made, x = [case(name) for name in covering()], tokens(2, 9)
    torch.save([(str(one.folder), x, one.subnet(x)) for one in made], tmp_path / "wanted.pt")
    env = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-I", "-c", STRANGER, str(tmp_path / "wanted.pt")]
    done = subprocess.run(command, cwd=made[0].folder, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("the same logits\n")
    assert "Error" not in done.stderr


@pytest.mark.parametrize("module", [attention_module, model_module, plan_module])
def test_the_folder_carries_the_one_forward(module: ModuleType) -> None:
    path = Path(str(module.__file__))
    ours, theirs = path.read_text().splitlines(), carried_code()[path.name].splitlines()
    changed = [(a, b) for a, b in zip(ours, theirs, strict=True) if a != b]
    assert changed == [("    from .shape import ModelShape", "    from .configuration_nas import NasConfig as ModelShape")]


def test_the_readme_says_what_the_model_costs_and_how_it_was_found(tmp_path: Path) -> None:
    config, spec = CONFIGS["cla-2"], MemorySpec(context=2048, batch=2, dtype="float16")
    losses = Losses(1.25, 3.4903, 0.02)
    evaluation = Evaluation(config, measure(SHAPE, config, spec), losses, 1.8, "retrained", 0, 1_200_000, 60.0)
    card = ModelCard(
        "CLA at 2k", "The knee of a search over 400 configurations.", "nas search s.yaml", "the moon", evaluation, spec
    )
    export(supernet(SHAPE, config).subnet(config), config, bytes_json(), tmp_path / "out", card)
    text = (tmp_path / "out" / "README.md").read_text()
    for part in (
        "# CLA at 2k",
        "The knee of a search",
        "nas search s.yaml",
        "Text: the moon.",
        "perplexity 3.49",
        "1,200,000 tokens",
    ):
        assert part in text
    assert "In float16, for a context of 2,048 tokens and a batch of 2:" in text
    assert "dtype=torch.float16" in text
    assert "| 1 | its own | its own | its own | layer 0's |" in text
    assert "| KV cache | 1.0 MiB | 2.0 MiB |" in text  # 2 of 4 layers keep 2 · 32 numbers of 2 bytes for each of 2 · 2048 tokens


# Writing


def test_an_export_that_fails_leaves_nothing_behind(case: Callable[..., Case], tmp_path: Path) -> None:
    made = case("dense")
    for target in (tmp_path / "new", tmp_path / "there"):
        (tmp_path / "there").mkdir(exist_ok=True)
        with pytest.raises(json.JSONDecodeError):
            export(made.subnet, made.config, "not a tokenizer", target, ModelCard())
        assert [path.name for path in tmp_path.rglob("*")] == ["there"]


def test_an_earlier_export_is_replaced_and_what_else_is_there_stays(case: Callable[..., Case], tmp_path: Path) -> None:
    target = tmp_path / "out"
    for name in ("dense", "everything"):
        made = case(name)
        export(made.subnet, made.config, bytes_json(), target, ModelCard())
        assert load_export(target).config == made.config
        if name == "dense":
            (target / "notes.txt").write_text("mine")
            (target / "model-00001-of-00002.safetensors").write_text("stale")
    assert (target / "notes.txt").read_text() == "mine"
    assert {path.name for path in target.iterdir()} == {path.name for path in made.folder.iterdir()} | {"notes.txt"}


def test_what_a_crash_left_half_replaced_is_no_export(
    case: Callable[..., Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, target = case("dense"), tmp_path / "out"
    export(made.subnet, made.config, bytes_json(), target, ModelCard())
    assert len({path.stat().st_mode for path in target.iterdir()}) == 1  # whoever may read one file may read them all
    move = Path.replace

    def crash(path: Path, to: Path) -> Path:
        if to.name == "model.safetensors":
            raise OSError("the lights are out")
        return move(path, to)

    monkeypatch.setattr(Path, "replace", crash)
    with pytest.raises(OSError, match="the lights are out"):
        export(case("everything").subnet, case("everything").config, bytes_json(), target, ModelCard())
    with pytest.raises(UserError, match=r"is no export: it has no config\.json"):
        load_export(target)


def test_a_folder_of_something_else_is_not_written_over(case: Callable[..., Case], tmp_path: Path) -> None:
    made = case("dense")
    (tmp_path / "thesis.tex").write_text("years")
    with pytest.raises(UserError, match=r"not empty and is no earlier export; .*--overwrite"):
        export(made.subnet, made.config, bytes_json(), tmp_path, ModelCard())
    with pytest.raises(UserError, match="is a file"):
        export(made.subnet, made.config, bytes_json(), tmp_path / "thesis.tex", ModelCard())
    with pytest.raises(UserError, match=r"unknown format 'hff'; did you mean hf\?"):
        export(made.subnet, made.config, bytes_json(), tmp_path, ModelCard(), "hff")
    export(made.subnet, made.config, bytes_json(), tmp_path, ModelCard(), overwrite=True)
    assert (tmp_path / "thesis.tex").read_text() == "years"
    assert load_export(tmp_path).config == made.config


@pytest.mark.parametrize("name", FORMATS)
def test_exporting_leaves_the_supernet_as_it_was(name: str, tmp_path: Path) -> None:
    config = CONFIGS["dictformer-2" if name == "dense" else "everything"]
    net = supernet(SHAPE, config)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    export(net.subnet(config), config, bytes_json(), tmp_path / "out", ModelCard(), name)
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    assert all(weight.grad is None for weight in net.parameters())


# Reading what is not right


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


def pickle_it(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


Q = "model.layers.0.self_attn.q_proj.weight"
DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (shutil.rmtree, "no such folder; give a folder that `nas export` wrote"),
    "no config": (lambda f: (f / "config.json").unlink(), "is no export: it has no config.json; "),
    "another model": (edit("config.json", lambda d: d.update(model_type="gpt2")), "model_type 'gpt2' is not one that is"),
    "a llama's name": (edit("config.json", lambda d: d.update(model_type="llama")), "NasForCausalLM is no LlamaForCausalLM"),
    "not JSON": (lambda f: (f / "config.json").write_text("{"), "config.json: is not JSON"),
    "a bad shape": (edit("config.json", lambda d: d.update(hidden_size="32")), "config.json: hidden_size: '32'"),
    "no plan": (edit("config.json", lambda d: d.pop("plan")), "plan says of no layer whose weights it uses"),
    "a plan too short": (edit("config.json", lambda d: d["plan"]["layers"].pop()), "plan is not one of 4 layers"),
    "an impossible plan": (edit("config.json", lambda d: d["plan"]["layers"][2].update(k=3)), "config.json: plan "),
    "another head": (edit("config.json", lambda d: d.update(tie_word_embeddings=False)), "is False, which is not what plan says"),
    "an edited sharing.yaml": (lambda f: (f / "sharing.yaml").write_text("num_hidden_layers: 4"), "is not what config.json says"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "has no model.safetensors; export the model again"),
    "pickled weights": (pickle_it, r"has pickled weights only \(pytorch_model.bin\)"),
    "torn weights": (lambda f: (f / "model.safetensors").write_bytes(b"torn"), "is not a safetensors file"),
    "a key missing": (reweigh(lambda w: w.pop(Q)), f"the weights lack {Q}; "),
    "a key too many": (reweigh(lambda w: w.update(a=w[Q].clone(), b=w[Q].clone())), "beyond the model's, a and 1 more; "),
    "a wrong shape": (reweigh(lambda w: w.update({Q: w[Q][:16].clone()})), rf"{Q} is \(16, 32\), not \(32, 32\)"),
    "mixed dtypes": (reweigh(lambda w: w.update({Q: w[Q].half()})), "the weights are float16 and float32"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "has no tokenizer.json"),
    "no tokenizer in it": (lambda f: (f / "tokenizer.json").write_text("{}"), "tokenizer.json: is no tokenizer"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_folder_is_refused_in_one_line(case: Callable[..., Case], what: str, tmp_path: Path) -> None:
    damage, says = DAMAGE[what]
    folder = tmp_path / "copy"
    shutil.copytree(case("everything").folder, folder)
    damage(folder)
    with pytest.raises(UserError, match=says) as raised:
        load_export(folder)
    assert "\n" not in str(raised.value)
    assert str(raised.value).startswith(str(folder))


def test_weights_in_shards_are_read(case: Callable[..., Case], tmp_path: Path) -> None:
    made = case("everything")
    made.model.save_pretrained(tmp_path, max_shard_size="40KB")
    shutil.copy(made.folder / "tokenizer.json", tmp_path)
    assert (tmp_path / "model.safetensors.index.json").is_file()
    x = tokens(1, 5)
    assert torch.equal(load_export(tmp_path).model(x), made.subnet(x))


# Training and measuring a folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "rhyme.txt"
    path.write_text("".join(f"{n} green bottles, hanging on the wall.\n" for n in range(400)))
    return path


def fresh(case: Callable[..., Case], tmp_path: Path, name: str = "everything") -> Path:
    folder = tmp_path / "model"
    shutil.copytree(case(name).folder, folder)
    return folder


def trained_on(folder: Path, text: Path, to: Path | None = None, **given: Any) -> Any:
    from nas.export.train import train_export
    from nas.export.train_settings import TrainSettings

    progress = given.pop("progress", None)
    return train_export(
        folder, text, TrainSettings(**{"steps": 6, "batch": 4, "seq": 16, "autocast": False} | given), to, progress
    )


@pytest.mark.parametrize("name", ["everything", "random-4"])
def test_training_a_folder_lowers_its_loss_and_keeps_it_a_folder(
    case: Callable[..., Case], name: str, text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder, to = fresh(case, tmp_path, name), tmp_path / "trained"
    (folder / "generation_config.json").write_text('{"max_new_tokens": 5}')
    (folder / "README.md").write_text("# Mine\n")
    seen: list[tuple[int, int, float]] = []
    capfd.readouterr()  # what transformers said when it loaded the folder
    done = trained_on(folder, text, to, steps=None, epochs=0.5, learning_rate=3e-3, progress=lambda *a: seen.append(a))
    assert capfd.readouterr() == ("", "")
    assert done.after.perplexity < done.before.perplexity
    assert done.bits_per_byte_after < done.bits_per_byte_before
    assert [step for step, _, _ in seen] == sorted({step for step, _, _ in seen})
    assert all(steps == done.steps for _, steps, _ in seen)
    assert seen[-1][2] < seen[0][2]
    assert (to / "README.md").read_text().startswith("# Mine\n\n## Training after the export\n")
    assert (to / "generation_config.json").read_text() == '{"max_new_tokens": 5}'
    assert {path.name for path in to.iterdir()} == {path.name for path in folder.iterdir()}
    assert json.loads(json.dumps(done.to_data()))["perplexity_after"] == done.after.perplexity
    x = tokens(1, 5)
    with torch.no_grad():
        assert torch.equal(from_pretrained(to)(x).logits, load_export(to).model(x))
        assert not torch.equal(from_pretrained(folder)(x).logits, load_export(to).model(x))
    again = trained_on(to, text)  # in its own place
    assert again.before == done.after
    assert (to / "README.md").read_text().count("## Training after the export") == 2


def test_a_stopped_training_goes_on_as_if_it_had_not_stopped(case: Callable[..., Case], text: Path, tmp_path: Path) -> None:
    folder = fresh(case, tmp_path)
    straight = trained_on(folder, text, tmp_path / "straight", save_steps=2)

    def stop(step: int, steps: int, loss: float) -> None:
        if step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained_on(folder, text, tmp_path / "stopped", save_steps=2, progress=stop)
    assert {path.name for path in (tmp_path / "stopped").iterdir()} == {"checkpoints"}
    with pytest.raises(UserError, match="there is an unfinished training; go on with --resume, or delete"):
        trained_on(folder, text, tmp_path / "stopped", save_steps=2)
    with pytest.raises(UserError, match="of other settings or another text"):
        trained_on(folder, text, tmp_path / "stopped", save_steps=2, learning_rate=0.5, resume=True)
    steps: list[int] = []
    resumed = trained_on(folder, text, tmp_path / "stopped", save_steps=2, resume=True, progress=lambda n, _, __: steps.append(n))
    assert steps == [5, 6]
    assert replace(resumed, seconds=0.0, directory=folder) == replace(straight, seconds=0.0, directory=folder)
    pair = [load_export(tmp_path / name).model.state_dict() for name in ("straight", "stopped")]
    assert all(torch.equal(pair[0][key], pair[1][key]) for key in pair[0])


def test_an_epoch_predicts_every_token_of_the_training_text_once(case: Callable[..., Case], text: Path, tmp_path: Path) -> None:
    train = load_corpus(DataSpec(text=str(text)), 256, Path()).train
    done = trained_on(fresh(case, tmp_path), text, steps=None, seq=128, batch=16)
    assert done.tokens == (len(train) - 1) // 128 * 128
    assert done.steps == -(-done.tokens // (128 * 16))


def test_a_training_that_cannot_be_is_refused(case: Callable[..., Case], text: Path, tmp_path: Path) -> None:
    folder = fresh(case, tmp_path)
    short = tmp_path / "short.txt"
    short.write_text("one line, and no more\n" * 4)
    with pytest.raises(UserError, match=r"the .* text has \d+ tokens, and one (row|window) takes 65"):
        trained_on(folder, short, tmp_path / "to", seq=64)
    with pytest.raises(UserError, match="steps: -1 is too small"):
        trained_on(folder, text, steps=-1)
    (tmp_path / "short").mkdir()
    (tmp_path / "short" / "thesis.tex").write_text("years")
    with pytest.raises(UserError, match="not empty and is no earlier export"):
        trained_on(folder, text, tmp_path / "short")
    with pytest.raises(UserError, match=r"train with a lower learning rate"):
        trained_on(folder, text, learning_rate=1e20)
    assert not (folder / "checkpoints").exists()
    x = tokens(1, 5)
    assert torch.equal(load_export(folder).model(x), case("everything").subnet(x))  # it is as it was


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", KINDS)
def test_measured_bytes_are_the_predicted_ones(case: Callable[..., Case], name: str, dtype: str, text: Path) -> None:
    from nas.export.measure import EvalSettings, eval_export

    made = case(name)
    spec = MemorySpec(context=700, batch=2, dtype=dtype)
    found = eval_export(made.folder, text, EvalSettings(seq=16, windows=4, autocast=False, memory=spec)).to_data()
    wanted = measure(SHAPE, made.config, spec)
    assert found["measured_weight_bytes"] == found["weight_bytes"] == wanted.weight_bytes
    assert found["measured_kv_cache_bytes"] == found["kv_cache_bytes"] == wanted.kv_cache_bytes
    assert found["file_bytes"] == (made.folder / "model.safetensors").stat().st_size > 4 * wanted.unique_params
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize("name", ["everything", "random-4", "random-5"])
@torch.no_grad()
def test_perplexity_is_that_of_the_whole_text(case: Callable[..., Case], name: str, tmp_path: Path) -> None:
    from nas.export.measure import EvalSettings, eval_export

    made = case(name)
    path = tmp_path / "text.txt"
    path.write_text("the moon is round, and so is the sun\n")
    data = torch.tensor([list(path.read_bytes())])
    found = eval_export(made.folder, path, EvalSettings(seq=data.shape[1] - 1, autocast=False))
    loss = F.cross_entropy(made.subnet(data[:, :-1])[0], data[0, 1:])
    assert found.losses.loss_nats_per_token == pytest.approx(loss.item(), rel=1e-5)
    assert found.losses.perplexity == pytest.approx(loss.exp().item(), rel=1e-5)
    assert found.bits_per_byte == pytest.approx(loss.item() / torch.tensor(2.0).log().item(), rel=1e-5)  # a token is a byte
    assert found.tokens == data.shape[1] - 1
    with pytest.raises(UserError, match=r"no_such\.txt does not exist; "):
        eval_export(made.folder, tmp_path / "no_such.txt")
