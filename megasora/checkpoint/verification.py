"""Which checkpoint a run goes on from: the newest whose every file has the size and the SHA-256 that its manifest names.

Reading is dealt out over the ranks; what rank 0 decides goes to all. A damaged checkpoint is never loaded: it is refused, renamed so that
it counts no more, and the next older one is looked at. A checkpoint of another format version is no damage: it is an error that says so.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megasora.checkpoint import commit, manifests, store
from megasora.checkpoint.lease import Lease
from megasora.config.errors import UserError
from megasora.parallel.agreement import told_by_rank_0


@dataclass(frozen=True, kw_only=True)
class Refused:
    """A checkpoint that was not used."""

    name: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Verified:
    """What a run goes on from.

    Attributes:
        folder: the checkpoint; None when there is none at all.
        manifest: its manifest, {} without one.
        refused: newer ones that are damaged, newest first.
    """

    folder: Path | None
    manifest: dict[str, Any]
    refused: tuple[Refused, ...]


def newest_good(root: Path, *, lease: Lease | None) -> Verified:
    """The newest undamaged checkpoint; all ranks together.

    Args:
        root: the run's checkpoints folder.
        lease: rank 0's, with which refused folders are renamed; None on the others.

    Raises:
        UserError: a checkpoint is of another format, or there are some and all are damaged.
    """
    candidates = told_by_rank_0(lambda: [str(folder) for _, folder in reversed(store.step_folders(root))])
    refused: list[Refused] = []
    for candidate in candidates:
        folder = Path(candidate)
        manifest, reason = told_by_rank_0(partial(_examined, folder))
        if reason is None:
            reason = _first_damage(folder, manifest["files"])
        if reason is None:
            told_by_rank_0(lambda: _put_aside(refused, root, lease))
            return Verified(folder=folder, manifest=manifest, refused=tuple(refused))
        refused.append(Refused(name=folder.name, reason=reason))
    if refused:
        raise UserError(
            f"no checkpoint in {root} is whole: {'; '.join(f'{one.name}: {one.reason}' for one in refused)}. "
            "Copy a good one there, or move them away to start from the beginning"
        )
    return Verified(folder=None, manifest={}, refused=())


def _examined(folder: Path) -> tuple[dict[str, Any], str | None]:
    """A candidate's manifest and what is wrong with it or with the names and sizes of files.

    Raises:
        UserError: it is of a format that this version does not read.
    """
    problem = manifests.problem_with(folder)
    if problem is not None:
        if (folder / "metadata.json").is_file() and not (folder / manifests.NAME).exists():
            problem = f"it has no {manifests.NAME}: it lost it, or was written by something older than megasora's format"
        return {}, problem
    try:
        manifest: dict[str, Any] = json.loads((folder / manifests.NAME).read_text())
    except (OSError, ValueError) as error:
        return {}, f"{manifests.NAME} cannot be read ({error})"
    return manifest, manifests.format_problem(manifest, folder)


def _first_damage(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> str | None:
    """What is wrong with the content of the files, or None; all ranks together, each reads a share of about the same size."""
    shares: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    sizes = [0] * len(shares)
    for name in sorted(files, key=lambda name: (-int(files[name]["bytes"]), name)):
        least = sizes.index(min(sizes))
        shares[least].append(name)
        sizes[least] += int(files[name]["bytes"])
    own = next((found for name in shares[dist.get_rank()] if (found := damage_of(folder / name, files[name]))), None)
    everybody: list[str | None] = [None] * len(shares)
    dist.all_gather_object(everybody, own)
    return next((found for found in everybody if found is not None), None)


def damage_of(path: Path, facts: Mapping[str, Any]) -> str | None:
    """What is wrong with the content of a file of a checkpoint, by its manifest's facts; None where nothing is."""
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        return f"{path.name} cannot be read ({error.strerror})"
    return None if digest == facts["sha256"] else f"{path.name} has another SHA-256 than its manifest says"


def _put_aside(refused: list[Refused], root: Path, lease: Lease | None) -> None:
    for one in refused:
        if lease is not None:
            with suppress(OSError):  # it cannot be read and not be renamed: it will be refused again
                commit.set_aside(lease, root / one.name)
