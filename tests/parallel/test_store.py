"""A checkpoint is one transaction: whatever fails on the way, what was complete stays, and what appears is complete and on disk."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megasora.checkpoint import manifests, store
from megasora.models.mmdit.sharded_state import sharded
from tests.pool import RankPool


def save(root: Path, step: int) -> Path:
    """A checkpoint of four numbers."""
    tensors = {"model.x": sharded("model.x", torch.full((4,), float(step)), (4,), (0,), (0, 0, 0))}
    return store.save(root, step=step, tensors=tensors, state={"n": step})


def saves_that_fail(rank: int, folder: str) -> list[tuple[str, list[int], str]]:
    """(where it failed, complete checkpoints afterwards, tracker) for a second save that fails at each point in turn."""
    root = Path(folder)
    save(root, 1)
    seen = []
    for owner, name in ((os, "fsync"), (Path, "rename"), (Path, "replace")):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(owner, name, _failing(getattr(owner, name)))
            with pytest.raises(OSError, match="planted"):
                save(root, 2)
        seen.append((name, [entry.step for entry in store.complete_checkpoints(root)], (root / store.TRACKER).read_text().strip()))
    return seen


def _failing(real: Callable[..., Any]) -> Callable[..., Any]:
    """Fails on the manifest, the folder and the tracker; Megatron syncs and renames files of its own inside the folder."""

    def fail(thing: Path | int, *arguments: Any) -> Any:
        path = thing if isinstance(thing, Path) else Path(os.readlink(f"/proc/self/fd/{thing}"))
        if path.name.startswith((".step_", ".latest", manifests.NAME)):
            raise OSError("planted")
        return real(thing, *arguments)

    return fail


def test_a_save_that_fails_leaves_the_checkpoint_before(pool: RankPool, tmp_path: Path) -> None:
    (seen,) = pool.run(1, saves_that_fail, str(tmp_path / "checkpoints"))
    # the tracker moves last: when only that fails, the new checkpoint is complete all the same
    assert seen == [("fsync", [1], "step_00000001"), ("rename", [1], "step_00000001"), ("replace", [1, 2], "step_00000001")]


def saves_again_and_fails(rank: int, folder: str) -> list[int]:
    """Complete checkpoints after a second save of the same step failed before it was whole."""
    save(Path(folder), 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", _failing(os.fsync))
        with pytest.raises(OSError, match="planted"):
            save(Path(folder), 1)
    return [entry.step for entry in store.complete_checkpoints(Path(folder))]


def test_a_checkpoint_is_not_removed_for_one_that_is_not_whole(pool: RankPool, tmp_path: Path) -> None:
    assert pool.run(1, saves_again_and_fails, str(tmp_path / "checkpoints")) == [[1]]


def names_on_disk_before_the_rename(rank: int, folder: str) -> tuple[set[str], set[str]]:
    """(files synced before the folder gets its name, files it holds)."""
    synced: set[str] = set()
    result: list[tuple[set[str], set[str]]] = []
    fsync, rename = os.fsync, Path.rename

    def note(descriptor: int) -> None:
        synced.add(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def look(path: Path, target: Path) -> Path:
        if path.is_dir():  # Megatron renames files of its own
            result.append((set(synced), {file.name for file in path.iterdir()}))
        return rename(path, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", note)
        patch.setattr(Path, "rename", look)
        save(Path(folder), 3)
    return result[0]


def test_every_file_is_synced_before_the_folder_gets_its_name(pool: RankPool, tmp_path: Path) -> None:
    ((synced, held),) = pool.run(1, names_on_disk_before_the_rename, str(tmp_path / "checkpoints"))
    assert len(held) >= 4 and held <= synced
    assert (tmp_path / "checkpoints" / store.TRACKER).read_text() == "step_00000003\n"
