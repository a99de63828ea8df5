"""Times of an operation on a CPU or a GPU: a median over repeats, each of as many calls as the clock needs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

SHORTEST_S = 0.02
"""A repeat takes at least so long, so that the clock and one interruption count little."""


@dataclass(frozen=True, kw_only=True)
class Timed:
    """Seconds of one call."""

    median_s: float
    min_s: float
    max_s: float


def timed(call: Callable[[], object], *, device: torch.device, repeats: int) -> Timed:
    """Median over repeats of the time of one call, after a warm-up.

    Args:
        call: what is timed; all its work is on the device's current stream or done when it returns.
        device: of the work.
        repeats: at least 1.
    """
    call()
    calls = max(1, round(SHORTEST_S / max(_once(call, 1, device), 1e-7)))
    times = [_once(call, calls, device) / calls for _ in range(repeats)]
    return Timed(median_s=statistics.median(times), min_s=min(times), max_s=max(times))


def _once(call: Callable[[], object], calls: int, device: torch.device) -> float:
    wait(device)
    started = time.perf_counter()
    for _ in range(calls):
        call()
    wait(device)
    return time.perf_counter() - started


def wait(device: torch.device) -> None:
    """Until the device has nothing to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
