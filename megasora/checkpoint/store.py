"""Complete checkpoints of a run: which there are, what their manifests say, and their tensors.

A checkpoint is one transaction: tensors, small state and a manifest with hashes, in a folder that exists whole or not at all
(checkpoint/writer.py writes it, commit.py gives it its name). Tensors are in Megatron's format, which any layout reads; small state is
JSON in the manifest, so reading it executes nothing.
"""

from __future__ import annotations

import re
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


NAME = re.compile(r"step_(\d{8,})")
"""Of a checkpoint's folder, with its step."""


def step_folder(root: Path, step: int) -> Path:
    """Folder of a step's checkpoint."""
    return root / f"step_{step:08d}"


def complete_checkpoints(root: Path) -> list[CheckpointEntry]:
    """Checkpoints whose manifest is there and whose files have the sizes it names, oldest first."""
    return [CheckpointEntry(path=folder, step=step) for step, folder in step_folders(root) if manifests.problem_with(folder) is None]


def step_folders(root: Path) -> list[tuple[int, Path]]:
    """(step, folder) of all that have a checkpoint's name, oldest first; a copy with another (step_00000100.bak) is none."""
    names = [(match, path) for path in root.glob("step_*") if (match := NAME.fullmatch(path.name))] if root.is_dir() else []
    return sorted((int(match[1]), path) for match, path in names)


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
