"""Which checkpoints count and which are removed, on folders that hold a manifest and one file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from megasora.checkpoint import commit, manifests, store
from megasora.checkpoint.lease import Lease
from megasora.config.errors import UserError


def made(root: Path, *steps: int) -> None:
    for step in steps:
        folder = store.step_folder(root, step)
        folder.mkdir(parents=True)
        (folder / "data").write_bytes(b"12345")
        write(folder, {"data": {"bytes": 5}})


def write(folder: Path, files: dict[str, dict[str, int]], fmt: str = manifests.TRAINING) -> None:
    (folder / manifests.NAME).write_text(json.dumps({"format": fmt, "files": files}))


def steps(root: Path) -> list[int]:
    return [entry.step for entry in store.complete_checkpoints(root)]


@pytest.mark.parametrize(
    ("keep", "every", "kept"), [(0, 0, [1, 2, 3, 4, 5]), (1, 0, [5]), (2, 0, [4, 5]), (2, 2, [2, 4, 5]), (9, 0, [1, 2, 3, 4, 5])]
)
def test_the_newest_and_the_milestones_stay(tmp_path: Path, keep: int, every: int, kept: list[int]) -> None:
    made(tmp_path, 3, 1, 5, 2, 4)
    lease = Lease.take(tmp_path)
    removed = commit.prune(lease, keep=keep, keep_every_steps=every)
    assert list(lease.work.iterdir()) == []
    lease.release()
    assert steps(tmp_path) == kept
    assert sorted(path.name for path in removed) == [f"step_{step:08d}" for step in range(1, 6) if step not in kept]


def test_a_copy_that_somebody_made_is_no_checkpoint(tmp_path: Path) -> None:
    """Nor does it count for those that are kept."""
    made(tmp_path, 1, 2)
    for name in ("step_00000002.bak", "step_00000002_1", "step_2", "step_x"):
        shutil.copytree(store.step_folder(tmp_path, 2), tmp_path / name)
    assert steps(tmp_path) == [1, 2]
    lease = Lease.take(tmp_path)
    assert [path.name for path in commit.prune(lease, keep=1, keep_every_steps=0)] == ["step_00000001"]
    lease.release()
    assert steps(tmp_path) == [2]
    assert (tmp_path / "step_00000002.bak").is_dir()


@pytest.mark.parametrize("content", [b"1234", b"123456"])
def test_a_file_of_another_size_makes_a_checkpoint_incomplete(tmp_path: Path, content: bytes) -> None:
    made(tmp_path, 1, 2)
    (store.step_folder(tmp_path, 2) / "data").write_bytes(content)
    assert steps(tmp_path) == [1]


def test_a_manifest_that_names_a_file_elsewhere_is_refused(tmp_path: Path) -> None:
    made(tmp_path / "root", 1)
    (tmp_path / "root" / "secret").write_bytes(b"12345")
    write(store.step_folder(tmp_path / "root", 1), {"../secret": {"bytes": 5}})
    assert steps(tmp_path / "root") == []
    with pytest.raises(UserError, match="points outside the folder"):
        manifests.read(store.step_folder(tmp_path / "root", 1))


def test_a_run_does_not_go_on_from_weights_alone(tmp_path: Path) -> None:
    made(tmp_path, 1)
    folder = store.step_folder(tmp_path, 1)
    write(folder, {}, manifests.WEIGHTS)
    with pytest.raises(UserError, match="holds weights only"):
        store.read_manifest(folder)
