"""The formats: a folder, reloaded the way its README says, is the model, or the format says in one line why it cannot be."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from commands import refused, said, told
from exports import (
    CONFIGS,
    COVERING,
    FAMILIES,
    SHAPE,
    Exports,
    bold,
    from_pretrained,
    greedy,
    load,
    over,
    over_all,
    stranger,
    supernet,
    tokens,
)
from torch import Tensor, nn

import nas
from nas.data.tokenizer import build_tokenizer, bytes_json
from nas.errors import UserError
from nas.export import FORMATS, ModelCard, Provenance, export, load_export, read_config
from nas.export.card import MARKERS
from nas.export.formats import EXPORTED, RENAMED, exported_files, is_export
from nas.export.torch_folder import one_file
from nas.model.decoder import Decoder, init_weights
from nas.model.supernet import standalone
from nas.search.run import Run
from nas.sharing.memory import MemorySpec, measure
from nas.sharing.shape import ModelShape
from nas.sharing.sharing_config import SharingConfig
from nas.tracking import Link

ROOT = Path(__file__).parent.parent
LOSSLESS = ("hf", "torch", "config")
"""Formats that write every config."""


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


@pytest.fixture(scope="module")
def dense() -> Decoder:
    return init_weights(Decoder(SHAPE, SharingConfig.dense(SHAPE).resolve(SHAPE)), torch.Generator().manual_seed(0))


def write(model: Decoder, to: Path, format: str = "hf", card: ModelCard | None = None, **given: Any) -> Path:
    return export(model, SharingConfig.of_plan(model.shape, model.plan), bytes_json(), to, card or ModelCard(), format, **given)


# What is loaded


def logits_of(format: str, folder: Path, subnet: Decoder, one: ModuleType, x: Tensor) -> Tensor:
    """Those of a folder's model, loaded as its README says; of a format without weights, with the subnet's."""
    if format == "torch":
        return one.load(folder)(x)
    if format == "config":
        model = nas.load(folder)
        model.load_state_dict(standalone(subnet).state_dict())
        return model(x)
    if format == "hf":
        return load(folder)(x).logits
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model(x).logits


def is_dense(name: str) -> bool:
    """Whether weights alone say what a config shares: no layer uses what another has computed, a window or experts."""
    plan = CONFIGS[name].resolve(SHAPE)
    own = all(i == layer.k == layer.v for i, layer in enumerate(plan.layers) if layer.has_attention)
    more = any(layer.window or layer.experts or layer.value_residual or layer.kv_input is not None for layer in plan.layers)
    return own and not more and not plan.outside.step_embedding


@over([*COVERING, "mobilellm-ls", "dictformer-2", "dha-1x2"], [*CONFIGS])
@torch.no_grad()
def test_the_folder_is_the_model_or_is_refused(names: list[str], one: ModuleType, tmp_path: Path) -> None:
    x = tokens(2, 11)
    for name, format in ((name, format) for name in names for format in FORMATS):
        config, folder = CONFIGS[name], tmp_path / f"{name} {format}"
        subnet = supernet(SHAPE, config).subnet(config)
        if format == "dense" and not is_dense(name):
            with pytest.raises(UserError, match=r"(layer \d+|embedding|step).*; .*hf"):
                export(subnet, config, bytes_json(), folder, ModelCard(), format)
            assert not folder.exists()
            continue
        export(subnet, config, bytes_json(), folder, ModelCard(), format)
        torch.testing.assert_close(logits_of(format, folder, subnet, one, x), subnet(x), rtol=1e-4, atol=1e-4)
        if format in LOSSLESS:
            assert read_config(folder)[1].resolve(read_config(folder)[0]) == subnet.plan
        assert {"README.md", "sharing.yaml", "tokenizer.json"} <= {path.name for path in folder.iterdir()} <= EXPORTED


@over_all
@torch.no_grad()
def test_the_one_file_decodes_with_a_cache_as_the_subnet_does_without(
    exports: Exports, names: list[str], one: ModuleType, tmp_path: Path
) -> None:
    x = tokens(2, 7)
    for made in map(exports, names):
        subnet = made.subnet
        model = one.load(export(subnet, made.config, bytes_json(), tmp_path / made.folder.name, ModelCard(), "torch"))
        assert torch.equal(model(x), subnet(x))
        out = one.generate(model, x, 6, temperature=0)
        assert all(torch.equal(row[7:], greedy(subnet, start, 6)) for row, start in zip(out, x, strict=True))
        cache = one.KVCache.of(model.plan)
        parts = [model(part, cache=cache) for part in x.split([3, 1, 2, 1], 1)]
        torch.testing.assert_close(torch.cat(parts, 1), subnet(x), rtol=1e-4, atol=1e-4)
        wanted = measure(SHAPE, made.config, MemorySpec(context=7, batch=2, dtype="float32"))
        assert (cache.bytes, sum(weight.nbytes for weight in model.parameters())) == (wanted.kv_cache_bytes, wanted.weight_bytes)


@torch.no_grad()
def test_every_dimension_and_dtype_is_read_back(one: ModuleType, tmp_path: Path) -> None:
    """By every reader, and of a folder that transformers saved again."""
    shape, x = ModelShape(300, 24, 3, 6, 40, 3, 10, 99, 500.0, 1e-2, False, **FAMILIES), tokens(2, 30)
    config = SharingConfig.make(shape, [{}, {"kv": 0}, {"kv_heads": 1}], embedding_rank=7)
    for format, dtype in product(("torch", "hf"), (torch.float32, torch.bfloat16)):
        model = bold(init_weights(Decoder(shape, config.resolve(shape)), torch.Generator().manual_seed(0))).to(dtype)
        folder = export(model, config, bytes_json(), tmp_path / "out", ModelCard(), format)
        for _ in range(2):
            loaded = load_export(folder)
            assert (loaded.shape, loaded.config, loaded.format) == (shape, config, format)
            readers = [loaded.model, nas.load(str(folder)), *([one.load(folder)] if format == "torch" else [])]
            for found in readers:
                assert found.embed_tokens.weight.dtype == dtype
                names = ModelShape.__dataclass_fields__
                assert all(repr(getattr(found.shape, name)) == repr(getattr(shape, name)) for name in names)
                assert torch.equal(found(x), model(x))
            if format == "hf":
                theirs = from_pretrained(folder, dtype="auto")
                assert torch.equal(theirs(x).logits, model(x))
                theirs.save_pretrained(folder)


@torch.no_grad()
def test_a_folder_without_weights_builds_what_the_search_begins_with(tmp_path: Path) -> None:
    for name, tied in ((name, tied) for name in (*COVERING, "universal") for tied in (True, False)):
        shape, config = replace(SHAPE, tie_word_embeddings=tied), CONFIGS[name]
        subnet = supernet(shape, config).subnet(config)
        folder = export(subnet, config, bytes_json(), tmp_path / "out", ModelCard(), "config")
        assert read_config(folder)[0] == shape
        assert read_config(folder)[1].resolve(shape) == subnet.plan
        made = [nas.load(folder, seed=seed) for seed in (3, 3, 4)]
        wanted = init_weights(Decoder(shape, subnet.plan), torch.Generator().manual_seed(3)).state_dict()
        for model in made[:2]:
            assert model.state_dict().keys() == wanted.keys()
            assert all(torch.equal(weight, wanted[key]) for key, weight in model.state_dict().items())
        assert not torch.equal(made[2].embed_tokens.weight, made[0].embed_tokens.weight)
        assert not [*folder.glob("*.safetensors")]


def test_loading_what_is_no_model_is_refused_in_one_line(dense: Decoder, tmp_path: Path) -> None:
    folder = write(dense, tmp_path / "out", "config")
    refused(lambda: load_export(folder), "is a configuration without weights; ", "`--format hf`")
    (folder / "model.yaml").write_text("hidden_size: 3\n")
    refused(lambda: nas.load(folder), "model.yaml: vocab_size is missing")
    refused(lambda: nas.load(tmp_path / "nowhere"), "no such folder")


# What a stranger gets

STRANGER = """
import runpy, torch
from model import load
for folder, x, logits in torch.load(sys.argv[1], weights_only=True):
    assert torch.equal(load(folder)(x), logits), folder
