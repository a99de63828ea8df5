"""How a run survives: checkpoints, hangs, steps that must not happen. Part of the schema (`config.schema`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When and what is saved."""

    interval_steps: int = 500
    """Steps between checkpoints; the last step is saved too. 0 saves only the last."""
    save_last: bool = True
    """Save the last step too, also where a run is asked to stop; a run that only measures need not."""
    keep: int = 3
    """Newest checkpoints kept; 0 keeps all."""
    keep_every_steps: int = 0
    """Checkpoints at multiples of this are never removed; 0 means none."""
    asynchronous: bool = True
    """Training waits for a copy into host memory only, threads write it; otherwise it waits until the checkpoint is on disk."""
    local_dir: str | None = None
    """Folder on each node's own disk for copies between checkpoints, used where a run comes back on the same nodes in the same layout."""
    local_interval_steps: int = 0
    """Steps between copies in local_dir, of which the newest two stay."""
    take_over: bool = False
    """Take the run folder from another run that is alive; that one stops at its next step."""


@dataclass(frozen=True, kw_only=True)
class RecoveryConfig:
    """How a run notices that it hangs or is held up."""

    watchdog: bool = True
    """Watch for hangs: leave all ranks' stacks in run_dir/recovery and end with code 75, for the launcher to start the run again."""
    hang_factor: float = 10.0
    """A step is hung after this many medians of recent steps."""
    hang_floor_s: float = 25.0
    """But never sooner (waiting for clips: data.decode_timeout_s later). With steps of a second a hang is found within 30 s."""
    first_step_s: float = 900.0
    """Longest first step: it compiles kernels and connects groups."""
    start_s: float = 3600.0
    """Longest time until the first step begins: encoders and weights are loaded."""
    save_s: float = 1800.0
    """Longest save."""
    evaluate_s: float = 3600.0
    """Longest evaluation or drawing of samples."""
    report_interval_steps: int = 100
    """Steps between reports of goodput and of slow ranks; 0 gives none."""
    straggler_factor: float = 1.3
    """A rank is slow that needs this many times the median of all ranks."""


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """What is done about steps whose loss or gradient is not finite or far off; it is seen before the weights change."""

    on_bad_step: Literal["leave_out", "stop"] = "leave_out"
    """leave_out: pass over the step's samples, and go back to the newest checkpoint when steps stay bad; stop: end the run."""
    window: int = 100
    """Good steps that a step is compared with; before half of them are known only what is not finite is bad."""
    loss_deviations: float = 10.0
    """A loss so many standard deviations above the mean of the window is bad; 0 looks at no finite loss."""
    norm_factor: float = 20.0
    """A gradient norm so many times the median of the window is bad; 0 looks at no finite norm."""
    patience: int = 2
    """Bad steps in a row after which the weights are suspect: the run goes back to its newest checkpoint."""
    budget: int = 10
    """More steps left out within a window end the run."""
