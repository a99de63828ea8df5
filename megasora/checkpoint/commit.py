"""A written folder becomes a checkpoint, and old checkpoints go: what rank 0 alone does, as the holder of the lease.

The order: contents, manifest, everything on disk, rename, tracker. Names that others read change only by renames out of or into the working
folder of the incarnation (checkpoint/lease.py says why that is enough).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from megasora import __version__
from megasora.checkpoint import manifests
from megasora.checkpoint.lease import ASIDE, Lease
from megasora.checkpoint.rank_file import RankFile
from megasora.checkpoint.store import TRACKER, complete_checkpoints, step_folder
from megasora.config.files import sync_to_disk


def write_manifest(folder: Path, *, about: Mapping[str, Any], extras: Mapping[str, bytes], files: Sequence[RankFile | None]) -> None:
    """Complete a folder that holds every rank's file: small files beside them, then the manifest, all of it on disk.

    Args:
        folder: a step's.
        about: format, step, incarnation and state.
        extras: names and contents of the small files.
        files: of the ranks.
    """
    facts = {file.name: {"bytes": file.num_bytes, "sha256": file.sha256} for file in files if file is not None}
    for name, data in extras.items():
        write_synced(folder / name, data)
        facts[name] = manifests.facts_of(data)
    manifest = {"version": manifests.VERSION, "megasora": __version__, **about, "files": dict(sorted(facts.items()))}
    write_synced(folder / manifests.NAME, json.dumps(manifests.sealed(manifest), indent=1).encode())
    sync_to_disk(folder)


def publish(lease: Lease, folder: Path, *, step: int) -> Path:
    """Give a complete folder of the lease's working folder its name and move the tracker.

    Returns:
        The checkpoint.

    Raises:
        LeaseLostError: another run has taken over; nothing was changed.
        OSError: the file system refused; a checkpoint of the same step that was there is there again.
    """
    final = step_folder(lease.root, step)
    aside = lease.work / f"{ASIDE}{final.name}"
    lease.check()
    try:
        if final.exists():
            os.rename(final, aside)
        os.rename(folder, final)
    except OSError:
        with suppress(OSError):
            os.rename(aside, final)
        lease.check()
        raise
    sync_to_disk(lease.root)
    write_synced(lease.work / TRACKER, f"{final.name}\n".encode())
    os.replace(lease.work / TRACKER, lease.root / TRACKER)
    sync_to_disk(lease.root)
    shutil.rmtree(aside, ignore_errors=True)
    return final


def prune(lease: Lease, *, keep: int, keep_every_steps: int) -> list[Path]:
    """Remove all but the newest `keep` complete checkpoints (0 keeps all); multiples of keep_every_steps stay.

    Raises:
        LeaseLostError: another run has taken over.
        OSError: a folder could not be moved.
    """
    entries = complete_checkpoints(lease.root)
    old = entries[:-keep] if keep else []
    removed = [entry.path for entry in old if not (keep_every_steps and entry.step % keep_every_steps == 0)]
    for path in removed:
        lease.check()
        trash = lease.work / f"pruned_{path.name}"
        os.rename(path, trash)
        shutil.rmtree(trash, ignore_errors=True)
    return removed


def set_aside(lease: Lease, folder: Path) -> Path:
    """Rename a checkpoint that was refused, so that nothing counts it among the good ones; a person may look at it."""
    lease.check()
    target = lease.root / f"refused_{folder.name}_{lease.incarnation}"
    os.rename(folder, lease.work / folder.name)
    os.rename(lease.work / folder.name, target)
    return target


def write_synced(path: Path, data: bytes) -> None:
    """Write a small file; returns when it is on disk."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
