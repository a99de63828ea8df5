"""torchrun's agent, which starts the ranks of a node again when one fails, whatever it failed of."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path

_FIRST_RANK_SPEAKS_S = 5.0
"""How long a rank leaves the mistake to the node's first rank: on rank 0's node that is the one that says it."""


def end_restarts(environment: Mapping[str, str] | None = None) -> None:
    """End this rank's agent, if it is torchrun's and would start the ranks again: the same mistake, --max-restarts times.

    It knows no exit code that means so. A signal it handles does: it ends the other ranks of the node and itself, with exit code 1.
    """
    known = os.environ if environment is None else environment
    restarts_left = int(known.get("TORCHELASTIC_MAX_RESTARTS", "0")) - int(known.get("TORCHELASTIC_RESTART_COUNT", "0"))
    agent = os.getppid()
    if restarts_left <= 0 or not _is_torchrun(agent):
        return
    if known.get("LOCAL_RANK", "0") != "0":
        time.sleep(_FIRST_RANK_SPEAKS_S)
    os.kill(agent, _handled_signal(known))


def _handled_signal(known: Mapping[str, str]) -> signal.Signals:
    """One that the agent ends by: it may be told not to listen to SIGTERM, which batch systems send with other intentions."""
    names = known.get("TORCHELASTIC_SIGNALS_TO_HANDLE", "SIGTERM").split(",")
    return signal.Signals["SIGTERM" if "SIGTERM" in names else names[0].strip()]


def _is_torchrun(pid: int) -> bool:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return False
    return any(Path(word).name == "torchrun" or word in ("torch.distributed.run", "torch.distributed.launch") for word in words)
