"""An exported folder of the format `hf` is the subnet: for transformers, for a stranger, and for this project."""

import io
import json
import re
import shutil
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from exports import (
    CONFIGS,
    COVERING,
    KINDS,
    SHAPE,
    Exports,
    batch_of,
    from_pretrained,
    gradients,
    greedy,
    load,
    over_all,
    over_kinds,
    stranger,
    supernet,
    tokens,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from nas.data.tokenizer import build_tokenizer, bytes_json
from nas.export import FORMATS, ModelCard, export, load_export, read_config
from nas.export.card import without_results
from nas.export.hugging_face import CODE, carried_code, hf_name
from nas.model.decoder import Decoder, init_weights
from nas.model.supernet import standalone
from nas.sharing.memory import MemorySpec, measure
from nas.sharing.plan import FFN_NORM
from nas.sharing.sharing_config import SharingConfig
from nas.training.evaluation import Evaluation, Losses

NEAR = {"rtol": 1e-4, "atol": 1e-4}


# What is loaded


@over_all
@torch.no_grad()
def test_transformers_loads_the_subnet_with_the_predicted_bytes(exports: Exports, names: list[str]) -> None:
    for made in (exports(name, tied) for name in names for tied in ((True, False) if name in KINDS else (True,))):
        x, memory = tokens(2, 11), measure(made.subnet.shape, made.config, MemorySpec(dtype="float32"))
        assert torch.equal(made.model(x).logits, made.subnet(x)), made.folder
        with (made.folder / "model.safetensors").open("rb") as file:
            header = 8 + int.from_bytes(file.read(8), "little")
        assert sum(weight.numel() for weight in made.model.parameters()) == memory.unique_params
        assert sum(weight.nbytes for weight in made.model.parameters()) == memory.weight_bytes
        assert (made.folder / "model.safetensors").stat().st_size - header == memory.weight_bytes


@over_all
@torch.no_grad()
def test_this_project_loads_it_and_what_transformers_saves_of_it(exports: Exports, names: list[str], tmp_path: Path) -> None:
    for made in (exports(name, tied) for name in names for tied in ((True, False) if name in KINDS else (True,))):
        head, alone = made.subnet.plan.outside.tie_word_embeddings, standalone(made.subnet).state_dict()
        shape, saved = replace(made.subnet.shape, tie_word_embeddings=head), tmp_path / made.folder.name
        made.model.save_pretrained(saved, max_shard_size="40KB")
        shutil.copy(made.folder / "tokenizer.json", saved)
        for folder in (made.folder, saved):
            loaded = load_export(folder)
            assert (loaded.config.resolve(shape), loaded.shape) == (made.subnet.plan, shape)
            assert loaded.config == made.config or head != made.subnet.shape.tie_word_embeddings
            assert read_config(folder) == (loaded.shape, loaded.config)
            assert loaded.model.state_dict().keys() == alone.keys()
            assert all(torch.equal(weight, alone[key]) for key, weight in loaded.model.state_dict().items())
            assert loaded.tokenizer.to_str() == type(loaded.tokenizer).from_str(bytes_json()).to_str()
        again, info = from_pretrained(saved, output_loading_info=True)  # its code travels on
        assert not any(info.values()), info
        assert torch.equal(again(tokens(2, 5)).logits, made.subnet(tokens(2, 5)))


@over_kinds
@torch.no_grad()
def test_it_is_saved_in_bfloat16_in_shards(exports: Exports, names: list[str], tmp_path: Path) -> None:
    x = tokens(2, 9)
    for made in map(exports, names):
        model, to = load(made.folder, dtype=torch.bfloat16), tmp_path / made.folder.name
        assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
        assert torch.equal(model(x).logits, standalone(made.subnet).bfloat16()(x))
        out = model.generate(x, max_new_tokens=4, return_dict_in_generate=True, do_sample=False)
        wanted = measure(SHAPE, made.config, MemorySpec(12, 2, "bfloat16")).kv_cache_bytes
        assert cache_bytes(out.past_key_values.layers) == wanted
        model.save_pretrained(to, max_shard_size="8KB")
        shutil.copy(made.folder / "tokenizer.json", to)
        assert len([*to.glob("model-*-of-*.safetensors")]) > 1
        again = load(to, dtype="auto")
        assert again.dtype == torch.bfloat16
        assert torch.equal(again(x).logits, model(x).logits)
        assert torch.equal(load_export(to).model(x), model(x).logits)


def test_the_tokenizer_gives_back_any_text(exports: Exports, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    folder = exports("dense").folder
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    assert isinstance(PreTrainedTokenizerFast.from_pretrained(folder), PreTrainedTokenizerFast)  # needs no trust

    @settings(max_examples=100)
    @given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])))
    def law(text: str) -> None:
        ids = tokenizer(text).input_ids
        assert ids == list(text.encode())
        assert tokenizer.decode(ids) == tokenizer.decode(ids, skip_special_tokens=True) == text

    law()
    made = exports("dense")
    older = export(made.subnet, made.config, bytes_json(end=False), tmp_path / "older", ModelCard())
    for pad, source in ((256, folder), (0, older)):
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=True)
        assert tokenizer.decode(tokenizer("Ā ÿ <pad>").input_ids) == "Ā ÿ <pad>"
        padded = tokenizer(["a", "bcd"], padding=True)
        assert padded.input_ids == [[pad, pad, ord("a")], list(b"bcd")]
        assert padded.attention_mask == [[0, 0, 1], [1, 1, 1]]


