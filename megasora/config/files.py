"""Files and folders that appear under their name only when they are whole, names that are taken already, lines that may be cut off."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from megasora.config.errors import UserError


def hidden_beside(path: Path) -> Path:
    """Hidden name in the same folder, of this process alone; ends as `path` does, for writers that look at endings."""
    return path.with_name(f".{path.stem}.{os.uname().nodename}.{os.getpid()}.tmp{path.suffix}")


@contextmanager
def written_whole(path: Path, *, sync: bool = False) -> Iterator[Path]:
    """A hidden name to write a file or a folder under; it becomes `path` when the block ends, and is removed when the block fails.

    Args:
        path: in a folder that exists; a file that is there is replaced, a folder only while it is empty.
        sync: wait until the file is on disk before it gets its name.
    """
    temporary = hidden_beside(path)
    _remove(temporary)  # a process of this number may have been killed here
    try:
        yield temporary
        if sync:
            sync_to_disk(temporary)
        temporary.replace(path)
    finally:
        _remove(temporary)


def json_lines(path: Path) -> Iterator[Any]:
    """Values of a file with one on each line, in order; a line that a crash cut off is passed over. Nothing where there is no file."""
    for line in path.read_text().splitlines() if path.exists() else []:
        with suppress(ValueError):
            yield json.loads(line)


def refuse_existing(path: Path, *, cure: str) -> None:
    """Refuse a name that is taken.

    Raises:
        UserError: it is; ends with the cure.
    """
    if path.exists():
        raise UserError(f"{path} exists; {cure}")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def sync_to_disk(path: Path) -> None:
    """Wait until a file, or a folder's names, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
