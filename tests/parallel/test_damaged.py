"""Damaged checkpoints: each is refused and the last good one loaded, or the damage was none; nothing wrong is ever loaded."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megasora.checkpoint import manifests, store
from megasora.checkpoint.lease import Lease
from megasora.checkpoint.verification import newest_good
from megasora.config.errors import UserError
from tests.parallel import saves
from tests.pool import RankPool

MUTATIONS = 500
SEED = 20261128
STEPS = (1, 2, 3)


def writes(rank: int, folder: str) -> None:
    """Three checkpoints."""
    with saves.writing(Path(folder)) as writer:
        for step in STEPS:
            saves.save(writer, step)


@pytest.fixture(scope="module")
def good(pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of steps 1, 2 and 3 by two ranks."""
    root = tmp_path_factory.mktemp("good") / "checkpoints"
    pool.run(2, writes, str(root))
    return root


def _file(folder: Path, draws: random.Random) -> Path:
    return draws.choice(sorted(path for path in folder.iterdir() if path.stat().st_size))


def truncated(folder: Path, draws: random.Random) -> None:
    path = _file(folder, draws)
    os.truncate(path, draws.randrange(path.stat().st_size))


def flipped(folder: Path, draws: random.Random) -> None:
    path = _file(folder, draws)
    data = bytearray(path.read_bytes())
    data[draws.randrange(len(data))] ^= 1 << draws.randrange(8)
    path.write_bytes(data)


def longer(folder: Path, draws: random.Random) -> None:
    path = _file(folder, draws)
    path.write_bytes(path.read_bytes() + draws.randbytes(draws.randint(1, 9)))


def missing(folder: Path, draws: random.Random) -> None:
    _file(folder, draws).unlink()


def swapped(folder: Path, draws: random.Random) -> None:
    one, other = draws.sample(sorted(folder.iterdir()), 2)
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)


def from_another_step(folder: Path, draws: random.Random) -> None:
    path = draws.choice([folder / "__0_0.distcp", folder / "__1_0.distcp", folder / manifests.NAME])
    shutil.copy(folder.with_name("step_00000001") / path.name, path)


def whole_from_another_step(folder: Path, draws: random.Random) -> None:
    shutil.rmtree(folder)
    shutil.copytree(folder.with_name("step_00000001"), folder)


def a_folder(folder: Path, draws: random.Random) -> None:
    path = _file(folder, draws)
    path.unlink()
    path.mkdir()


def edited(folder: Path, draws: random.Random) -> None:
    """A manifest that is JSON and says something else."""
    path = folder / manifests.NAME
    manifest = json.loads(path.read_text())
    name = draws.choice(sorted(manifest["files"]))

    def number_of_step() -> None:
        manifest["step"] += 7

    edits: list[Callable[[], Any]] = [
        number_of_step,
        lambda: manifest["state"].update(n=99),
        lambda: manifest["state"].update(extra=None),
        lambda: manifest["files"].pop(name),
        lambda: manifest["files"][name].update(sha256="0" * 64),
        lambda: manifest["files"][name].update(bytes=manifest["files"][name]["bytes"] + 1),
        lambda: manifest["files"][name].pop("sha256"),
        lambda: manifest["files"].update({"../secret": {"bytes": 1, "sha256": "0" * 64}}),
        lambda: manifest.pop(draws.choice(sorted(set(manifest) - {"version"}))),
        lambda: manifest.update({draws.choice(sorted(manifest)): draws.choice([None, 7, "x", [], {}])}),
    ]
    draws.choice(edits)()
    path.write_text(json.dumps(draws.choice([manifest, manifest, manifest, manifest, [manifest], None])))


KINDS = (truncated, flipped, flipped, longer, missing, swapped, from_another_step, whole_from_another_step, a_folder, edited, edited)


