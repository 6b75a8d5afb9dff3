"""Files that were damaged, or made to do harm: one line says what is wrong, and nothing is followed, filled up or overwritten."""

import errno
import json
import pickle
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import searches
import tiny
import torch
from commands import refused, said
from safetensors.torch import save_file

from nas.config import dump_yaml, parse_yaml, read_json, read_yaml
from nas.errors import RunFailed
from nas.export import Provenance, load_export
from nas.export.load import read_config
from nas.export.trainers import TrainSettings
from nas.files import atomic_write, require_writable, write_text
from nas.search.jobs import read_supernet
from nas.search.launch import Launch, resume
from nas.search.progress import Silent
from nas.search.publish import export_run
from nas.search.run import Journal, Run, require_unused
from nas.search.train import train_folder
from nas.search.trial import Trial
from nas.sharing.sharing_config import SharingConfig
from nas.tracking import Link, ui
from nas.tracking.spec import Outbox, prepare_database
from nas.workers import Job, RunSpec, Session, executor

BOMB = "\n".join(["a: &a0 [x, x, x, x, x, x, x, x, x, x]", *(f"a{n}: &a{n} [{f'*a{n - 1}, ' * 9}x]" for n in range(1, 12))])
NO_YAML = {
    "tags of other types": "!!int x|!!float x|!!bool x|!!timestamp 2020-9-99|!!binary eA==|!!set {a}|{!!timestamp 2020-01-01: 3}",
    "numbers of YAML 1.1": "010|08|0b11|0o17|1:30|1:30.5|{010: 3}",
    "a long number": "1" * 5000,
}


def test_yaml_is_read_as_json_would_be() -> None:
    for kind, values in NO_YAML.items():
        for value in values.split("|"):
            refused(lambda value=value: parse_yaml(f"a: 1\nb: {value}", "a.yaml"), "a.yaml:2: ", "not YAML"), kind
    for text in ("010", "08", "0o17", "1:30", "1_000", "0x1F"):
        assert parse_yaml(dump_yaml({"a": text}), "").data == {"a": text}
    assert parse_yaml("[1_000, 0x1F, 0, -7, 2026-01-31]", "").data == [1000, 31, 0, -7, "2026-01-31"]


def test_aliases_that_repeat_one_another_are_counted_before_they_are_filled_in() -> None:
    refused(lambda: parse_yaml(BOMB, "a.yaml"), "a.yaml:", "more than 100,000 values")
    refused(lambda: parse_yaml("[" * 10_000, "a.yaml"), "nested too deeply")


def test_long_values_are_cut_where_an_error_shows_them() -> None:
    long = "x" * 900
    for layers in (f"{{1: {{{long}: 3}}}}", f"{{1: {{tie: {long}}}}}", f"{{{long}: {{}}}}", long, "9" * 99):
        text = f"num_hidden_layers: 4\nlayers: {layers}"
        refused(lambda text=text: SharingConfig.from_yaml(tiny.MHA, text), "sharing.yaml:2: ", "…" if "x" in layers else "")


def test_a_damaged_sharing_yaml_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "sharing.yaml"
    for content in (b"", b"[1, 2]", b"3", b"text", b"\xa1", b"null", b"layers: []", b"{1: 2}"):
        path.write_bytes(content)
        refused(lambda: SharingConfig.load(tiny.MHA, path), "sharing.yaml")
    refused(lambda: read_yaml(tmp_path), str(tmp_path))


def test_damaged_json_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    halves = b'{"a": "\\ud800"}'
    for content in (b"", b"{", b"\xa1", b"[]", b"3", b"[" * 100_000, b'{"a": ' + b"1" * 5000 + b"}", halves):
        path.write_bytes(content)
        refused(lambda: read_json(path), "a.json")
    refused(lambda: read_json(tmp_path), str(tmp_path))
    refused(lambda: read_json(tmp_path / "none"), "no such file")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A dense model's export."""
    return searches.write_dense(tmp_path / "dense")


