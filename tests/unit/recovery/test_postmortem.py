"""Of all the errors of a run that died, the one that came first for a reason of its own."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest

from megasora.config.errors import UserError
from megasora.recovery.evidence import (
    Ended,
    ExitRecord,
    ending_of,
    exit_record,
    incarnations,
    is_communication_error,
    keep_lost,
    next_incarnation,
    read_evidence,
)
from megasora.recovery.folder import RecoveryFolder, write_json
from megasora.recovery.heartbeat import Beat, Seat
from megasora.recovery.kernel import memory_kills, out_of_memory_line
from megasora.recovery.postmortem import Cause, first_cause
from megasora.recovery.watchdog import Hang

CLOSED = "[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:60034"
NOW = 10_000.0


def beat(rank: int, *, alive: float = 100.0, step: int = 7, incarnation: int = 1) -> Beat:
    return Beat(rank=rank, world_size=4, incarnation=incarnation, host=f"host{rank}", pid=100 + rank, step=step, phase="forward_backward",
                time=alive, alive=alive)  # fmt: skip


class Run:
    """A recovery folder to leave things in."""

    def __init__(self, path: Path) -> None:
        self.folder = RecoveryFolder(path)

    def beats(self, *beats: Beat) -> None:
        for one in beats:
            write_json(self.folder.heartbeat(one.rank), asdict(one))

    def raised(self, rank: int, error: BaseException, *, time: float) -> None:
        self.left(exit_record(beat(rank), ending=ending_of(error, stopped=False), time=time, samples=["clip3", "clip9"], error=error))

    def left(self, record: ExitRecord) -> None:
        write_json(self.folder.exit(record.incarnation, record.rank), asdict(record))

    def ended(self, rank: int, code: int, *, by_supervisor: bool = False, time: float = 101.0, memory: str | None = None) -> None:
        ended = Ended(rank=rank, generation=0, host=f"host{rank}", pid=100 + rank, code=code, by_supervisor=by_supervisor,
                      out_of_memory=memory, time=time)  # fmt: skip
        write_json(self.folder.ended(rank), asdict(ended))

    def hung(self, *, silent: list[int]) -> None:
        hang = Hang(rank=0, host="host0", incarnation=1, step=7, phase="forward_backward", waited_s=26.0, allowed_s=25.0, time=130.0,
                    silent_ranks=silent)  # fmt: skip
        write_json(self.folder.hang(1), asdict(hang))
        for rank in range(4):
            if rank not in silent:
                self.folder.stacks(1, rank).write_text("Thread 0x1\n")
                self.left(exit_record(beat(rank), ending="hang", time=131.0))

    def cause(self) -> Cause:
        return first_cause(read_evidence(self.folder, incarnations(self.folder)[-1]), now=NOW)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


@pytest.mark.parametrize(
    ("error", "message", "is_one"),
    [
        ("RuntimeError", CLOSED, True),
        ("DistBackendError", "NCCL error in: ProcessGroupNCCL.cpp:1234, remote process exited", True),
        ("DistStoreError", "Socket Timeout", True),
        ("RuntimeError", "[Rank 3] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=12, OpType=ALLREDUCE)", True),
        ("OutOfMemoryError", "CUDA out of memory. Tried to allocate 2.00 GiB", False),
        ("TimeoutError", "decoding took 120 s", False),
        ("RuntimeError", "CUDA error: an illegal memory access was encountered", False),
        ("KeyError", "'clip'", False),
    ],
)
def test_errors_of_communication_are_told_apart(error: str, message: str, is_one: bool) -> None:
    assert is_communication_error(error, message) is is_one


def test_an_error_of_its_own_comes_before_earlier_errors_of_communication(run: Run) -> None:
    run.beats(*(beat(rank) for rank in range(3)))
    run.raised(0, RuntimeError(CLOSED), time=200.0)
    run.raised(1, ValueError("the clip is broken"), time=201.0)  # its record was late
    run.raised(2, RuntimeError(CLOSED), time=202.0)
    cause = run.cause()
    assert (cause.kind, cause.rank, cause.host, cause.step) == ("exception", 1, "host1", 7)
    assert cause.what == "ValueError: the clip is broken"
    assert cause.samples == ["clip3", "clip9"]
    assert cause.secondary == 2
    assert cause.trace is not None and "ValueError" in cause.trace


def test_of_two_errors_of_their_own_the_earlier_is_first(run: Run) -> None:
    run.raised(0, KeyError("b"), time=201.0)
    run.raised(1, ValueError("a"), time=200.0)
    assert run.cause().rank == 1


def test_a_users_mistake_is_named_as_one(run: Run) -> None:
    run.raised(0, UserError("no such file; make it"), time=200.0)
    assert (run.cause().kind, run.cause().what) == ("mistake", "UserError: no such file; make it")


def test_a_rank_without_a_record_was_killed(run: Run) -> None:
    run.beats(beat(0), beat(1, alive=90.0), beat(2))
    for rank in (0, 2):
        run.raised(rank, RuntimeError(CLOSED), time=101.0)
    cause = run.cause()
    assert (cause.kind, cause.rank, cause.secondary) == ("killed", 1, 2)
    assert cause.samples == ["clip3", "clip9"], "all ranks know the step's clips"


def test_a_killed_rank_was_where_the_others_waited_for_it(run: Run) -> None:
    run.beats(beat(0), beat(1, step=6))  # written up to a second before
    run.raised(0, RuntimeError(CLOSED), time=101.0)
    assert (run.cause().rank, run.cause().step, run.cause().samples) == (1, 7, ["clip3", "clip9"])


def test_its_supervisor_knows_the_signal_and_the_kernels_words(run: Run) -> None:
    run.beats(beat(0), beat(1))
    run.raised(0, RuntimeError(CLOSED), time=102.0)
    run.ended(1, -9, memory="Out of memory: Killed process 101 (python)")
    cause = run.cause()
    assert cause.what == "ended by SIGKILL; out of memory: Out of memory: Killed process 101 (python)"
    assert cause.out_of_memory


def test_ranks_that_supervisors_ended_are_no_cause(run: Run) -> None:
    run.beats(beat(0, alive=50.0), beat(1, alive=99.0))
    run.ended(0, -9, by_supervisor=True, time=120.0)
    run.ended(1, -11, time=101.0)
    run.folder.stacks(1, 1).write_text("Fatal Python error: Segmentation fault\n\nThread ...")
    cause = run.cause()
    assert (cause.kind, cause.rank) == ("killed", 1)
    assert cause.what == "ended by SIGSEGV (Fatal Python error: Segmentation fault)"


def test_with_nothing_else_the_longest_silent_rank_is_first(run: Run) -> None:
    run.beats(beat(0, alive=130.0), beat(1, alive=99.0), beat(2, alive=130.5))
    assert (run.cause().kind, run.cause().rank) == ("killed", 1)


def test_a_hang_names_the_rank_that_was_waited_for(run: Run) -> None:
    run.beats(*(beat(rank) for rank in range(4)))
    run.hung(silent=[2])
    run.ended(2, -9, by_supervisor=True)
    cause = run.cause()
    assert (cause.kind, cause.rank, cause.stackless) == ("hang", 2, [2])
    assert "its process did not run" in cause.what


def test_a_hang_of_running_processes_names_the_one_that_is_least_far(run: Run) -> None:
    run.beats(beat(0), beat(1), beat(2), beat(3, step=6))
    run.hung(silent=[])
    cause = run.cause()
    assert (cause.kind, cause.rank, cause.stackless) == ("hang", 3, [])
    assert "no step for 26 s" in cause.what


def test_only_errors_of_communication_are_said_to_be_that(run: Run) -> None:
    run.raised(1, RuntimeError(CLOSED), time=200.0)
    run.raised(0, RuntimeError(CLOSED), time=201.0)
    assert (run.cause().kind, run.cause().rank) == ("communication", 1)


def test_a_run_with_fresh_heartbeats_runs(run: Run) -> None:
    run.beats(beat(0, alive=NOW - 5), beat(1, alive=NOW - 20))
    assert run.cause().kind == "running"


def test_heartbeats_of_a_clock_that_was_set_back_since_are_old(run: Run) -> None:
    run.beats(beat(0, alive=NOW + 7200), beat(1, alive=NOW + 7190))
    assert run.cause().kind == "killed"


@pytest.mark.parametrize(
    ("error", "stopped", "ending"), [(None, False, "finished"), (None, True, "stopped"), (KeyboardInterrupt(), False, "interrupted")]
)
def test_endings_without_an_error(error: BaseException | None, stopped: bool, ending: str) -> None:
    assert ending_of(error, stopped=stopped) == ending


def test_the_next_start_keeps_what_a_killed_rank_cannot_say(run: Run) -> None:
    run.beats(beat(0), beat(1), beat(2), beat(3))
    for rank in (0, 2, 3):
        run.raised(rank, RuntimeError(CLOSED), time=101.0)
    run.ended(1, -9)
    assert next_incarnation(run.folder) == 2
    for rank in range(2):  # the world has shrunk to two
        keep_lost(run.folder, Seat(rank=rank, world_size=2, incarnation=2, host="b", pid=1))
        run.beats(beat(rank, incarnation=2))
    cause = first_cause(read_evidence(run.folder, 1), now=NOW)
    assert (cause.kind, cause.rank, cause.what) == ("killed", 1, "ended by SIGKILL")


def test_records_of_twenty_incarnations_ago_go(run: Run) -> None:
    run.raised(0, ValueError("old"), time=1.0)
    keep_lost(run.folder, Seat(rank=0, world_size=1, incarnation=20, host="a", pid=1))
    assert run.folder.exit(1, 0).exists()
    keep_lost(run.folder, Seat(rank=0, world_size=1, incarnation=21, host="a", pid=1))
    assert not run.folder.exit(1, 0).exists()


def test_the_kernels_line_is_of_this_process(tmp_path: Path) -> None:
    lines = [
        "[1.0] Out of memory: Killed process 4711 (python) total-vm:1kB",
        "[2.0] Out of memory: Killed process 12 (ls)",
        "[3.0] usb 4711",
    ]
    assert out_of_memory_line(lines, 4711) == lines[0]
    assert out_of_memory_line(lines, 471) is None
    (tmp_path / "memory.events").write_text("low 0\noom 3\noom_kill 2\n")
    assert memory_kills(tmp_path) == 2
    assert memory_kills(tmp_path / "v1") == 0
