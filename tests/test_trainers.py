"""Any trainer: an exported folder goes on into what people train and generate with, and `nas train` says what came of it."""

from __future__ import annotations

import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_export import CONFIGS, KINDS, SHAPE, batch_of, covering, from_pretrained, gradients, greedy, supernet, tokens

from nas.data import DataSpec, load_corpus
from nas.data.tokenizer import bytes_json
from nas.errors import UserError
from nas.export import ModelCard, Provenance, export, load_export
from nas.export.measure import EvalSettings, eval_export
from nas.export.modeling_nas import NasForCausalLM
from nas.export.train import train_export
from nas.export.train_settings import Trained, TrainSettings
from nas.model import decoder as model_module
from nas.model.decoder import Decoder, init_weights
from nas.search.train import TrackedTraining, train_folder
from nas.sharing.sharing_config import SharingConfig
from nas.tracking.store import connect

ROOT = Path(__file__).parent.parent
ADAPTED = [*dict.fromkeys([*KINDS, *covering(), "headwise-direct-30", "basis-2x16"])]
TRAINED = ["dense", "everything", "first reads the last", "dictformer-2", "moeut-2"]


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Path]]:
    """`folder_of(name)`: a config's subnet, exported, each once."""
    root = tmp_path_factory.mktemp("exports")

    def make(name: str) -> Path:
        folder, config = root / name.replace(" ", "-"), CONFIGS[name]
        if not folder.exists():
            export(supernet(SHAPE, config).subnet(config), config, bytes_json(), folder, ModelCard())
        return folder

    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        yield make


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"{n} green bottles, hanging on the wall.\n" for n in range(400)))
    return path


def load(folder: Path) -> Any:
    """The folder's model by this project's class, quicker than by the folder's code."""
    return NasForCausalLM.from_pretrained(folder)


def fresh(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "model"))


def settings(**given: Any) -> TrainSettings:
    return TrainSettings(**{"steps": 6, "batch": 4, "seq": 16, "autocast": False, "learning_rate": 3e-3} | given)


