"""Folders of Llama's family: read as `transformers` reads them, written as it reads them, or refused in one line."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import refused, said, told
from exports import CONFIGS, SHAPE, UNTIED, Exports, bold, edit, reweigh, supernet, tokens
from safetensors.torch import load_file
from torch import nn

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from nas.config import format_bytes
from nas.data.tokenizer import bytes_json
from nas.errors import RunFailed, UserError
from nas.export import FORMATS, ModelCard, export, load_export, read_config
from nas.model.decoder import Decoder, init_weights
from nas.pretrained import FAMILIES, family_of, read_shape, require_plain
from nas.pretrained.families import SIZES
from nas.pretrained.files import LICENCE_KEYS, LICENCES, TEXTS, TOKEN_IDS
from nas.sharing.memory import MemorySpec, measure
from nas.sharing.plan import LayerPlan
from nas.sharing.primitives import PRIMITIVES
from nas.sharing.shape import ModelShape, RotaryScaling
from nas.sharing.sharing_config import SharingConfig

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
        (folder / "tokenizer.json").write_text(bytes_json(end=False))
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


SPARSE = [
    Made(family, heads, tied=n % 2 == 0, shards=n % 3 == 0, dtype=("float32", "bfloat16")[n // 2 % 2])
    for n, (family, heads) in enumerate(product(FAMILIES, HEADS))
]
FURTHER = {
    "llama 3.1": Made("llama", said=(("rope_parameters", LLAMA3),)),
    "linear": Made("llama", said=(("rope_parameters", LINEAR),)),
    "wide heads": Made("llama", said=(("head_dim", 20),)),
    "geglu": Made("llama", said=(("hidden_act", "gelu_pytorch_tanh"),)),
    "exact gelu": Made("mistral", said=(("hidden_act", "gelu"),)),
    "another base and epsilon": Made(
        "qwen2", said=(("rope_parameters", {"rope_type": "default", "rope_theta": 99.0}), ("rms_norm_eps", 0.1))
    ),
    "gemma's own word for it": Made("gemma", said=(("hidden_act", "gelu"),)),
    "gemma with silu": Made("gemma", said=(("hidden_act", "silu"),)),
    "a window as long as the text": Made("mistral", said=(("sliding_window", 64),)),
    "float16": Made("qwen3", dtype="float16"),
}


# Reading


@torch.no_grad()
def check_folder(made: Made, path: Path) -> None:
    """A folder is read as transformers reads it, and written and read again as the same model."""
    from nas.export.card import Artifact
    from nas.export.hugging_face import write_dense

    folder = made.write(path / "first")
    loaded = load_export(folder)
    assert_same(folder)
    assert loaded.config.is_dense
    assert loaded.shape.num_key_value_heads == HEADS[made.heads]
    assert read_config(folder) == (loaded.shape, loaded.config)
    weights = loaded.model.state_dict()
    assert {weight.dtype for weight in weights.values()} == {torch.float32 if loaded.notes else getattr(torch, made.dtype)}
    assert bool(loaded.notes) == (made.family == "gemma" and made.dtype != "float32")
    assert all(weight.requires_grad for weight in loaded.model.parameters())

    artifact = Artifact(loaded.shape, loaded.config, weights, bytes_json(end=False), ModelCard(), loaded.metadata, loaded.family)
    (path / "second").mkdir()
    write_dense(artifact, path / "second")
    again = load_export(path / "second")
    assert (again.shape, again.config) == (loaded.shape, loaded.config)
    ids = loaded.metadata.token_ids
    assert again.metadata.token_ids == ids | {"pad_token_id": ids["pad_token_id"] or 0}  # the byte 0 fills, where nothing did
    for name, weight in again.model.state_dict().items():
        assert weight.dtype == weights[name].dtype
        if made.family == "gemma":  # 1 + (w - 1)
            torch.testing.assert_close(weight, weights[name], rtol=1e-6, atol=1e-6)
        else:
            assert torch.equal(weight, weights[name])
    assert_same(path / "second")
    config = json.loads((path / "second" / "config.json").read_text())
    assert (config["model_type"], config["dtype"]) == (made.family, str(next(iter(weights.values())).dtype)[6:])


def test_folders_of_transformers_are_the_same_model_and_are_written_as_they_were(tmp_path: Path) -> None:
    for family in FAMILIES:
        check_folder(next(made for made in SPARSE if made.family == family), tmp_path / family)


@pytest.mark.slow
def test_every_folder_of_transformers_is_the_same_model_and_is_written_as_it_was(tmp_path: Path) -> None:
    for n, made in enumerate([*SPARSE, *FURTHER.values()]):
        check_folder(made, tmp_path / str(n))


def fields(shape: ModelShape) -> dict[str, Any]:
    """A shape's sizes, by a config.json's names."""
    return {key: getattr(shape, key) for key in SIZES} | {"rope_theta": shape.rope_theta}


def by_transformers(data: dict[str, Any]) -> dict[str, Any]:
    """The same as transformers takes them from a config.json."""
    from transformers import AutoConfig

    config = AutoConfig.for_model(**data)
    sizes = {key: getattr(config, key, None) for key in SIZES}
    sizes["head_dim"] = sizes["head_dim"] or config.hidden_size // config.num_attention_heads
    return sizes | {"rope_theta": config.rope_parameters["rope_theta"]}


SAID: dict[str, dict[str, Any]] = {
    "nothing": {},
    "other sizes": {"hidden_size": 96, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 10, "rms_norm_eps": 1e-3},
    "a base at the top": {"rope_theta": 1e6},
    "a base in rope_parameters": {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}, "rope_theta": 7.0},
    "no scaling": {"rope_scaling": None, "rope_theta": 500000},
    "the old spelling": {"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_theta": 500.0},
    "both spellings": {
        "rope_scaling": {"type": "linear", "factor": 4.0},
        "rope_parameters": {"rope_theta": 3.0, "rope_type": "default"},
    },
    "the other head": {"tie_word_embeddings": True},
    "its own head": {"tie_word_embeddings": False},
    "no window": {"sliding_window": None},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_config_leaves_out_is_what_transformers_takes(family: str) -> None:
    from transformers import AutoConfig

    for what, given in SAID.items():
        data = {"model_type": family} | given
        shape, config, _ = read_shape(data, Path("config.json"))
        wanted = by_transformers(dict(data))
        if family == "mistral" and what != "no window":
            wanted["max_position_embeddings"] = 4096
        assert fields(shape) == wanted
        assert (shape.rotary_scaling is not None) == ("spelling" in what)
        assert config.is_dense
    for key in FAMILIES[family].derived:  # null: it follows from the others
        shape, *_ = read_shape({"model_type": family, key: None}, Path("config.json"))
        assert fields(shape)[key] == by_transformers({"model_type": family, key: None})[key]
    for key in {"num_key_value_heads", "head_dim"} - set(FAMILIES[family].derived):
        with pytest.raises(UserError, match=f"config.json: {key}: "):
            read_shape({"model_type": family, key: None}, Path("config.json"))
    for given in ({}, {"eos_token_id": [3, 4], "pad_token_id": 5, "bos_token_id": None}):
        theirs = AutoConfig.for_model(model_type=family, **given)
        assert FAMILIES[family].token_ids(given) == {name: getattr(theirs, name) for name in TOKEN_IDS}


def test_scalings_are_read_in_either_spelling(tmp_path: Path) -> None:
    scaling = {key: value for key, value in LLAMA3.items() if key != "rope_theta"}
    original = "original_max_position_embeddings"
    for given in (
        {"rope_parameters": LLAMA3},
        {"rope_theta": 500.0, "rope_scaling": scaling},
        {"rope_theta": 500.0, "rope_scaling": scaling | {original: 9}, original: 8},
        {"rope_theta": 500.0, "rope_scaling": {**scaling, original: None}, "max_position_embeddings": 8},
    ):
        shape, *_ = read_shape({"model_type": "llama"} | given, Path("config.json"))
        assert (shape.rotary_scaling, shape.rope_theta) == (RotaryScaling(**scaling), 500.0)
    Made("llama").write(tmp_path)
    edit("config.json", lambda d: d.update(d.pop("rope_parameters") and {"rope_theta": 500.0, "rope_scaling": scaling}))(tmp_path)
    assert_same(tmp_path)


def test_a_window_shortens_the_context_and_says_so(tmp_path: Path) -> None:
    loaded = load_export(Made("mistral", said=(("sliding_window", 24),)).write(tmp_path))
    assert loaded.shape.max_position_embeddings == 24
    assert len(loaded.notes) == 1
    assert_same(tmp_path, 24)
    with pytest.raises(AssertionError):
        assert_same(tmp_path, 40)


@torch.no_grad()
def test_folders_may_hold_more_than_weights_and_their_code_is_not_run(tmp_path: Path) -> None:
    folder = Made("llama", tied=True).write(tmp_path)
    wanted = load_export(folder).model(tokens(1, 9))
    inverse = torch.ones(4)
    reweigh(lambda w: w.update({f"model.layers.{i}.self_attn.rotary_emb.inv_freq": inverse.clone() for i in range(2)}))(folder)
    reweigh(lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"].clone()}))(folder)
    assert torch.equal(load_export(folder).model(tokens(1, 9)), wanted)
    reweigh(lambda w: [w.update({name.removeprefix("model."): w.pop(name)}) for name in [*w]])(folder)
    (folder / "modeling_llama.py").write_text("raise SystemExit('it was run')")
    code = {"AutoModelForCausalLM": "modeling_llama.LlamaForCausalLM"}
    edit("config.json", lambda d: d.update(architectures=["LlamaModel"], auto_map=code))(folder)
    loaded = load_export(folder)
    assert len(loaded.notes) == 1
    assert torch.equal(loaded.model(tokens(1, 9)), wanted)


# Refusing

Q = "model.layers.0.self_attn.q_proj.weight"


def config(**said: Any) -> Callable[[Path], None]:
    return edit("config.json", lambda data: data.update(said))


def index(data: dict[str, Any]) -> Callable[[Path], None]:
    """Put an index in the place of the weights."""

    def damage(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").write_text(json.dumps(data))

    return damage


def tear(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def more_tokens(data: dict[str, Any]) -> None:
    token = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    data["added_tokens"] = [token | {"id": n, "content": f"<{n}>"} for n in range(256, 261)]


def pointer(name: str) -> Callable[[Path], Any]:
    """What a clone without git-LFS has in the place of a file."""
    return lambda folder: (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")


def other(name: str, *kept: str) -> Callable[[Path], None]:
    """A folder of another kind of model, told by a file's name."""

    def damage(folder: Path) -> None:
        for path in (folder / "config.json", folder / "model.safetensors"):
            if path.name not in kept:
                path.unlink()
        (folder / name).write_text("{}")

    return damage