def test_every_format_names_the_end_of_text_and_generation_ends_there(exports: Exports, tmp_path: Path) -> None:
    """`lm-eval` needs a token to begin texts with, `trl` one to end them with."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    made, text = exports("albert"), "abc" * 80
    bpe = build_tokenizer("bpe", SHAPE.vocab_size, text.encode(), tmp_path).json
    for format, json_text in product(("hf", "dense", "torch"), (bytes_json(), bpe)):
        folder = export(made.subnet, made.config, json_text, tmp_path / "out", ModelCard(), format)
        config = json.loads((folder / "config.json").read_text())
        assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (256, 256, 256)
        assert load_export(folder).metadata.token_ids == dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 256)
        if format == "torch":
            continue
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (256, 256, 256)
        assert tokenizer(f"ab{tokenizer.eos_token}").input_ids == [*tokenizer("ab").input_ids, 256]
        assert 256 not in tokenizer("ab").input_ids
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        assert model.generation_config.eos_token_id == 256
        model.set_output_embeddings(Ending(model.get_output_embeddings(), after=12))
        found = model.generate(**tokenizer("abcdefg", return_tensors="pt"), max_new_tokens=40, do_sample=False)
        assert found[0, 12:].tolist() == [256]


class Ending(torch.nn.Module):
    """An output head that gives the end of text the most once a text has so many tokens."""

    def __init__(self, head: Any, after: int) -> None:
        super().__init__()
        self.head, self.left = head, after - 7

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.left -= 1
        return self.head(x).index_fill(-1, torch.tensor([256]), 1e9 if self.left < 0 else -1e9)


def test_a_tokenizer_of_the_users_gets_a_padding_token_if_it_has_one(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import AutoTokenizer

    model = init_weights(Decoder(SHAPE, SharingConfig.dense(SHAPE).resolve(SHAPE)), torch.Generator())
    for special, pad in ((["<s>", "<pad>"], "<pad>"), (["<|endoftext|>"], "<|endoftext|>"), ([], None)):
        tokenizer = Tokenizer(models.WordLevel({"Ā": 0, "a": 1}, unk_token="a"))
        tokenizer.add_special_tokens(special)
        export(model, CONFIGS["dense"], tokenizer.to_str(), tmp_path / "out", ModelCard())
        loaded = AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)
        data = json.loads((tmp_path / "out" / "config.json").read_text())
        assert loaded.pad_token == pad
        assert data["pad_token_id"] == loaded.pad_token_id == (tokenizer.token_to_id(pad) if pad else None)


# The cache

END = 256
"""The tokenizer's end-of-text token, which fills up, too."""


def cache_bytes(layers: Sequence[Any]) -> int:
    tensors = [t for layer in layers for t in (layer.keys, layer.values) if t is not None]
    return sum(t.numel() * t.element_size() for t in tensors)


