"""Leaving the project: an exported folder is the subnet, for `transformers`, for a stranger, and for this project."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from nas import model as decoder_module
from nas.data import DataSpec, load_corpus
from nas.data.tokenizer import bytes_json
from nas.errors import UserError
from nas.evaluate import Evaluation, Losses
from nas.export import FORMATS, Card, export, load_export, read_config
from nas.export.hugging_face import carried_code, hf_name
from nas.memory import MemorySpec, measure
from nas.model import Decoder, init_weights
from nas.shape import ModelShape
from nas.sharing import PRIMITIVES, Draft, SharingConfig, apply_layer
from nas.supernet import Supernet, standalone
from nas.zoo import presets

SHAPE = ModelShape(vocab_size=256, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=48)
UNTIED = replace(SHAPE, tie_word_embeddings=False)
EVERYTHING = [{}, {"kv_heads": 2}, {"kv": 1, "ffn": 0}, {"tie": 1}]


def random_config(seed: int) -> SharingConfig:
    """Any primitives together, drawn until they go together."""
    rng = random.Random(seed)
    draft = Draft(SHAPE, rng.choice(["private", "tied"]))
    layers: list[dict[str, Any]] = []
    while len(layers) < SHAPE.num_hidden_layers:
        rows = [row for row in PRIMITIVES.values() if rng.random() < 0.4 and (len(layers) or not row.sources)]
        layer = {row.name: rng.choice([*range(len(layers))] if row.sources else row.options(SHAPE)) for row in rows}
        try:
            apply_layer(draft, layer)
        except UserError:
            draft.start()
        else:
            layers.append(layer)
    return SharingConfig.make(SHAPE, layers, draft.norms)


CONFIGS = dict(presets(SHAPE))
CONFIGS |= {"everything": SharingConfig.make(SHAPE, EVERYTHING)} | {f"random-{n}": random_config(n) for n in range(4)}
COMBINED = ["dense", "gqa-2", "cla-2", "albert", "everything"]
"""The kinds of sharing, for laws that take longer."""


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


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Models this small only wait for a second one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def supernets() -> dict[bool, Supernet]:
    nets = {shape.tie_word_embeddings: Supernet(shape, torch.Generator().manual_seed(0)) for shape in (SHAPE, UNTIED)}
    for net in nets.values():
        bold(net.bank)
    return nets


@pytest.fixture(scope="module")
def case(supernets: dict[bool, Supernet], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Case]]:
    """`case(name, tied)`: a config exported from a supernet and loaded by transformers, each once."""
    root = tmp_path_factory.mktemp("exports")
    made: dict[tuple[str, bool], Case] = {}

    def make(name: str, tied: bool = True) -> Case:
        if (name, tied) not in made:
            config, folder = CONFIGS[name], root / f"{name}{'' if tied else '-untied'}"
            subnet = supernets[tied].subnet(config)
            export(subnet, config, bytes_json(), folder, Card())
            model, info = from_pretrained(folder, output_loading_info=True)
            made[name, tied] = Case(config, subnet, folder, model, info)
        return made[name, tied]

    with pytest.MonkeyPatch.context() as patch:
        # Its copies of a folder's code go to a place that it reads at import, and that is not ours to fill.
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        yield make


def from_pretrained(folder: Path, **kwargs: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **kwargs)


def tokens(batch: int, seq: int, seed: int = 0) -> Tensor:
    return torch.randint(256, (batch, seq), generator=torch.Generator().manual_seed(seed))


# What is loaded


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_transformers_loads_the_subnet(case: Callable[..., Case], name: str, tied: bool) -> None:
    made = case(name, tied)
    assert not any(made.info.values()), made.info
    x = tokens(2, 11)
    assert torch.equal(made.model(x).logits, made.subnet(x))
    unique = sum(weight.numel() for weight in made.model.parameters())
    assert unique == measure(made.subnet.shape, made.config, MemorySpec()).unique_params


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", CONFIGS)
def test_this_project_loads_it_back(case: Callable[..., Case], name: str, tied: bool) -> None:
    made = case(name, tied)
    loaded = load_export(made.folder)
    assert (loaded.config, loaded.shape) == (made.config, made.subnet.shape)
    assert read_config(made.folder) == (made.subnet.shape, made.config)
    alone = standalone(made.subnet).state_dict()
    assert loaded.model.state_dict().keys() == alone.keys()
    assert all(torch.equal(weight, alone[name]) for name, weight in loaded.model.state_dict().items())
    assert loaded.tokenizer.to_str() == type(loaded.tokenizer).from_str(bytes_json()).to_str()


@pytest.mark.parametrize("name", ["dense", "gqa-2"])
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
    config.num_key_value_heads = made.subnet.plan.layers[0].kv_heads
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
    shape = ModelShape(300, 24, 3, 6, 40, 3, 10, 99, 500.0, 1e-2, False)
    config = SharingConfig.make(shape, [{}, {"kv": 0}, {"kv_heads": 1}])
    model = bold(init_weights(Decoder(shape, config.resolve(shape)), torch.Generator().manual_seed(0)))
    export(model, config, bytes_json(), tmp_path / "out", Card())
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
    per_token = measure(SHAPE, made.config, MemorySpec(dtype="bfloat16")).kv_bytes_per_token
    assert cache_bytes(out.past_key_values) == per_token * 2 * 12


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
    export(Supernet(SHAPE, torch.Generator()).bank, CONFIGS["dense"], tokenizer.to_str(), tmp_path / "out", Card())
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert loaded.pad_token == pad
    data = json.loads((tmp_path / "out" / "config.json").read_text())
    assert data["pad_token_id"] == loaded.pad_token_id == (tokenizer.token_to_id(pad) if pad else None)


# The cache


def cache_bytes(cache: Any) -> int:
    tensors = [t for layer in cache.layers for t in (layer.keys, layer.values) if t is not None]
    return sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_only_owners_keep_a_cache_of_the_predicted_bytes(case: Callable[..., Case], name: str) -> None:
    made = case(name)
    x = tokens(2, 7)
    plain = made.model.generate(x, max_new_tokens=6, do_sample=False, use_cache=False)
    out = made.model.generate(x, max_new_tokens=6, do_sample=False, return_dict_in_generate=True)
    assert torch.equal(out.sequences, plain)
    cached = 7 + 6 - 1  # the last token is never read
    kept = [i for i, layer in enumerate(out.past_key_values.layers) if layer.keys is not None]
    assert kept == made.subnet.plan.kv_owners
    per_token = measure(SHAPE, made.config, MemorySpec(dtype="float32")).kv_bytes_per_token
    assert cache_bytes(out.past_key_values) == per_token * 2 * cached


@pytest.mark.parametrize("chunk", [None, 3])
@pytest.mark.parametrize("name", COMBINED)
@torch.no_grad()
def test_readers_keep_nothing_in_a_static_cache(case: Callable[..., Case], name: str, chunk: int | None) -> None:
    made = case(name)
    how = {"cache_implementation": "static", "prefill_chunk_size": chunk, "return_dict_in_generate": True, "do_sample": False}
    cache = made.model.generate(tokens(2, 7), max_length=30, **how).past_key_values
    assert [i for i, layer in enumerate(cache.layers) if layer.keys is not None] == made.subnet.plan.kv_owners
    per_token = measure(SHAPE, made.config, MemorySpec(dtype="float32")).kv_bytes_per_token
    assert cache_bytes(cache) == per_token * 2 * cache.get_max_length()


@pytest.mark.parametrize("name", COMBINED)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(case: Callable[..., Case], name: str, side: str) -> None:
    made = case(name)
    texts = [tokens(1, n, seed=n)[0] for n in (3, 9, 6)]
    before = [(9 - len(t)) if side == "left" else 0 for t in texts]
    x = torch.stack([F.pad(t, (n, 9 - n - len(t)), value=7) for t, n in zip(texts, before, strict=True)])
    mask = torch.stack([F.pad(torch.ones(len(t)), (n, 9 - n - len(t))) for t, n in zip(texts, before, strict=True)]).long()
    logits = made.model(x, attention_mask=mask).logits
    for row, text, start in zip(logits, texts, before, strict=True):
        torch.testing.assert_close(row[start : start + len(text)], made.model(text[None]).logits[0], rtol=1e-4, atol=1e-4)
    grads = gradients(made.model, made.model(x, attention_mask=mask, labels=x.masked_fill(mask == 0, -100)).loss)
    assert all(tensor.isfinite().all() for tensor in (logits, *grads.values()))


@pytest.mark.parametrize("name", COMBINED)
@torch.no_grad()
def test_a_batch_with_left_padding_generates_what_each_prompt_does(case: Callable[..., Case], name: str) -> None:
    made = case(name)
    texts = [tokens(1, n, seed=n) for n in (2, 8, 5)]
    x = torch.cat([F.pad(t, (8 - t.shape[1], 0), value=0) for t in texts])
    mask = torch.cat([F.pad(torch.ones_like(t), (8 - t.shape[1], 0)) for t in texts])
    for cache in (None, "static"):
        out = made.model.generate(x, attention_mask=mask, max_new_tokens=5, do_sample=False, cache_implementation=cache)
        for row, text in zip(out, texts, strict=True):
            assert torch.equal(row[8:], made.model.generate(text, max_new_tokens=5, do_sample=False)[0, text.shape[1] :])


@pytest.mark.parametrize("name", COMBINED)
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


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["dense", "everything"])
@torch.no_grad()
def test_every_way_to_generate_gives_what_it_gives_without_a_cache(case: Callable[..., Case], name: str, mode: str) -> None:
    made = case(name)
    how, caching = MODES[mode]
    x = tokens(1, 7).repeat(1, 2)  # so that a look-up finds something
    torch.manual_seed(0)
    plain = made.model.generate(x, max_new_tokens=6, use_cache=False, **how)
    torch.manual_seed(0)
    assert torch.equal(made.model.generate(x, max_new_tokens=6, **how, **caching), plain)


@pytest.mark.parametrize("name", COMBINED)
@torch.no_grad()
def test_decoding_in_pieces_gives_the_logits_of_the_whole(case: Callable[..., Case], name: str) -> None:
    from transformers import DynamicCache, StaticCache

    made = case(name)
    x = tokens(2, 10)
    whole = made.subnet(x)
    for cache in (DynamicCache(), DynamicCache(config=made.model.config), StaticCache(made.model.config, max_cache_len=16)):
        parts = [made.model(part, past_key_values=cache).logits for part in x.split([4, 1, 3, 1, 1], 1)]
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)


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


@torch.no_grad()
def test_the_forward_takes_what_every_causal_model_takes(case: Callable[..., Case]) -> None:
    model = case("everything").model
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


# Training


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters()}


@pytest.mark.parametrize("name", [*COMBINED, "random-0", "random-1"])
@pytest.mark.parametrize("tied", [True, False])
def test_checkpointing_activations_changes_no_gradient(case: Callable[..., Case], name: str, tied: bool) -> None:
    made = case(name, tied)
    x = tokens(2, 9)
    model = from_pretrained(made.folder).train()
    alone = standalone(made.subnet)
    wanted = gradients(alone, F.cross_entropy(alone(x)[:, :-1].flatten(0, 1), x[:, 1:].flatten()))
    wanted = {hf_name(key): grad for key, grad in wanted.items()}
    runs: list[int] = []
    model.model.layers[0]["input_layernorm"].register_forward_hook(lambda *_: runs.append(1))
    torch.testing.assert_close(gradients(model, model(x, labels=x).loss), wanted)
    once = len(runs)
    for reentrant in (False, True):
        runs.clear()
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
        torch.testing.assert_close(gradients(model, model(x, labels=x).loss), wanted)
        assert len(runs) == 2 * once
    with pytest.raises(ValueError, match="would fill a KV cache twice"):
        model(x, use_cache=True)
    assert model.eval()(x).past_key_values is not None


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
def test_its_vocabulary_can_grow(case: Callable[..., Case], tied: bool) -> None:
    made = case("everything", tied)
    model = from_pretrained(made.folder)
    x = tokens(2, 5)
    before = model(x).logits
    model.resize_token_embeddings(260)
    torch.testing.assert_close(model(x).logits[..., :256], before)
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied


def test_a_model_from_its_config_alone_begins_as_the_searchs_do(case: Callable[..., Case]) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(case("cla-2").folder, trust_remote_code=True)
    config.hidden_size, config.head_dim, config.intermediate_size = 128, 32, 256
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    wanted = init_weights(Decoder(config, case("cla-2").subnet.plan), torch.Generator().manual_seed(0)).state_dict()
    for name, weight in model.model.state_dict().items():
        torch.testing.assert_close(weight.std(), wanted[name].std(), rtol=0.05, atol=0)


# What a stranger gets

STRANGER = """
import sys
from importlib.abc import MetaPathFinder