CONFIGS: dict[str, Any] = {
    "architectures": [32, "LlamaForCausalLM2", {}, [3], [None]],
    "model_type": [{}, [], 3, None],
    "layer_types": [3, "full_attention", {}],
    "hidden_act": [{}, [], 3],
    "rope_scaling": [3, [1], {"rope_type": []}],
    "num_hidden_layers": [10**8, "3", None, 2.5, -1],
    "hidden_size": [2**40],
    "vocab_size": [2**40],
    "num_attention_heads": [10**12],
    "intermediate_size": [10**300],
    "sliding_window": [{}],
}


def test_a_damaged_config_json_is_one_line(folder: Path) -> None:
    ours = json.loads((folder / "config.json").read_text())
    llama = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 16, "num_attention_heads": 4}
    for config in (ours, llama, llama | {"model_type": "mistral"}):
        for key, values in CONFIGS.items():
            for value in values if key in ("num_hidden_layers", "hidden_size", "model_type") or config is not ours else ():
                (folder / "config.json").write_text(json.dumps(config | {key: value}))
                refused(lambda: load_export(folder), str(folder))


def test_damaged_files_of_an_export_are_one_line(folder: Path) -> None:
    for name in ("tokenizer.json", "sharing.yaml", "tokenizer_config.json", "generation_config.json"):
        path = folder / name
        whole = path.read_bytes() if path.is_file() else b"{}"
        for content in (b"", b"3", whole[: len(whole) // 2] + b"\xa1", None):
            path.unlink(missing_ok=True)
            path.write_bytes(content) if content is not None else path.mkdir()
            refused(lambda: load_export(folder), name)
        shutil.rmtree(path)
        path.write_bytes(whole)
    assert load_export(folder)


def test_links_out_of_a_folder_are_not_followed(folder: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("{}")
    for name in ("chat_template.jinja", "generation_config.json", "tokenizer_config.json", "tokenizer.json"):
        kept = (folder / name).read_bytes() if (folder / name).exists() else None
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(secret)
        refused(lambda: load_export(folder), name, "link out of the folder")
        (folder / name).unlink()
        if kept is not None:
            (folder / name).write_bytes(kept)
    cache = tmp_path / "hub" / "models--a--b"
    shutil.copytree(folder, cache / "snapshots" / "1")
    (cache / "blobs").mkdir()
    for path in (cache / "snapshots" / "1").iterdir():
        path.rename(cache / "blobs" / path.name)
        path.symlink_to(Path("../../blobs") / path.name)
    assert read_config(cache / "snapshots" / "1") == read_config(folder)
    assert load_export(cache / "snapshots" / "1").metadata == load_export(folder).metadata


def test_a_target_is_tried_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("in the way")
    long = "x" * 256
    for command in (
        "convert none --method gqa --text python --to",
        "train none --text python --to",
        "export none --to",
        "report none --to",
        "describe none --to",
    ):
        for target in ("file/x", f"new/{long}", long, "/proc/none"):
            refused(lambda command=command, target=target: said(*command.split(), target))
    refused(lambda: require_writable(tmp_path, file=True), "is a folder")
    refused(lambda: require_writable(tmp_path / "file"), "is a file")
    require_writable(tmp_path / "file", file=True)
    require_writable(tmp_path / "a" / "b")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file"

    def fail(write: Callable[[Path], object]) -> None:
        with atomic_write(path) as part:
            write(part)
            raise ZeroDivisionError

    for before in ([], [("file", "old")]):
        for write in (Path.touch, Path.mkdir, lambda part: part.write_text("new, and")):
            with pytest.raises(ZeroDivisionError):
                fail(write)
            assert [(p.name, p.read_text()) for p in path.parent.iterdir()] == before
        write_text(path, "old")
    write_text(path, "new")
    assert [(p.name, p.read_text()) for p in path.parent.iterdir()] == [("file", "new")]


def test_a_write_that_fails_on_a_full_disk_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the library says that wrote: numpy's OSError has no number, torch's error is none of the system's."""
    for free, told in ((0, errno.ENOSPC), (2**30, None)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        for error in (OSError("53985 requested and 26624 written"), RuntimeError("enforce fail at inline_container.cc")):
            with pytest.raises((OSError, RuntimeError)) as caught, atomic_write(tmp_path / "file"):
                raise error
            assert getattr(caught.value, "errno", None) == told
            assert list(tmp_path.iterdir()) == []


def test_names_that_lead_out_of_the_runs_are_refused(tmp_path: Path) -> None:
    for name in ("", ".", "..", "../outside", "/abs", "a/../../b", "a//b", "~"):
        path = searches.write_trial(tmp_path, searches.PREDICTOR, name=name)
        refused(lambda path=path: Trial.load(path), "trial.yaml:", "name")
        refused(lambda name=name: Launch(Path(), tmp_path / "runs", name=name).folder("tiny"), "--name")
    assert Launch(Path(), tmp_path / "runs", name="team a/exp 1").folder("tiny") == tmp_path / "runs" / "team a" / "exp 1"


def test_what_a_person_types_is_quoted_and_whole(tmp_path: Path) -> None:
    assert Run(Path("runs") / "team a" / "exp 1").argument == "'team a/exp 1'"
    assert Run(Path("other") / "exp").argument == "other/exp"
    launch = Launch(Path("my trial.yaml"), Path("my runs"), name="exp 1", workers=0)
    assert launch.command("search") == "nas search 'my trial.yaml' '--name=exp 1' '--runs=my runs' --workers=0"
    assert Launch(Path("a.yaml"), Path("runs")).command("compare") == "nas compare a.yaml"


def test_a_start_that_was_killed_leaves_the_name_free(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "tiny"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text("{}")
    (folder / "tokenizer.json.part").write_text("{")
    require_unused(folder, "run")
    (folder / "notes.txt").write_text("a person's")
    refused(lambda: require_unused(folder, "run"), str(folder), "is no run")


def test_only_who_appends_to_a_journal_cuts_its_torn_line(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    journal.append({"a": 1})
    torn = journal.path.read_bytes() + b'{"b": '
    journal.path.write_bytes(torn)
    assert list(journal.read()) == [{"a": 1}]
    assert journal.path.read_bytes() == torn
    journal.append({"c": 3})
    assert list(journal.read()) == [{"a": 1}, {"c": 3}]
    journal.path.write_bytes(b"\xa1\n")
    refused(lambda: list(journal.read()), "journal.jsonl")


def test_damaged_files_of_a_run_are_one_line(from_run: Run, tmp_path: Path) -> None:
    run = Run(Path(shutil.copytree(from_run.folder, tmp_path / "runs" / "damaged")))
    read: dict[str, Callable[[], Any]] = {
        "run.json": lambda: export_run(run, "knee", tmp_path / "to"),
        "tokenizer.json": lambda: export_run(run, "knee", tmp_path / "to"),
        "tracking.json": lambda: export_run(run, "knee", tmp_path / "to"),
        "front.json": run.front,
        "trial.yaml": run.trial,
        "journal.jsonl": run.searched,
    }
    for name, call in read.items():
        path, whole = run.folder / name, (run.folder / name).read_bytes()
        for content in (whole[: len(whole) // 2] + b"\n", b"[]\n", b"3\n", b"{}\n", b"\xa1\n"):
            path.write_bytes(content)
            refused(call, path.name)
        path.unlink()
        if name not in ("tracking.json", "journal.jsonl"):
            refused(call, "damaged")
        path.write_bytes(whole)
    for key in ("config", "weight_bytes", "perplexity", "seed", "supernet"):
        front = json.loads((from_run.folder / "front.json").read_text())
        del front["front"][0][key]
        (run.folder / "front.json").write_text(json.dumps(front))
        refused(run.front, "front.json")
    assert not (tmp_path / "to").exists()


def test_metadata_and_notes_of_a_run_are_read_strictly(from_run: Run, tmp_path: Path) -> None:
    """Whatever stands in `extras.json`, `run.json`, `front.json` and a conversion's result: one line, and nothing written."""
    run = Run(Path(shutil.copytree(from_run.folder, tmp_path / "runs" / "damaged")))

    def damaged(name: str, call: Callable[[], Any], change: Callable[[Any], Any]) -> None:
        path, whole = run.folder / name, (run.folder / name).read_text()
        data = json.loads(whole)
        changed = change(data)
        path.write_text(json.dumps(data if changed is None else changed))
        refused(call, path.name)
        path.write_text(whole)

    def export_it() -> Any:
        return export_run(run, "knee", tmp_path / "to")

    for texts in (3, None, {"../outside": "x"}, {"tokenizer_config.json": 3}, {"tokenizer_config.json": "3"}, {"x": "y"}):
        damaged("extras.json", export_it, lambda data, texts=texts: data.update(texts=texts))
    for pad in (3, {"a": 1}, []):
        text = json.dumps({"pad_token": pad})
        damaged("extras.json", export_it, lambda data, text=text: data.update(texts={"tokenizer_config.json": text}))
    for ids in (None, {"eos_token_id": "x"}, {"other": 3}):
        damaged("extras.json", export_it, lambda data, ids=ids: data.update(token_ids=ids))
    damaged("run.json", export_it, lambda data: data.update(from_perplexity="x"))
    damaged("run.json", run.provenance, lambda data: data.pop("from_perplexity") and None)
    damaged("front.json", run.front, lambda data: {"front": [], "dominated": []})
    damaged("front.json", run.front, lambda data: data["front"][0].update(weights="inherited"))
    for key, value in (("perplexity", [1]), ("perplexity", float("nan")), ("weight_bytes", "x"), ("name", {}), ("seed", True)):
        damaged("front.json", run.front, lambda data, key=key, value=value: data["front"][0].update({key: value}))
    result = next(path for path in run.folder.glob("converted/*/result.json") if "refused" not in path.read_text())
    damaged(str(result.relative_to(run.folder)), run.converted, lambda data: data.pop("config") and None)
    assert not (tmp_path / "to").exists()
    assert not (tmp_path / "outside").exists()


def test_a_provenance_that_is_a_folder_is_found_before_training(folder: Path, tmp_path: Path) -> None:
    (folder / "provenance.json").mkdir()
    refused(lambda: train_folder(folder, "python", TrainSettings(steps=1), tmp_path / "to"), "provenance.json")
    assert not (tmp_path / "to").exists()


def test_a_folder_does_not_choose_where_its_training_is_tracked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    database = folder.parent / "victim.db"
    database.touch()
    Provenance("run", "trial", "experiment", "1", f"sqlite:///{database}").save(folder)
    settings = TrainSettings(steps=1, seq=16, batch=2)
    assert train_folder(folder, "python", settings, folder.parent / "to").link is None
    assert database.stat().st_size == 0


def test_a_run_does_not_choose_what_is_written_over(from_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither its trial's address, nor its link to MLflow, nor a link among its files; what another program owns stays."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    victim, private = tmp_path / "victim.db", tmp_path / "private"
    with closing(sqlite3.connect(victim)) as database:
        database.execute("create table mine (x)")
    private.write_text("private")
    before, uri = victim.read_bytes(), f"sqlite:///{victim}"
    run = Run(shutil.copytree(from_run.folder, tmp_path / "runs" / "given"))
    trial = read_yaml(run.folder / "trial.yaml").data
    run.write("trial.yaml", dump_yaml(trial | {"tracking": {"uri": uri}}))
    (run.folder / "front.json").unlink()
    refused(lambda: resume(run, Silent()), f"was tracked at {uri}", f"nas resume {run.folder} --tracking {uri}")
    Link(uri, "1", "a" * 32).save(run.folder)
    refused(lambda: ui(run.folder).__enter__(), f"was tracked at {uri}", f"nas ui {run.folder} --tracking {uri}")
    assert resume(run, Silent(), tracking="none") == from_run.front()
    refused(lambda: prepare_database(uri), "another program's database")
    assert (victim.read_bytes(), [*tmp_path.glob("victim*.db")]) == (before, [victim])
    for name in ("journal.jsonl", ".lock", "new", "final/new"):
        path = run.folder / name
        path.unlink(missing_ok=True)
        path.symlink_to(private)
        refused(lambda: Run.find(str(run.folder), tmp_path), str(path), "is a link out of the folder")
        path.unlink()
    run.folder.joinpath("inside").symlink_to("trial.yaml")
    (tmp_path / "linked").symlink_to(run.folder)
    assert Run.find("linked", tmp_path).name == "given"


def test_an_address_that_is_none_is_found_before_a_run_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "mlruns")
    refused(lambda: searches.search(tmp_path, searches.PREDICTOR | {"tracking": {}}), "MLFLOW_TRACKING_URI: 'mlruns' is not an")
    assert not (tmp_path / "runs").exists()


def test_damaged_states_and_weights_of_a_run_are_one_line(supernet_run: Run, tmp_path: Path) -> None:
    run = Run(shutil.copytree(supernet_run.folder, tmp_path / "run"))
    space = run.trial().space
    for path in run.folder.glob("supernet/*/fit.pt"):
        state = torch.load(path)
        whole = path.read_bytes()
        for content in (b"", b"hello", whole[:5000], pickle.dumps({"model": {}}), whole.replace(b"extra", b"other")):
            path.write_bytes(content)
            refused(lambda path=path: read_supernet(space, path), str(path), f"delete {path.parent}")
        torch.save(state | {"model": {}}, path)
        refused(lambda path=path: read_supernet(space, path), str(path), f"delete {path.parent}")
    for path in run.folder.glob("final/*/model.safetensors"):
        path.write_bytes(path.read_bytes()[:300])
    refused(lambda: export_run(run, "knee", tmp_path / "to"), "model.safetensors: is not a safetensors file")
    for path in run.folder.glob("final/*/model.safetensors"):
        save_file({"x": torch.zeros(3)}, path)
    refused(lambda: export_run(run, "knee", tmp_path / "to"), "model.safetensors: the weights lack ")


def test_a_run_that_is_deleted_while_it_is_worked_on_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nas.search.launch.publish", lambda ctx, *rest: shutil.rmtree(ctx.run.folder))
    with pytest.raises(RunFailed, match="was deleted, or moved, while it was worked on"):
        searches.search(tmp_path, searches.PREDICTOR, final={**searches.SUPERNET["final"], "presets": False})
    assert not (tmp_path / "runs" / "tiny").exists()

    def delete(settings: None, session: Session) -> None:
        shutil.rmtree(session.folder.parent)
        raise FileNotFoundError

    jobs = [Job(f"job{n}", None) for n in range(9)]
    with executor(RunSpec(workers=0)) as work, pytest.raises(RunFailed, match="was deleted"):
        work.train(jobs, delete, tmp_path / "trainings")


def test_a_finished_run_has_its_front_though_mlflow_is_away(
    from_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, said = Run(shutil.copytree(from_run.folder, tmp_path / "run")), list[str]()
    monkeypatch.setattr(Silent, "say", lambda self, line: said.append(line))
    Outbox(run.folder).append("note", text="one more")
    assert resume(run, Silent(), tracking="http://127.0.0.1:9") == from_run.front()
    assert "does not answer" in said[0]
