"""A few of each kind of fault; `python -m tests.faults` tries many."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.fuzz import fuzz
from tests.faults.kills import kill
from tests.faults.services import SEARCHES, disk_full, head_lost, nodes_apart, nodes_lost, server_away, small_disk, workers_killed

pytestmark = [pytest.mark.slow, pytest.mark.service]


def test_a_killed_search_goes_on_to_what_an_undisturbed_one_gives(tmp_path: Path) -> None:
    assert kill(tmp_path, kills=6, ray_every=2).wrong == []


def test_a_server_that_goes_comes_and_hangs_has_every_point_once_in_the_end(tmp_path: Path) -> None:
    assert server_away(tmp_path).wrong == []


@pytest.mark.parametrize("kind", SEARCHES)
def test_workers_that_are_killed_in_any_stage_change_no_number(kind: str, tmp_path: Path) -> None:
    assert workers_killed(tmp_path, [kind]).wrong == []


@pytest.mark.parametrize("kind", SEARCHES)
def test_machines_that_go_away_in_any_stage_change_no_number(kind: str, tmp_path: Path) -> None:
    assert nodes_lost(tmp_path, [kind]).wrong == []


@pytest.mark.parametrize("kind", SEARCHES)
def test_machines_that_share_no_disk_and_go_away_in_any_stage_change_no_number(kind: str, tmp_path: Path) -> None:
    assert nodes_apart(tmp_path, [kind]).wrong == []


def test_the_end_of_a_clusters_head_is_one_line_and_resume_goes_on_without_it(tmp_path: Path) -> None:
    assert head_lost(tmp_path).wrong == []


def test_a_full_disk_is_one_line_and_the_run_goes_on_when_there_is_room(tmp_path: Path) -> None:
    try:
        with small_disk(tmp_path / "tried"):
            pass
    except OSError as error:
        pytest.skip(f"no small disk can be had here: {error}")
    assert disk_full(tmp_path, tries=3).wrong == []


def test_no_broken_file_is_more_than_one_line(tmp_path: Path) -> None:
    assert fuzz(tmp_path, inputs=300).wrong == []
