"""kill -9 at random instants, also inside a save: the run goes on, loses at most what it had not saved, and ends as if nothing had been.

A longer version is `python -m benchmarks.faults`.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.kills import STEPS, disturbed_runs
from tests.parallel.test_training import assert_same_curve, assert_same_weights
from tests.pool import RankPool

KILLS = 10


@pytest.mark.slow
def test_ten_kills_and_the_runs_are_the_one_that_was_never_disturbed(pool: RankPool, straight: Path, tmp_path: Path) -> None:
    for run_dir, kills in disturbed_runs(pool, tmp_path, assets=straight / "assets", kills=KILLS, seed=20261128):
        print(*kills, sep="\n")
        assert_same_curve(run_dir, straight, steps=STEPS)
        for select in ("model", "ema"):
            assert_same_weights(run_dir, straight, select=select)