sys.argv = ['model.py', 'Hé', '--tokens', '5']
runpy.run_path('model.py', run_name='__main__')
"""
OURS = ("nas", "transformers", "tokenizers")


@torch.no_grad()
def test_a_stranger_runs_the_one_file_on_torch_alone(exports: Exports, tmp_path: Path) -> None:
    wanted, x = [], tokens(2, 9)
    for n, made in enumerate(map(exports, COVERING)):
        folder = export(made.subnet, made.config, bytes_json(), tmp_path / str(n), ModelCard(), "torch")
        wanted.append((str(folder), x, made.subnet(x)))
    torch.save(wanted, tmp_path / "wanted.pt")
    text = stranger(tmp_path / "0", STRANGER, str(tmp_path / "wanted.pt"), without=OURS)
    assert text.startswith("Hé")
    assert len(text) > len("Hé\n")


def test_a_tokenizer_that_is_not_bytes_goes_with_the_one_file(one: ModuleType, tmp_path: Path) -> None:
    text = "the moon is round, and so is the sun; " * 40
    tokenizer = build_tokenizer("bpe", 270, text.encode(), tmp_path)
    shape = replace(SHAPE, vocab_size=tokenizer.size)
    model = init_weights(Decoder(shape, SharingConfig.dense(shape).resolve(shape)), torch.Generator())
    export(model, SharingConfig.of_plan(shape, model.plan), tokenizer.json, tmp_path / "out", ModelCard(), "torch")
    encode, decode = one.tokenizer(tmp_path / "out")
    assert encode(text) == tokenizer.encode(text.encode()).tolist()
    assert decode(encode(text)) == text
    code = "import runpy; runpy.run_path('model.py', run_name='__main__')"
    assert stranger(tmp_path / "out", code, "the moon", "--tokens", "3").startswith("the moon")


def test_the_one_file_ends_a_text_at_its_end_of_text(exports: Exports, one: ModuleType, tmp_path: Path) -> None:
    made, x = exports("everything"), tokens(2, 9)
    for older, ends in ((False, [256]), (True, [])):
        folder = export(made.subnet, made.config, bytes_json(end=not older), tmp_path / f"{older}", ModelCard(), "torch")
        assert one.end_tokens(folder) == ends
        encode, decode = one.tokenizer(folder)
        assert encode("é<|endoftext|>a") == [*"é".encode(), *(ends or b"<|endoftext|>"), ord("a")]
        assert decode([97, 256, 98]) == "ab"
    whole = one.generate(made.subnet, x, 8, 0.0)
    end = int(whole[0, 11])
    for count in (1, 2):
        found = one.generate(made.subnet, x[:count], 8, 0.0, ends=[end])[:, 9:].tolist()
        free = [row.index(end) + 1 if end in row else 8 for row in whole[:count, 9:].tolist()]
        assert found == [
            (row[:stop] + [end] * 8)[: max(free)] for row, stop in zip(whole[:count, 9:].tolist(), free, strict=True)
        ]


def test_the_one_file_is_as_clean_as_its_sources(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(one_file())
    for command in (["check"], ["format", "--check"]):
        ruff = [sys.executable, "-m", "ruff", *command, "--config", str(ROOT / "pyproject.toml"), "model.py"]
        done = subprocess.run(ruff, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    assert not re.search(r"\b(import|from) (nas|transformers|\.)", one_file())


def test_the_one_file_trains_and_is_written_back(exports: Exports, one: ModuleType, tmp_path: Path) -> None:
    x = tokens(2, 9)
    for made in (exports("everything"), exports("dictformer-2")):
        folder = export(made.subnet, made.config, bytes_json(), tmp_path / made.folder.name, ModelCard(), "torch")
        model, losses = one.load(folder), []
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(5):
            loss = nn.functional.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())
            losses.append(loss.item())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert losses[-1] < losses[0]
        one.save(model, folder / "trained", folder)
        with torch.no_grad():
            for again in (one.load(folder / "trained"), load_export(folder / "trained").model):
                assert torch.equal(again(x), model(x))


def blocks(readme: Path, language: str) -> list[str]:
    """The code blocks of its section on use."""
    section = readme.read_text().partition("\n## Use\n")[2].partition("\n## ")[0]
    return [code for kind, code in re.findall(r"```(\w*)\n(.*?)```", section, re.DOTALL) if kind == language]


@pytest.mark.slow
@pytest.mark.parametrize("format", FORMATS)
def test_what_the_readme_says_runs(format: str, rhyme: Path, tmp_path: Path) -> None:
    shape, config = replace(SHAPE, max_position_embeddings=2048), CONFIGS["cla-2" if format in LOSSLESS else "dense"]
    folder = export(supernet(shape, config).subnet(config), config, bytes_json(), tmp_path / "out", ModelCard(), format)
    env = os.environ | {"PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    shell = [["-c", code] for code in blocks(folder / "README.md", "python")]
    for line in (line for block in blocks(folder / "README.md", "") for line in block.splitlines()):
        program, *words = [word.strip('"') for word in re.findall(r'"[^"]*"|\S+', line.replace("FILE", str(rhyme)))]
        shell.append([*{"nas": ["-m", "nas"], "python": []}[program], *words])
    assert len(shell) > 2
    for command in shell:
        done = subprocess.run([sys.executable, *command], cwd=folder, env=env, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        assert done.stdout.strip() or command[0] == "-c"


# Writing


def test_any_earlier_export_is_replaced_by_any_other_and_what_else_is_there_stays(dense: Decoder, tmp_path: Path) -> None:
    (tmp_path / "figure.png").write_bytes(b"png")
    alone = {name: exported_files(write(dense, tmp_path / name, name)) for name in FORMATS}
    for before, after in ((before, after) for before in FORMATS for after in FORMATS):
        target = write(dense, tmp_path / f"{before} {after}", before, ModelCard(figure=tmp_path / "figure.png"))
        (target / "notes.txt").write_text("mine")
        (target / "model-00001-of-00002.safetensors").write_text("stale")
        assert is_export(target)
        write(dense, target, after)
        assert exported_files(target) == alone[after]
        assert {path.name for path in target.iterdir()} == {*alone[after], "notes.txt"}
        if after == "hf":
            assert len({path.stat().st_mode for path in target.iterdir()}) == 1  # whoever may read one file may read them all


@pytest.mark.parametrize("format", FORMATS)
def test_an_export_that_fails_leaves_what_was_there(
    format: str, dense: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(FileNotFoundError):  # the figure is written last
        write(dense, tmp_path / "new", format, ModelCard(figure=tmp_path / "gone.png"))
    assert list(tmp_path.iterdir()) == []
    target, move = write(dense, tmp_path / "out", format), Path.replace

    def crash(path: Path, to: Path) -> Path:
        if to.name == "tokenizer.json":
            raise OSError("the lights are out")
        return move(path, to)

    monkeypatch.setattr(Path, "replace", crash)
    with pytest.raises(OSError, match="the lights are out"):
        write(dense, target, format)
    assert not is_export(target)
    assert not [marker for marker in MARKERS if (target / marker).exists()]


def test_a_folder_of_something_else_is_not_written_over(dense: Decoder, tmp_path: Path) -> None:
    for format in FORMATS:
        folder = tmp_path / format
        folder.mkdir()
        for name in ("plan.py", "model.yaml", "notes.txt"):
            (folder / name).write_text("mine")
        with pytest.raises(UserError, match=r"not empty and is no earlier export; .*--overwrite"):
            write(dense, folder, format)
        with pytest.raises(UserError, match="is a file"):
            write(dense, folder / "notes.txt", format)
        write(dense, folder, format, overwrite=True)
        assert (folder / "notes.txt").read_text() == "mine"
        assert (folder / "plan.py").read_text() == "mine" or format == "hf"
        assert read_config(folder)[0] == SHAPE


def test_exporting_leaves_the_supernet_as_it_was(tmp_path: Path) -> None:
    for format in FORMATS:
        config = CONFIGS["dictformer-2" if format == "dense" else "everything"]
        net = supernet(SHAPE, config)
        before = {key: value.clone() for key, value in net.state_dict().items()}
        export(net.subnet(config), config, bytes_json(), tmp_path / "out", ModelCard(), format)
        assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
        assert all(weight.grad is None for weight in net.parameters())


# What a folder and the command line say


def test_a_readme_says_where_mlflow_has_it_and_no_password(dense: Decoder, tmp_path: Path) -> None:
    card = ModelCard(provenance=Provenance("lemons", "tree", "fruit", "12ab", "https://me:secret@host:5000/mlflow", "34cd"))
    readme = (write(dense, tmp_path / "out", card=card) / "README.md").read_text()
    assert "In MLflow of https://host:5000/mlflow: experiment `fruit`, run `12ab` of the search, run `34cd` of this" in readme
    assert "secret" not in readme
    assert Provenance("lemons", "tree", tracking_uri="sqlite:////home/me/mlflow.db").server == ""
    assert "MLflow" not in (write(dense, tmp_path / "untracked") / "README.md").read_text()


def test_provenance_travels_without_a_password(tmp_path: Path) -> None:
    for uri, public in (
        ("http://me:secret@host:5000/x", "http://host:5000/x"),
        ("postgresql://me:secret@host/db", "postgresql://host/db"),
        *((uri, uri) for uri in ("sqlite:////runs/mlflow.db", "")),
    ):
        Provenance("run", "trial", "experiment", "0" * 32, uri).save(tmp_path)
        assert Provenance.load(tmp_path) == Provenance("run", "trial", "experiment", "0" * 32, public)
    (tmp_path / "provenance.json").write_text('{"run": 1}')
    refused(lambda: Provenance.load(tmp_path), "provenance.json: ")


def test_help_lists_the_formats_and_a_wrong_one_is_answered(dense: Decoder, tmp_path: Path) -> None:
    text = said("export", "--help")
    for row in FORMATS.values():
        assert re.search(rf"^ +{row.name} +{re.escape(row.meaning.split()[0])}", text, re.MULTILINE)
    for name, hint in {"tørch": "did you mean torch", **{old: f"it is called {new} now" for old, new in RENAMED.items()}}.items():
        with pytest.raises(UserError, match=f"format: unknown format '{name}'; {hint}"):
            write(dense, tmp_path / "out", name)


def test_a_searchs_model_says_where_it_comes_from(from_run: Run, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    link = Link.load(from_run.folder)
    for format in LOSSLESS:
        to, runs = tmp_path / format, str(from_run.folder.parent)
        row = told("export", from_run.name, "--runs", runs, "--to", to, "--format", format)
        files = exported_files(to)
        assert (row["format"], row["files"], row["bytes"]) == (format, files, sum(files.values()))
        readme = (to / "README.md").read_text()
        child = MlflowClient(link.uri).get_run(link.model(row["hash"]))
        assert (child.data.params["hash"], child.data.tags["mlflow.parentRunId"]) == (row["hash"], link.run_id)
        for part in ("search `from`", "experiment `from`", f"run `{link.run_id}` of the search", child.info.run_id):
            assert part in readme
        assert runs not in readme  # where it lay is nobody's business
        assert re.findall(r"\]\(([^)]+)\)", readme) == ["front.png"]
        assert (to / "front.png").read_bytes() == (from_run.folder / "front.png").read_bytes()
        assert ("not in this folder" in readme) == (format == "config")
