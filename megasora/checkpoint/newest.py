"""What a run goes on from: the newest of its checkpoints and of the copies on its nodes, whichever is whole; all ranks decide together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megasora.checkpoint.lease import Lease
from megasora.checkpoint.local_copies import Copy, LocalCopies
from megasora.checkpoint.store import complete_checkpoints
from megasora.checkpoint.verification import Refused, Verified, newest_good
from megasora.config.errors import UserError
from megasora.parallel.agreement import told_by_rank_0


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a run goes on from.

    Attributes:
        folder: a checkpoint, or this rank's part of a copy; None when there is nothing at all.
        manifest: its manifest, {} without one.
        refused: newer checkpoints that are damaged.
        copy: this rank's part, where it is a copy.
        passed_over: why a newer copy was not taken.
    """

    folder: Path | None
    manifest: dict[str, Any]
    refused: tuple[Refused, ...] = ()
    copy: Copy | None = None
    passed_over: str | None = None


def newest_anywhere(root: Path, *, lease: Lease | None, copies: LocalCopies | None, parallel: Mapping[str, Any]) -> Found:
    """The newest whole state; a copy before a checkpoint of the same step, for it is near.

    Args:
        root: the run's checkpoints folder.
        lease: rank 0's, with which refused folders are renamed; None on the others.
        copies: of the run; None where it makes none.
        parallel: the run's layout.

    Raises:
        UserError: a checkpoint is of another format, or there are some, all are damaged, and there is no copy.
    """
    if copies is None:
        return _of(newest_good(root, lease=lease), None)
    saved = told_by_rank_0(lambda: max((entry.step for entry in complete_checkpoints(root)), default=0))
    copy, passed_over = copies.newest(at_least=saved, parallel=parallel)
    if copy is not None:
        return Found(folder=copy.folder, manifest=copy.manifest, copy=copy, passed_over=passed_over)
    try:
        good, problem = newest_good(root, lease=lease), None
    except UserError as error:
        good, problem = Verified(folder=None, manifest={}, refused=()), error
    reached = good.manifest.get("step", 0)
    if reached < saved or problem is not None:  # newer checkpoints were damaged: a copy may be newer than what is left
        copy, _ = copies.newest(at_least=reached + 1, parallel=parallel)
        if copy is not None:
            return Found(folder=copy.folder, manifest=copy.manifest, refused=good.refused, copy=copy, passed_over=passed_over)
    if problem is not None:
        raise problem
    return _of(good, passed_over)


def _of(good: Verified, passed_over: str | None) -> Found:
    return Found(folder=good.folder, manifest=good.manifest, refused=good.refused, passed_over=passed_over)