ROPE = {"rope_theta": 1.0, "factor": 2.0}
DAMAGE: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "no folder": ("hf", shutil.rmtree, "no such folder; give a folder that `nas export` wrote"),
    "no config": ("hf", lambda f: (f / "config.json").unlink(), "is no export: it has no config.json; "),
    "an export that is called a llama": ("hf", config(model_type="llama"), "NasForCausalLM is no LlamaForCausalLM"),
    "a size of an export as text": ("hf", config(hidden_size="32"), "config.json: hidden_size: "),
    "no plan": ("hf", edit("config.json", lambda d: d.pop("plan")), "config.json: plan "),
    "a plan of other depth": ("hf", edit("config.json", lambda d: d["plan"]["layers"].pop()), "plan is not one of 4 layers"),
    "no such plan": ("hf", edit("config.json", lambda d: d["plan"]["layers"][2].update(k=3)), "config.json: plan "),
    "another head than the plan's": ("hf", config(tie_word_embeddings=False), "config.json: tie_word_embeddings is False"),
    "another sharing": ("hf", lambda f: (f / "sharing.yaml").write_text("num_hidden_layers: 4"), "is not what config.json says"),
    "an export without a tensor": ("hf", reweigh(lambda w: w.pop(Q)), f"the weights lack {Q}; "),
    "no tokenizer in it": ("hf", lambda f: (f / "tokenizer.json").write_text("{}"), "tokenizer.json: is no tokenizer"),
    "another family": ("llama", config(model_type="gpt2"), "model_type 'gpt2'"),
    "no family": ("llama", edit("config.json", lambda d: d.pop("model_type")), "model_type None"),
    "a family with code": ("llama", config(model_type="phi-x", auto_map={"AutoModel": "m.M"}), "code of its own"),
    "a classifier": ("llama", config(architectures=["LlamaForSequenceClassification"]), "json: architectures: "),
    "quantised": ("llama", config(quantization_config={"bits": 4}), "json: quantization_config: "),
    "biases of o": ("llama", config(attention_bias=True), "json: attention_bias: "),
    "biases of the FFN": ("llama", config(mlp_bias=True), "json: mlp_bias: "),
    "windows in some layers": ("qwen2", config(use_sliding_window=True), "json: use_sliding_window: "),
    "kinds of layers": ("qwen3", config(layer_types=["full_attention", "sliding_attention"]), "json: layer_types: "),
    "both directions": ("gemma", config(use_bidirectional_attention=True), "json: use_bidirectional_attention: "),
    "capped logits": ("gemma", config(final_logit_softcapping=30.0), "json: final_logit_softcapping: "),
    "capped scores": ("gemma", config(attn_logit_softcapping=30.0), "json: attn_logit_softcapping: "),
    "an activation": ("llama", config(hidden_act="relu"), "json: hidden_act: 'relu'"),
    "yarn": ("llama", config(rope_scaling=ROPE | {"rope_type": "yarn"}), "json: rope_scaling: 'yarn'"),
    "dynamic": ("llama", config(rope_parameters=ROPE | {"rope_type": "dynamic"}), "json: rope_parameters: 'dynamic'"),
    "longrope": ("llama", config(rope_parameters=ROPE | {"rope_type": "longrope"}), "json: rope_parameters: 'longrope'"),
    "no factor": ("llama", config(rope_parameters={"rope_type": "linear"}), "json: rope_parameters: factor is missing"),
    "half a head": ("llama", config(partial_rotary_factor=0.5), "json: partial_rotary_factor: "),
    "half a head, newly": ("llama", config(rope_parameters={"partial_rotary_factor": 0.5}), "json: partial_rotary_factor: "),
    "rotation by kind of layer": ("llama", config(rope_parameters={"full_attention": ROPE}), "json: rope_parameters: "),
    "a window of no tokens": ("mistral", config(sliding_window=0), "json: sliding_window: 0"),
    "a size as text": ("llama", config(hidden_size="32"), "json: hidden_size: '32'"),
    "heads that do not divide": ("llama", config(num_key_value_heads=3), "json: num_key_value_heads: 3"),
    "not JSON": ("llama", lambda f: (f / "config.json").write_text("{"), "config.json: is not JSON"),
    "no keys": ("llama", lambda f: (f / "config.json").write_text("[]"), "config.json: holds no keys"),
    "a missing shard": ("llama", index({"weight_map": {Q: "b.safetensors"}}), "has no b.safetensors"),
    "an index of nothing": ("llama", index({}), "index.json: names no files"),
    "pickled": ("llama", lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), r"\(pytorch_model\.bin\)"),
    "no weights": ("llama", lambda f: (f / "model.safetensors").unlink(), r"has no model\.safetensors"),
    "torn": ("llama", tear, r"model\.safetensors: is not a safetensors file"),
    "a tensor missing": ("llama", reweigh(lambda w: w.pop(Q)), f"lack {Q}"),
    "no head": ("llama", reweigh(lambda w: w.pop("lm_head.weight")), "lack lm_head.weight"),
    "no biases": ("llama", config(model_type="qwen2", architectures=None), r"lack .*k_proj\.bias and 5 more"),
    "a tensor too many": ("llama", reweigh(lambda w: w.update({"model.extra": w[Q].clone()})), "beyond the model's, model.extra"),
    "norms too many": ("qwen3", config(model_type="llama", architectures=None), r"model's, .*k_norm\.weight and 3 more"),
    "a wrong shape": ("llama", reweigh(lambda w: w.update({Q: w[Q][:16].clone()})), rf"{Q} is \(16, 32\)"),
    "mixed dtypes": ("llama", reweigh(lambda w: w.update({Q: w[Q].half()})), "float16 and float32"),
    "whole numbers": ("llama", reweigh(lambda w: w.update({name: w[name].to(torch.int8) for name in w})), "int8"),
    "another head than is said": ("llama", config(tie_word_embeddings=True), "lm_head.weight is not the embedding"),
    "no tokenizer": ("llama", lambda f: (f / "tokenizer.json").unlink(), "has no tokenizer.json"),
    "sentencepiece": ("llama", lambda f: (f / "tokenizer.json").rename(f / "tokenizer.model"), "make it of tokenizer.model"),
    "too many tokens": ("llama", edit("tokenizer.json", more_tokens), r"tokenizer\.json: 261 tokens .* 260 rows.*resize_token"),
    "a pointer to weights": ("llama", pointer("model.safetensors"), r"model\.safetensors: is a pointer of git-LFS.*git lfs pull"),
    "a pointer to a tokenizer": ("llama", pointer("tokenizer.json"), r"tokenizer\.json: is a pointer of git-LFS"),
    "an adapter": ("llama", other("adapter_config.json"), r"a PEFT adapter.*merge_and_unload"),
    "an adapter beside a config": ("llama", other("adapter_config.json", "config.json"), r"a PEFT adapter"),
    "a folder of LitGPT": ("llama", other("lit_model.pth", "config.json"), "LitGPT.*convert_from_litgpt"),
    "a chat in Latin-1": ("llama", lambda f: (f / "chat_template.jinja").write_bytes(b"\xe9"), "chat_template.jinja: "),
    "a torn setting": ("llama", lambda f: (f / "tokenizer_config.json").write_text("{"), "tokenizer_config.json: is not JSON"),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, exports: Exports) -> Callable[[str], Path]:
    """`plain(family)`: a folder of it, each made once; `hf` is an export."""
    made: dict[str, Path] = {"hf": exports("everything").folder}

    def make(family: str) -> Path:
        if family not in made:
            made[family] = Made(family).write(tmp_path_factory.mktemp(family))
        return made[family]

    return make


