"""The manifest of a distributed checkpoint: what it is, and name, size and hash of every file. JSON, so reading it executes nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megasora.config.errors import UserError

NAME = "manifest.json"
TRAINING = "megasora-training-checkpoint"
"""Everything a resume needs; written by `megasora train`."""
WEIGHTS = "megasora-weights"
"""The model's weights only; written by `megasora convert --to megasora`."""


def problem_with(folder: Path) -> str | None:
    """Why a checkpoint folder cannot be used, or None."""
    try:
        manifest = json.loads((folder / NAME).read_text())
        for name, facts in manifest["files"].items():
            if Path(name).name != name:
                return f"its manifest points outside the folder: {name!r}"
            size = (folder / name).stat().st_size
            if size != facts["bytes"]:
                return f"{name} has {size} bytes, its manifest says {facts['bytes']}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"manifest or a file is missing or unreadable ({error})"
    return None


def read(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint.

    Raises:
        UserError: the folder is no complete checkpoint of ours.
    """
    problem = problem_with(folder)
    if problem is not None:
        raise UserError(f"{folder} is no complete checkpoint: {problem}")
    manifest: dict[str, Any] = json.loads((folder / NAME).read_text())
    if manifest.get("format") not in (TRAINING, WEIGHTS):
        raise UserError(f"{folder} is no megasora checkpoint; its format is {manifest.get('format')!r}")
    return manifest