@over_all
@torch.no_grad()
def test_a_padded_batch_generates_what_the_subnet_does_with_a_cache_of_owners_alone(exports: Exports, names: list[str]) -> None:
    texts = [tokens(1, n, seed=n)[0] for n in (3, 8)]
    x, mask = batch_of(texts)
    for made in map(exports, names):
        how = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True}
        out = made.model.generate(x, attention_mask=mask, **how)
        for row, text in zip(out.sequences, texts, strict=True):
            expected = greedy(made.subnet, text, 6)
            ends = expected == END
            expected[ends.cumsum(0) > ends] = END  # a row that has ended is filled up
            assert torch.equal(row[8:], expected), made.folder
        layers = out.past_key_values.layers
        assert [i for i, layer in enumerate(layers) if layer.keys is not None] == made.subnet.plan.kv_owners
        held = MemorySpec(context=8 + 6 - 1, batch=2, dtype="float32")  # the last token is never read
        assert cache_bytes(layers) == measure(SHAPE, made.config, held).kv_cache_bytes


def is_static(name: str) -> bool:
    """Whether a static cache can serve a config: no window, nothing read from a later layer, as many key as value heads."""
    config = CONFIGS[name]
    later = any(dict(layer).get("kv", 0) > i for i, layer in enumerate(config.layers))
    plan = config.resolve(SHAPE)
    return not later and not any(layer.window or layer.k_heads != layer.v_heads for layer in plan.layers)


@over_kinds
@torch.no_grad()
def test_a_static_cache_holds_owners_alone_or_is_refused(exports: Exports, names: list[str]) -> None:
    for made, name, chunk in ((exports(name), name, chunk) for name in names for chunk in (None, 3)):
        how = {"cache_implementation": "static", "prefill_chunk_size": chunk, "return_dict_in_generate": True}
        if not is_static(name):
            with pytest.raises(ValueError, match=r"a static cache cannot serve this model: layer \d .*; use a dynamic cache"):
                made.model.generate(tokens(2, 7), max_length=30, do_sample=False, **how)
            continue
        cache = made.model.generate(tokens(2, 7), max_length=30, do_sample=False, **how).past_key_values
        layers = cache.layers if made.subnet.plan.kv_owners else []
        assert [i for i, layer in enumerate(layers) if layer.keys is not None] == made.subnet.plan.kv_owners
        spec = MemorySpec(context=cache.get_max_length(), batch=2, dtype="float32") if layers else MemorySpec()
        assert cache_bytes(layers) == measure(SHAPE, made.config, spec).kv_cache_bytes


@over_kinds
def test_padding_changes_nothing(exports: Exports, names: list[str]) -> None:
    texts = [tokens(1, n, seed=n)[0] for n in (3, 9, 6)]
    for model, side in ((exports(name).model, side) for name in names for side in ("left", "right")):
        x, mask = batch_of(texts, side, pad=7)
        logits = model(x, attention_mask=mask).logits
        for row, real, text in zip(logits, mask.bool(), texts, strict=True):
            torch.testing.assert_close(row[real], model(text[None]).logits[0], **NEAR)
        grads = gradients(model, model(x, attention_mask=mask, labels=x.masked_fill(mask == 0, -100)).loss)
        assert all(tensor.isfinite().all() for tensor in (logits, *grads.values()))


@over_kinds
@torch.no_grad()
def test_documents_in_a_row_are_kept_apart_by_their_positions(exports: Exports, names: list[str]) -> None:
    texts = [tokens(1, n, seed=n) for n in (4, 1, 6)]
    positions = torch.cat([torch.arange(t.shape[1]) for t in texts])[None]
    for model in (exports(name).model for name in names):
        logits = model(torch.cat(texts, 1), position_ids=positions).logits
        torch.testing.assert_close(logits, torch.cat([model(t).logits for t in texts], 1), **NEAR)