def test_what_cannot_be_read_is_refused_in_one_line(plain: Callable[[str], Path], tmp_path: Path) -> None:
    for n, (what, (family, damage, says)) in enumerate(DAMAGE.items()):
        folder = tmp_path / str(n)
        shutil.copytree(plain(family), folder)
        damage(folder)
        with pytest.raises(UserError, match=says) as raised:
            load_export(folder)
        assert "\n" not in str(raised.value), what
        assert str(raised.value).startswith(str(folder)), what
        assert raised.value.hint, what


CHECKED = ("no tokenizer", "pickled", "too many tokens", "a pointer to weights", "an adapter", "a folder of LitGPT")


def test_a_search_from_what_cannot_be_read_is_refused_by_check(plain: Callable[[str], Path], tmp_path: Path) -> None:
    from nas.search.launch import check_unread
    from nas.search.trial import Trial

    space = {"choices": {"tie": {"sources": "previous"}}}
    for what in CHECKED:
        _, damage, says = DAMAGE[what]
        shutil.copytree(plain("llama"), tmp_path / what)
        (tmp_path / "trial.yaml").write_text(
            json.dumps({"name": "t", "from": what, "space": space, "final": {"steps": 0, "seq": 16}, "memory": {"context": 16}})
        )
        check_unread(Trial.load(tmp_path / "trial.yaml"))
        damage(tmp_path / what)
        with pytest.raises(UserError, match=f"{what}.*({says})"):
            check_unread(Trial.load(tmp_path / "trial.yaml"))


