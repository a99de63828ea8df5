"""Complete checkpoints of a run: which there are, what their manifests say, and their tensors.

A checkpoint is one transaction: tensors, small state and a manifest with hashes, in a folder that exists whole or not at all
(checkpoint/writer.py writes it, commit.py gives it its name). Tensors are in Megatron's format, which any layout reads; small state is
JSON in the manifest, so reading it executes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from megasora.checkpoint import manifests
from megasora.config.errors import UserError

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


def load(folder: Path, tensors: Mapping[str, ShardedTensor]) -> None:
    """Read this rank's rectangles in place; the layout that wrote them does not matter."""
    loaded = dist_checkpointing.load(dict(tensors), str(folder), validate_access_integrity=False)
    for name, sharded in tensors.items():
        if loaded[name].data_ptr() != sharded.data.data_ptr():
            sharded.data.copy_(loaded[name])