GREEDY, DRAWN = {"do_sample": False}, {"do_sample": True, "top_k": 20, "temperature": 0.8}
WAYS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "beams": ({"num_beams": 3, "do_sample": False}, {}),
    "beams of a group": ({"num_beams": 4, "num_return_sequences": 2, "do_sample": False, "length_penalty": 0.5}, {}),
    "sampled beams": ({"num_beams": 3, "do_sample": True}, {}),
    "several samples": (DRAWN | {"num_return_sequences": 3}, {}),
    "static cache": (GREEDY, {"cache_implementation": "static"}),
    "prefill in chunks": (GREEDY, {"prefill_chunk_size": 3}),
    "static cache, prefill in chunks": (GREEDY, {"prefill_chunk_size": 3, "cache_implementation": "static"}),
    "prompt look-up": (GREEDY, {"prompt_lookup_num_tokens": 2}),
    "drafts that are often wrong": (GREEDY, {"assistant_model": "mqa"}),
    "drafts that are never wrong": (GREEDY, {"assistant_model": None}),
}
"""Ways to generate, and the options with which a cache is used otherwise than by default."""


@over_kinds
@torch.no_grad()
def test_every_way_to_generate_gives_what_it_gives_without_a_cache(exports: Exports, names: list[str]) -> None:
    x = tokens(1, 4).repeat(1, 2)  # so that a look-up finds something
    for name, (way, (how, caching)) in ((name, row) for name in names for row in WAYS.items()):
        if "static" in way and not is_static(name):
            continue
        model, caching = load(exports(name).folder), dict(caching)
        if "assistant_model" in caching:
            caching["assistant_model"] = load(exports(caching["assistant_model"] or name).folder)
        torch.manual_seed(0)
        plain = model.generate(x, max_new_tokens=6, use_cache=False, **how)
        torch.manual_seed(0)
        assert torch.equal(model.generate(x, max_new_tokens=6, **how, **caching), plain), (name, way)


@over_kinds
@torch.no_grad()
def test_rows_of_a_padded_batch_are_generated_as_if_alone(exports: Exports, names: list[str]) -> None:
    texts = [tokens(1, n, seed=n)[0] for n in (3, 8)]
    x, mask = batch_of(texts)
    for model in (exports(name).model for name in names):
        for way in ("beams", "prefill in chunks"):
            how = WAYS[way][0] | WAYS[way][1] | {"max_new_tokens": 5}
            together = model.generate(x, attention_mask=mask, **how)
            alone = [model.generate(row[None], **how)[:, -5:] for row in texts]
            assert torch.equal(together[:, 8:], torch.cat(alone)), how


@over_kinds
@torch.no_grad()
def test_a_cache_is_filled_in_pieces_reordered_repeated_and_continued(exports: Exports, names: list[str]) -> None:
    from transformers import DynamicCache, StaticCache

    x, order = tokens(2, 10), torch.tensor([1, 0])
    for name in names:
        made = exports(name)
        model, whole = made.model, made.subnet(x)
        caches = [DynamicCache(), DynamicCache(config=model.config)]
        for cache in caches + [StaticCache(model.config, max_cache_len=16)] * is_static(name):
            parts = [model(part, past_key_values=cache).logits for part in x.split([4, 1, 3, 1, 1], 1)]
            torch.testing.assert_close(torch.cat(parts, 1), whole, **NEAR)
        swapped, repeated, said = DynamicCache(config=model.config), DynamicCache(config=model.config), tokens(1, 3)
        model(x[:, :9], past_key_values=swapped), model(x[:, :9], past_key_values=repeated)
        swapped.reorder_cache(order), repeated.batch_repeat_interleave(2)
        torch.testing.assert_close(model(x[order, 9:], past_key_values=swapped).logits, whole[order, 9:], **NEAR)
        twice = model(x[:, 9:].repeat_interleave(2, 0), past_key_values=repeated).logits
        torch.testing.assert_close(twice, whole[:, 9:].repeat_interleave(2, 0), **NEAR)
        conversation = DynamicCache()
        for turn in range(3):
            said = torch.cat([said, tokens(1, 2, seed=turn)], 1)
            wanted = greedy(made.subnet, said[0], 2)
            said = model.generate(said, past_key_values=conversation, max_new_tokens=2, do_sample=False)
            assert torch.equal(said[0, -2:], wanted), name


