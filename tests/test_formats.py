"""The formats: a folder, reloaded the way its README says, is the model, or the format says in one line why it cannot be."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from test_export import CONFIGS, KINDS, SHAPE, bold, covering, greedy, supernet, tokens
from test_search import tiny
from torch import Tensor, nn

import nas
from nas.cli.models import export as export_command
from nas.data.tokenizer import build_tokenizer, bytes_json
from nas.errors import UserError
from nas.export import FORMATS, ModelCard, Provenance, export, load_export, read_config
from nas.export.artifact import MARKERS
from nas.export.formats import EXPORTED, exported_files, is_export
from nas.export.torch_folder import one_file
from nas.model.decoder import Decoder, init_weights
from nas.model.supernet import dense_plan, standalone
from nas.search.launch import Launch, start
from nas.search.progress import Silent
from nas.search.run import Run
from nas.sharing.memory import MemorySpec, measure
from nas.sharing.shape import ModelShape
from nas.sharing.sharing_config import SharingConfig
from nas.tracking import Link

ROOT = Path(__file__).parent.parent
WITHOUT_WEIGHTS = ("config",)
BY_HAND = [name for name in KINDS if name not in ("albert", "moeut-2")]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """The one file of the `torch` format, imported."""
    folder = tmp_path_factory.mktemp("one")
    (folder / "model.py").write_text(one_file())
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        import model

        yield model
        del sys.modules["model"]


# What is loaded

Logits = Callable[[Tensor], Tensor]


def _by_transformers(folder: Path, trust: bool) -> Logits:
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust, output_loading_info=True)
    assert not any(info.values()), info
    return lambda x: model(x).logits


def reload(format: str, folder: Path, subnet: Decoder, one: ModuleType) -> Logits:
    """A folder's model, loaded as its README says; of a format without weights, with the subnet's."""
    if format == "torch":
        return one.load(folder)
    if format == "config":
        model = nas.load(folder)
        model.load_state_dict(standalone(subnet).state_dict())
        return model
    return _by_transformers(folder, trust=format == "hf")


EXACT = ("hf", "torch", "config")
"""Formats that write every config."""


def refusal(attempt: Callable[[], object]) -> UserError | None:
    try:
        attempt()
    except UserError as error:
        return error
    return None


LAW = [(format, name) for format in FORMATS for name in (KINDS if format == "hf" else CONFIGS)]


@pytest.mark.slow
@pytest.mark.parametrize(("format", "name"), LAW)
@torch.no_grad()
def test_the_folder_is_the_model_or_is_refused(format: str, name: str, one: ModuleType, tmp_path: Path) -> None:
    config, folder = CONFIGS[name], tmp_path / "out"
    subnet = supernet(SHAPE, config).subnet(config)
    refused = refusal(lambda: export(subnet, config, bytes_json(), folder, ModelCard(), format))
    if refused:
        assert format not in EXACT
        assert re.search(r"layer \d+|embedding|step", refused.message)
        assert "hf" in refused.hint
        assert not folder.exists()
        return
    x = tokens(2, 11)
    torch.testing.assert_close(reload(format, folder, subnet, one)(x), subnet(x), rtol=1e-4, atol=1e-4)
    if format in EXACT:
        assert read_config(folder)[1].resolve(read_config(folder)[0]) == subnet.plan
    assert {"README.md", "sharing.yaml", "tokenizer.json"} <= {path.name for path in folder.iterdir()} <= EXPORTED


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_the_one_file_decodes_from_its_cache_as_the_subnet_does_without(name: str, one: ModuleType, tmp_path: Path) -> None:
    config = CONFIGS[name]
    subnet = supernet(SHAPE, config).subnet(config)
    export(subnet, config, bytes_json(), tmp_path / "out", ModelCard(), "torch")
    model = one.load(tmp_path / "out")
    x = tokens(2, 7)
    assert torch.equal(model(x), subnet(x))
    out = one.generate(model, x, 6, temperature=0)
    assert all(torch.equal(row[7:], greedy(subnet, start, 6)) for row, start in zip(out, x, strict=True))
    cache = one.KVCache.of(model.plan)
    parts = [model(part, cache=cache) for part in x.split([3, 1, 2, 1], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), subnet(x), rtol=1e-4, atol=1e-4)
    assert cache.bytes == measure(SHAPE, config, MemorySpec(context=7, batch=2, dtype="float32")).kv_cache_bytes
    wanted = measure(SHAPE, config, MemorySpec(dtype="float32"))
    assert sum(weight.nbytes for weight in model.parameters()) == wanted.weight_bytes
    assert all(weight.requires_grad for weight in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("format", ["torch", "hf"])
def test_this_project_reads_the_weights_of_any_format_back(format: str, dtype: torch.dtype, tmp_path: Path) -> None:
    shape = ModelShape(300, 24, 3, 6, 40, 3, 10, 99, 500.0, 1e-2, False)
    config = SharingConfig.make(shape, [{}, {"kv": 0}, {"kv_heads": 1}], embedding_rank=7)
    model = bold(init_weights(Decoder(shape, config.resolve(shape)), torch.Generator().manual_seed(0))).to(dtype)
    export(model, config, bytes_json(), tmp_path / "out", ModelCard(), format)
    loaded = load_export(tmp_path / "out")
    assert (loaded.shape, loaded.config) == (shape, config)
    for found in (loaded.model, nas.load(str(tmp_path / "out"))):
        assert found.embed_tokens.weight.dtype == dtype
        assert torch.equal(found(tokens(2, 9)), model(tokens(2, 9)))


def test_the_one_file_keeps_every_dimension_of_the_shape(one: ModuleType, tmp_path: Path) -> None:
    shape = ModelShape(300, 24, 3, 6, 40, 3, 10, 99, 500.0, 1e-2, False)
    model = bold(init_weights(Decoder(shape, dense_plan(shape)), torch.Generator()))
    export(model, SharingConfig.of_plan(shape, model.plan), bytes_json(), tmp_path / "out", ModelCard(), "torch")
    found = one.load(tmp_path / "out")
    assert all(getattr(found.shape, name) == getattr(shape, name) for name in ModelShape.__dataclass_fields__)
    assert torch.equal(found(tokens(2, 30)), model(tokens(2, 30)))
    assert one.tokenizer(tmp_path / "out")[1]([299, 72, 105]) == "Hi"  # what is no byte is no text


@pytest.mark.parametrize("name", [*BY_HAND, "moeut-2", "universal"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_folder_without_weights_builds_what_the_search_begins_with(name: str, tied: bool, tmp_path: Path) -> None:
    shape, config = replace(SHAPE, tie_word_embeddings=tied), CONFIGS[name]
    subnet = supernet(shape, config).subnet(config)
    export(subnet, config, bytes_json(), tmp_path / "out", ModelCard(), "config")
    assert read_config(tmp_path / "out") == (shape, config)
    made = [nas.load(tmp_path / "out", seed=seed) for seed in (3, 3, 4)]
    wanted = init_weights(Decoder(shape, subnet.plan), torch.Generator().manual_seed(3)).state_dict()
    for model in made[:2]:
        assert model.state_dict().keys() == wanted.keys()
        assert all(torch.equal(weight, wanted[key]) for key, weight in model.state_dict().items())
    assert not torch.equal(made[2].embed_tokens.weight, made[0].embed_tokens.weight)
    assert not [path for path in (tmp_path / "out").iterdir() if path.suffix == ".safetensors"]


def test_loading_what_is_no_model_is_refused_in_one_line(tmp_path: Path) -> None:
    model = init_weights(Decoder(SHAPE, dense_plan(SHAPE)), torch.Generator())
    export(model, CONFIGS["dense"], bytes_json(), tmp_path / "out", ModelCard(), "config")
    with pytest.raises(UserError, match=r"is a configuration without weights; export it with `--format hf`, or begin"):
        load_export(tmp_path / "out")
    (tmp_path / "out" / "model.yaml").write_text("hidden_size: 3\n")
    with pytest.raises(UserError, match=r"model\.yaml: vocab_size is missing"):
        nas.load(tmp_path / "out")
    with pytest.raises(UserError, match="no such folder"):
        nas.load(tmp_path / "nowhere")


# What a stranger gets

WITHOUT = """
import sys
from importlib.abc import MetaPathFinder

