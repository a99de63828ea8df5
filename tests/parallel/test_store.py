"""A checkpoint is one transaction: whatever fails on the way, what was complete stays, and what appears is complete and on disk."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megasora.checkpoint import manifests, store
from tests.parallel import saves
from tests.pool import RankPool


def saves_that_fail(rank: int, folder: str) -> list[tuple[str, str, list[int], str]]:
    """(what failed, event, complete checkpoints afterwards, tracker) for a second save that fails at each point in turn."""
    root = Path(folder)
    seen = []
    with saves.writing(root) as writer:
        saves.save(writer, 1)
        for name in ("fsync", "rename", "replace"):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(os, name, _failing(getattr(os, name)))
                (event,) = saves.save(writer, 2)
            seen.append((name, event["event"], saves.steps(root), (root / store.TRACKER).read_text().strip()))
    return seen


def _failing(real: Callable[..., Any]) -> Callable[..., Any]:
    """Fails on the manifest, the folder and the tracker."""

    def fail(thing: Path | int, *arguments: Any) -> Any:
        path = thing if isinstance(thing, Path) else Path(os.readlink(f"/proc/self/fd/{thing}"))
        if path.name.startswith(("step_", store.TRACKER, manifests.NAME)):
            raise OSError("planted")
        return real(thing, *arguments)

    return fail


def test_a_save_that_fails_leaves_the_checkpoint_before(pool: RankPool, tmp_path: Path) -> None:
    (seen,) = pool.run(1, saves_that_fail, str(tmp_path / "checkpoints"))
    # the tracker moves last: when only that fails, the new checkpoint is complete all the same
    assert seen == [
        ("fsync", "checkpoint_failed", [1], "step_00000001"),
        ("rename", "checkpoint_failed", [1], "step_00000001"),
        ("replace", "checkpoint_failed", [1, 2], "step_00000001"),
    ]


def names_on_disk_before_the_rename(rank: int, folder: str) -> tuple[set[str], set[str], list[str]]:
    """(names synced before the folder gets its name, files it holds, what happened in which order) of rank 0; nothing elsewhere."""
    synced: set[str] = set()
    order: list[str] = []
    result: list[tuple[set[str], set[str], list[str]]] = [(set(), set(), order)]
    fsync, rename, replace = os.fsync, os.rename, os.replace

    def note(descriptor: int) -> None:
        name = Path(os.readlink(f"/proc/self/fd/{descriptor}")).name
        fsync(descriptor)
        synced.add(name)
        order.append(name)

    def look(path: Path, target: Path) -> None:
        result.append((set(synced), {file.name for file in path.iterdir()}, order))
        order.append("rename")
        rename(path, target)

    def move(path: Path, target: Path) -> None:
        order.append("tracker")
        replace(path, target)

    with pytest.MonkeyPatch.context() as patch, saves.writing(Path(folder)) as writer:
        for name, function in (("fsync", note), ("rename", look), ("replace", move)):
            patch.setattr(os, name, function)
        saves.save(writer, 3)
    return result[-1]


def test_every_file_is_synced_before_the_folder_gets_its_name(pool: RankPool, tmp_path: Path) -> None:
    (synced, held, order), _ = pool.run(2, names_on_disk_before_the_rename, str(tmp_path / "checkpoints"))
    ours = held - {"__1_0.distcp"}  # the other rank syncs its own
    assert held == {".metadata", "__0_0.distcp", "__1_0.distcp", "common.pt", "manifest.json", "metadata.json"}
    assert ours | {"step_00000003"} <= synced
    start = order.index("manifest.json")
    names_of_the_folder, names_of_the_root = "step_00000003", "checkpoints"
    expected = ["manifest.json", names_of_the_folder, "rename", names_of_the_root, "latest", "tracker", names_of_the_root]
    assert order[start : start + 7] == expected
    assert (tmp_path / "checkpoints" / store.TRACKER).read_text() == "step_00000003\n"
