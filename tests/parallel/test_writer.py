"""Checkpoints written while training goes on: what is saved is what was there; what fails is said and costs nothing saved before."""

from __future__ import annotations

import errno
import os
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megasora.checkpoint import commit, store
from megasora.checkpoint import writer as writer_module
from megasora.checkpoint.lease import Lease
from megasora.checkpoint.megatron_io import MegatronReader
from megasora.checkpoint.writer import CheckpointWriter
from megasora.config.errors import UserError
from tests.parallel import saves
from tests.pool import RankPool


def saves_and_changes(rank: int, folder: str, asynchronous: bool) -> list[Any]:
    """Two saves whose tensors change right after each call; the events and what is loaded."""
    root = Path(folder)
    with saves.writing(root, asynchronous=asynchronous) as writer:
        for step in (1, 2):
            tensors = saves.rectangles(step)
            writer.save(step=step, tensors=tensors, state={"n": step})
            saves.empty(tensors)
        writer.wait()
        events = writer.poll()
        writer.close()
    return [events, [saves.loaded_step(store.step_folder(root, step)) for step in (1, 2)]]


@pytest.mark.parametrize("asynchronous", [True, False])
def test_what_is_saved_is_what_was_there_when_it_was_called(pool: RankPool, tmp_path: Path, asynchronous: bool) -> None:
    for events, loaded in pool.run(3, saves_and_changes, str(tmp_path / "c"), asynchronous):
        assert loaded == [1, 2]
        assert [(event["event"], event["path"]) for event in events] == [("checkpoint", "step_00000001"), ("checkpoint", "step_00000002")]
        assert all(0 < event["stall_s"] <= event["seconds"] for event in events)
        assert ("waited_s" in events[1]) == asynchronous  # the second save waited for the first, and says so
    assert (tmp_path / "c" / store.TRACKER).read_text() == "step_00000002\n"


def loads(rank: int, folder: str) -> int:
    return saves.loaded_step(Path(folder))


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_any_layout_reads_what_three_ranks_wrote(pool: RankPool, tmp_path: Path, world_size: int) -> None:
    pool.run(3, saves_and_changes, str(tmp_path / "c"), True)
    folder = store.step_folder(tmp_path / "c", 2)
    assert pool.run(world_size, loads, str(folder)) == [2] * world_size
    assert MegatronReader(folder).infos["split"].shape == (saves.ROWS, 5)  # our own reader, which executes nothing, reads it too


def saves_while_steps_go_on(rank: int, folder: str) -> list[Any]:
    """Events and complete checkpoints before, and paths after the writing was let go."""
    with saves.writing(Path(folder)) as writer:
        gate = saves.hold(writer)
        writer.save(step=1, tensors=saves.rectangles(1), state={})
        before = [writer.poll() for _ in range(3)]
        listed = saves.steps(Path(folder))
        gate.set()
        writer.wait()
        return [before, listed, [event["path"] for event in writer.poll()], writer.poll()]


def test_steps_go_on_while_a_checkpoint_is_written(pool: RankPool, tmp_path: Path) -> None:
    for before, listed, paths, after in pool.run(2, saves_while_steps_go_on, str(tmp_path / "c")):
        assert (before, listed, paths, after) == ([[], [], []], [], ["step_00000001"], [])


def memory_of_saves(rank: int, folder: str) -> list[Any]:
    """Bytes kept, where they lie, and how often the ranks planned, over three saves and one of another structure."""
    plans = []
    with pytest.MonkeyPatch.context() as patch, saves.writing(Path(folder)) as writer:
        real = writer_module.make_plan
        patch.setattr(writer_module, "make_plan", lambda tensors: plans.append(1) or real(tensors))
        seen = []
        for step in (1, 2, 3):
            saves.save(writer, step)
            assert writer._copy is not None
            seen.append((writer.host_bytes, [tensor.data_ptr() for tensor in writer._copy.tensors]))
        fewer = {name: one for name, one in saves.rectangles(4).items() if rank == 0 or name != "model.same"}
        writer.save(step=4, tensors=fewer, state={})
        writer.wait()
        (event,) = writer.poll()
    return [len({str(one) for one in seen}), seen[0][0], len(plans), event["event"]]


def test_host_memory_and_plan_are_kept_from_save_to_save(pool: RankPool, tmp_path: Path) -> None:
    results = pool.run(2, memory_of_saves, str(tmp_path / "c"))
    assert [places for places, *_ in results] == [1, 1]
    # 3 of 12 rows of two tensors and 7 bf16 numbers; 9 rows: each rounded up to 64 bytes
    assert [num_bytes for _, num_bytes, *_ in results] == [2 * 64 + 64, 2 * 192]
    assert [(plans, event) for *_, plans, event in results] == [(2, "checkpoint")] * 2