def test_a_byte_order_mark_is_no_part_of_a_file(plain: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(plain("llama"), folder)
    (folder / "tokenizer_config.json").write_text(BESIDE["tokenizer_config.json"])
    for name in ("config.json", "tokenizer_config.json"):
        (folder / name).write_bytes(b"\xef\xbb\xbf" + (folder / name).read_bytes())
    loaded = load_export(folder)
    assert loaded.shape == load_export(plain("llama")).shape
    assert loaded.metadata.texts["tokenizer_config.json"] == BESIDE["tokenizer_config.json"]


@pytest.mark.slow
def test_a_vocabulary_of_an_older_kind_is_made_a_tokenizer_json_as_the_error_says(
    plain: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(plain("qwen2"), folder)
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(UserError, match=r"make it of vocab\.json") as raised:
        load_export(folder)
    command = raised.value.hint.partition(": ")[2].replace("python", sys.executable, 1)
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert load_export(folder).tokenizer.encode("abc").ids == list(b"abc")


# Writing


def test_a_familys_own_shapes_are_written_as_it_reads_them() -> None:
    for made in [*SPARSE, *FURTHER.values()]:
        data = json.loads(made.config().to_json_string())
        shape, *_ = read_shape(data, Path("config.json"))
        assert FAMILIES[made.family].fits(shape)
        written = FAMILIES[made.family].config(shape)
        assert read_shape(written, Path("config.json"))[0] == shape
        wanted = {"mistral": "llama"}.get(made.family, made.family)  # the first that has such models
        assert family_of(shape).model_type == wanted


NO_FAMILY = [
    replace(SHAPE, attention_bias=True, qk_norm=True),
    replace(SHAPE, qk_norm=True, embedding_multiplier=32**0.5),
    replace(SHAPE, embedding_multiplier=2.0),
    replace(SHAPE, hidden_act="gelu", embedding_multiplier=32**0.5),
]


def test_a_shape_that_no_family_has_is_refused(tmp_path: Path) -> None:
    for shape in NO_FAMILY:
        model = init_weights(Decoder(shape, SharingConfig.dense(shape).resolve(shape)), torch.Generator().manual_seed(0))
        with pytest.raises(UserError, match=r"layers of attention_bias=.*; use the format hf"):
            export(model, CONFIGS["dense"], bytes_json(), tmp_path / "out", ModelCard(), "dense")
        assert not (tmp_path / "out").exists()


SHAPES = {
    "llama": SHAPE,
    "llama-untied-geglu": replace(UNTIED, hidden_act="gelu_tanh", rotary_scaling=RotaryScaling("linear", 2.0)),
    "qwen2": replace(SHAPE, attention_bias=True, rope_theta=77.0),
    "qwen3": replace(UNTIED, qk_norm=True, head_dim=6),
    "gemma": replace(SHAPE, hidden_act="gelu_tanh", embedding_multiplier=32**0.5),
}
BY_HAND: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "nothing": ([{}] * 4, {}),
    "unlike heads": ([{}, {"kv_heads": 2}, {"k_heads": 2, "v_heads": 1}, {"kv_heads": 1}], {}),
    "unlike widths": ([{}, {"intermediate": 24}, {"ffn": 1}, {"intermediate": 96}], {}),
    "parts and layers dropped": ([{"drop": "attn"}, {"drop": "ffn"}, {"drop": "both"}, {"tie": 1}], {}),
    "heads of others": ([{}, {"heads": "0=0.1 2=0.0"}, {"attn": 1, "delta": 2}, {"heads": "1=2.2 3=1.3"}], {}),
    "composed": (
        [
            {"factor": "dictionary 3 at 0 for q k v o using 0 2"},
            {"attn": 0, "delta": 2},
            *[{"factor": "basis 8 at 2 for q up"}] * 2,
        ],
        {"norms": "tied"},
    ),
    "projections of others": ([{}, {"k": 0}, {"o": 1}, {"v": 0, "q": 2}], {"tie_word_embeddings": False}),
    "a thin embedding": ([{}, {"tie": 0, "delta": 2}, {"q": 1, "ffn": 0}, {"v": 1}], {"embedding_rank": 8}),
}


def by_hand(shape: ModelShape, name: str) -> SharingConfig:
    layers, whole = BY_HAND[name]
    return SharingConfig.make(shape, layers, **whole)


@torch.no_grad()
def test_a_materialised_model_is_the_same_to_transformers(tmp_path: Path) -> None:
    for (family, shape), name in product(SHAPES.items(), BY_HAND):
        config, folder = by_hand(shape, name), tmp_path / family / name
        subnet = supernet(shape, config).subnet(config)
        export(subnet, config, bytes_json(), folder, ModelCard(), "dense")
        model = theirs(folder)
        x = tokens(2, 13)
        torch.testing.assert_close(model(x).logits, subnet(x), rtol=1e-4, atol=1e-4)
        assert type(model).__name__ == FAMILIES[family.partition("-")[0]].architecture
        torch.testing.assert_close(load_export(folder).model(x), subnet(x), rtol=1e-4, atol=1e-4)
        assert not list(folder.glob("*.py"))


REFUSED = {
    "kv": [{}, {"kv": 0}, {}, {}],
    "kv, of a later layer": [{"kv": 3}, {}, {}, {}],
    "k_from": [{}, {"k_from": 0}, {}, {}],
    "v_from": [{}, {"v_from": 0}, {}, {}],
    "kv_input": [{}, {"drop": "attn"}, {}, {"kv_input": 0}],
    "attn_map": [{}, {"attn_map": 0}, {}, {}],
    "value_residual": [{}, {"value_residual": 0.5}, {}, {}],
    "window": [{}, {"window": 4}, {}, {}],
    "experts": [{}, {"experts": 4}, {}, {}],
}


def test_what_a_plain_decoder_cannot_compute_is_refused_by_layer_and_primitive(tmp_path: Path) -> None:
    given = {primitive for layers, whole in BY_HAND.values() for one in (*layers, whole) for primitive in one}
    assert given | {"active_experts", "router", "step_embedding"} | set(REFUSED) - {"kv, of a later layer"} == set(PRIMITIVES)
    refused = {"step_embedding": CONFIGS["universal"]}
    for name, layers in REFUSED.items():
        layer = {"kv, of a later layer": 0, "kv_input": 3}.get(name, 1)
        refused[f"layer {layer}: {name.partition(',')[0]}"] = SharingConfig.make(SHAPE, layers)
    for what, config in refused.items():
        model = init_weights(Decoder(SHAPE, config.resolve(SHAPE)), torch.Generator().manual_seed(0))
        with pytest.raises(UserError, match=rf"^{what}: .*; use the format hf"):
            export(model, config, bytes_json(), tmp_path / "out", ModelCard(), "dense")
        assert not (tmp_path / "out").exists()


def test_what_is_new_in_a_plan_is_refused_until_it_is_known_to_be_plain() -> None:
    @dataclass(frozen=True)
    class Layer(LayerPlan):
        """A layer of a later version."""

        sink: int = 0

    plan = CONFIGS["dense"].resolve(SHAPE)
    for sink in (0, 1):
        layers = (*plan.layers[:2], Layer(**vars(plan.layers[2]), sink=sink), *plan.layers[3:])
        with pytest.raises(UserError, match=r"layer 2: sink: .*; use the format hf") if sink else nullcontext():
            require_plain(replace(plan, layers=layers))


def test_a_dense_form_that_computes_something_else_is_no_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nas.pretrained import checkpoint

    config = SharingConfig.make(SHAPE, REFUSED["kv"])
    monkeypatch.setattr(checkpoint, "require_plain", lambda plan: None)
    monkeypatch.setattr("nas.export.hugging_face.require_plain", lambda plan: None)
    monkeypatch.setattr(checkpoint, "_layer_weight", lambda model, i, name, plain: None)
    model = bold(init_weights(Decoder(SHAPE, config.resolve(SHAPE)), torch.Generator().manual_seed(0)))
    with pytest.raises(RunFailed, match="other logits"):
        export(model, config, bytes_json(), tmp_path / "out", ModelCard(), "dense")
    assert not (tmp_path / "out").exists()
    refused(lambda: export(model, CONFIGS["dense"], bytes_json(), tmp_path / "out", ModelCard()), "config: is not this model's")


@torch.no_grad()
def test_a_model_in_few_bits_is_written_in_as_many(tmp_path: Path) -> None:
    for (family, shape), dtype in zip(SHAPES.items(), [torch.bfloat16, torch.float16] * 3, strict=False):
        config = by_hand(shape, "heads of others")
        model = bold(init_weights(Decoder(shape, config.resolve(shape)), torch.Generator().manual_seed(0))).to(dtype)
        export(model, config, bytes_json(), tmp_path / family, ModelCard(), "dense")
        assert {weight.dtype for weight in load_file(tmp_path / family / "model.safetensors").values()} == {dtype}
        x = tokens(2, 13)
        torch.testing.assert_close(theirs(tmp_path / family)(x).logits, model.float()(x), rtol=0.05, atol=0.05)


def test_the_cost_of_a_dense_form_is_stated_in_bytes(tmp_path: Path) -> None:
    spec = MemorySpec(context=100, batch=2, dtype="float32")
    for name in ("mobilellm-ls", "dha-1x2", "dense"):
        config, folder = CONFIGS[name], tmp_path / name
        export(supernet(SHAPE, config).subnet(config), config, bytes_json(), folder, ModelCard(memory=spec), "dense")
        ours, dense = measure(SHAPE, config, spec), measure(*read_config(folder), spec)
        assert (ours.weight_bytes < dense.weight_bytes) == (name != "dense")
        cost = FORMATS["dense"].cost(SHAPE, config, spec)
        assert cost in (folder / "README.md").read_text()
        for field in ("weight_bytes", "kv_cache_bytes"):
            both = [format_bytes(getattr(memory, field)) for memory in (dense, ours)]
            assert (both[0] != both[1]) == (f"{both[0]} of" in cost) == (f"in place of {both[1]}" in cost)
        header = 8 + int.from_bytes((folder / "model.safetensors").read_bytes()[:8], "little")
        assert (folder / "model.safetensors").stat().st_size - header == dense.weight_bytes


# What goes along with a model

BESIDE = {
    "tokenizer_config.json": '{"chat_template": "{{ messages }}", "pad_token": "c", "eos_token": "b"}',
    "special_tokens_map.json": '{"eos_token": "b"}',
    "chat_template.jinja": "{% for message in messages %}{{ message.content }}{% endfor %}",
    "generation_config.json": '{"eos_token_id": [98, 97], "temperature": 0.5}',
    **{name: f"{name}: \n                 Apache License\n           Version 2.0, January 2004\n" for name in LICENCES},
}


def with_extras(folder: Path) -> Path:
    Made("llama", said=(("bos_token_id", 97), ("eos_token_id", [98, 97]))).write(folder)
    for name, text in BESIDE.items():
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize("format", ["hf", "dense"])
def test_the_chat_template_and_the_end_of_text_go_along(format: str, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    assert set(BESIDE) == set(TEXTS)
    loaded = load_export(with_extras(tmp_path / "from"))
    assert loaded.metadata.texts == BESIDE
    export(loaded.model, loaded.config, bytes_json(end=False), tmp_path / "to", ModelCard(), format, metadata=loaded.metadata)
    for name, text in BESIDE.items():
        assert (tmp_path / "to" / name).read_text() == text
    config = AutoConfig.from_pretrained(tmp_path / "to", trust_remote_code=True)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (97, [98, 97], 99)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "to", trust_remote_code=True)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "moon"}], tokenize=False) == "moon"
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (99, 98)
    assert GenerationConfig.from_pretrained(tmp_path / "to").eos_token_id == [98, 97]
    again = load_export(tmp_path / "to")
    assert again.metadata.texts == loaded.metadata.texts


