"""A checkpoint is one transaction: tensors, small state and a manifest with hashes, in a folder that exists whole or not at all.

Tensors go through Megatron's dist_checkpointing (every rank writes its rectangles; nothing is gathered) into a temporary folder; the files
are synced and hashed by the ranks that wrote them, rank 0 writes the manifest, renames the folder and moves the tracker `latest`.
Small state is JSON in the manifest, so reading it executes nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from megasora import __version__
from megasora.checkpoint import manifests
from megasora.config.errors import UserError
from megasora.config.files import sync_to_disk

TRACKER = "latest"


@dataclass(frozen=True, kw_only=True)
class CheckpointEntry:
    """A complete checkpoint on disk."""

    path: Path
    step: int


def step_folder(root: Path, step: int) -> Path:
    """Folder of a step's checkpoint."""
    return root / f"step_{step:08d}"


def complete_checkpoints(root: Path) -> list[CheckpointEntry]:
    """Checkpoints whose manifest is there and whose files have the sizes it names, oldest first."""
    entries = []
    for folder in sorted(root.glob("step_*")) if root.is_dir() else []:
        problem = manifests.problem_with(folder)
        if problem is None:
            entries.append(CheckpointEntry(path=folder, step=int(folder.name.removeprefix("step_"))))
    return entries


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a training checkpoint.

    Raises:
        UserError: the folder is no complete training checkpoint.
    """
    manifest = manifests.read(folder)
    if manifest["format"] != manifests.TRAINING:
        raise UserError(f"{folder} holds weights only, a run cannot go on from it; start one with --init.weights {folder}")
    return manifest


def save(root: Path, *, step: int, tensors: Mapping[str, ShardedTensor], state: Mapping[str, Any]) -> Path:
    """Write a checkpoint; all ranks call it together.

    Args:
        root: the run's checkpoints folder.
        step: optimizer steps done.
        tensors: this rank's rectangles.
        state: JSON-able small state, the same on every rank.

    Returns:
        The final folder.
    """
    final = step_folder(root, step)
    temporary = root / f".{final.name}.tmp"
    if dist.get_rank() == 0:
        root.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
    dist.barrier()
    with _shielded_children():
        dist_checkpointing.save(dict(tensors), str(temporary))
    dist.barrier()
    files = _hash_own_files(temporary)
    if dist.get_rank() == 0:
        manifest = {"format": manifests.TRAINING, "megasora": __version__, "step": step, "state": dict(state), "files": files}
        _write_synced(temporary / manifests.NAME, json.dumps(manifest, indent=1))
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        _write_synced(root / f".{TRACKER}.tmp", final.name + "\n")
        (root / f".{TRACKER}.tmp").replace(root / TRACKER)
        sync_to_disk(root)
    dist.barrier()
    return final


@contextmanager
def _shielded_children() -> Iterator[None]:
    """Processes started inside do not notice SIGTERM and SIGUSR1.

    Slurm warns every process of a step. A rank handles the warning, but Megatron's writer keeps helper processes from its first save on,
    which would die of it and make the very save that the warning asks for fail. A blocked signal stays blocked in children; here it is
    delivered when the save is done.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR1})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def load(folder: Path, tensors: Mapping[str, ShardedTensor]) -> None:
    """Read this rank's rectangles in place; the layout that wrote them does not matter."""
    loaded = dist_checkpointing.load(dict(tensors), str(folder), validate_access_integrity=False)
    for name, sharded in tensors.items():
        if loaded[name].data_ptr() != sharded.data.data_ptr():
            sharded.data.copy_(loaded[name])


def prune(root: Path, *, keep: int, keep_every_steps: int) -> list[Path]:
    """Remove all but the newest `keep` complete checkpoints (0 keeps all); multiples of keep_every_steps stay."""
    entries = complete_checkpoints(root)
    old = entries[:-keep] if keep else []
    removed = [entry.path for entry in old if not (keep_every_steps and entry.step % keep_every_steps == 0)]
    for path in removed:
        shutil.rmtree(path)
    return removed


def _hash_own_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file; the work is dealt out over the ranks, each synced to disk by its reader."""
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    own = {name: _facts(folder / name) for name in names[dist.get_rank() :: dist.get_world_size()]}
    gathered: list[dict[str, dict[str, Any]]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, own)
    return {name: facts for part in gathered for name, facts in sorted(part.items())}


def _facts(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def _write_synced(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
