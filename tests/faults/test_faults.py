"""A few of each kind of fault; `python -m tests.faults` tries many."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.faults.fuzz import fuzz
from tests.faults.kills import kill
from tests.faults.processes import Found
from tests.faults.services import SEARCHES, disk_full, head_lost, nodes_apart, nodes_lost, server_away, small_disk, workers_killed

pytestmark = [pytest.mark.slow, pytest.mark.service]

FAULTS: dict[str, Callable[[Path], Found]] = {
    "a driver is killed": partial(kill, kills=6, ray_every=2),
    "a server goes, comes and hangs": server_away,
    "a cluster's head goes away": head_lost,
    "files are broken": partial(fuzz, inputs=300),
}
for _kind in SEARCHES:
    for _what, _try in (("workers are killed", workers_killed), ("machines go away", nodes_lost), ("far machines", nodes_apart)):
        FAULTS[f"{_what}, {_kind}"] = partial(_try, kinds=[_kind])


@pytest.mark.parametrize("what", FAULTS)
def test_what_a_search_survives_changes_no_number_and_loses_no_point(what: str, tmp_path: Path) -> None:
    assert FAULTS[what](tmp_path).wrong == []


def test_a_full_disk_is_one_line_and_the_run_goes_on_when_there_is_room(tmp_path: Path) -> None:
    try:
        with small_disk(tmp_path / "tried"):
            pass
    except OSError as error:
        pytest.skip(f"no small disk can be had here: {error}")
    assert disk_full(tmp_path, tries=3).wrong == []
