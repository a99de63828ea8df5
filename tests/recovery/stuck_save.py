"""`python -m tests.recovery.stuck_save TRAIN_WORDS...`: `megasora`, where rank 1's writes to the checkpoint of step 10 never return."""

from __future__ import annotations

import os
import tempfile

from megasora import cli
from megasora.checkpoint import rank_file


def plant() -> None:
    """Let the write wait in the kernel, as on a network file system without its server: it reads a pipe that nobody writes to."""
    pipe = os.path.join(tempfile.mkdtemp(), "pipe")
    os.mkfifo(pipe)
    real = rank_file.HashingFile._append

    def append(file: rank_file.HashingFile, part: memoryview) -> None:
        if "step_00000010" in str(file._file.name):
            os.open(pipe, os.O_RDONLY)
        real(file, part)

    rank_file.HashingFile._append = append  # type: ignore[method-assign]


if __name__ == "__main__":
    if os.environ["RANK"] == "1":
        plant()
    cli.main()