@torch.no_grad()
def test_a_step_with_a_static_cache_is_one_graph(exports: Exports) -> None:
    """What `generate` compiles where there is an accelerator; the laws of compiled code are torch's."""
    from transformers import StaticCache

    x, mask = tokens(2, 7), (torch.arange(16) < 7)[None, None, None]
    for made in (exports("everything"), exports("dictformer-2")):
        cache = StaticCache(made.model.config, max_cache_len=16)
        made.model(x[:, :6], past_key_values=cache)
        step = torch.compile(made.model.forward, backend="eager", fullgraph=True)
        logits = step(x[:, 6:], past_key_values=cache, attention_mask=mask, position_ids=torch.tensor([[6]])).logits
        torch.testing.assert_close(logits, made.subnet(x)[:, 6:], **NEAR)


@over_kinds
@torch.no_grad()
def test_it_streams_and_serves_a_pipeline(exports: Exports, names: list[str]) -> None:
    from transformers import AutoTokenizer, TextIteratorStreamer, TextStreamer, pipeline

    x, options = tokens(1, 5) % 60 + 60, {"max_new_tokens": 5, "do_sample": False}
    for made in map(exports, names):
        model, tokenizer = load(made.folder), AutoTokenizer.from_pretrained(made.folder, trust_remote_code=True)
        text = tokenizer.decode(model.generate(x, **options)[0, 5:])
        out, streamer = io.StringIO(), TextIteratorStreamer(tokenizer, skip_prompt=True)
        with redirect_stdout(out):
            model.generate(x, streamer=TextStreamer(tokenizer, skip_prompt=True), **options)
        model.generate(x, streamer=streamer, **options)
        assert out.getvalue().rstrip("\n") == "".join(streamer).rstrip("\n") == text.rstrip("\n")
        write = pipeline("text-generation", model=model, tokenizer=tokenizer)
        together = write(["The ", "In the end "], batch_size=2, return_full_text=False, **options)
        rows = [torch.tensor(list(text.encode())) for text in ("The ", "In the end ")]
        wanted = [tokenizer.decode(greedy(made.subnet, row, 5)) for row in rows]
        assert [one[0]["generated_text"] for one in together] == wanted


# The forward's other arguments


