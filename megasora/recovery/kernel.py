"""What this host's kernel says of processes it ended for want of memory."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path


def out_of_memory_of(pid: int) -> str | None:
    """The kernel's words on ending a process of this host for want of memory; None where there are none or they may not be read."""
    return out_of_memory_line(kernel_lines(), pid)


def out_of_memory_line(lines: Iterable[str], pid: int) -> str | None:
    """The newest line that says so of this process."""
    killed = [line for line in lines if re.search(r"out of memory|oom[-_]kill|oom_reaper", line, re.IGNORECASE)]
    own = [line for line in killed if re.search(rf"(?<!\d){pid}(?!\d)", line)]
    return own[-1].strip() if own else None


def kernel_lines() -> Sequence[str]:
    """The kernel's log, as far as this user may read it."""
    try:
        answer = subprocess.run(["dmesg"], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return answer.stdout.splitlines()


def memory_kills(cgroup: Path | None = None) -> int:
    """Processes of this process's control group that were ended for want of memory; 0 where nothing counts them (cgroup v1).

    A job's own group (SLURM, a container) can be read where the kernel's log cannot.
    """
    events = (own_cgroup() if cgroup is None else cgroup) / "memory.events"
    try:
        counts = dict(line.split() for line in events.read_text().splitlines())
    except (OSError, ValueError):
        return 0
    return int(counts.get("oom_kill", 0))


def own_cgroup(root: Path = Path("/sys/fs/cgroup")) -> Path:
    """Folder of this process's control group (cgroup v2)."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return root
    unified = next((line.removeprefix("0::") for line in lines if line.startswith("0::")), "/")
    return root / unified.lstrip("/")
