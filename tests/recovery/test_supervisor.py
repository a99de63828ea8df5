"""Two ranks under their supervisors, and what can happen to them."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from megasora.recovery.evidence import read_evidence
from megasora.recovery.folder import RecoveryFolder
from megasora.recovery.postmortem import Cause, first_cause
from tests.recovery.worlds import await_beat, endings, send, started, total, until

STEPS = 10
STATE = {"step": STEPS, "total": float(2 * sum(range(1, STEPS + 1)) + STEPS)}
pytestmark = pytest.mark.slow


def supervised(run_dir: Path, *, fault: str = "", step_s: float = 0.3) -> list[str]:
    return ["tests.recovery.supervise", str(run_dir), str(STEPS), str(step_s), fault]


def cause(run_dir: Path) -> Cause:
    """Of the first incarnation's end."""
    return first_cause(read_evidence(RecoveryFolder.of_run(run_dir), 1), now=time.time())


def test_a_killed_rank_brings_all_back(tmp_path: Path) -> None:
    with started(supervised(tmp_path)) as world:
        send(await_beat(tmp_path, 1, step=4), signal.SIGKILL)
        ends = endings(world)
    assert [code for code, _ in ends] == [0, 0], ends
    assert total(tmp_path) == STATE
    assert (cause(tmp_path).kind, cause(tmp_path).rank, cause(tmp_path).what) == ("killed", 1, "ended by SIGKILL")
    assert "ended by SIGKILL" in ends[0][1]


def test_a_stopped_rank_is_found_and_replaced(tmp_path: Path) -> None:
    folder = RecoveryFolder.of_run(tmp_path)
    with started(supervised(tmp_path)) as world:
        stopped = send(await_beat(tmp_path, 1, step=4), signal.SIGSTOP)
        hang = until(lambda: folder.hang(1) if folder.hang(1).exists() else None, within_s=60)
        assert hang.stat().st_mtime - stopped < 10, "the loop's limits are 4 s"
        ends = endings(world)
    assert [code for code, _ in ends] == [0, 0], ends
    assert total(tmp_path) == STATE
    found = cause(tmp_path)
    assert (found.kind, found.rank, found.stackless) == ("hang", 1, [1])
    assert "all_reduce" in folder.stacks(1, 0).read_text()


def test_a_rank_that_keeps_the_gil_leaves_its_stack(tmp_path: Path) -> None:
    with started(supervised(tmp_path, fault="hold:1:4")) as world:
        ends = endings(world)
    assert [code for code, _ in ends] == [0, 0], ends
    assert total(tmp_path) == STATE
    assert "in fail" in RecoveryFolder.of_run(tmp_path).stacks(1, 1).read_text()
    assert (cause(tmp_path).kind, cause(tmp_path).rank) == ("hang", 1)


def test_a_rank_that_waits_forever_is_told_by_its_stack(tmp_path: Path) -> None:
    with started(supervised(tmp_path, fault="sleep:1:4")) as world:
        ends = endings(world)
    assert [code for code, _ in ends] == [0, 0], ends
    assert total(tmp_path) == STATE
    assert cause(tmp_path).stackless == []
    assert "in fail" in RecoveryFolder.of_run(tmp_path).stacks(1, 1).read_text()


def test_an_exception_of_one_rank_is_the_first_cause(tmp_path: Path) -> None:
    with started(supervised(tmp_path, fault="raise:1:4")) as world:
        ends = endings(world)
    assert [code for code, _ in ends] == [0, 0], ends
    found = cause(tmp_path)
    assert (found.kind, found.rank, found.step, found.samples) == ("exception", 1, 4, ["clip4"])
    assert found.what == "ValueError: a clip of this rank is broken"
    assert found.secondary == 1
    assert "rank 1" in ends[0][1].splitlines()[-1] and "a clip of this rank is broken" in ends[0][1].splitlines()[-1]


def test_a_mistake_is_not_restarted(tmp_path: Path) -> None:
    with started(supervised(tmp_path, fault="mistake:1:4")) as world:
        ends = endings(world)
    assert [code for code, _ in ends] == [2, 2], ends
    assert not RecoveryFolder.of_run(tmp_path).exit(2, 0).exists()
    assert cause(tmp_path).kind == "mistake"


def test_a_rank_that_dies_before_its_first_step_uses_the_budget_up(tmp_path: Path) -> None:
    with started(["tests.recovery.supervise", str(tmp_path), "no number", "1"], ranks=1) as world:
        ((code, errors),) = endings(world)
    assert code == 1
    assert errors.count("ValueError: invalid literal") == 3
    assert "no restart is left without a new step" in errors


def test_a_rank_does_not_outlive_its_supervisor(tmp_path: Path) -> None:
    with started(supervised(tmp_path, step_s=60.0)) as world:
        beat = await_beat(tmp_path, 1, step=1)
        world[1].kill()
        until(lambda: True if _gone(beat.pid) else None, within_s=10)


def _gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True
