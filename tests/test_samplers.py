"""Samplers on a truth as a lookup: what they are told, and how what they find is judged."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from nas.cli import nas
from nas.data import eval_windows
from nas.model.supernet import Supernet
from nas.rank.agreement import corner
from nas.rank.known import Known
from nas.rank.samplers import KINDS, Lookup, compare_samplers, sampler_rows
from nas.rank.spec import TruthPlan
from nas.rank.truth import TRUTH, TruthRow, write_truth
from nas.rank.tying import Agent, TyingJob, config_of, tie_while_training, untie
from nas.search.context import published
from nas.sharing.memory import measure
from nas.sharing.sharing_config import SharingConfig
from nas.workers import Session

ROOT = Path(__file__).parents[1]
FILE = ROOT / "trials" / "ground_truth.yaml"


@pytest.fixture(scope="module")
def plan() -> TruthPlan:
    return TruthPlan.load(FILE, only=["python"])


def rows_of(plan: TruthPlan, noise: float) -> list[TruthRow]:
    """A truth in which a tenfold memory takes a nat, and every training has noise of its own."""
    rng = np.random.default_rng(0)
    rows = []
    for config, name in list(plan.configs.items())[:24]:
        memory = measure(plan.space.shape, config, plan.file.memory)
        for seed in (0, 1):
            loss = 8 - np.log10(memory.memory_bytes) + rng.normal() * noise
            sizes = (memory.memory_bytes, memory.weight_bytes, memory.kv_cache_bytes, memory.flops_per_token)
            rows.append(TruthRow("python", config.hash, name, *sizes, seed, 1000, float(loss)))
    return rows


@pytest.fixture(scope="module")
def lookup(plan: TruthPlan) -> Lookup:
    return Lookup.of(plan, Known.of(rows_of(plan, 0.02), "python"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "command", [["samplers", str(FILE), "--seeds", "1"], ["rank", str(ROOT / "trials" / "ranking.yaml"), "--no-train"]]
)
def test_what_trains_nothing_needs_no_text(command: list[str], plan: TruthPlan, tmp_path: Path) -> None:
    """A table is scored where the text that it is of is not at hand."""
    rows = [replace(row, text="shakespeare") for row in rows_of(plan, 0.02)]
    write_truth(tmp_path / TRUTH, rows)
    found = CliRunner().invoke(nas, [*command, "--truth", str(tmp_path), "--only", "shakespeare", "--json"])
    assert found.exit_code == 0, found.exception
    assert json.loads(found.stdout)
    wrong = CliRunner().invoke(nas, [*command, "--truth", str(tmp_path), "--only", "shakespear"])
    assert "did you mean shakespeare" in str(wrong.exception)


def test_the_lookup_follows_the_law_that_the_truth_has(plan: TruthPlan) -> None:
    exact = Lookup.of(plan, Known.of(rows_of(plan, 0.0), "python"))
    assert exact.surrogate.held_out().tau > 0.85
    others = list(plan.configs)[30:50]
    memory, loss = np.array([exact(config) for config in others]).T
    assert memory.tolist() == [measure(plan.space.shape, config, plan.file.memory).memory_bytes for config in others]
    off = loss - (8 - np.log10(memory))
    assert np.sqrt(np.mean(off**2)) < 0.2 * np.log10(memory).std()


def test_a_search_is_told_the_noise_of_one_training_which_is_a_seeds_own(lookup: Lookup, plan: TruthPlan) -> None:
    configs = list(plan.configs)
    told = np.array([[lookup.noisy(config, seed)[1] - lookup(config)[1] for config in configs] for seed in range(8)])
    assert told.std() == pytest.approx(lookup.noise, rel=0.2)
    assert abs(np.corrcoef(told[0], told[1])[0, 1]) < 0.4
    assert lookup.noisy(configs[0], 3) == lookup.noisy(configs[0], 3)


def test_what_is_found_only_grows_and_is_judged_without_noise(lookup: Lookup, plan: TruthPlan) -> None:
    counts = (12, 40)
    found = list(compare_samplers(lookup, 1, counts))
    assert [(one.sampler, one.start) for one in found] == list(KINDS)
    for one in found:
        assert one.volumes[0] <= one.volumes[1], one.sampler
    zoo = {one.volumes[0] for one in found if one.start == "the zoo"}
    assert len(zoo) == 1, "all of them ask the published schemes first"
    assert zoo == {lookup.volume(list(published(plan.space))[:12])}
    rows = sampler_rows(lookup, found, counts=counts)
    assert max(float(row["40 evaluations"].rstrip("%")) for row in rows) == 100.0
    assert lookup.corner == corner(lookup.surrogate.known.memory, lookup.surrogate.known.truth)


# --- tying while training


def test_an_agent_learns_which_ties_pay() -> None:
    """Rewards that count untied layers, or tied ones, without any model."""
    for wanted in (1, -1):
        agent, ties, taken = Agent(4, 0), [0] * 4, []
        for n in range(300):
            own = sum(j == i for i, j in enumerate(ties))
            if taken:
                agent.learn(taken, wanted * own / 4)
            ties, taken = agent.decide(ties, max(1 - n / 250, 0.0))
            assert all(ties[j] == j <= i for i, j in enumerate(ties)), "a tie is to an owner before it"
        assert sum(j == i for i, j in enumerate(ties)) == (4 if wanted > 0 else 1)


def test_a_layer_that_is_untied_begins_with_the_weights_that_it_used(plan: TruthPlan) -> None:
    net, rows = Supernet(plan.space.shape, torch.Generator().manual_seed(0)), torch.arange(16)[None]
    before, after = [0, 0, 0, 3, 3, 0], [0, 1, 0, 3, 4, 0]
    with torch.no_grad():
        logits = net.subnet(config_of(plan.space.shape, before))(rows)
        untie(net, before, after)
        assert torch.equal(net.subnet(config_of(plan.space.shape, after))(rows), logits)
        other = net.subnet(config_of(plan.space.shape, [0, 1, 2, 3, 4, 5]))(rows)
    assert not torch.equal(other, logits)


def test_a_run_ties_as_it_is_paid_to(plan: TruthPlan, tmp_path: Path) -> None:
    """At a price beyond any loss all layers end tied; each run is one of a seed, and ends in a config of the space."""
    spec, corpus = replace(plan.file.train, steps=300, batch=1, seq=8), plan.corpora["python"]
    windows = eval_windows(corpus.eval, 8, 4).numpy()
    job = TyingJob(plan.space.shape, spec, plan.file.memory, 100.0, 0, corpus.train.numpy(), windows)
    found = tie_while_training(job, Session(tmp_path))
    assert found == tie_while_training(job, Session(tmp_path))
    config = SharingConfig.from_data(plan.space.shape, found["config"])
    assert config == config_of(plan.space.shape, [0] * 6)
    assert 0 < found["loss_nats_per_token"] < 8


@pytest.mark.slow
def test_the_command_line_writes_a_page_that_says_what_its_json_says(plan: TruthPlan, tmp_path: Path) -> None:
    write_truth(tmp_path / TRUTH, rows_of(plan, 0.02))
    page = tmp_path / "page.md"
    arguments = ["samplers", str(FILE), "--truth", str(tmp_path), "--only", "python", "--seeds", "1", "--to", str(page)]
    arguments += ["--runs", str(tmp_path)]
    found = CliRunner().invoke(nas, [*arguments, "--json"])
    assert found.exit_code == 0, found.exception
    said = json.loads(found.stdout)
    assert [(row["sampler"], row["start"]) for row in said] == list(KINDS)
    best = max(row["volumes"][-1] for row in said)
    shown = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.read_text().splitlines() if line.startswith("|")]
    for row in said:
        assert [row["sampler"], row["start"], *(f"{volume / best:.1%}" for volume in row["volumes"])] in shown
