"""How a command ends: with an answer for a person or a program, in one line, or with an exit code."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from megasora.config.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a command found. `main` prints one of the two, on stdout."""

    data: object
    """For programs (`--json`): what json.dumps takes."""
    show: Callable[[], None]
    """For people."""
    exit_code: int = 0


def lines(text: Iterable[str]) -> Callable[[], None]:
    """An answer's `show` that prints lines."""
    return lambda: print("\n".join(text))


def leave(code: int) -> None:
    """End now: a failed rank must not wait in a destructor for ranks that go on."""
    sys.stdout.flush()
    sys.stderr.flush()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        os._exit(code)
    sys.exit(code)


def note_mistake(text: str) -> None:
    """Append a user's mistake to the file that MEGASORA_MISTAKE_FILE names, if it does.

    A job file must know it from a crash, and the exit code 2 of one rank drowns in the codes of those that are ended with it.
    """
    name = os.environ.get("MEGASORA_MISTAKE_FILE")
    if name:
        with contextlib.suppress(OSError), open(name, "a") as file:
            file.write(f"rank {rank()}: {text}\n")


@contextlib.contextmanager
def end_world() -> Iterator[None]:
    """Leave the process groups that what runs inside has started, unless it fails: then other ranks may still wait in one."""
    yield
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def rank() -> int:
    """This process's rank by its launcher; 0 without one."""
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))


@contextlib.contextmanager
def file_errors(interrupted: str | None = None) -> Iterator[None]:
    """Make the operating system's refusals one line, and say what an interruption leaves.

    Raises:
        UserError: a file cannot be read or written.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"{error.filename or 'a file'}: {error.strerror or error}") from error
    except KeyboardInterrupt:
        if interrupted:
            print(f"megasora: {interrupted}", file=sys.stderr)
        raise