# Ways to generate


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_drafted_tokens_and_sampled_beams_give_what_they_give_without_a_cache(
    folder_of: Callable[[str], Path], name: str
) -> None:
    model, x = load(folder_of(name)), tokens(1, 4).repeat(1, 2)
    plain = model.generate(x, max_new_tokens=6, do_sample=False, use_cache=False)
    for drafter in (load(folder_of("mqa")), load(folder_of(name))):  # one that is often wrong, and one that never is
        assert torch.equal(model.generate(x, max_new_tokens=6, do_sample=False, assistant_model=drafter), plain)
    beams = []
    for cached in (False, True):
        torch.manual_seed(0)
        beams.append(model.generate(x, max_new_tokens=6, num_beams=3, do_sample=True, use_cache=cached))
    assert torch.equal(*beams)


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_it_streams_and_serves_a_pipeline(folder_of: Callable[[str], Path], name: str) -> None:
    from transformers import AutoTokenizer, TextIteratorStreamer, TextStreamer, pipeline

    folder, x = folder_of(name), tokens(1, 5) % 60 + 60
    model, tokenizer = load(folder), AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    said = tokenizer.decode(model.generate(x, max_new_tokens=6, do_sample=False)[0, 5:])
    out, streamer = io.StringIO(), TextIteratorStreamer(tokenizer, skip_prompt=True)
    with redirect_stdout(out):
        model.generate(x, max_new_tokens=6, do_sample=False, streamer=TextStreamer(tokenizer, skip_prompt=True))
    model.generate(x, max_new_tokens=6, do_sample=False, streamer=streamer)
    assert out.getvalue().rstrip("\n") == "".join(streamer).rstrip("\n") == said.rstrip("\n")
    write = pipeline("text-generation", model=model, tokenizer=tokenizer)
    options = {"max_new_tokens": 5, "do_sample": False, "return_full_text": False}
    together = write(["The ", "In the end "], batch_size=2, **options)
    texts = [torch.tensor(list(text.encode())) for text in ("The ", "In the end ")]
    decoder = load_export(folder).model
    assert [one[0]["generated_text"] for one in together] == [tokenizer.decode(greedy(decoder, row, 5)) for row in texts]


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_a_padded_batch_gives_the_same_in_every_mode(folder_of: Callable[[str], Path], name: str) -> None:
    model = load(folder_of(name))
    texts = [tokens(1, n, seed=n)[0] for n in (3, 8)]
    x, mask = batch_of(texts)
    for how in ({"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}, {"use_cache": False}, {"prefill_chunk_size": 3}):
        together = model.generate(x, attention_mask=mask, max_new_tokens=5, do_sample=False, **how)
        alone = [model.generate(row[None], max_new_tokens=5, do_sample=False, **how)[:, -5:] for row in texts]
        assert torch.equal(together[:, 8:], torch.cat(alone)), how


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_a_cache_can_be_reordered_and_repeated(folder_of: Callable[[str], Path], name: str) -> None:
    from transformers import DynamicCache

    model, x, order = load(folder_of(name)), tokens(2, 6), torch.tensor([1, 0])
    swapped, repeated = DynamicCache(config=model.config), DynamicCache(config=model.config)
    model(x[:, :5], past_key_values=swapped), model(x[:, :5], past_key_values=repeated)
    swapped.reorder_cache(order)
    repeated.batch_repeat_interleave(2)
    wanted = load_export(folder_of(name)).model(x)[:, 5:]
    torch.testing.assert_close(model(x[order, 5:], past_key_values=swapped).logits, wanted[order], rtol=1e-4, atol=1e-4)
    twice = x[:, 5:].repeat_interleave(2, 0)
    torch.testing.assert_close(
        model(twice, past_key_values=repeated).logits, wanted.repeat_interleave(2, 0), rtol=1e-4, atol=1e-4
    )


NOT_GIVEN: dict[str, tuple[Callable[[Any], Any], type[Exception], str]] = {
    "early exit": (
        lambda m: m.generate(tokens(1, 5), max_new_tokens=3, assistant_early_exit=2),
        ValueError,
        "assistant_early_exit is not supported by this model; use prompt_lookup_num_tokens or assistant_model",
    ),
    "continuous batching": (
        lambda m: m.generate_batch([[1, 2, 3], [4]]),
        ValueError,
        r"continuous batching \(generate_batch\) is not supported by this model; use generate with a padded batch",
    ),
    "a quantised cache": (
        lambda m: m.generate(tokens(1, 5), max_new_tokens=3, cache_implementation="quantized"),
        ValueError,
        "`QuantizedCache` is only supported for models with only full attention layers",
    ),
    "hidden states": (
        lambda m: m.generate(tokens(1, 5), max_new_tokens=3, output_hidden_states=True, return_dict_in_generate=True),
        ValueError,
        "output_hidden_states is not supported by this model",
    ),
}


@pytest.mark.parametrize("what", NOT_GIVEN)
def test_ways_to_generate_that_it_has_not_are_refused_in_one_line(folder_of: Callable[[str], Path], what: str) -> None:
    ask, error, says = NOT_GIVEN[what]
    with pytest.raises(error, match=says):
        ask(load(folder_of("everything")))


@pytest.mark.parametrize("kind", ["flash_attention_2", "flex_attention"])
def test_an_attention_that_it_does_not_use_is_refused(folder_of: Callable[[str], Path], kind: str) -> None:
    with pytest.raises((ValueError, ImportError), match=r"does not support|not.*installed"):
        from_pretrained(folder_of("dense"), attn_implementation=kind)


# Adapters


def adapted(folder: Path, **given: Any) -> Any:
    """The folder's model with LoRA on every linear map, at weights that tell."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    return get_peft_model(load(folder), LoraConfig(r=4, init_lora_weights=False, task_type="CAUSAL_LM", **given))


def linear(name: str) -> dict[str, Any]:
    """What LoRA is put on: every linear map, or where all of them are composed, the head."""
    return {"target_modules": ["lm_head"] if name.startswith("dictformer") else "all-linear"}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ADAPTED)
def test_an_adapter_acts_wherever_its_matrix_is_used_and_merges(
    folder_of: Callable[[str], Path], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So merged into the matrix, which all its users use, it changes nothing."""
    from peft import PeftModel

    if "moeut" in name:
        monkeypatch.setattr(model_module, "SPARSE_FROM", 0)  # experts by their rows: the matrix itself is read
    folder, x = folder_of(name), tokens(2, 9)
    before = load(folder)(x).logits
    model = adapted(folder, **linear(name))
    logits = model(x).logits
    assert (logits - before).abs().max() > 1e-2
    model.save_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(PeftModel.from_pretrained(load(folder), tmp_path / "adapter")(x).logits, logits)
    if not name.startswith("dictformer"):  # its head is the embedding, and merging changes both
        torch.testing.assert_close(model.merge_and_unload()(x).logits, logits, rtol=1e-3, atol=1e-3)


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_on_a_shared_matrix_is_one_and_its_gradient_is_that_of_all_users(folder_of: Callable[[str], Path]) -> None:
    x, grads = tokens(2, 9), {}
    for name in ("albert", "dense"):
        model = adapted(folder_of(name), target_modules=["q_proj"])
        found = {key: weight for key, weight in model.named_parameters() if weight.requires_grad}
        assert len(found) == {"albert": 2, "dense": 2 * SHAPE.num_hidden_layers}[name]
        loss = model(x, labels=x).loss
        loss.backward()
        grads[name] = found
    # An untied copy of the same model: each layer's adapter begins as the shared one, and their gradients add up.
    shared = adapted(folder_of("albert"), target_modules=["q_proj"])
    users: list[torch.Tensor] = []
    layer = shared.base_model.model.model.layers[0]["self_attn"]["q_proj"]
    layer.lora_A["default"].register_full_backward_hook(lambda _, __, out: users.append(out[0]))
    shared(x, labels=x).loss.backward()
    assert len(users) == SHAPE.num_hidden_layers


def test_an_adapter_on_a_part_of_a_matrix_is_refused(folder_of: Callable[[str], Path]) -> None:
    from peft import LoraConfig, get_peft_model

    model = load(folder_of("dictformer-2"))
    with pytest.raises(
        ValueError, match=r"an adapter cannot be put on a RawParameter, a part of a matrix; leave it out|[Tt]arget"
    ):
        get_peft_model(model, LoraConfig(r=2, target_parameters=["q_atoms.weight"]))(tokens(1, 5))


# Graphs, devices, files


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_a_training_step_is_one_graph(folder_of: Callable[[str], Path], name: str) -> None:
    model, x = load(folder_of(name)).train(), tokens(2, 9)
    wanted = gradients(model, model(x, labels=x).loss)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(gradients(model, compiled(x, labels=x).loss), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("name", ["everything", "dictformer-2"])
def test_inductor_trains_and_decodes_it(folder_of: Callable[[str], Path], name: str) -> None:
    model, x = load(folder_of(name)).train(), tokens(2, 9)
    wanted = gradients(model, model(x, labels=x).loss)
    torch._dynamo.reset()
    compiled = torch.compile(model)
    torch.testing.assert_close(gradients(model, compiled(x, labels=x).loss), wanted, rtol=1e-3, atol=1e-4)
    model.eval()
    plain = model.generate(x, max_new_tokens=4, do_sample=False)
    model.forward = torch.compile(model.forward)
    assert torch.equal(model.generate(x, max_new_tokens=4, do_sample=False, cache_implementation="static"), plain)


@pytest.mark.parametrize("where", ["cpu", "auto"])
@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_accelerate_places_it(folder_of: Callable[[str], Path], name: str, where: str) -> None:
    placed = NasForCausalLM.from_pretrained(folder_of(name), device_map=where)
    x = tokens(2, 9)
    torch.testing.assert_close(placed(x).logits.cpu(), load(folder_of(name))(x).logits)


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_it_is_saved_in_shards_and_in_bfloat16_and_loaded_again(
    folder_of: Callable[[str], Path], name: str, tmp_path: Path
) -> None:
    x, model = tokens(2, 9), NasForCausalLM.from_pretrained(folder_of(name), dtype=torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    shutil.copy(folder_of(name) / "tokenizer.json", tmp_path)
    assert len([*tmp_path.glob("model-*-of-*.safetensors")]) > 1
    again, info = NasForCausalLM.from_pretrained(tmp_path, output_loading_info=True, dtype="auto")
    assert not any(info.values())
    assert again.dtype == torch.bfloat16
    assert torch.equal(again(x).logits, model(x).logits)
    assert torch.equal(load_export(tmp_path).model(x), model(x).logits)


@pytest.mark.parametrize("name", TRAINED)
def test_it_trains_in_bfloat16(folder_of: Callable[[str], Path], name: str) -> None:
    """The weights themselves, and by autocast."""
    x = tokens(4, 17)
    for dtype in (torch.bfloat16, torch.float32):
        model = NasForCausalLM.from_pretrained(folder_of(name), dtype=dtype).train()
        optimizer, losses = torch.optim.AdamW(model.parameters(), lr=3e-3), []
        for _ in range(6):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.float32):
                loss = model(x, labels=x).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[-1] < losses[0]


# nas train


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_export(folder).model.state_dict()


def train(folder: Path, text: Path, to: Path, **given: Any) -> Trained:
    return train_export(folder, text, settings(**given), to)


@pytest.mark.parametrize("name", TRAINED)
def test_parts_of_a_batch_and_checkpointed_activations_change_nothing(
    folder_of: Callable[[str], Path], name: str, text: Path, tmp_path: Path
) -> None:
    plain = train(folder_of(name), text, tmp_path / "plain")
    ways: dict[str, dict[str, Any]] = {"parts": {"grad_accumulation": 2}, "again": {"gradient_checkpointing": True}}
    for way, given in ways.items():
        if way == "again" and load_export(folder_of(name)).model.plan.fixed_point_layers:
            with pytest.raises(UserError, match="cannot be recomputed in the backward pass; leave out"):
                train(folder_of(name), text, tmp_path / way, **given)
            assert not (tmp_path / way).exists()
            continue
        done = train(folder_of(name), text, tmp_path / way, **given)
        assert done.tokens == plain.tokens
        torch.testing.assert_close(weights(tmp_path / way), weights(tmp_path / "plain"), rtol=1e-3, atol=1e-4)


def test_a_batch_that_does_not_divide_is_refused(folder_of: Callable[[str], Path], text: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"batch: 4 rows do not divide into 1 processes × 3 parts; use 6"):
        train(folder_of("dense"), text, tmp_path / "to", grad_accumulation=3)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "warmup": ({"warmup": 1.5}, "warmup: 1.5 is too large; use 1 or less"),
    "distill_weight": ({"distill_weight": -1.0}, "distill_weight: -1.0 is too small"),
    "weight_decay": ({"weight_decay": -0.1}, "weight_decay: -0.1 is too small; use 0 or more"),
    "dtype": ({"dtype": "bfloat"}, "dtype: 'bfloat' will not do; did you mean bfloat16"),
    "eval_steps": ({"eval_steps": 0}, "eval_steps: 0 is too small"),
}


@pytest.mark.parametrize("what", BAD)
def test_settings_that_cannot_be_are_refused(what: str) -> None:
    given, says = BAD[what]
    with pytest.raises(UserError, match=re.escape(says)):
        TrainSettings(**given)


def test_fresh_weights_are_the_seeds_and_not_the_folders(folder_of: Callable[[str], Path], text: Path, tmp_path: Path) -> None:
    config = CONFIGS["everything"]
    done = [train(folder_of("everything"), text, tmp_path / str(n), from_scratch=True, seed=n, steps=1) for n in (1, 1 + 1)]
    new = init_weights(Decoder(SHAPE, config.resolve(SHAPE)), torch.Generator().manual_seed(1))
    export(new, config, bytes_json(), tmp_path / "new", ModelCard())
    assert done[0].before == train(tmp_path / "new", text, tmp_path / "again", steps=1).before
    assert done[0].before != done[1].before


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_dtype_stays_unless_another_is_asked_for(
    folder_of: Callable[[str], Path], dtype: str, text: Path, tmp_path: Path
) -> None:
    """And what is measured is what is written."""
    model = load_export(folder_of("everything")).model.to(getattr(torch, dtype))
    export(model, CONFIGS["everything"], bytes_json(), tmp_path / "model", ModelCard())
    for asked in (None, "float16"):
        done = train(tmp_path / "model", text, tmp_path / f"{asked}", dtype=asked)
        loaded = load_export(tmp_path / f"{asked}").model.embed_tokens.weight.dtype
        assert (done.dtype, loaded) == (asked or dtype, getattr(torch, asked or dtype))
        assert json.loads((tmp_path / f"{asked}" / "config.json").read_text())["dtype"] == (asked or dtype)
        assert train(tmp_path / f"{asked}", text, tmp_path / "again", steps=1).before == done.after
        shutil.rmtree(tmp_path / "again")


@pytest.mark.slow
def test_a_model_learns_its_teachers_probabilities(folder_of: Callable[[str], Path], text: Path, tmp_path: Path) -> None:
    """The more, the nearer; and with no weight on them they change nothing."""
    teacher, student = folder_of("dense"), folder_of("everything")
    distance: dict[Any, float] = {}
    given = {"steps": 40, "batch": 8, "learning_rate": 3e-3}
    for weight in (None, 0.0, 0.5, 1.0):
        said = {} if weight is None else {"distill_from": str(teacher), "distill_weight": weight}
        train(student, text, tmp_path / f"{weight}", **given, **said)
        rows = load_corpus(DataSpec(text=str(text)), 256, Path()).eval[:256].view(8, 32).long()
        with torch.no_grad():
            p, q = (load_export(folder).model(rows).log_softmax(-1) for folder in (teacher, tmp_path / f"{weight}"))
        distance[weight] = (p.exp() * (p - q)).sum(-1).mean().item()
    assert distance[1.0] < distance[0.5] < distance[0.0]
    torch.testing.assert_close(weights(tmp_path / "0.0"), weights(tmp_path / "None"), rtol=1e-3, atol=1e-4)
    assert f"on the probabilities of `{teacher}`" in (tmp_path / "0.5" / "README.md").read_text()


def test_a_teacher_of_another_vocabulary_is_refused(folder_of: Callable[[str], Path], text: Path, tmp_path: Path) -> None:
    shape = replace(SHAPE, vocab_size=300)
    config = SharingConfig.make(shape, [{}] * 4)
    model = init_weights(Decoder(shape, config.resolve(shape)), torch.Generator().manual_seed(0))
    export(model, config, bytes_json(), tmp_path / "teacher", ModelCard())
    with pytest.raises(
        UserError, match=r"teacher's vocabulary is another: it has 300 tokens, .* 256; use a teacher with the same"
    ):
        train(folder_of("dense"), text, tmp_path / "to", distill_from=str(tmp_path / "teacher"))
    assert not (tmp_path / "to").exists()


# MLflow


def run_of(done: TrackedTraining) -> tuple[Any, Any]:
    """The client, and the run, in MLflow."""
    assert done.link
    client = connect(done.link.uri)
    return client, client.get_run(done.link.run_id)


def tracked(folder: Path, text: Path, to: Path, uri: str | None, **given: Any) -> TrackedTraining:
    return train_folder(folder, text, settings(**{"autocast": True, "seq": 128} | given), to, uri)


@pytest.mark.slow
def test_what_mlflow_holds_is_what_nas_eval_gives_and_the_curves(
    folder_of: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    corpus = load_corpus(DataSpec(text=str(text)), 256, Path())
    (tmp_path / "held.txt").write_bytes(corpus.eval_text)
    folder, uri = fresh(folder_of("everything"), tmp_path), f"sqlite:///{tmp_path}/mlflow.db"
    done = tracked(folder, text, tmp_path / "to", uri, eval_steps=2)
    measured = eval_export(tmp_path / "to", tmp_path / "held.txt", EvalSettings())
    client, run = run_of(done)
    assert done.trained.after == measured.losses
    assert run.data.metrics["perplexity"] == pytest.approx(measured.losses.perplexity, rel=1e-6)
    assert run.data.metrics["bits_per_byte"] == pytest.approx(measured.bits_per_byte, rel=1e-6)
    history = {name: client.get_metric_history(run.info.run_id, name) for name in run.data.metrics}
    assert [point.step for point in history["perplexity"]] == [0, 2, 4, 6]
    assert [point.step for point in history["learning_rate"]] == [1, 2, 3, 4, 5, 6]
    assert [point.step for point in history["train_loss_nats_per_token"]] == [1, 2, 3, 4, 5, 6]
    assert history["perplexity"][0].value == pytest.approx(done.trained.before.perplexity, rel=1e-6)
    assert run.data.metrics["tokens"] == done.trained.tokens
    assert client.get_experiment(run.info.experiment_id).name == "model"
    assert (run.info.status, run.info.run_name) == ("FINISHED", "train to")
    assert run.data.params["learning_rate"] == "0.003"
    assert run.data.tags["kind"] == "training"
    assert done.to_data() == done.trained.to_data() | {"experiment": "model", "run_id": run.info.run_id, "tracking_uri": uri}
    assert not (tmp_path / "to" / "checkpoints").exists()


@pytest.mark.slow
def test_a_stopped_training_goes_on_in_its_mlflow_run(folder_of: Callable[[str], Path], text: Path, tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"

    def stop(step: int, steps: int, loss: float) -> None:
        if step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_folder(folder_of("cla-2"), text, settings(save_steps=2), tmp_path / "to", uri, stop)
    done = train_folder(folder_of("cla-2"), text, settings(save_steps=2, resume=True), tmp_path / "to", uri)
    client, run = run_of(done)
    assert len(client.search_runs([run.info.experiment_id])) == 1
    assert run.info.status == "FINISHED"
    steps = [point.step for point in client.get_metric_history(run.info.run_id, "learning_rate")]
    assert steps == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_where_a_training_is_tracked(
    folder_of: Callable[[str], Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the folder's search is, in its experiment, if it is there yet; else where the environment says; `none` is nowhere."""
    folder, here = fresh(folder_of("dense"), tmp_path), f"sqlite:///{tmp_path}/search.db"
    assert train_folder(folder, text, settings(), tmp_path / "a").link is None
    Provenance("crawl", "tiny", "sharing", "f" * 32, here).save(folder)
    assert train_folder(folder, text, settings(), tmp_path / "b").link is None  # its database was left behind
    assert not (tmp_path / "search.db").exists()
    connect(here)
    client = connect(here)
    client.search_experiments()  # makes it
    done = train_folder(folder, text, settings(), tmp_path / "c")
    _, run = run_of(done)
    assert (done.experiment, run.data.tags["search"], run.data.tags["search_run_id"]) == ("sharing", "crawl", "f" * 32)
    assert client.get_experiment_by_name("sharing")
    assert Provenance.load(tmp_path / "c") == Provenance.load(folder)  # it travels on
    assert train_folder(folder, text, settings(), tmp_path / "d", "none").link is None
    Provenance("crawl", "tiny", "sharing", "f" * 32, "http://127.0.0.1:9").save(folder)
    assert train_folder(folder, text, settings(), tmp_path / "s").link is None  # a stranger's server is not asked
    (folder / "provenance.json").unlink()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/other.db")
    done = train_folder(folder, text, settings(), tmp_path / "e")
    assert done.link
    assert done.link.uri.endswith("/other.db")
    assert done.experiment == "model"
    with pytest.raises(UserError, match="is not an MLflow address"):
        train_folder(folder, text, settings(), tmp_path / "f", "here")


def test_mlflow_that_is_not_there_costs_nothing_but_a_line(
    folder_of: Callable[[str], Path], text: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    done = train_folder(folder_of("dense"), text, settings(), tmp_path / "to", "http://127.0.0.1:9")
    assert done.link is None
    assert load_export(tmp_path / "to")
    assert not (tmp_path / "to" / "checkpoints").exists()
    assert len([record for record in caplog.records if "the training goes on" in record.message]) == 1


SECRETS = {
    "http://me:secret@host:5000/x": "http://host:5000/x",
    "postgresql://me:secret@host/db": "postgresql://host/db",
    "sqlite:////runs/mlflow.db": "sqlite:////runs/mlflow.db",
    "": "",
}


@pytest.mark.parametrize("uri", SECRETS)
def test_provenance_travels_without_a_password(uri: str, tmp_path: Path) -> None:
    Provenance("run", "trial", "experiment", "0" * 32, uri).save(tmp_path)
    assert Provenance.load(tmp_path) == Provenance("run", "trial", "experiment", "0" * 32, SECRETS[uri])
    (tmp_path / "provenance.json").write_text('{"run": 1}')
    with pytest.raises(UserError, match=r"provenance\.json: "):
        Provenance.load(tmp_path)


# Several processes, and the README


def shell(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HOME": str(cwd / "hf"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
    env.pop("MLFLOW_TRACKING_URI", None)
    return subprocess.run([sys.executable, *words], cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


def torchrun(processes: int) -> tuple[str, ...]:
    return "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)


PAIRS = [
    ("dictformer-2", []),
    ("everything", ["--gradient-checkpointing"]),
    ("first reads the last", ["--grad-accumulation", "2"]),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "more"), PAIRS)
def test_two_processes_train_what_one_does(
    folder_of: Callable[[str], Path], name: str, more: list[str], text: Path, tmp_path: Path
) -> None:
    said = ["train", str(folder_of(name)), "--text", str(text), "--steps", "8", "--batch", "8", "--seq", "32", "--json"]
    # In bfloat16 a batch in parts is rounded otherwise, and the repeated passes over keys of a later layer make that grow.
    said.append("--no-autocast")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    alone = shell("-m", "nas", *said, "--to", "one", cwd=tmp_path)
    pair = shell(*torchrun(2), "-m", "nas", *said, *more, "--to", "two", "--tracking", uri, cwd=tmp_path)
    assert (alone.returncode, pair.returncode) == (0, 0), alone.stderr + pair.stderr
    one, two = json.loads(alone.stdout), json.loads(pair.stdout)  # one object: one process speaks
    assert one["tokens"] == two["tokens"] == 8 * 8 * 32
    assert two["perplexity_before"] == one["perplexity_before"]
    assert two["perplexity_after"] == pytest.approx(one["perplexity_after"], rel=2e-3)
    assert pair.stderr.count("train: 8 steps") == 1
    assert {path.name for path in (tmp_path / "two").iterdir()} == {path.name for path in (tmp_path / "one").iterdir()}
    client = connect(uri)
    experiment = client.get_experiment_by_name(folder_of(name).name)
    assert len(client.search_runs([experiment.experiment_id])) == 1
    assert math.isclose(client.get_run(two["run_id"]).data.metrics["perplexity"], two["perplexity_after"], rel_tol=1e-6)


@pytest.mark.slow
def test_a_mistake_ends_all_processes(folder_of: Callable[[str], Path], text: Path, tmp_path: Path) -> None:
    said = ["train", str(folder_of("dense")), "--text", str(text), "--steps", "3", "--seq", "32", "--to", "to"]
    for more, says in (
        (["--batch", "7"], "7 rows do not divide into 2 processes"),
        (["--learning-rate", "1e20"], "lower learning rate"),
    ):
        done = shell(*torchrun(2), "-m", "nas", *said, *more, cwd=tmp_path)
        assert done.returncode != 0
        assert says in done.stderr
        assert "nas/cli" not in done.stderr  # torchrun's own traceback there is, of ours none
        assert not (tmp_path / "to" / "config.json").exists()


@pytest.mark.slow
def test_the_terminal_says_what_json_says(folder_of: Callable[[str], Path], text: Path, tmp_path: Path) -> None:
    said = ["train", str(folder_of("dense")), "--text", str(text), "--steps", "3", "--seq", "32"]
    spoken = shell("-m", "nas", *said, "--to", "a", cwd=tmp_path).stdout
    data = json.loads(shell("-m", "nas", *said, "--to", "b", "--json", cwd=tmp_path).stdout)
    for figure in (
        *(
            f"{data[f'{name}_{when}']:.3f}"
            for when in ("before", "after")
            for name in ("perplexity", "perplexity_standard_error")
        ),
        *(f"{data[f'{name}_{when}']:.4f}" for when in ("before", "after") for name in ("bits_per_byte", "loss_nats_per_token")),
        f"{data['steps']:,} steps, {data['tokens']:,} tokens",
        f"weights in {data['dtype']}",
    ):
        assert figure in spoken, figure


def recipes() -> dict[str, str]:
    """The scripts of the README's section, by their titles."""
    section = (ROOT / "README.md").read_text().split("### Train it with what you have")[1].split("\n## ")[0]
    return dict(re.findall(r"\*\*(.+?)\*\*.*?\n\n```python\n(.*?)```", section, re.DOTALL))


def test_there_are_three_short_recipes() -> None:
    assert [*recipes()] == ["transformers.Trainer", "Lightning", "A loop of your own"]
    assert all(code.count("\n") < 20 for code in recipes().values())


RUNS = [
    ("transformers.Trainer", 1, "everything"),
    ("transformers.Trainer", 2, "moeut-2"),
    ("Lightning", 1, "everything"),
    ("A loop of your own", 1, "first reads the last"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("title", "processes", "name"), RUNS)
def test_the_readmes_recipes_train(
    folder_of: Callable[[str], Path], title: str, processes: int, name: str, text: Path, tmp_path: Path
) -> None:
    shutil.copytree(folder_of(name), tmp_path / "DIR")
    shutil.copy(text, tmp_path / "text.txt")
    (tmp_path / "train.py").write_text(recipes()[title])
    done = shell(*(torchrun(processes) if processes > 1 else ()), "train.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    before, after = (eval_export(tmp_path / name, text, EvalSettings(windows=8)).losses for name in ("DIR", "trained"))
    assert after.loss_nats_per_token < before.loss_nats_per_token - 0.2
    x = tokens(1, 5)
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "trained")(x).logits, load_export(tmp_path / "trained").model(x))
