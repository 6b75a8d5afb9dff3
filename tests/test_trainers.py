"""Trainers: an exported folder is trained by `nas train` and by what people train with, and `nas eval` measures it."""

import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from commands import refused, said, told
from exports import CONFIGS, COVERING, KINDS, SHAPE, Exports, copied, from_pretrained, gradients, load, over_kinds, tokens
from torch.nn import functional as F

from nas.data import DataSpec, load_corpus
from nas.data.tokenizer import bytes_json
from nas.errors import UserError
from nas.export import TRAINERS, ModelCard, Provenance, Start, export, load_export, train_recipe
from nas.export.measure import EvalSettings, eval_export
from nas.export.modeling_nas import NasForCausalLM
from nas.export.train import train_export
from nas.export.trainers import TEXT, Trained, TrainSettings
from nas.model import decoder as decoder_module
from nas.model.decoder import Decoder, init_weights
from nas.search.run import Run
from nas.search.train import TrackedTraining, train_folder
from nas.sharing.memory import MemorySpec, measure
from nas.sharing.sharing_config import SharingConfig
from nas.tracking.store import connect

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _untracked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def settings(**given: Any) -> TrainSettings:
    return TrainSettings(**{"steps": 6, "batch": 4, "seq": 16, "autocast": False, "learning_rate": 3e-3} | given)


def train(folder: Path, text: Path, to: Path | None = None, progress: Any = None, **given: Any) -> Trained:
    return train_export(folder, text, settings(**given), to, progress)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_export(folder).model.state_dict()


def stop(step: int, steps: int, loss: float) -> None:
    if step == 5:
        raise KeyboardInterrupt


# nas train