def full_disk(folder: Path, rank: int) -> None:
    """Make a rank's file of the next save lie on a full disk."""
    real = Path.open

    def on_full(path: Path, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        return real(Path("/dev/full"), "wb") if path.name == f"__{rank}_0.distcp" else real(path, mode, *arguments, **options)

    Path.open = on_full  # type: ignore[method-assign,assignment]


def fails_on(rank: int, folder: str, how: str, asynchronous: bool) -> list[Any]:
    """Events of a good save, one that fails and one after the cure; what is there after the failure; the work folder's content then."""
    root = Path(folder)
    with saves.writing(root, asynchronous=asynchronous) as writer:
        events = saves.save(writer, 1)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Path, "open", Path.open)
            if how.startswith("full") and rank == 1:
                full_disk(root, rank)
            if how == "read-only" and rank == 0:
                patch.setattr(Path, "mkdir", _read_only)
            if how == "manifest" and rank == 0:
                patch.setattr(commit, "write_manifest", _read_only)
            if how == "moved" and rank == 0:
                root.rename(root.with_name("elsewhere"))
            dist.barrier()
            events += saves.save(writer, 2)
            with pytest.raises(UserError, match=r"the last checkpoint could not be written .*start the same command again"):
                writer.close()
            dist.barrier()
            if how == "moved" and rank == 0:
                root.with_name("elsewhere").rename(root)
            dist.barrier()
        there = [saves.steps(root), [path.name for work in root.glob(".work_*") for path in work.iterdir()]]
        dist.barrier()
        events += saves.save(writer, 3)
        writer.close()
    return [events, there, saves.loaded_step(store.step_folder(root, 1))]


def _read_only(*arguments: Any, **options: Any) -> None:
    raise OSError(errno.EROFS, "Read-only file system", "checkpoints")


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("full", r"rank 1: No space left on device"),
        ("read-only", r"Read-only file system"),
        ("manifest", r"Read-only file system"),
        ("moved", r"No such file or directory"),
    ],
)
def test_a_save_that_fails_is_said_and_training_goes_on(pool: RankPool, tmp_path: Path, how: str, said: str) -> None:
    for events, there, loaded in pool.run(2, fails_on, str(tmp_path / "c"), how, how != "manifest"):
        assert [event["event"] for event in events] == ["checkpoint", "checkpoint_failed", "checkpoint"]
        assert events[1]["step"] == 2
        assert re.search(said, events[1]["reason"])
        assert there == [[1], []]  # the good one stayed, the temporary is gone
        assert loaded == 1
    assert saves.steps(tmp_path / "c") == [1, 3]


def replaces_a_step(rank: int, folder: str) -> list[Any]:
    """What is listed when a step is saved again and each rename, in turn, fails; then when none does."""
    root, seen = Path(folder), []
    with saves.writing(root) as writer:
        saves.save(writer, 7)
        for failing in range(3):
            calls = []

            def rename(source: Any, target: Any, *, failing: int = failing, calls: list[Any] = calls, real: Any = os.rename) -> None:
                calls.append(source)
                if len(calls) == failing:
                    raise OSError(errno.EIO, "planted")
                real(source, target)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(os, "rename", rename)
                events = saves.save(writer, 7)
            seen.append([events[0]["event"], saves.steps(root), loaded(root, 7)])
    return seen


def loaded(root: Path, step: int) -> int:
    """Which step's values lie under a step's name."""
    return saves.loaded_step(store.step_folder(root, step))


def test_a_checkpoint_is_there_until_its_replacement_is_whole(pool: RankPool, tmp_path: Path) -> None:
    (seen,) = pool.run(1, replaces_a_step, str(tmp_path / "c"))
    assert seen == [["checkpoint", [7], 7], ["checkpoint_failed", [7], 7], ["checkpoint_failed", [7], 7]]


def keeps(rank: int, folder: str) -> list[int]:
    with saves.writing(Path(folder), keep=2) as writer:
        for step in (1, 2, 3, 4):
            saves.save(writer, step)
        return saves.steps(Path(folder))


def test_the_newest_checkpoints_stay(pool: RankPool, tmp_path: Path) -> None:
    assert pool.run(2, keeps, str(tmp_path / "c")) == [[3, 4]] * 2


def go_on(writer: CheckpointWriter, when: str) -> None:
    """Train without end."""
    if when == "save":
        writer.save(step=2, tensors=saves.rectangles(2), state={})
    while True:
        writer.poll()


def loses_its_lease(rank: int, folder: str, when: str) -> list[Any]:
    """What each call says after another run took over; complete checkpoints then."""
    root = Path(folder)
    other = None
    with saves.writing(root, beat_s=0.05) as writer:
        saves.save(writer, 1)
        gate = saves.hold(writer)
        if when == "commit":
            writer.save(step=2, tensors=saves.rectangles(2), state={})
        if rank == 0:
            other = Lease.take(root, force=True, beat_s=60)
        gate.set()
        time.sleep(0.3 if when == "poll" else 0)
        dist.barrier()
        with pytest.raises(UserError, match=r"another run has taken over .*\(host .*, pid \d+") as raised:
            go_on(writer, when)
        if other is not None:
            other.release()
    return [str(raised.value).startswith("another run"), saves.steps(root)]


@pytest.mark.parametrize("when", ["save", "poll", "commit"])
def test_a_run_that_was_replaced_ends_with_one_sentence_on_every_rank(pool: RankPool, tmp_path: Path, when: str) -> None:
    assert pool.run(2, loses_its_lease, str(tmp_path / "c"), when) == [[True, [1]]] * 2