def loads_what_is_left(rank: int, good: str, folder: str) -> dict[str, int]:
    """Damage copies of the newest checkpoint, and sometimes of the one before it, and load; how often each step was loaded."""
    draws = random.Random(SEED)
    counts: dict[str, int] = {}
    for number in range(MUTATIONS):
        root = Path(folder) / str(number)
        damaged = [3, 2] if number % 5 == 0 else [3]
        if rank == 0:
            shutil.copytree(good, root)
        kinds = [(step, draws.choice(KINDS), random.Random(draws.random())) for step in damaged]
        if rank == 0:
            for step, kind, own in kinds:
                kind(store.step_folder(root, step), own)
        dist.barrier()
        lease = Lease.take(root) if rank == 0 else None
        what = f"{number}: {[(step, kind.__name__) for step, kind, _ in kinds]}"
        found = newest_good(root, lease=lease)
        assert found.folder is not None
        step = saves.loaded_step(found.folder)
        assert found.folder.name == f"step_{step:08d}", what
        assert found.manifest["state"] == {"n": step}, what
        assert step == min(damaged) - 1, (what, found)  # every damage of these kinds is one
        assert [one.name for one in found.refused] == [f"step_{step:08d}" for step in damaged], what
        counts[str(step)] = counts.get(str(step), 0) + 1
        if lease is not None:
            assert {path.name for path in root.glob("refused_*")} == {f"refused_step_{step:08d}_2" for step in damaged}, what
            assert saves.steps(root) == list(range(1, step + 1)), what
            lease.release()
            shutil.rmtree(root)
        dist.barrier()
    return counts


def test_five_hundred_damaged_checkpoints_are_refused(pool: RankPool, good: Path, tmp_path: Path) -> None:
    assert pool.run(2, loads_what_is_left, str(good), str(tmp_path)) == [{"1": MUTATIONS // 5, "2": MUTATIONS * 4 // 5}] * 2


def resumed(rank: int, folder: str) -> str:
    """What a run that resumes is told."""
    with pytest.raises(UserError) as raised:
        newest_good(Path(folder), lease=None)
    return str(raised.value)


def test_a_run_does_not_start_over_when_all_are_damaged(pool: RankPool, good: Path, tmp_path: Path) -> None:
    shutil.copytree(good, tmp_path / "c")
    for step in STEPS:
        flipped(store.step_folder(tmp_path / "c", step), random.Random(step))
    for said in pool.run(2, resumed, str(tmp_path / "c")):
        assert "no checkpoint in" in said
        assert all(f"step_{step:08d}: " in said for step in STEPS)
        assert "move them away to start from the beginning" in said


def resealed(folder: Path, **changes: Any) -> None:
    """Change a manifest as a program would that writes another format."""
    path = folder / manifests.NAME
    manifest = {**json.loads(path.read_text()), **changes}
    manifest = {name: value for name, value in manifest.items() if value is not None}
    path.write_text(json.dumps(manifests.sealed({k: v for k, v in manifest.items() if k != manifests.SEAL})))


@pytest.mark.parametrize(("version", "said"), [(3, "format 3"), (None, "format 1")])
def test_another_format_is_said_not_taken_for_damage(pool: RankPool, good: Path, tmp_path: Path, version: int | None, said: str) -> None:
    shutil.copytree(good, tmp_path / "c")
    folder = store.step_folder(tmp_path / "c", 3)
    resealed(folder, version=version)
    if version is None:  # as they were written before manifests had a seal
        manifest = json.loads((folder / manifests.NAME).read_text())
        del manifest[manifests.SEAL]
        (folder / manifests.NAME).write_text(json.dumps(manifest))
    (told,) = pool.run(1, resumed, str(tmp_path / "c"))
    assert said in told
    assert f"reads format {manifests.VERSION}" in told
    assert "--init.weights" in told


def test_a_checkpoint_that_lost_its_manifest_is_named(pool: RankPool, good: Path, tmp_path: Path) -> None:
    shutil.copytree(store.step_folder(good, 3), tmp_path / "c" / "step_00000003")
    (tmp_path / "c" / "step_00000003" / manifests.NAME).unlink()
    (told,) = pool.run(1, resumed, str(tmp_path / "c"))
    assert "it has no manifest.json" in told