class Without(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "nas":
            raise ModuleNotFoundError("No module named 'nas'", name=name)

sys.meta_path.insert(0, Without())
folder, readme, wanted = sys.argv[1:]
code = open(readme).read().split("```python")[1].split("```")[0]
exec(code)

import torch
model, info = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
assert not any(info.values()), info
x, logits = torch.load(wanted, weights_only=True)
assert torch.equal(model(x).logits, logits)
assert not [name for name in sys.modules if name.split(".")[0] == "nas"]
print("the same logits")
"""


@torch.no_grad()
def test_a_stranger_without_this_project_runs_what_the_readme_says(case: Callable[..., Case], tmp_path: Path) -> None:
    made = case("everything")
    x = tokens(2, 9)
    torch.save((x, made.subnet(x)), tmp_path / "wanted.pt")
    env = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-I",
        "-c",
        STRANGER,
        str(made.folder),
        str(made.folder / "README.md"),
        str(tmp_path / "wanted.pt"),
    ]
    done = subprocess.run(command, cwd=made.folder, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("the same logits\n")
    assert "Error" not in done.stderr


def test_the_folder_carries_the_one_forward() -> None:
    ours = Path(str(decoder_module.__file__)).read_text().splitlines()
    theirs = carried_code()["decoder.py"].splitlines()
    changed = [(a, b) for a, b in zip(ours, theirs, strict=True) if a != b]
    assert changed == [("    from .shape import ModelShape", "    from .configuration_nas import NasConfig as ModelShape")]


def test_the_readme_says_what_the_model_costs_and_how_it_was_found(tmp_path: Path) -> None:
    config, spec = CONFIGS["cla-2"], MemorySpec(context=2048, batch=2, dtype="float16")
    losses = Losses(1.25, 3.4903, 0.02)
    evaluation = Evaluation(config, measure(SHAPE, config, spec), losses, 1.8, "retrained", 0, 1_200_000, 60.0)
    card = Card("CLA at 2k", "The knee of a search over 400 configurations.", "nas search s.yaml", "the moon", evaluation, spec)
    export(Supernet(SHAPE, torch.Generator()).subnet(config), config, bytes_json(), tmp_path / "out", card)
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
    assert "| 1 | its own | its own | its own | reads layer 0's | 4 |" in text
    assert "| KV cache | 1.0 MiB | 2.0 MiB |" in text  # 2 of 4 layers keep 2 · 32 numbers of 2 bytes for each of 2 · 2048 tokens


# Writing


def test_an_export_that_fails_leaves_nothing_behind(case: Callable[..., Case], tmp_path: Path) -> None:
    made = case("dense")
    for target in (tmp_path / "new", tmp_path / "there"):
        (tmp_path / "there").mkdir(exist_ok=True)
        with pytest.raises(json.JSONDecodeError):
            export(made.subnet, made.config, "not a tokenizer", target, Card())
        assert [path.name for path in tmp_path.rglob("*")] == ["there"]


def test_an_earlier_export_is_replaced_and_what_else_is_there_stays(case: Callable[..., Case], tmp_path: Path) -> None:
    target = tmp_path / "out"
    for name in ("dense", "everything"):
        made = case(name)
        export(made.subnet, made.config, bytes_json(), target, Card())
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
    export(made.subnet, made.config, bytes_json(), target, Card())
    assert len({path.stat().st_mode for path in target.iterdir()}) == 1  # whoever may read one file may read them all
    move = Path.replace

    def crash(path: Path, to: Path) -> Path:
        if to.name == "model.safetensors":
            raise OSError("the lights are out")
        return move(path, to)

    monkeypatch.setattr(Path, "replace", crash)
    with pytest.raises(OSError, match="the lights are out"):
        export(case("everything").subnet, case("everything").config, bytes_json(), target, Card())
    with pytest.raises(UserError, match=r"is no export: it has no config\.json"):
        load_export(target)


def test_a_folder_of_something_else_is_not_written_over(case: Callable[..., Case], tmp_path: Path) -> None:
    made = case("dense")
    (tmp_path / "thesis.tex").write_text("years")
    with pytest.raises(UserError, match=r"not empty and is no earlier export; .*--overwrite"):
        export(made.subnet, made.config, bytes_json(), tmp_path, Card())
    with pytest.raises(UserError, match="is a file"):
        export(made.subnet, made.config, bytes_json(), tmp_path / "thesis.tex", Card())
    with pytest.raises(UserError, match=r"unknown format 'hff'; did you mean hf\?"):
        export(made.subnet, made.config, bytes_json(), tmp_path, Card(), "hff")
    export(made.subnet, made.config, bytes_json(), tmp_path, Card(), overwrite=True)
    assert (tmp_path / "thesis.tex").read_text() == "years"
    assert load_export(tmp_path).config == made.config


@pytest.mark.parametrize("name", FORMATS)
def test_exporting_leaves_the_supernet_as_it_was(supernets: dict[bool, Supernet], name: str, tmp_path: Path) -> None:
    net = supernets[True]
    before = {key: value.clone() for key, value in net.state_dict().items()}
    export(net.subnet(CONFIGS["everything"]), CONFIGS["everything"], bytes_json(), tmp_path / "out", Card(), name)
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
    "another model": (edit("config.json", lambda d: d.update(model_type="llama")), "model_type is 'llama', not 'nas_sharing'"),
    "not JSON": (lambda f: (f / "config.json").write_text("{"), "config.json: is not JSON"),
    "a bad shape": (edit("config.json", lambda d: d.update(hidden_size="32")), "config.json: hidden_size: '32'"),
    "no plan": (edit("config.json", lambda d: d.pop("plan")), "plan says of no layer whose weights it uses"),
    "a plan too short": (edit("config.json", lambda d: d["plan"].pop()), "plan is not one of 4 layers"),
    "an impossible plan": (edit("config.json", lambda d: d["plan"][2].update(kv=3)), "config.json: plan "),
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
    from nas.export.train import TrainSettings, train_export

    progress = given.pop("progress", None)
    return train_export(
        folder, text, TrainSettings(**{"steps": 6, "batch": 4, "seq": 16, "autocast": False} | given), to, progress
    )


@pytest.mark.parametrize("name", ["dense", "everything"])
def test_training_a_folder_lowers_its_loss_and_keeps_it_a_folder(
    case: Callable[..., Case], name: str, text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder, to = fresh(case, tmp_path, name), tmp_path / "trained"
    (folder / "generation_config.json").write_text('{"max_new_tokens": 5}')
    (folder / "README.md").write_text("# Mine\n")
    seen: list[tuple[int, int, float]] = []
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
    with pytest.raises(UserError, match=r"the .* text has \d+ tokens, and one window takes 65"):
        trained_on(folder, short, tmp_path / "to", seq=64)
    with pytest.raises(UserError, match="steps: -1 is not positive"):
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
@pytest.mark.parametrize("name", COMBINED)
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


@torch.no_grad()
def test_perplexity_is_that_of_the_whole_text(case: Callable[..., Case], tmp_path: Path) -> None:
    from nas.export.measure import EvalSettings, eval_export

    made = case("everything")
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
