"""Starts a rank's process and, when any rank of the run died, starts it again together with all others.

For plain srun, where nothing else does (torchrun's agent restarts by itself): one supervisor a task. A rank that still runs when another
one died is given `grace_s` to leave its record and stacks and is then killed, with its helpers. SIGTERM, SIGUSR1 and Ctrl-C go to the
rank and end the supervision once the rank has ended by itself. A rank dies with its supervisor.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from types import FrameType

from megasora.recovery.agreement import POLL_S, Agreement, Place
from megasora.recovery.evidence import Ended, incarnations, read_evidence
from megasora.recovery.folder import RecoveryFolder, write_json
from megasora.recovery.heartbeat import read_beats
from megasora.recovery.kernel import memory_kills, out_of_memory_of
from megasora.recovery.postmortem import first_cause
from megasora.recovery.restarts import Decision, Life, RestartBudget, RestartPolicy, decide

PASSED_ON = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_DIE_WITH_PARENT = 1
"""PR_SET_PDEATHSIG of prctl(2)."""


@dataclass(frozen=True, kw_only=True)
class Supervision:
    """What is supervised, and how."""

    command: Sequence[str]
    """Starts the rank."""
    folder: RecoveryFolder
    """Of its run."""
    policy: RestartPolicy = field(default_factory=RestartPolicy)
    grace_s: float = 15.0
    """How long a rank may go on after another one died."""


class Supervisor:
    """One rank's."""

    def __init__(self, supervision: Supervision, place: Place, agreement: Agreement) -> None:
        self._supervision, self._place, self._agreement = supervision, place, agreement
        self._budget = RestartBudget(supervision.policy)
        self._child: subprocess.Popen[bytes] | None = None
        self._asked: int | None = None
        self._known = 0
        """Newest incarnation when the rank was started."""

    def run(self) -> int:
        """Supervise to the end; the exit code.

        Raises:
            RuntimeError: another supervisor, or the store, is gone.
        """
        before = {number: signal.signal(number, self._pass_on) for number in PASSED_ON}
        try:
            for generation in itertools.count():
                life = self._live(generation)
                decision = self._agree(generation, life)
                if not decision.restart:
                    self._agreement.leave()
                    return decision.code
            raise AssertionError("a count has no end")
        finally:
            self._kill()
            for number, handler in before.items():
                signal.signal(number, handler)

    def _live(self, generation: int) -> Life:
        """Start the rank and wait for its end, or end it when another rank died."""
        kills = memory_kills()
        env = {**os.environ, "MASTER_ADDR": self._place.master_addr, "MASTER_PORT": str(self._place.rank_port(generation))}
        self._known = max(incarnations(self._supervision.folder), default=0)
        self._child = child = subprocess.Popen(self._supervision.command, env=env, process_group=0, preexec_fn=_die_with(os.getpid()))
        if self._asked is not None:
            child.send_signal(self._asked)
        killed = self._wait(child, generation)
        code = child.returncode
        self._kill()
        if code != 0:
            self._agreement.tell_failure(generation)
        self._record(child, generation, by_supervisor=killed, memory_was_short=memory_kills() > kills)
        return Life(rank=self._place.rank, code=code, by_supervisor=killed, stopping=self._asked is not None)

    def _wait(self, child: subprocess.Popen[bytes], generation: int) -> bool:
        """Until the rank has ended, and with success all others too; whether it had to be killed."""
        deadline: float | None = None
        told = False
        while True:
            code = child.poll()
            if code not in (None, 0) or (code == 0 and told and self._agreement.all_succeeded(generation)):
                return False
            if code == 0 and not told:
                self._agreement.tell_success(generation)
                told = True
            if self._agreement.failed(generation):
                if code == 0:
                    return False
                deadline = deadline or time.monotonic() + self._supervision.grace_s
                if time.monotonic() > deadline:
                    self._kill()
                    child.wait()
                    return True
            time.sleep(POLL_S)

    def _agree(self, generation: int, life: Life) -> Decision:
        """Tell the others, and learn what all do next."""
        self._agreement.tell_end(generation, life)
        if self._place.rank != 0:
            return self._agreement.decision(generation)
        step = max((beat.step for beat in read_beats(self._supervision.folder).values()), default=0)
        decision = decide(self._agreement.ends(generation), budget=self._budget, step=step)
        if decision.restart:
            _say(f"{self._why() or decision.reason} at step {step}; start {generation + 2} in {decision.wait_s:.0f} s")
            decision = self._back_off(decision)
        if not decision.restart and decision.code:
            _say(f"ends with code {decision.code}: {decision.reason}")
        self._agreement.tell_decision(generation, decision)
        return decision

    def _why(self) -> str | None:
        """The first cause, as far as the ranks of this generation left records."""
        folder, now = self._supervision.folder, time.time()
        numbers = incarnations(folder)
        if not numbers or numbers[-1] == self._known:
            return None
        cause = first_cause(read_evidence(folder, numbers[-1]), now=now, quiet_s=0)
        return f"rank {cause.rank} on {cause.host}: {cause.what}"

    def _back_off(self, decision: Decision) -> Decision:
        """Wait as decided, unless a supervisor is asked to stop meanwhile."""
        deadline = time.monotonic() + decision.wait_s
        while time.monotonic() < deadline or self._agreement.asked_to_stop():
            if self._asked is not None or self._agreement.asked_to_stop():
                return Decision(restart=False, reason="asked to stop")
            time.sleep(POLL_S)
        return decision

    def _record(self, child: subprocess.Popen[bytes], generation: int, *, by_supervisor: bool, memory_was_short: bool) -> None:
        """How the process ended, for the post-mortem; a run without a folder never began."""
        folder = self._supervision.folder
        killed = child.returncode == -signal.SIGKILL and not by_supervisor
        memory = out_of_memory_of(child.pid) if killed else None
        if killed and memory is None and memory_was_short:
            memory = "the job's control group counts a process ended for want of memory"
        ended = Ended(
            rank=self._place.rank,
            generation=generation,
            host=socket.gethostname(),
            pid=child.pid,
            code=child.returncode,
            by_supervisor=by_supervisor,
            out_of_memory=memory,
            time=time.time(),
        )
        with contextlib.suppress(OSError):
            if folder.path.is_dir():
                write_json(folder.ended(self._place.rank), asdict(ended))

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        again = self._asked == number == signal.SIGINT
        self._asked = number
        if self._child is not None and self._child.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._child.pid, signal.SIGKILL if again else number)
        else:
            self._agreement.ask_to_stop()

    def _kill(self) -> None:
        """End what is left of the rank: the process and its helpers."""
        if self._child is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._child.pid, signal.SIGKILL)
            self._child.poll()


def _die_with(parent: int) -> Callable[[], None]:
    """What a child does before it becomes its program: ask the kernel to end it with the process that started it."""
    prctl = ctypes.CDLL(None).prctl

    def ask() -> None:
        prctl(_DIE_WITH_PARENT, int(signal.SIGKILL))
        if os.getppid() != parent:  # it has ended meanwhile
            os._exit(1)

    return ask


def _say(text: str) -> None:
    print(f"megasora supervise: {text}", file=sys.stderr, flush=True)
