"""The `megasora` command: find it, parse it, run it, say what it found.

Each command is one file of `cli/commands`: a frozen dataclass of its arguments and one function. tyro lives in this package only, and heavy
imports happen inside the function that needs them, so that `--help` is quick. A user's mistake is one line on rank 0 with its cure and exit
code 2, never a stack trace.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import warnings
from collections.abc import Sequence

from megasora.cli.agent import end_restarts
from megasora.cli.endings import end_world, leave, note_mistake, rank
from megasora.cli.parsing import parse
from megasora.config.errors import UserError


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command; exits 0, with the command's own code (compare: 1 different), or 2 after a user's mistake."""
    words = list(sys.argv[1:] if argv is None else argv)
    warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")  # `megasora doctor` says so, once
    warnings.filterwarnings(
        "ignore", message="`torch.distributed.*is deprecated", category=FutureWarning
    )  # Megatron's calls, not the user's
    try:
        with end_world():
            _run(words)
            sys.stdout.flush()
    except BrokenPipeError:  # the reader (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it flushes at the end
        leave(128 + signal.SIGPIPE)
    except UserError as error:
        note_mistake(str(error))
        if rank() == 0:
            print(f"megasora: error: {error}", file=sys.stderr, flush=True)
        end_restarts()
        leave(2)
    except KeyboardInterrupt:
        leave(130)


def _run(words: list[str]) -> None:
    command, args = parse(words)
    try:
        answer = command.run(args)
    except ModuleNotFoundError as error:
        if command.extra is None or (error.name or "").startswith("megasora"):
            raise
        raise UserError(
            f'{command.name} needs the package of {error.name}: pip install "megasora[{command.extra}]"; megasora doctor lists all'
        ) from error
    if answer is None:
        return
    if getattr(args, "json", False):
        print(json.dumps(answer.data))
    else:
        answer.show()
    if answer.exit_code:
        leave(answer.exit_code)
