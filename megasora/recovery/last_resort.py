"""Ends a process whose watchdog cannot: that one reads and writes files, and a file system that blocks takes it along.

This thread touches no file. It gives the watchdog time to end the process in order, with record and stacks, and then ends it without. A
thread that the kernel does not let go of (an NFS mount without its server) keeps even an ended process until the server is back.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable

_SAY_S = 5.0
"""How long saying it may take: the log may lie on the file system that blocks."""
_LATE_S = 5.0
"""A look that comes so much later than it should means that this process was stopped."""


class LastResort:
    """The thread.

    Args:
        over_s: seconds since what the process does should have ended, counted from the time it is given at the earliest.
        grace_s: what the watchdog is left of them.
        code: exit code.
        poll_s: time between looks.
        clock: monotonic seconds.
        end: ends the process.
    """

    def __init__(
        self,
        over_s: Callable[[float], float],
        *,
        grace_s: float,
        code: int,
        poll_s: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
        end: Callable[[int], object] = os._exit,
    ) -> None:
        self._over_s, self._grace_s, self._code, self._poll_s, self._clock, self._end = over_s, grace_s, code, poll_s, clock, end
        self._looked_at = self._resumed_at = clock()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="megasora-last-resort", daemon=True)

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def stop(self) -> None:
        """Look no more."""
        self._stopped.set()

    def look(self) -> bool:
        """Whether the process is to end."""
        now = self._clock()
        if now - self._looked_at > self._poll_s + _LATE_S:
            self._resumed_at = now
        self._looked_at = now
        return self._over_s(self._resumed_at) > self._grace_s

    def _watch(self) -> None:
        while not self._stopped.wait(self._poll_s):
            if self.look():
                saying = threading.Thread(target=_say, args=(self._code,), daemon=True)
                saying.start()
                saying.join(_SAY_S)
                self._end(self._code)
                return


def _say(code: int) -> None:
    os.write(
        sys.stderr.fileno(),
        b"megasora: the run hangs and its folder cannot be written: a file system blocks; the rank ends with code %d, without a record, "
        b"and was here:\n" % code,
    )
    faulthandler.dump_traceback(sys.stderr, all_threads=True)
