"""Commands of `nas` in this process, and the line that ends what a user cannot have."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from click.testing import CliRunner

from nas.cli import nas
from nas.errors import UserError


def said(*words: object) -> str:
    """What a command prints on stdout; what it raises is raised."""
    return CliRunner().invoke(nas, [str(word) for word in words], catch_exceptions=False, standalone_mode=False).stdout


def told(*words: object) -> Any:
    """What a command prints with `--json`."""
    return json.loads(said(*words, "--json"))


def refused(act: Callable[[], object], *words: str) -> str:
    """What a user is told: a line of bearable length, with each of the words."""
    with pytest.raises(UserError) as caught:
        act()
    line = str(caught.value)
    assert "\n" not in line
    assert len(line) < 600
    assert [word for word in words if word not in line] == [], line
    return line
