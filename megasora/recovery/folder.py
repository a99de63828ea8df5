"""run_dir/recovery: which file says what, and how one is written and read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megasora.config.files import written_whole


@dataclass(frozen=True)
class RecoveryFolder:
    """Names in run_dir/recovery. Ranks have five digits, incarnations (starts of the run, counted from 1) four."""

    path: Path

    @classmethod
    def of_run(cls, run_dir: Path) -> RecoveryFolder:
        """The folder of a run, which need not exist."""
        return cls(run_dir / "recovery")

    def heartbeat(self, rank: int) -> Path:
        """Where a rank is and when it last was well."""
        return self.path / f"rank_{rank:05d}.json"

    def exit(self, incarnation: int, rank: int) -> Path:
        """How a rank ended, as it saw it."""
        return self.path / f"exit_{incarnation:04d}_rank_{rank:05d}.json"

    def lost(self, incarnation: int, rank: int) -> Path:
        """Last heartbeat of a rank that wrote no exit record, kept by the rank that came after it."""
        return self.path / f"lost_{incarnation:04d}_rank_{rank:05d}.json"

    def stacks(self, incarnation: int, rank: int) -> Path:
        """Python stacks of a rank that hung or was ended by a fatal signal."""
        return self.path / f"stacks_{incarnation:04d}_rank_{rank:05d}.txt"

    def hang(self, incarnation: int) -> Path:
        """Who first saw that the run hangs; every watchdog looks for it."""
        return self.path / f"hang_{incarnation:04d}.json"

    def ended(self, rank: int) -> Path:
        """How a rank's process ended, as its supervisor saw it."""
        return self.path / f"ended_rank_{rank:05d}.json"

    @property
    def goodput(self) -> Path:
        """Where the time went, a line an incarnation."""
        return self.path / "goodput.jsonl"


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    """Write a record that readers see whole or not at all."""
    with written_whole(path) as temporary:
        temporary.write_text(json.dumps(record))


def read_json(path: Path) -> dict[str, Any] | None:
    """A record; None when there is none or it cannot be read."""
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None
