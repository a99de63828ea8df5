"""kill -9 of a rank inside a save, at named places and random instants: the next run finds a whole checkpoint, right in every bit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.parallel.killed_saves import PLACES

INSTANTS = 6


def test_a_killed_save_costs_nothing_that_was_saved_before(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-m", "tests.parallel.killed_saves", str(tmp_path), "20261128", str(INSTANTS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == len(PLACES) + INSTANTS
    for one in found:
        assert one["signal"] == 9, one
        assert one["refused"] == [], one  # what has its name is whole
        assert one["hidden"] == [], one  # nothing is left over
        assert one["loaded"] == one["n"], one
    at = {one["place"]: one for one in found[: len(PLACES)]}
    assert (at["first save"]["listed"], at["first save"]["loaded"]) == ([], 0)
    for place in ("writing", "file", "manifest", "before rename"):
        assert at[place]["listed"] == [1], at[place]
    for place in ("before tracker", "pruning"):
        assert at[place]["listed"] == [1, 2], at[place]
    assert (at["replacing"]["listed"], at["replacing"]["loaded"]) == ([1], 1)
    assert all(one["listed"] and one["loaded"] >= 1 for one in found[len(PLACES) :])
