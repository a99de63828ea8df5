"""What the commands ask of a user, and nothing heavy: where clips come from, how often GPUs fail."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Clips = Literal["auto", "manifest", "largest", "drawn"]
"""Where clips come from (`scaling.workload`); auto: the manifest where the recipe has one, else largest."""


@dataclass(frozen=True, kw_only=True)
class Failures:
    """How often a job dies and what that costs."""

    gpu_hours_between: float = 50_000.0
    """GPU-hours of a job between two failures that end it. 419 unexpected interruptions in 54 days on 16,384 GPUs (The Llama 3 Herd of
    Models, arXiv 2407.21783, section 3.3.4) are one in 50,700."""
    restart_s: float = 300.0
    """From a failure to the next step: notice, requeue, start, load (chosen; CPU runs took 16 to 47 s, a large one loads 200 GB)."""
    straggling: float = 0.0
    """Share by which a job's slowest GPU is slower than the others (0.02: 2 %); every step waits for it."""