class Without(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("nas", "transformers", "tokenizers"):
            raise ModuleNotFoundError(name=name)

sys.meta_path.insert(0, Without())
"""

STRANGER = (
    WITHOUT
    + """
import torch
from model import load

for folder, x, logits in torch.load(sys.argv[1], weights_only=True):
    assert torch.equal(load(folder)(x), logits), folder
print("the same logits")
"""
)


def stranger(folder: Path, *command: str) -> str:
    """What a Python with nothing of ours in its environment prints there."""
    env = {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder)}
    done = subprocess.run([sys.executable, *command], cwd=folder, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@torch.no_grad()
def test_a_stranger_runs_the_one_file_on_torch_alone(tmp_path: Path) -> None:
    wanted, x = [], tokens(2, 9)
    for n, name in enumerate(covering()):
        subnet = supernet(SHAPE, CONFIGS[name]).subnet(CONFIGS[name])
        folder = export(subnet, CONFIGS[name], bytes_json(), tmp_path / str(n), ModelCard(), "torch")
        wanted.append((str(folder), x, subnet(x)))
    torch.save(wanted, tmp_path / "wanted.pt")
    assert stranger(tmp_path / "0", "-c", STRANGER, str(tmp_path / "wanted.pt")) == "the same logits\n"
    said = stranger(tmp_path / "0", "-c", WITHOUT + "import runpy; sys.argv = ['model.py', 'Hé', '--tokens', '5']\n"
                    "runpy.run_path('model.py', run_name='__main__')")  # fmt: skip
    assert said.startswith("Hé")
    assert len(said) > len("Hé\n")


def test_a_tokenizer_that_is_not_bytes_goes_with_the_one_file(one: ModuleType, tmp_path: Path) -> None:
    text = "the moon is round, and so is the sun; " * 40
    tokenizer = build_tokenizer("bpe", 270, text.encode(), tmp_path)
    shape = replace(SHAPE, vocab_size=tokenizer.size)
    model = init_weights(Decoder(shape, dense_plan(shape)), torch.Generator())
    export(model, SharingConfig.of_plan(shape, model.plan), tokenizer.json, tmp_path / "out", ModelCard(), "torch")
    encode, decode = one.tokenizer(tmp_path / "out")
    assert encode(text) == tokenizer.encode(text.encode()).tolist()
    assert decode(encode(text)) == text
    assert stranger(tmp_path / "out", "model.py", "the moon", "--tokens", "3").startswith("the moon")


def test_the_one_file_is_as_clean_as_its_sources(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(one_file())
    for command in (["check"], ["format", "--check"]):
        ruff = [sys.executable, "-m", "ruff", *command, "--config", str(ROOT / "pyproject.toml"), "model.py"]
        done = subprocess.run(ruff, cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr
    assert not re.search(r"\b(import|from) (nas|transformers|\.)", one_file())


@pytest.mark.parametrize("name", ["everything", "dictformer-2"])
def test_the_one_file_trains_and_is_written_back(name: str, one: ModuleType, tmp_path: Path) -> None:
    config = CONFIGS[name]
    export(supernet(SHAPE, config).subnet(config), config, bytes_json(), tmp_path / "out", ModelCard(), "torch")
    model, x = one.load(tmp_path / "out"), tokens(2, 9)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(5):
        loss = nn.functional.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    (tmp_path / "out" / "model.py").is_file()
    one.save(model, tmp_path / "trained", tmp_path / "out")
    with torch.no_grad():
        for again in (one.load(tmp_path / "trained"), load_export(tmp_path / "trained").model):
            assert torch.equal(again(x), model(x))


@pytest.mark.slow
def test_training_a_folder_keeps_its_format(one: ModuleType, tmp_path: Path) -> None:
    from nas.export.train import train_export
    from nas.export.train_settings import TrainSettings

    text = tmp_path / "rhyme.txt"
    text.write_text("".join(f"{n} green bottles, hanging on the wall.\n" for n in range(400)))
    config, x = CONFIGS["cla-2"], tokens(2, 9)
    folder = export(supernet(SHAPE, config).subnet(config), config, bytes_json(), tmp_path / "out", ModelCard(), "torch")
    names, before = set(exported_files(folder)), one.load(folder)(x)
    train_export(folder, text, TrainSettings(steps=2, batch=2, seq=16, autocast=False))
    assert set(exported_files(folder)) == names
    with torch.no_grad():
        assert torch.equal(one.load(folder)(x), load_export(folder).model(x))
        assert not torch.equal(one.load(folder)(x), before)


# The README


def blocks(readme: Path, language: str) -> list[str]:
    """The code blocks of its section on use."""
    section = readme.read_text().partition("\n## Use\n")[2].partition("\n## ")[0]
    return [code for kind, code in re.findall(r"```(\w*)\n(.*?)```", section, re.DOTALL) if kind == language]


@pytest.mark.slow
@pytest.mark.parametrize("format", FORMATS)
def test_what_the_readme_says_runs(format: str, tmp_path: Path) -> None:
    text = tmp_path / "rhyme.txt"
    text.write_text("".join(f"{n} green bottles, hanging on the wall.\n" for n in range(400)))
    name = "cla-2" if format in EXACT else "dense"
    shape = replace(SHAPE, max_position_embeddings=2048)
    config = CONFIGS[name]
    folder = export(supernet(shape, config).subnet(config), config, bytes_json(), tmp_path / "out", ModelCard(), format)
    env = os.environ | {"PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    code = blocks(folder / "README.md", "python")
    commands = [line for block in blocks(folder / "README.md", "") for line in block.splitlines()]
    assert code
    assert commands
    shell = [[sys.executable, "-c", block] for block in code]
    for line in commands:
        words = [str(text) if word == "FILE" else word.strip('"') for word in re.findall(r'"[^"]*"|\S+', line)]
        assert words[0] in ("nas", "python")
        shell.append([sys.executable, *_program(words)])
    for command in shell:
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        assert done.stdout.strip() or command[1] == "-c"


def _program(words: list[str]) -> list[str]:
    return ["-c", "from nas.cli import main; main()", *words[1:]] if words[0] == "nas" else words[1:]


def links(readme: Path) -> list[str]:
    """What it links to or shows."""
    return re.findall(r"\]\(([^)]+)\)", readme.read_text())


# Writing

PAIRS = [(a, b) for a in FORMATS for b in FORMATS]


@pytest.mark.parametrize(("before", "after"), PAIRS)
def test_any_earlier_export_is_replaced_by_any_other(before: str, after: str, tmp_path: Path) -> None:
    target, config = tmp_path / "out", CONFIGS["dense"]
    model = init_weights(Decoder(SHAPE, config.resolve(SHAPE)), torch.Generator())
    figure = tmp_path / "figure.png"
    figure.write_bytes(b"png")
    export(model, config, bytes_json(), target, ModelCard(figure=figure), before)
    (target / "notes.txt").write_text("mine")
    assert is_export(target)
    alone = exported_files(export(model, config, bytes_json(), tmp_path / "alone", ModelCard(), after))
    export(model, config, bytes_json(), target, ModelCard(), after)
    assert exported_files(target) == alone
    assert {path.name for path in target.iterdir()} == {*alone, "notes.txt"}


@pytest.mark.parametrize("format", FORMATS)
def test_an_export_that_fails_leaves_what_was_there(format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = CONFIGS["dense"]
    model = init_weights(Decoder(SHAPE, config.resolve(SHAPE)), torch.Generator())
    with pytest.raises(FileNotFoundError):  # the last thing that is put in
        export(model, config, bytes_json(), tmp_path / "new", ModelCard(figure=tmp_path / "gone.png"), format)
    assert list(tmp_path.iterdir()) == []
    export(model, config, bytes_json(), tmp_path / "out", ModelCard(), format)
    move = Path.replace

    def crash(path: Path, to: Path) -> Path:
        if to.name == "tokenizer.json":
            raise OSError("the lights are out")
        return move(path, to)

    monkeypatch.setattr(Path, "replace", crash)
    with pytest.raises(OSError, match="the lights are out"):
        export(model, config, bytes_json(), tmp_path / "out", ModelCard(), format)
    assert not is_export(tmp_path / "out")
    assert not [marker for marker in MARKERS if (tmp_path / "out" / marker).exists()]


@pytest.mark.parametrize("format", FORMATS)
def test_files_of_our_names_in_a_strangers_folder_stay_unless_they_are_written(format: str, tmp_path: Path) -> None:
    """A folder that is no export, written over because the user says so."""
    for name in ("plan.py", "model.yaml", "notes.txt"):
        (tmp_path / name).write_text("mine")
    config = CONFIGS["dense"]
    model = init_weights(Decoder(SHAPE, config.resolve(SHAPE)), torch.Generator())
    with pytest.raises(UserError, match="not empty and is no earlier export"):
        export(model, config, bytes_json(), tmp_path, ModelCard(), format)
    export(model, config, bytes_json(), tmp_path, ModelCard(), format, overwrite=True)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert (tmp_path / "plan.py").read_text() == "mine" or format == "hf"


# A search's models


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run that MLflow has."""
    folder = tmp_path_factory.mktemp("tracked")
    return start(Launch(tiny(folder, tracking={"experiment": "lemons"}), folder / "runs"), Silent())[0]


def exported(run: Run, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from nas.cli import main; main()", "export", run.name, "--runs", str(run.folder.parent)]
    return subprocess.run([*command, *words], cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.mark.slow
@pytest.mark.parametrize("format", ["hf", "torch", "config"])
def test_a_search_s_model_says_where_it_comes_from(format: str, tracked: Run, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    done = exported(tracked, "--to", str(tmp_path / "out"), "--format", format, "--json")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    files = {path.name: path.stat().st_size for path in (tmp_path / "out").iterdir()}
    assert (said["format"], said["files"], said["bytes"]) == (format, files, sum(files.values()))
    readme = (tmp_path / "out" / "README.md").read_text()
    link = Link.load(tracked.folder)
    child = MlflowClient(link.uri).get_run(link.child(said["hash"]))
    assert child.data.params["hash"] == said["hash"]
    assert child.data.tags["mlflow.parentRunId"] == link.run_id
    for part in ("search `tiny`", "experiment `lemons`", f"run `{link.run_id}` of the search", child.info.run_id):
        assert part in readme
    assert str(tracked.folder.parent) not in readme  # where it lay is nobody's business
    assert links(tmp_path / "out" / "README.md") == ["front.png"]
    assert (tmp_path / "out" / "front.png").read_bytes() == (tracked.folder / "front.png").read_bytes()
    assert ("not in this folder" in readme) == (format in WITHOUT_WEIGHTS)


@pytest.mark.slow
def test_an_untracked_searchs_model_names_no_tracking(tracked: Run, tmp_path: Path) -> None:
    link = (tracked.folder / "tracking.json").read_text()
    (tracked.folder / "tracking.json").unlink()
    try:
        assert exported(tracked, "--to", str(tmp_path / "out")).returncode == 0
    finally:
        (tracked.folder / "tracking.json").write_text(link)
    assert "MLflow" not in (tmp_path / "out" / "README.md").read_text()


def test_a_readme_says_no_password(tmp_path: Path) -> None:
    model = init_weights(Decoder(SHAPE, CONFIGS["dense"].resolve(SHAPE)), torch.Generator())
    card = ModelCard(provenance=Provenance("lemons", "tree", "fruit", "12ab", "https://me:secret@host:5000/mlflow", "34cd"))
    export(model, CONFIGS["dense"], bytes_json(), tmp_path / "out", card)
    readme = (tmp_path / "out" / "README.md").read_text()
    assert "In MLflow of https://host:5000/mlflow: experiment `fruit`, run `12ab` of the search, run `34cd` of this" in readme
    assert "secret" not in readme
    assert Provenance("lemons", "tree", tracking_uri="sqlite:////home/me/mlflow.db").server == ""


def test_help_lists_the_formats_and_a_misspelt_one_is_said(tmp_path: Path) -> None:
    from click.testing import CliRunner

    said = CliRunner().invoke(export_command, ["--help"]).output
    for row in FORMATS.values():
        assert re.search(rf"^ +{row.name} +{re.escape(row.meaning.split()[0])}", said, re.MULTILINE)
    model = init_weights(Decoder(SHAPE, CONFIGS["dense"].resolve(SHAPE)), torch.Generator())
    with pytest.raises(UserError, match=r"unknown format 'tørch'; did you mean torch\?"):
        export(model, CONFIGS["dense"], bytes_json(), tmp_path, ModelCard(), "tørch")


def test_importing_the_package_imports_no_torch() -> None:
    code = "import nas, sys; assert 'torch' not in sys.modules and 'yaml' not in sys.modules; print(nas.load.__name__)"
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)
    assert done.stdout == "load\n", done.stderr
