"""Clips that are not tried any more, remembered over restarts: a file that fails costs its step a clip each time, one that hangs a thread.

In the run's folder each rank keeps failures_00012.jsonl, a line for each failed clip.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from megasora.config.files import json_lines


@dataclass(frozen=True, kw_only=True)
class Failures:
    """Of one clip, so far."""

    count: int
    last_reason: str


def read_failures(folder: Path) -> dict[str, Failures]:
    """Failures by clip, from all ranks' files."""
    found: dict[str, Failures] = {}
    for file in sorted(folder.glob("failures_*.jsonl")):
        for record in json_lines(file):
            try:
                clip, reason = str(record["clip"]), str(record["reason"])
            except (KeyError, TypeError):
                continue
            found[clip] = Failures(count=found[clip].count + 1 if clip in found else 1, last_reason=reason)
    return found


class Quarantine:
    """One rank's view; threads may share it.

    Args:
        folder: of the run's failures.
        rank: whose files are written.
        known: failures so far, the same on every rank.
        limit: failures after which a clip is not tried any more; 0 tries for ever.
    """

    def __init__(self, folder: Path, *, rank: int, known: Mapping[str, Failures], limit: int) -> None:
        self._failures_file = folder / f"failures_{rank:05d}.jsonl"
        self._known, self._limit = dict(known), limit
        self._lock = threading.Lock()
        folder.mkdir(parents=True, exist_ok=True)

    def reason(self, clip: str) -> str | None:
        """Why a clip is not tried; None where it is."""
        with self._lock:
            failures = self._known.get(clip)
        if not self._limit or failures is None or failures.count < self._limit:
            return None
        return f"in quarantine after {failures.count} failures, the last: {failures.last_reason}"

    def failed(self, clip: str, reason: str) -> None:
        """Remember a failure."""
        with self._lock:
            count = self._known[clip].count if clip in self._known else 0
            self._known[clip] = Failures(count=count + 1, last_reason=reason)
            with suppress(OSError), self._failures_file.open("a") as file:  # on a full disk a restart counts fewer
                file.write(json.dumps({"clip": clip, "reason": reason}) + "\n")