def test_a_tokenizer_without_padding_gets_one_and_keeps_the_rest(tmp_path: Path) -> None:
    loaded = load_export(with_extras(tmp_path / "from"))
    texts = {"tokenizer_config.json": '{"eos_token": "b", "auto_map": {"AutoTokenizer": "x.Y"}}'}
    metadata = replace(loaded.metadata, texts=texts)
    export(loaded.model, loaded.config, bytes_json(end=False), tmp_path / "to", ModelCard(), metadata=metadata)
    said = json.loads((tmp_path / "to" / "tokenizer_config.json").read_text())
    assert said == {"eos_token": "b", "pad_token": "Ā", "split_special_tokens": True}
    assert json.loads((tmp_path / "to" / "config.json").read_text())["pad_token_id"] == 0
    generation = json.loads((tmp_path / "to" / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 97, "eos_token_id": [98, 97], "pad_token_id": 0}


def test_the_licence_goes_along_as_the_card_or_the_file_says(tmp_path: Path) -> None:
    from huggingface_hub import ModelCard as HubCard

    card = "---\ntags: [a, &x b, {c: !odd d}]\nlicense: other\nlicense_name: 'my-licence'\nlicense_link: LICENSE\n---\n# Mine\n"
    apache, mine = BESIDE["LICENSE"], "Ask me, caf\xe9.\n".encode("latin-1")
    named = {"license": "other", "license_name": "my-licence", "license_link": "LICENSE"}
    for n, (readme, file, wanted) in enumerate(
        (
            (card, None, named),
            (card, apache.encode(), named),
            ("---\nlicense: gemma\n---\n", None, {"license": "gemma"}),
            ("# No front matter\n\nlicense: mit\n", None, {}),
            (None, apache.encode(), {"license": "apache-2.0"}),
            (None, b"MIT License\n\nCopyright", {"license": "mit"}),
            (None, mine, {"license": "other", "license_name": "custom", "license_link": "LICENSE"}),
        )
    ):
        folder, to = tmp_path / f"{n}", tmp_path / f"{n}-to"
        Made("llama").write(folder)
        for name, content in (("README.md", (readme or "").encode() if readme else None), ("LICENSE", file)):
            if content is not None:
                (folder / name).write_bytes(content)
        loaded = load_export(folder)
        assert loaded.metadata.licence == wanted
        for format in FORMATS:
            export(loaded.model, loaded.config, bytes_json(end=False), to, ModelCard(), format, metadata=loaded.metadata)
            said = HubCard.load(to / "README.md").data.to_dict()
            assert {key: said[key] for key in LICENCE_KEYS if key in said} == wanted
            assert (to / "LICENSE").exists() == (file is not None)
            if format != "config":
                assert load_export(to).metadata.licence == wanted


def test_a_model_that_names_no_end_has_none_in_a_plain_folder(tmp_path: Path) -> None:
    """Llama's own default would end every text at byte 2."""
    subnet = supernet(SHAPE, CONFIGS["dense"]).subnet(CONFIGS["dense"])
    export(subnet, CONFIGS["dense"], bytes_json(end=False), tmp_path / "out", ModelCard(), "dense")
    model = theirs(tmp_path / "out")
    assert (model.config.bos_token_id, model.config.eos_token_id) == (None, None)
    assert model.generation_config.eos_token_id is None


# The command line

EACH_FAMILY = [family if family == "gemma" else pytest.param(family, marks=pytest.mark.slow) for family in FAMILIES]


@pytest.mark.parametrize("family", EACH_FAMILY)
@torch.no_grad()
def test_eval_measures_a_folder(family: str, tmp_path: Path, rhyme: Path) -> None:
    folder = Made(family, dtype="bfloat16", said=(("sliding_window", 24),) if family == "mistral" else ()).write(tmp_path)
    words = ("eval", folder, "--text", rhyme, "--eval-sequences", 8, "--context", 24)
    data = told(*words, "--seq", 16)
    assert data["measured_weight_bytes"] == data["weight_bytes"]
    assert data["measured_kv_cache_bytes"] == data["kv_cache_bytes"]
    assert len(data["notes"]) == (family in ("mistral", "gemma"))
    longer = told(*words, "--seq", 65)
    assert "sequences of 65 tokens are longer than the" in longer["notes"][-1]
    shown = said(*words, "--seq", 16)
    assert all(note in shown for note in data["notes"])
    described = told("describe", folder)
    assert described["dense"]["weight_bytes"] == described["weight_bytes"] == data["weight_bytes"]


def with_bos(folder: Path) -> Path:
    """A folder whose tokenizer begins texts with a token, as Gemma's does."""
    from tokenizers import Tokenizer, processors

    tokenizer = Tokenizer.from_file(str(Made("llama", heads="mha").write(folder) / "tokenizer.json"))
    tokenizer.add_special_tokens(["<bos>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 256)])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def test_only_a_template_that_begins_with_a_token_is_a_beginning(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, processors

    from nas.data.tokenizer import build_tokenizer

    end = processors.TemplateProcessing(single="$A <s>", special_tokens=[("<s>", 1)])
    begin = processors.TemplateProcessing(single="<s> $A <s>", special_tokens=[("<s>", 1)])
    byte_level = processors.ByteLevel()
    for processor, bos in ((None, None), (byte_level, None), (end, None), (processors.Sequence([byte_level, begin]), 1)):
        tokenizer = Tokenizer(models.WordLevel({"b": 0, "<s>": 1}, unk_token="<s>"))
        if processor is not None:
            tokenizer.post_processor = processor
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        assert build_tokenizer("tokenizer.json", 9, b"", tmp_path).bos == bos


def test_sequences_begin_as_the_tokenizer_begins_texts(tmp_path: Path, rhyme: Path) -> None:
    from nas.data import DataSpec, eval_sequences, load_corpus, train_batches
    from nas.export.measure import EvalSettings, eval_export
    from nas.export.train import Rows
    from nas.search.jobs import token_batches
    from nas.training.evaluation import measure_losses
    from nas.training.loop import TrainSpec

    folder = with_bos(tmp_path / "from")
    corpus = load_corpus(DataSpec(str(rhyme), tokenizer=str(folder / "tokenizer.json")), 260, Path())
    plain = load_corpus(DataSpec(str(rhyme)), 260, Path())
    assert (corpus.bos, plain.bos) == (256, None)
    assert torch.equal(corpus.train, plain.train)
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    ours, without = (
        [eval_sequences(c.eval, 16, 8, c.bos), next(train_batches(c.train, 4, 16, generator, c.bos)), Rows(c.train, 16, c.bos)[3]]
        for c, generator in zip((corpus, plain), generators, strict=True)
    )
    spec = TrainSpec(steps=1, batch=4, seq=16)
    for c, rows in ((corpus, ours), (plain, without)):  # a search's workers draw the same
        assert torch.equal(next(token_batches(c.train.numpy(), spec, torch.Generator().manual_seed(0), c.bos)), rows[1])
    for mine, other in zip([*ours[:2], ours[2]["input_ids"]], [*without[:2], without[2]["input_ids"]], strict=True):
        assert torch.equal(mine[..., 1:], other[..., 1:])
        assert set(mine[..., 0].flatten().tolist()) == {256}

    settings = {bos: EvalSettings(16, 8, autocast=False, bos=bos) for bos in ("auto", "yes", "no")}
    measured = {bos: eval_export(folder, rhyme, given) for bos, given in settings.items()}
    assert measured["auto"] == measured["yes"]
    assert [note for bos in ("auto", "no") for note in measured[bos].notes] == ["every sequence begins with <bos>"]
    text = torch.tensor(list(rhyme.read_bytes()))
    for bos, given in (("auto", 256), ("no", None)):
        losses = measure_losses(load_export(folder).model, eval_sequences(text, 16, 8, given), 16, autocast=False)
        assert measured[bos].losses.loss_nats_per_token == losses.loss_nats_per_token
    words = ("--method", "gqa", "--size", 2, "--text", rhyme, "--fine-tune", 2, "--seq", 16, "--calibration", 4, "--windows", 8)
    data = told("convert", folder, *words, "--to", tmp_path / "to")
    rows = eval_sequences(corpus.eval, 16, 8, 256)
    dense = measure_losses(load_export(folder).model, rows, 16)
    assert data["stages"][0]["perplexity"] == pytest.approx(dense.perplexity)
    tuned = measure_losses(load_export(tmp_path / "to").model, rows, 16)
    assert data["stages"][-1]["perplexity"] == pytest.approx(tuned.perplexity)
    Made("llama").write(tmp_path / "none")
    edit("config.json", lambda d: d.update(bos_token_id=None))(tmp_path / "none")
    refused(lambda: eval_export(tmp_path / "none", rhyme, settings["yes"]), "bos: the folder names no BOS token")


@pytest.mark.parametrize("family", EACH_FAMILY)
@torch.no_grad()
def test_convert_makes_a_folder_share(family: str, tmp_path: Path, rhyme: Path) -> None:
    folder, to = Made(family, heads="mha", tied=family == "gemma").write(tmp_path / "from"), tmp_path / "to"
    for name in ("chat_template.jinja", "generation_config.json"):
        (folder / name).write_text(BESIDE[name])
    words = ("--method", "gqa", "--size", 2, "--text", rhyme, "--fine-tune", 0, "--seq", 16, "--calibration", 4, "--windows", 8)
    data = told("convert", folder, *words, "--to", to)
    assert data["notes"] == []
    assert [stage["stage"] for stage in data["stages"]] == ["dense", "converted"]
    assert (to / "chat_template.jinja").read_text() == BESIDE["chat_template.jinja"]
    loaded, ids = load_export(to), load_export(folder).metadata.token_ids
    assert loaded.shape == load_export(folder).shape
    assert loaded.metadata.token_ids | {"pad_token_id": None} == ids | {"pad_token_id": None}
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(to, trust_remote_code=True)
    x = tokens(2, 20)
    torch.testing.assert_close(model(x).logits, loaded.model(x), rtol=1e-4, atol=1e-4)
