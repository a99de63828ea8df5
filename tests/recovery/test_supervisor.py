"""Two ranks under their supervisors, and what can happen to them."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from megasora.recovery.evidence import incarnations, read_evidence
from megasora.recovery.folder import RecoveryFolder
from megasora.recovery.postmortem import Cause, first_cause
from megasora.recovery.report import examine
from megasora.recovery.watchdog import HANG_EXIT_CODE
from tests.recovery.worlds import await_beat, endings, started, total, until

STEPS = 10
STATE = {"step": STEPS, "total": float(2 * sum(range(1, STEPS + 1)) + STEPS)}
pytestmark = pytest.mark.slow


def supervised(run_dir: Path, *, faults: str = "", step_s: float = 0.3) -> list[str]:
    return ["tests.recovery.supervise", str(run_dir), str(STEPS), str(step_s), faults]


def cause(run_dir: Path, incarnation: int) -> Cause:
    return first_cause(read_evidence(RecoveryFolder.of_run(run_dir), incarnation), now=time.time())


@pytest.fixture(scope="module")
def life(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[int, str]]]:
    """A run that dies of something else each time, with two restarts allowed without a step in between: each death is further on."""
    run_dir = tmp_path_factory.mktemp("life")
    with started(supervised(run_dir, faults="raise:1:4,hold:1:6,sleep:0:8,mistake:1:9")) as world:
        return run_dir, endings(world)


Life = tuple[Path, list[tuple[int, str]]]


def test_each_death_is_explained(life: Life) -> None:
    run_dir, ends = life
    folder = RecoveryFolder.of_run(run_dir)
    raised, held, slept = (cause(run_dir, number) for number in (1, 2, 3))
    assert (raised.kind, raised.rank, raised.step, raised.samples, raised.secondary) == ("exception", 1, 4, ["clip4"], 1)
    assert raised.what == "ValueError: a clip of this rank is broken"
    assert all(f"; start {number} in " in ends[0][1] for number in (2, 3, 4)), (
        "each restart is said, with what is known of its cause by then"
    )
    assert (held.kind, held.rank) == ("hang", 1)
    assert "in fail" in folder.stacks(2, 1).read_text(), "from the C thread: the GIL was held"
    assert "all_reduce" in folder.stacks(2, 0).read_text()
    assert (slept.kind, slept.stackless) == ("hang", [])
    assert "in fail" in folder.stacks(3, 0).read_text()


def test_each_restart_goes_on_with_what_was_saved(life: Life) -> None:
    assert total(life[0]) == {"step": 8, "total": float(2 * sum(range(1, 9)) + 8)}


def test_a_mistake_is_not_restarted(life: Life) -> None:
    run_dir, ends = life
    assert [code for code, _ in ends] == [2, 2], ends
    assert cause(run_dir, 4).kind == "mistake"
    assert incarnations(RecoveryFolder.of_run(run_dir)) == [1, 2, 3, 4]


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


def test_a_slow_clip_of_one_rank_is_no_hang_of_the_others(tmp_path: Path) -> None:
    with started(["tests.recovery.loop", str(tmp_path), str(STEPS), "0.1", "clip:1:6"]) as world:
        ends = endings(world)
    assert [code for code, _ in ends] == [0, 0], ends
    assert total(tmp_path) == STATE


@pytest.mark.parametrize("rank", [0, 1])
def test_a_clock_that_is_set_ends_nothing_and_accuses_nobody(tmp_path: Path, rank: int) -> None:
    """By 3 hours forward, then 6 back, on the rank that watches the other and counts the time, and on the other."""
    began = time.monotonic()
    with started(["tests.recovery.loop", str(tmp_path), str(STEPS), "0.7", f"clock:{rank}:3"]) as world:
        ends = endings(world)
    assert [code for code, _ in ends] == [0, 0], ends
    assert total(tmp_path) == STATE
    report = examine(tmp_path, saved_step=STEPS)
    assert report.cause is not None and report.cause.kind == "finished"
    assert STEPS * 0.7 < report.goodput.wall_s < time.monotonic() - began
    assert report.goodput.restarts_s == 0


def test_a_file_system_that_blocks_cannot_keep_the_ranks(tmp_path: Path) -> None:
    """Not even their watchdogs can write; they end all the same, and say where they were."""
    with started(["tests.recovery.loop", str(tmp_path), str(STEPS), "0.1", "storage:all:4"]) as world:
        ends = endings(world, within_s=120)
    assert [code for code, _ in ends] == [HANG_EXIT_CODE] * 2, ends
    assert all("its folder cannot be written" in errors and "Thread 0x" in errors for _, errors in ends)


def _gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True
