"""Clips that are not tried any more, remembered over restarts: a file that fails costs its step a clip each time, one that hangs a thread,
one that crashes the decoder the whole job.

In the run's folder each rank keeps two files: failures_00012.jsonl, a line for each failed clip, and decoding_00012.json, what its threads
are decoding now. What a process leaves in the latter has died with it: each clip there counts as failed once.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

DIED = "the process ended while it was decoded"


@dataclass(frozen=True, kw_only=True)
class Failures:
    """Of one clip, so far."""

    count: int
    last_reason: str


def read_failures(folder: Path) -> dict[str, Failures]:
    """Failures by clip, from all ranks' files; what dead processes were decoding becomes failures. One process calls it, before any rank
    of the run decodes."""
    for file in sorted(folder.glob("decoding_*.json")):
        died = _clips_in(file)
        _append(folder / file.name.replace("decoding", "failures").replace(".json", ".jsonl"), dict.fromkeys(died, DIED))
        file.unlink()
    found: dict[str, Failures] = {}
    for file in sorted(folder.glob("failures_*.jsonl")):
        for line in file.read_text().splitlines():
            try:
                record = json.loads(line)
                clip, reason = str(record["clip"]), str(record["reason"])
            except (ValueError, KeyError, TypeError):  # a line that a crash cut off
                continue
            found[clip] = Failures(count=found[clip].count + 1 if clip in found else 1, last_reason=reason)
    return found


def _clips_in(file: Path) -> list[str]:
    try:
        found = json.loads(file.read_text())
    except ValueError:  # cut off
        return []
    return [str(clip) for clip in found] if isinstance(found, list) else []


def _append(file: Path, reasons: Mapping[str, str]) -> None:
    if reasons:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a") as out:
            out.writelines(json.dumps({"clip": clip, "reason": reason}) + "\n" for clip, reason in reasons.items())


class Quarantine:
    """One rank's view; threads may share it.

    Args:
        folder: of the run's failures.
        rank: whose files are written.
        known: failures so far, the same on every rank.
        limit: failures after which a clip is not tried any more; 0 tries for ever.
    """

    def __init__(self, folder: Path, *, rank: int, known: Mapping[str, Failures], limit: int) -> None:
        self._failures_file, self._decoding_file = folder / f"failures_{rank:05d}.jsonl", folder / f"decoding_{rank:05d}.json"
        self._known, self._limit = dict(known), limit
        self._decoding: list[str] = []
        self._closed = False
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
            _append(self._failures_file, {clip: reason})

    @contextmanager
    def decoding(self, clips: Sequence[str]) -> Iterator[None]:
        """Have it on disk that these are being decoded, in case the process does not survive it."""
        self._note(add=clips)
        try:
            yield
        finally:
            self._note(remove=clips)

    def close(self) -> None:
        """Decoding ends here, until it begins again: what runs on is not to blame for the end of the process."""
        with self._lock:
            self._closed = True
            self._decoding_file.unlink(missing_ok=True)

    def _note(self, *, add: Sequence[str] = (), remove: Sequence[str] = ()) -> None:
        with self._lock:
            self._decoding += add
            for clip in remove:
                self._decoding.remove(clip)
            self._closed = self._closed and not add
            if not self._closed:
                self._decoding_file.write_text(json.dumps(self._decoding))