@torch.no_grad()
def test_the_forward_takes_what_every_causal_model_takes(exports: Exports) -> None:
    x = tokens(2, 9)
    labels, causal = x.clone(), torch.ones(9, 9, dtype=torch.bool).tril()[None, None]
    labels[0, :4] = -100
    for made in (exports("everything"), exports("albert")):
        model = made.model
        logits, embeddings = model(x).logits, model.get_input_embeddings()(x)
        assert torch.equal(model(inputs_embeds=embeddings).logits, logits)
        assert torch.equal(model.lm_head(model.base_model(input_ids=x, use_cache=False).last_hidden_state), logits)  # as trl does
        torch.testing.assert_close(model(x, logits_to_keep=2).logits, logits[:, -2:])
        torch.testing.assert_close(model(x, logits_to_keep=torch.tensor([1, 4])).logits, logits[:, [1, 4]])
        torch.testing.assert_close(model(x, position_ids=torch.arange(9)[None] + 100).logits, logits, rtol=1e-3, atol=1e-3)
        for mask in (causal, torch.where(causal, 0.0, -torch.inf)):
            torch.testing.assert_close(model(x, attention_mask=mask).logits, logits)
        assert torch.equal(model(x, return_dict=False)[0], logits)
        assert model(x, use_cache=False).past_key_values is None
        both = ({"inputs_embeds": embeddings}, {"inputs": x})
        new = [model.generate(**given, max_new_tokens=3, do_sample=False) for given in both]
        assert torch.equal(new[0][:, :3], new[1][:, 9:])
        wanted = F.cross_entropy(made.subnet(x)[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        torch.testing.assert_close(model(x, labels=labels).loss, wanted)
        assert load(made.folder, dtype=torch.bfloat16)(x, labels=labels).loss.dtype == torch.float32


ONE = tokens(1, 5)
REFUSED: dict[str, Callable[[Any], Any]] = {
    "either input_ids or inputs_embeds": lambda m: m(input_ids=None),
    "output_attentions is not supported": lambda m: m(ONE, output_attentions=True),
    "output_hidden_states is not supported": lambda m: m.generate(ONE, output_hidden_states=True, return_dict_in_generate=True),
    "3 columns for 5 tokens": lambda m: m(ONE, attention_mask=torch.ones(1, 3)),
    "assistant_early_exit is not supported": lambda m: m.generate(ONE, max_new_tokens=3, assistant_early_exit=2),
    "continuous batching .* is not supported": lambda m: m.generate_batch([[1, 2, 3], [4]]),
    "`QuantizedCache` is only supported": lambda m: m.generate(ONE, max_new_tokens=3, cache_implementation="quantized"),
}


def test_what_it_cannot_give_is_refused(exports: Exports) -> None:
    for says, ask in REFUSED.items():
        with pytest.raises(ValueError, match=says):
            ask(exports("everything").model)
    with pytest.raises(ValueError, match="tie_word_embeddings is False, and the plan's is True"):
        from_pretrained(exports("dense").folder, tie_word_embeddings=False)
    for kind in ("flash_attention_2", "flex_attention"):
        with pytest.raises((ValueError, ImportError), match=r"does not support|not.*installed"):
            from_pretrained(exports("dense").folder, attn_implementation=kind)


# Training


@over_kinds
def test_checkpointing_activations_changes_no_gradient(exports: Exports, names: list[str]) -> None:
    x = tokens(2, 9)
    for made in (exports(name, tied) for name in names for tied in (True, False)):
        model, alone = load(made.folder).train(), standalone(made.subnet)
        wanted = gradients(alone, F.cross_entropy(alone(x)[:, :-1].flatten(0, 1), x[:, 1:].flatten()))
        wanted = {hf_name(key): grad for key, grad in wanted.items()}
        runs: list[int] = []
        layer = next(i for i, layer in enumerate(made.subnet.plan.layers) if layer.owner(FFN_NORM) is not None)
        model.model.part(layer, FFN_NORM).register_forward_hook(lambda *_, runs=runs: runs.append(1))
        torch.testing.assert_close(gradients(model, model(x, labels=x).loss), wanted)
        once = len(runs)
        for reentrant in (False, True):
            runs.clear()
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
            if made.subnet.plan.fixed_point_layers:
                with pytest.raises(ValueError, match="turn it off"):
                    model(x, labels=x)
                continue
            torch.testing.assert_close(gradients(model, model(x, labels=x).loss), wanted)
            assert len(runs) == 2 * once
            with pytest.raises(ValueError, match="would fill a KV cache twice"):
                model(x, use_cache=True)
        assert torch.equal(model.eval()(x).logits, made.model(x).logits)
        assert model(x).past_key_values is not None


def test_its_vocabulary_can_grow(exports: Exports) -> None:
    x = tokens(2, 5)
    for name, tied in ((name, tied) for name in ("everything", "albert") for tied in (True, False)):
        model = load(exports(name, tied).folder)
        before = model(x).logits
        model.resize_token_embeddings(260)
        torch.testing.assert_close(model(x).logits[..., :257], before)
        assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied


def test_a_model_from_its_config_alone_begins_as_a_searchs_does(exports: Exports) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    for name in ("cla-2", "universal", "relaxed-recursive-2x4", "basis-2x16", "dictformer-2", "albert", "moeut-2"):
        config = AutoConfig.from_pretrained(exports(name).folder, trust_remote_code=True)
        config.hidden_size, config.head_dim = 256, 64
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
        wanted = init_weights(Decoder(config, exports(name).subnet.plan), torch.Generator().manual_seed(0)).state_dict()
        for key, weight in model.model.state_dict().items():
            if weight.numel() > 1000:  # the deviation of fewer is too uncertain
                torch.testing.assert_close(weight.std(), wanted[key].std(), rtol=0.1, atol=0)
            assert (weight == weight.flatten()[0]).all() == (wanted[key] == wanted[key].flatten()[0]).all()
        head = model.get_output_embeddings().weight
        torch.testing.assert_close(head.std(), wanted["embed_tokens.weight"].std(), rtol=0.1, atol=0)


# What a stranger gets

STRANGER = """
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
def test_a_stranger_without_this_project_runs_what_the_readme_says(exports: Exports, tmp_path: Path) -> None:
    made, x = [exports(name) for name in COVERING], tokens(2, 9)
    torch.save([(str(one.folder), x, one.subnet(x)) for one in made], tmp_path / "wanted.pt")
    assert stranger(made[0].folder, STRANGER, str(tmp_path / "wanted.pt")).endswith("the same logits\n")


def test_the_folder_carries_the_one_forward() -> None:
    for name, path in CODE.items():
        pairs = zip(path.read_text().splitlines(), carried_code()[name].splitlines(), strict=True)
        changed = [theirs for ours, theirs in pairs if ours != theirs]
        assert all(re.match(r" *from \.(plan|model|configuration_nas) import", line) for line in changed), changed


def test_the_readme_says_what_the_model_costs_and_how_it_was_found(tmp_path: Path) -> None:
    config, spec = CONFIGS["cla-2"], MemorySpec(context=2048, batch=2, dtype="float16")
    losses = Losses(1.25, 3.4903, 0.02)
    evaluation = Evaluation(config, measure(SHAPE, config, spec), losses, 1.8, "retrained", 0, 1_200_000, 60.0)
    card = ModelCard("CLA at 2k", "The knee of a search.", "nas search s.yaml", "the moon", evaluation, spec)
    export(supernet(SHAPE, config).subnet(config), config, bytes_json(), tmp_path / "out", card)
    text = (tmp_path / "out" / "README.md").read_text()
    for part in (
        *("# CLA at 2k", "The knee of a search", "nas search s.yaml", "Text: the moon.", "perplexity 3.49", "1,200,000 tokens"),
        "In float16, for a context of 2,048 tokens and a batch of 2:",
        "dtype=torch.float16",
        "| 1 | q, o | gate up down | = layer 0 |",
        "| KV cache | 1.0 MiB | 2.0 MiB |",  # 2 of 4 layers keep 2 · 32 numbers of 2 bytes for each of 2 · 2048 tokens
    ):
        assert part in text


@pytest.mark.parametrize("part", ["test", "validation", ""])
def test_the_hub_reads_the_evaluation_from_the_readme(part: str, tmp_path: Path) -> None:
    from huggingface_hub import ModelCard as HubCard

    config, spec = CONFIGS["albert"], MemorySpec()
    memory, losses = measure(SHAPE, config, spec), Losses(1.25, 3.4903, 0.021)
    evaluation = Evaluation(config, memory, losses, 1.83, "retrained", 0, 100, 6.0, part=part)
    for data, kind in (("Parquet hf:some-one/tales, column text", "some-one/tales"), ('file a: "b".txt', "text")):
        for format in FORMATS:
            card = ModelCard("Knee: kv2", data=data, evaluation=evaluation)
            export(supernet(SHAPE, config).subnet(config), config, bytes_json(), tmp_path / "out", card, format)
            path = tmp_path / "out" / "README.md"
            text, read = path.read_text(), HubCard.load(path)
            if format == "config":  # no weights, nothing was measured of them
                assert read.data.eval_results is None
                continue
            assert read.data.model_name == "Knee: kv2"
            found = {result.metric_type: result for result in read.data.eval_results}
            values = {"perplexity": 3.4903, "perplexity_standard_error": 0.021, "bits_per_byte": 1.83}
            assert {name: result.metric_value for name, result in found.items()} == values
            for result in found.values():
                where = (result.task_type, result.dataset_type, result.dataset_name, result.dataset_split)
                assert where == ("text-generation", kind, data, part or "evaluation")
            assert HubCard(str(read)).data.to_dict() == read.data.to_dict()
            assert (read.data["library_name"] == "transformers") == (format in ("hf", "dense"))
            rest = HubCard(without_results(text))
            assert rest.data.eval_results is None
            assert (rest.data.tags, rest.text) == (read.data.tags, read.text)
    assert without_results("# Mine\n\nmodel-index:\n- a\n---\n") == "# Mine\n\nmodel-index:\n- a\n---\n"
