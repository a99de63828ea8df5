"""The manifest of a distributed checkpoint: what it is, and name, size and hash of every file. JSON, so reading it executes nothing."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megasora.config.errors import UserError

NAME = "manifest.json"
TRAINING = "megasora-training-checkpoint"
"""Everything a resume needs; written by `megasora train`."""
LOCAL = "megasora-local-copy"
"""What one node's ranks of a training checkpoint hold, on the node's own disk; a copy beside the others, no checkpoint by itself."""
WEIGHTS = "megasora-weights"
"""The model's weights only; written by `megasora convert --to megasora`."""

VERSION = 2
"""Of training checkpoints: layout of the folder, keys of the tensors, names in the state. Version 1 did not name itself and had no seal."""
SEAL = "manifest_sha256"
"""Key of a training manifest's own hash."""


def sealed(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """A manifest with its own hash, so that an edited one is noticed."""
    plain = json.loads(json.dumps(dict(manifest)))
    return {**plain, SEAL: _seal(plain)}


def _seal(manifest: Mapping[str, Any]) -> str:
    content = {name: value for name, value in manifest.items() if name != SEAL}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def facts_of(data: bytes) -> dict[str, Any]:
    """What a manifest says of a file."""
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def problem_with(folder: Path) -> str | None:
    """Why a checkpoint folder cannot be used, or None; looks at names and sizes, not at hashes."""
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


def format_problem(manifest: Mapping[str, Any], folder: Path) -> str | None:
    """What is wrong with the manifest of a training checkpoint beside its files, or None.

    Raises:
        UserError: it is a whole checkpoint, but none that this version resumes.
    """
    if manifest.get("format") == WEIGHTS:
        raise UserError(f"{folder} holds weights only, a run cannot go on from it; start one with --init.weights {folder}")
    old = SEAL not in manifest and "version" not in manifest and manifest.get("format") == TRAINING
    if not old and manifest.get(SEAL) != _seal(manifest):
        return "its manifest has been changed"
    if old or manifest["version"] != VERSION:
        raise UserError(
            f"{folder} is a checkpoint of format {manifest.get('version', 1)}, of megasora {manifest.get('megasora')}; this version "
            f"reads format {VERSION}: go on with that version, or start another run from its weights with --init.weights {folder}"
        )
    if folder.name != f"step_{manifest['step']:08d}":
        return f"it is the checkpoint of step {manifest['step']}"
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
