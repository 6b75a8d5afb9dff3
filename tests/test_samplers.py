"""Samplers on a truth as a lookup: what they are told, and how what they find is judged."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from nas.cli import nas
from nas.memory import measure
from nas.rank.agreement import corner
from nas.rank.known import Known
from nas.rank.samplers import KINDS, Lookup, compare_samplers, published, sampler_rows
from nas.rank.spec import TruthPlan
from nas.rank.truth import TRUTH, TruthRow, write_truth

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


def test_the_lookup_follows_the_law_that_the_truth_has(plan: TruthPlan) -> None:
    exact = Lookup.of(plan, Known.of(rows_of(plan, 0.0), "python"))
    assert exact.surrogate.held_out().tau > 0.9
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
    assert zoo == {lookup.volume(published(plan.space)[:12])}
    rows = sampler_rows(found, counts)
    assert max(float(row["40 evaluations"].rstrip("%")) for row in rows) == 100.0
    assert lookup.corner == corner(lookup.surrogate.known.memory, lookup.surrogate.known.truth)


@pytest.mark.slow
def test_the_command_line_writes_a_page_that_says_what_its_json_says(plan: TruthPlan, tmp_path: Path) -> None:
    write_truth(tmp_path / TRUTH, rows_of(plan, 0.02))
    page = tmp_path / "page.md"
    arguments = ["samplers", str(FILE), "--truth", str(tmp_path), "--only", "python", "--seeds", "1", "--to", str(page)]
    found = CliRunner().invoke(nas, [*arguments, "--json"])
    assert found.exit_code == 0, found.exception
    said = json.loads(found.stdout)
    assert [(row["sampler"], row["start"]) for row in said] == list(KINDS)
    best = max(row["volumes"][-1] for row in said)
    shown = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.read_text().splitlines() if line.startswith("|")]
    for row in said:
        assert [row["sampler"], row["start"], *(f"{volume / best:.1%}" for volume in row["volumes"])] in shown
