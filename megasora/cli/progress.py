"""Progress on stderr, where that is a terminal; a log file gets none of it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn


class ByteBar:
    """Bytes and rate of a conversion."""

    def __init__(self, name: str) -> None:
        columns = (TextColumn(name), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        console = Console(stderr=True)
        self.progress = Progress(*columns, console=console, disable=not console.is_terminal)
        self.task = self.progress.add_task("", total=None)

    def start(self, done: int, total: int) -> None:
        """Set where it starts and ends."""
        self.progress.update(self.task, total=total, completed=done)

    def advance(self, num_bytes: int) -> None:
        """Count finished bytes."""
        self.progress.advance(self.task, num_bytes)


class RowBar:
    """Rows of a table, and how many of them failed."""

    def __init__(self, name: str) -> None:
        columns = (TextColumn(name), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"), TimeRemainingColumn())
        console = Console(stderr=True)
        self.progress = Progress(*columns, console=console, disable=not console.is_terminal)
        self.task = self.progress.add_task("", total=None, note="")

    def update(self, done: int, total: int | None, failed: int) -> None:
        """Show how far it is."""
        self.progress.update(self.task, completed=done, total=total, note=f"{failed} failed" if failed else "")


@contextlib.contextmanager
def byte_bar(name: str) -> Iterator[ByteBar]:
    """A bar that is gone afterwards."""
    bar = ByteBar(name)
    with bar.progress:
        yield bar


@contextlib.contextmanager
def row_bar(name: str) -> Iterator[RowBar]:
    """A bar that is gone afterwards."""
    bar = RowBar(name)
    with bar.progress:
        yield bar