@pytest.mark.parametrize("format", ["hf", "torch", "dense"])
def test_training_lowers_the_loss_and_keeps_the_folder_what_it_is(
    format: str, exports: Exports, rhyme: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    made = exports("dense" if format == "dense" else "everything")
    folder, to = tmp_path / "model", tmp_path / "trained"
    export(made.subnet, made.config, bytes_json(), folder, ModelCard(), format)
    (folder / "README.md").write_text("---\nlicense: mit\nmodel-index:\n- name: of other weights\n---\n# Mine\n")
    seen: list[tuple[int, int, float]] = []
    capfd.readouterr()
    done = train(folder, rhyme, to, lambda *a: seen.append(a), steps=None, epochs=0.5)
    assert capfd.readouterr() == ("", "")
    assert done.after.perplexity < done.before.perplexity
    assert done.bits_per_byte_after < done.bits_per_byte_before
    assert [step for step, _, _ in seen] == sorted({step for step, _, _ in seen})
    assert all(steps == done.steps for _, steps, _ in seen)
    assert seen[-1][2] < seen[0][2]
    assert (to / "README.md").read_text().startswith("---\nlicense: mit\n---\n# Mine\n\n## Training after the export\n")
    assert {path.name for path in to.iterdir()} == {path.name for path in folder.iterdir()}
    assert load_export(to).format == format
    assert json.loads(json.dumps(done.to_data()))["perplexity_after"] == done.after.perplexity
    again = train(to, rhyme)  # in its own place
    assert again.before == done.after
    assert (to / "README.md").read_text().count("## Training after the export") == 2
    if format == "hf":
        assert done.notes == ()
        assert "longer than the 16" in train(to, rhyme, steps=1, seq=17).notes[-1]
        with torch.no_grad():
            assert torch.equal(from_pretrained(to)(tokens(1, 5)).logits, load_export(to).model(tokens(1, 5)))


def test_a_stopped_training_goes_on_as_if_it_had_not_stopped(exports: Exports, rhyme: Path, tmp_path: Path) -> None:
    folder, to = exports("everything").folder, tmp_path / "stopped"
    straight = train(folder, rhyme, tmp_path / "straight", save_steps=2)
    with pytest.raises(KeyboardInterrupt):
        train(folder, rhyme, to, stop, save_steps=2)
    assert {path.name for path in to.iterdir()} == {"checkpoints"}
    refused(lambda: train(folder, rhyme, to, save_steps=2), "there is an unfinished training; ", "--resume")
    refused(lambda: train(folder, rhyme, to, save_steps=2, learning_rate=0.5, resume=True), "of other settings or another text")
    steps: list[int] = []
    resumed = train(folder, rhyme, to, lambda n, *_: steps.append(n), save_steps=2, resume=True)
    assert steps == [5, 6]
    assert replace(resumed, seconds=0.0, directory=folder) == replace(straight, seconds=0.0, directory=folder)
    torch.testing.assert_close(weights(to), weights(tmp_path / "straight"), rtol=0, atol=0)


def test_an_epoch_predicts_every_token_of_the_training_text_once(exports: Exports, rhyme: Path, tmp_path: Path) -> None:
    text = load_corpus(DataSpec(text=str(rhyme)), 257, Path()).train
    done = train(exports("everything").folder, rhyme, tmp_path / "to", steps=None, seq=128, batch=16)
    assert done.tokens == (len(text) - 1) // 128 * 128
    assert done.steps == -(-done.tokens // (128 * 16))


def test_parts_of_a_batch_and_checkpointed_activations_change_nothing(exports: Exports, rhyme: Path, tmp_path: Path) -> None:
    for name in ("everything", "first reads the last", "moeut-2"):
        folder = exports(name).folder
        plain = train(folder, rhyme, tmp_path / "plain")
        for given in ({"grad_accumulation": 2}, {"gradient_checkpointing": True}):
            to = tmp_path / f"{name}-{next(iter(given))}"
            if "gradient_checkpointing" in given and load_export(folder).model.plan.fixed_point_layers:
                with pytest.raises(UserError, match=r"cannot be recomputed .*; leave out --gradient-checkpointing"):
                    train(folder, rhyme, to, **given)
                assert not to.exists()
                continue
            assert train(folder, rhyme, to, **given).tokens == plain.tokens
            torch.testing.assert_close(weights(to), weights(tmp_path / "plain"), rtol=1e-3, atol=1e-4)
        shutil.rmtree(tmp_path / "plain")


def test_a_training_that_cannot_be_is_refused_and_leaves_the_folder(exports: Exports, rhyme: Path, tmp_path: Path) -> None:
    folder, short, thesis = copied(exports("dense").folder, tmp_path / "model"), tmp_path / "short.txt", tmp_path / "thesis"
    short.write_text("one line, and no more\n" * 4)
    thesis.mkdir()
    (thesis / "thesis.tex").write_text("years")
    shape = replace(SHAPE, vocab_size=300)
    config = SharingConfig.make(shape, [{}] * 4)
    teacher = init_weights(Decoder(shape, config.resolve(shape)), torch.Generator().manual_seed(0))
    export(teacher, config, bytes_json(), tmp_path / "teacher", ModelCard())
    asked: list[tuple[str, dict[str, Any]]] = [
        (r"batch: 4 rows do not divide into 1 processes × 3 parts; use 6", {"grad_accumulation": 3}),
        (r"300 tokens, .* 257; use a teacher with the same tokenizer", {"distill_from": str(tmp_path / "teacher")}),
        (r"the .* text has \d+ tokens", {"text": short, "seq": 64}),
        ("not empty and is no earlier export", {"to": thesis}),
        ("the loss .* is nan.*; train with a lower learning rate|; train with a lower learning rate", {"learning_rate": 1e20}),
    ]
    for name, value in {"warmup": 1.5, "distill_weight": -1.0, "dtype": "bfloat", "steps": -1, "seed": -1}.items():
        asked.append((f"^{name}: ", {name: value}))
    for says, given in asked:
        with pytest.raises(UserError, match=says):
            train(folder, **{"text": rhyme} | given)
    assert not (folder / "checkpoints").exists()
    assert torch.equal(load_export(folder).model(tokens(1, 5)), exports("dense").subnet(tokens(1, 5)))


def test_new_weights_are_the_seeds_and_the_dtype_stays_unless_another_is_asked_for(
    exports: Exports, rhyme: Path, tmp_path: Path
) -> None:
    folder, config = exports("everything").folder, CONFIGS["everything"]
    done = [train(folder, rhyme, tmp_path / str(n), from_scratch=True, seed=n, steps=1) for n in (1, 2)]
    new = init_weights(Decoder(SHAPE, config.resolve(SHAPE)), torch.Generator().manual_seed(1))
    export(new, config, bytes_json(), tmp_path / "new", ModelCard())
    assert done[0].before == train(tmp_path / "new", rhyme, tmp_path / "again", steps=1).before != done[1].before
    export(new.bfloat16(), config, bytes_json(), tmp_path / "new", ModelCard())
    for asked, dtype in ((None, "bfloat16"), ("float16", "float16"), ("float32", "float32")):
        to = tmp_path / dtype
        trained = train(tmp_path / "new", rhyme, to, dtype=asked)
        assert (trained.dtype, weights(to)["embed_tokens.weight"].dtype) == (dtype, getattr(torch, dtype))
        assert json.loads((to / "config.json").read_text())["dtype"] == dtype
        again = train(to, rhyme, tmp_path / f"{dtype} again", steps=1)
        assert again.before == trained.after  # what is evaluated is what is written


@pytest.mark.slow
def test_a_model_learns_its_teachers_probabilities(exports: Exports, rhyme: Path, tmp_path: Path) -> None:
    """The more, the nearer; and with no weight on them they change nothing."""
    teacher, student, distance = exports("dense").folder, exports("everything").folder, dict[Any, float]()
    for weight in (None, 0.0, 0.5, 1.0):
        distill = {} if weight is None else {"distill_from": str(teacher), "distill_weight": weight}
        train(student, rhyme, tmp_path / f"{weight}", steps=40, batch=8, **distill)
        rows = load_corpus(DataSpec(text=str(rhyme)), 257, Path()).eval[:256].view(8, 32).long()
        with torch.no_grad():
            p, q = (load_export(folder).model(rows).log_softmax(-1) for folder in (teacher, tmp_path / f"{weight}"))
        distance[weight] = (p.exp() * (p - q)).sum(-1).mean().item()
    assert distance[1.0] < distance[0.5] < distance[0.0]
    torch.testing.assert_close(weights(tmp_path / "0.0"), weights(tmp_path / "None"), rtol=1e-3, atol=1e-4)
    assert f"on the probabilities of `{teacher}`" in (tmp_path / "0.5" / "README.md").read_text()


# nas eval


@over_kinds
def test_measured_bytes_are_the_predicted_ones(exports: Exports, names: list[str], rhyme: Path) -> None:
    for made, dtype in ((exports(name), dtype) for name in names for dtype in ("float32", "bfloat16")):
        spec = MemorySpec(context=700, batch=2, dtype=dtype)
        found = eval_export(made.folder, rhyme, EvalSettings(seq=16, eval_sequences=4, autocast=False, memory=spec)).to_data()
        wanted = measure(SHAPE, made.config, spec)
        assert found["measured_weight_bytes"] == found["weight_bytes"] == wanted.weight_bytes
        assert found["measured_kv_cache_bytes"] == found["kv_cache_bytes"] == wanted.kv_cache_bytes
        assert found["file_bytes"] == (made.folder / "model.safetensors").stat().st_size > 4 * wanted.unique_params
        assert json.loads(json.dumps(found)) == found


@torch.no_grad()
def test_perplexity_is_that_of_the_whole_text(exports: Exports, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("the moon is round, and so is the sun\n")
    data = torch.tensor([list(path.read_bytes())])
    for made in map(exports, COVERING[:6]):
        found = eval_export(made.folder, path, EvalSettings(seq=data.shape[1] - 1, autocast=False))
        loss = F.cross_entropy(made.subnet(data[:, :-1])[0], data[0, 1:]).item()
        assert found.losses.loss_nats_per_token == pytest.approx(loss, rel=1e-5)
        assert found.losses.perplexity == pytest.approx(math.exp(loss), rel=1e-5)
        assert found.bits_per_byte == pytest.approx(loss / math.log(2), rel=1e-5)  # a token is a byte
        assert found.tokens == data.shape[1] - 1
    refused(lambda: eval_export(exports("dense").folder, tmp_path / "no_such.txt"), "no_such.txt does not exist; ")


# Adapters, graphs, devices


def adapted(folder: Path, **given: Any) -> Any:
    """The folder's model with LoRA, whose weights are far from zero."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    return get_peft_model(load(folder), LoraConfig(r=4, init_lora_weights=False, task_type="CAUSAL_LM", **given))


@pytest.mark.filterwarnings("ignore")
@over_kinds
@pytest.mark.slow
def test_an_adapter_acts_wherever_its_matrix_is_used_and_merges(
    exports: Exports, names: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So merged into the matrix, which all its users use, it changes nothing."""
    from peft import PeftModel

    monkeypatch.setattr(decoder_module, "SPARSE_FROM", 0)  # experts by their rows: the matrix itself is read
    x = tokens(2, 9)
    for name in names:
        folder, composed = exports(name).folder, name.startswith("dictformer")  # all its matrices: the head has the adapter
        before = load(folder)(x).logits
        model = adapted(folder, target_modules=["lm_head"] if composed else "all-linear")
        logits = model(x).logits
        assert (logits - before).abs().max() > 1e-2
        model.save_pretrained(tmp_path / name)
        torch.testing.assert_close(PeftModel.from_pretrained(load(folder), tmp_path / name)(x).logits, logits)
        if not composed:  # the head is the embedding, and merging changes both
            torch.testing.assert_close(model.merge_and_unload()(x).logits, logits, rtol=1e-3, atol=1e-3)


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_on_a_shared_matrix_is_one_and_on_a_part_of_a_matrix_is_refused(exports: Exports) -> None:
    from peft import LoraConfig, get_peft_model

    x, users = tokens(2, 9), list[torch.Tensor]()
    for name, count in (("albert", 1), ("dense", SHAPE.num_hidden_layers)):
        model = adapted(exports(name).folder, target_modules=["q_proj"])
        assert sum(weight.requires_grad for weight in model.parameters()) == 2 * count
    shared = adapted(exports("albert").folder, target_modules=["q_proj"])
    adapter = shared.base_model.model.model.layers[0]["self_attn"]["q_proj"].lora_A["default"]
    adapter.register_full_backward_hook(lambda _, __, out: users.append(out[0]))
    shared(x, labels=x).loss.backward()
    assert len(users) == SHAPE.num_hidden_layers
    with pytest.raises(ValueError, match=r"an adapter cannot be put on a RawParameter|[Tt]arget"):
        get_peft_model(load(exports("dictformer-2").folder), LoraConfig(r=2, target_parameters=["q_atoms.weight"]))(x)


@pytest.mark.slow
def test_a_training_step_is_one_graph(exports: Exports) -> None:
    x = tokens(2, 9)
    for model in (load(exports(name).folder).train() for name in KINDS):
        wanted = gradients(model, model(x, labels=x).loss)
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(gradients(model, compiled(x, labels=x).loss), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("name", ["everything", "dictformer-2"])
def test_inductor_trains_and_decodes_it(exports: Exports, name: str) -> None:
    model, x = load(exports(name).folder).train(), tokens(2, 9)
    wanted = gradients(model, model(x, labels=x).loss)
    torch._dynamo.reset()
    compiled = torch.compile(model)
    torch.testing.assert_close(gradients(model, compiled(x, labels=x).loss), wanted, rtol=1e-3, atol=1e-4)
    plain = model.eval().generate(x, max_new_tokens=4, do_sample=False)
    model.forward = torch.compile(model.forward)
    assert torch.equal(model.generate(x, max_new_tokens=4, do_sample=False, cache_implementation="static"), plain)


@over_kinds
def test_accelerate_places_it_and_it_trains_in_bfloat16(exports: Exports, names: list[str]) -> None:
    """The weights themselves, and by autocast."""
    x = tokens(4, 17)
    for folder in (exports(name).folder for name in names):
        for where in ("cpu", "auto"):
            placed = NasForCausalLM.from_pretrained(folder, device_map=where)
            torch.testing.assert_close(placed(x).logits.cpu(), load(folder)(x).logits)
        for dtype in (torch.bfloat16, torch.float32):
            model, losses = NasForCausalLM.from_pretrained(folder, dtype=dtype).train(), []
            optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
            for _ in range(6):
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.float32):
                    losses.append(model(x, labels=x).loss)
                losses[-1].backward()
                optimizer.step()
                optimizer.zero_grad()
            assert losses[-1].item() < losses[0].item()


# MLflow


def tracked_run(done: TrackedTraining) -> tuple[Any, Any]:
    assert done.link
    client = connect(done.link.uri)
    return client, client.get_run(done.link.run_id)


def test_mlflow_has_what_nas_eval_gives_and_the_curves_of_a_training_that_was_stopped(
    exports: Exports, rhyme: Path, tmp_path: Path
) -> None:
    (tmp_path / "held.txt").write_bytes(load_corpus(DataSpec(text=str(rhyme)), 257, Path()).eval_text)
    folder, uri = copied(exports("everything").folder, tmp_path / "model"), f"sqlite:///{tmp_path}/mlflow.db"
    given = {"autocast": True, "seq": 128, "eval_steps": 2, "save_steps": 2}
    with pytest.raises(KeyboardInterrupt):
        train_folder(folder, rhyme, settings(**given), tmp_path / "to", uri, stop)
    done = train_folder(folder, rhyme, settings(**given, resume=True), tmp_path / "to", uri)
    measured = eval_export(tmp_path / "to", tmp_path / "held.txt", EvalSettings())
    client, run = tracked_run(done)
    assert len(client.search_runs([run.info.experiment_id])) == 1
    assert done.trained.after == measured.losses
    wanted = {"perplexity": measured.losses.perplexity, "bits_per_byte": measured.bits_per_byte, "tokens": done.trained.tokens}
    assert {name: run.data.metrics[name] for name in wanted} == pytest.approx(wanted, rel=1e-6)
    history = {name: client.get_metric_history(run.info.run_id, name) for name in run.data.metrics}
    assert {point.step for point in history["perplexity"]} == {0, 2, 4, 6}
    assert [point.step for point in history["learning_rate"]] == [1, 2, 3, 4, 5, 6]
    assert [point.step for point in history["train_loss_nats_per_token"]] == [1, 2, 3, 4, 5, 6]
    assert client.get_experiment(run.info.experiment_id).name == "model"
    assert (run.info.status, run.info.run_name, run.data.tags["kind"]) == ("FINISHED", "train to", "training")
    assert run.data.params["learning_rate"] == "0.003"
    assert done.to_data() == done.trained.to_data() | {"experiment": "model", "run_id": run.info.run_id, "tracking_uri": uri}
    assert not (tmp_path / "to" / "checkpoints").exists()


@pytest.mark.slow
def test_where_a_training_is_tracked(exports: Exports, rhyme: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the user says, or the environment, in the experiment of the folder's search; `none` is nowhere."""
    folder, here = copied(exports("dense").folder, tmp_path / "model"), f"sqlite:///{tmp_path}/search.db"

    def tracked(to: str, uri: str | None = None) -> TrackedTraining:
        return train_folder(folder, rhyme, settings(), tmp_path / to, uri)

    assert tracked("a").link is None
    Provenance("crawl", "tiny", "sharing", "f" * 32, here).save(folder)
    assert tracked("b").link is None  # the folder, which may be a stranger's, does not choose where is written
    assert not (tmp_path / "search.db").exists()
    client = connect(here)
    done = tracked("c", here)
    _, run = tracked_run(done)
    assert (done.experiment, run.data.tags["search"], run.data.tags["search_run_id"]) == ("sharing", "crawl", "f" * 32)
    assert client.get_experiment_by_name("sharing")
    assert Provenance.load(tmp_path / "c") == Provenance.load(folder)  # it travels on
    assert tracked("d", "none").link is None
    (folder / "provenance.json").unlink()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/other.db")
    done = tracked("e")
    assert done.link
    assert (done.link.uri[-9:], done.experiment) == ("/other.db", "model")
    refused(lambda: tracked("f", "here"), "is not an MLflow address")


def test_mlflow_that_is_not_there_costs_nothing_but_a_line_and_is_told_later(
    exports: Exports, rhyme: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    done = train_folder(exports("dense").folder, rhyme, settings(), tmp_path / "to", "http://127.0.0.1:9")
    assert done.link is None
    assert load_export(tmp_path / "to")
    assert all(path.name.startswith("tracking.") for path in (tmp_path / "to" / "checkpoints").iterdir())  # for `nas sync`
    assert len([record for record in caplog.records if "the training goes on" in record.message]) == 1


def test_what_an_earlier_training_could_not_send_is_kept(exports: Exports, rhyme: Path, tmp_path: Path) -> None:
    """A training that does not continue it, or is tracked elsewhere, neither forgets nor sends its entries."""
    folder, checkpoints, uri = exports("dense").folder, tmp_path / "to" / "checkpoints", f"sqlite:///{tmp_path}/mlflow.db"
    train_folder(folder, rhyme, settings(steps=1), tmp_path / "to", "http://127.0.0.1:9")
    left = (checkpoints / "tracking.jsonl").read_text()
    for count, resume in enumerate((False, True), 1):
        (checkpoints / "tracking.jsonl").write_text(left)
        done = train_folder(folder, rhyme, settings(steps=1, resume=resume), tmp_path / "to", uri)
        client, run = tracked_run(done)
        assert len(client.search_runs([run.info.experiment_id])) == count
        kept = [path.read_text() for path in checkpoints.glob("unsent-*/tracking.jsonl")]
        assert kept == [left] * count


# Several processes, the command line, and the recipes


def shell(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HOME": str(cwd / "hf"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
    return subprocess.run([sys.executable, *words], cwd=cwd, env=env, capture_output=True, text=True)


def torchrun(processes: int) -> tuple[str, ...]:
    return ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)) if processes > 1 else ()


@pytest.mark.slow
def test_two_processes_train_what_one_does(exports: Exports, rhyme: Path, tmp_path: Path) -> None:
    ways = {"dictformer-2": [], "everything": ["--gradient-checkpointing"], "first reads the last": ["--grad-accumulation", "2"]}
    for name, more in ways.items():
        folder, cwd = exports(name).folder, tmp_path / name.replace(" ", "-")
        cwd.mkdir()
        # In bfloat16 a batch in parts is rounded otherwise, and the repeated passes over keys of a later layer make that grow.
        words = f"train {folder} --text {rhyme} --steps 8 --batch 8 --seq 32 --json --no-autocast".split()
        alone = shell("-m", "nas", *words, "--to", "one", cwd=cwd)
        pair = shell(*torchrun(2), "-m", "nas", *words, *more, "--to", "two", "--tracking", f"sqlite:///{cwd}/m.db", cwd=cwd)
        assert (alone.returncode, pair.returncode) == (0, 0), alone.stderr + pair.stderr
        one, two = json.loads(alone.stdout), json.loads(pair.stdout)  # one object: one process prints
        assert one["tokens"] == two["tokens"] == 8 * 8 * 32
        assert two["perplexity_before"] == one["perplexity_before"]
        assert two["perplexity_after"] == pytest.approx(one["perplexity_after"], rel=2e-3)
        assert pair.stderr.count("train: 8 steps") == 1
        assert {path.name for path in (cwd / "two").iterdir()} == {path.name for path in (cwd / "one").iterdir()}
        client = connect(f"sqlite:///{cwd}/m.db")
        assert len(client.search_runs([client.get_experiment_by_name(folder.name).experiment_id])) == 1
        assert client.get_run(two["run_id"]).data.metrics["perplexity"] == pytest.approx(two["perplexity_after"], rel=1e-6)


FSDP = """
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

def trained(model, rows):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for batch in rows:
        model(batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model

def model():
    return AutoModelForCausalLM.from_pretrained("DIR", trust_remote_code=True, dtype=torch.float32).train()

torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
rows = torch.randint(256, (4, 2, 15), generator=torch.Generator().manual_seed(0))
alone = trained(model(), rows)
sharded = trained(fully_shard(model(), mesh=init_device_mesh("cpu", (2,))), rows[:, rank, None])
held = sum(weight.to_local().numel() for weight in sharded.parameters())
assert held < 0.6 * sum(weight.numel() for weight in alone.parameters())
for (name, weight), found in zip(alone.named_parameters(), sharded.parameters(), strict=True):
    torch.testing.assert_close(found.full_tensor(), weight, rtol=1e-4, atol=1e-5, msg=name)
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_of_fsdp_train_to_the_weights_of_one(exports: Exports, tmp_path: Path) -> None:
    """Shared weights are stored, sharded and reduced once."""
    for name in ("everything", "albert"):
        copied(exports(name).folder, tmp_path / name / "DIR")
        (tmp_path / name / "train.py").write_text(FSDP)
        done = shell(*torchrun(2), "train.py", cwd=tmp_path / name)
        assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_mistake_ends_all_processes(exports: Exports, rhyme: Path, tmp_path: Path) -> None:
    words = f"train {exports('dense').folder} --text {rhyme} --steps 3 --seq 32 --to to".split()
    mistakes = {"7 rows do not divide into 2 processes": "--batch 7", "lower learning rate": "--learning-rate 1e20"}
    for says, more in mistakes.items():
        done = shell(*torchrun(2), "-m", "nas", *words, *more.split(), cwd=tmp_path)
        assert done.returncode != 0
        assert says in done.stderr
        assert "nas/cli" not in done.stderr  # torchrun's own traceback there is, of ours none
        assert not (tmp_path / "to" / "config.json").exists()


def test_the_terminal_says_what_json_says(exports: Exports, rhyme: Path, tmp_path: Path) -> None:
    words = ("train", exports("dense").folder, "--text", rhyme, "--steps", 3, "--seq", 32, "--to")
    spoken, data = said(*words, tmp_path / "a"), told(*words, tmp_path / "b")
    digits = {"perplexity": 3, "perplexity_standard_error": 3, "bits_per_byte": 4, "loss_nats_per_token": 4}
    for name, when in product(digits, ("before", "after")):
        assert f"{data[f'{name}_{when}']:.{digits[name]}f}" in spoken
    assert f"{data['steps']:,} steps, {data['tokens']:,} tokens" in spoken
    assert f"weights in {data['dtype']}" in spoken
    refused(lambda: said(*words, tmp_path / "c", "--fresh"), "--fresh: ", "it is called --from-scratch now")


def recipes() -> dict[str, str]:
    """The scripts of the page's section, by their titles."""
    section = (ROOT / "docs" / "export.md").read_text().split("## Train with your own trainer")[1].split("\n## ")[0]
    return dict(re.findall(r"\*\*(.+?)\*\*.*?\n\n```python\n(.*?)```", section, re.DOTALL))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("title", "processes", "name"),
    [
        ("transformers.Trainer", 1, "everything"),
        ("transformers.Trainer", 2, "moeut-2"),
        ("Lightning", 1, "everything"),
        ("A loop of your own", 1, "first reads the last"),
    ],
)
def test_the_recipes_train(title: str, processes: int, name: str, exports: Exports, rhyme: Path, tmp_path: Path) -> None:
    copied(exports(name).folder, tmp_path / "DIR")
    shutil.copy(rhyme, tmp_path / "text.txt")
    (tmp_path / "train.py").write_text(recipes()[title])
    done = shell(*torchrun(processes), "train.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    before, after = (eval_export(tmp_path / name, rhyme, EvalSettings(eval_sequences=8)).losses for name in ("DIR", "trained"))
    assert after.loss_nats_per_token < before.loss_nats_per_token - 0.2
    shutil.rmtree(tmp_path / "DIR")
    with torch.no_grad():
        ours, theirs = load_export(tmp_path / "trained").model, from_pretrained(tmp_path / "trained")
        assert torch.equal(theirs(tokens(1, 5)).logits, ours(tokens(1, 5)))
    assert sum(weight.numel() for weight in theirs.parameters()) == measure(SHAPE, CONFIGS[name], MemorySpec()).unique_params


# What other trainers start from


def test_trainers_read_what_they_start_from(exports: Exports, tmp_path: Path) -> None:
    """Each by its own reader; TRL and axolotl, which are not always installed, only where they are."""
    made, column = exports("everything"), "body"
    lines = tmp_path / "lines.jsonl"
    lines.write_text("{}\n")
    given = TrainSettings(seq=32, batch=3, learning_rate=1e-5, column=column, grad_accumulation=2, steps=7)
    names = tuple(name for name, row in TRAINERS.items() if not row.refused)
    for text, format in ((TEXT, "hf"), (str(lines), "dense")):
        folder = tmp_path / format
        case = exports("albert") if format == "dense" else made
        start = Start(names, text, given)
        export(case.subnet, case.config, bytes_json(), folder, ModelCard(), format, start=start)
        readme = (folder / "README.md").read_text()
        for name in names:
            READERS[name](folder, text)
            assert TRAINERS[name].launch in readme
            assert all((folder / word).exists() for word in TRAINERS[name].launch.split() if word.endswith((".py", ".yaml")))
        export(case.subnet, case.config, bytes_json(), folder, ModelCard(), format)  # what people have changed stays
        assert (folder / "trl.yaml").exists()
        assert "Train with" not in (folder / "README.md").read_text()


LAUNCHED = {
    "accelerate": (*torchrun(2), "train.py", "train.yaml"),
    "trl": ("-m", "trl.cli.main", "sft", "--config", "trl.yaml", "--use_cpu"),
}
"""What begins a training on CPUs. FSDP needs GPUs."""


@pytest.mark.slow
@pytest.mark.parametrize("name", LAUNCHED)
def test_what_a_trainer_starts_from_trains(name: str, exports: Exports, tmp_path: Path) -> None:
    if name == "trl":
        pytest.importorskip("trl")
    made, folder, text = exports("everything"), tmp_path / "DIR", "the round moon"
    start = Start((name,), settings=TrainSettings(steps=20, batch=2, seq=16, learning_rate=1e-2))
    export(made.subnet, made.config, bytes_json(), folder, ModelCard(), start=start)
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for _ in range(40)))
    (tmp_path / "held.txt").write_text(text * 20)
    done = shell(*LAUNCHED[name], cwd=folder)
    assert done.returncode == 0, done.stderr
    assert load_export(folder / "trained").config == made.config
    before, after = (eval_export(f, tmp_path / "held.txt", EvalSettings(seq=16)).losses for f in (folder, folder / "trained"))
    assert after.loss_nats_per_token < before.loss_nats_per_token / 2


def same_training(arguments: Any) -> None:
    rows = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
    assert (rows, arguments.max_steps, arguments.learning_rate) == (6, 7, 1e-5)
    assert (arguments.adam_beta2, arguments.lr_scheduler_kwargs) == (0.95, {"min_lr_rate": 0.1})
    assert arguments.get_warmup_steps(100) == 5


def arguments_of(path: Path, text: str) -> Any:
    from transformers import HfArgumentParser, TrainingArguments

    given = yaml.safe_load(path.read_text()) | {"use_cpu": True}
    data, arguments = HfArgumentParser((train_recipe.Data, TrainingArguments)).parse_dict(given)
    assert (data.text, data.column, data.seq) == (text, "body", 32)
    same_training(arguments)
    return arguments


def read_by_accelerate(folder: Path, text: str) -> None:
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.commands.config import config_args
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    assert config_args.load_config_from_file(str(folder / "accelerate.yaml")).distributed_type == "FSDP"
    words = TRAINERS["accelerate"].launch.split()[2:]
    args = launch_command_parser().parse_args([str(folder / word) if word == "accelerate.yaml" else word for word in words])
    environment = prepare_multi_gpu_env(_validate_launch_command(args)[0])
    assert (environment["ACCELERATE_USE_FSDP"], environment["FSDP_VERSION"]) == ("true", "2")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        plugin = FullyShardedDataParallelPlugin()
    assert (plugin.fsdp_version, plugin.reshard_after_forward, plugin.auto_wrap_policy) == (2, True, None)
    assert "FULL_STATE_DICT" in str(plugin.state_dict_type)
    assert arguments_of(folder / "train.yaml", text).fsdp_plugin_args is None  # accelerate's launcher says it


def read_by_torchrun(folder: Path, text: str) -> None:
    from torch.distributed.run import parse_args

    args = parse_args(TRAINERS["torchrun"].launch.split()[1:])
    assert (args.nproc_per_node, args.training_script, args.training_script_args) == ("2", "train.py", ["torchrun.yaml"])
    sharded = arguments_of(folder / args.training_script_args[0], text).fsdp_plugin_args
    wanted = {"fsdp_version": 2, "auto_wrap_policy": "NO_WRAP", "reshard_after_forward": True}
    assert sharded.items() >= (wanted | {"state_dict_type": "FULL_STATE_DICT"}).items()


def read_by_trl(folder: Path, text: str) -> None:
    if not importlib.util.find_spec("trl"):
        return
    from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, SFTConfig, TrlParser

    parser = TrlParser((ScriptArguments, SFTConfig, ModelConfig, DatasetMixtureConfig))
    _, sft, model, data = parser.parse_args_and_config(["--config", str(folder / "trl.yaml"), "--use_cpu", "true"])
    same_training(sft)
    assert (sft.max_length, sft.packing, sft.packing_strategy, sft.dataset_text_field) == (32, True, "wrapped", "body")
    assert (model.model_name_or_path, model.dtype) == (".", "float32")
    assert sft.trust_remote_code
    assert (data.datasets[0].path, data.datasets[0].data_files, data.datasets[0].columns) == ("json", text, ["body"])


def read_by_axolotl(folder: Path, text: str) -> None:
    if not importlib.util.find_spec("axolotl"):
        return
    from axolotl.utils.schemas.config import AxolotlInputConfig

    given = yaml.safe_load((folder / "axolotl.yaml").read_text())
    assert given.keys() <= AxolotlInputConfig.model_fields.keys()
    read = AxolotlInputConfig(**given)
    assert (read.base_model, read.sequence_len, read.max_steps, read.learning_rate) == (".", 32, 7, 1e-5)
    assert read.micro_batch_size * read.gradient_accumulation_steps == 6
    assert (read.datasets[0].path, read.datasets[0].type, read.datasets[0].field) == (text, "completion", "body")


READERS = {
    "accelerate": read_by_accelerate,
    "torchrun": read_by_torchrun,
    "trl": read_by_trl,
    "axolotl": read_by_axolotl,
}


def test_a_trainer_that_cannot_start_is_refused(from_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text.txt").write_text("moon")
    cannot = {
        ("--trainer", "tlr"): "trainer: unknown trainer 'tlr'; did you mean trl?",
        ("--trainer", "litgpt"): "trainer litgpt: LitGPT builds the models of its own list, *; use trl,",
        ("--trainer", "trl", "--format", "torch"): "trainer trl: loads Hugging Face folders, *; use the format hf",
        ("--trainer", "trl", "--text", "text.txt"): "text.txt: is no file of JSON lines, *; give a .jsonl file",
        ("--trainer", "trl", "--text", "none.jsonl"): "none.jsonl: is no file of JSON lines",
    }
    monkeypatch.chdir(tmp_path)
    for words, says in cannot.items():
        refused(lambda words=words: said("export", from_run.folder, "--to", "out", *words), *says.split("*"))
        assert not (tmp_path / "out").exists()


def test_an_export_tells_how_its_trainers_begin_with_the_settings_of_the_search(from_run: Run, tmp_path: Path) -> None:
    row = told("export", from_run.folder, "--to", tmp_path / "out", "--trainer", "trl", "--trainer", "torchrun")
    final = from_run.trial().file.final
    assert row["launch"] == {name: TRAINERS[name].launch for name in ("trl", "torchrun")}
    given = yaml.safe_load((tmp_path / "out" / "trl.yaml").read_text())
    found = (given["max_length"], given["per_device_train_batch_size"], given["learning_rate"])
    assert found == (final.seq, final.batch, final.learning_rate)
    assert str(tmp_path) not in (tmp_path / "out" / "trl.yaml").read_text()
