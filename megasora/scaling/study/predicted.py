"""What a prediction of a point holds, and the names of a step's parts, which predictions and traces share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from megasora.config.errors import UserError
from megasora.config.schema import RunConfig

PARTS = (
    "compute",
    "tensor_parallel",
    "context_parallel",
    "pipeline",
    "bubble",
    "data_parallel",
    "optimizer",
    "data",
    "gaps",
)
"""Where a step's time goes on a rank; communication counts where no compute covers it.

compute            forward and backward kernels
tensor_parallel, context_parallel, data_parallel   collectives of those groups
pipeline           messages between stages, as long as they travel
bubble             waiting: for a stage's message, and for all ranks to agree at a step's end
optimizer          the update and its moving average
data               waiting for clips, and encoding them
gaps               nothing runs: launches come too late, or the host computes
"""


@dataclass(frozen=True)
class Predicted:
    """What a step should need."""

    step_time_s: float
    peak_memory_bytes: float
    """Of the fullest rank."""
    communication_bytes: Mapping[str, int]
    """Payload of a rank and step by group (tp, cp, pp, dp)."""
    parts: Mapping[str, float]
    """Seconds by `PARTS`, of the slowest rank; they add up to the step's time."""


Predict = Callable[[RunConfig, int], Predicted | None]
"""(config, ranks) -> what to expect; None where the hardware profile cannot say."""


def predictor(hardware: str | None) -> Predict | None:
    """What predicts points on a hardware profile; None without one.

    Args:
        hardware: name or file of a profile (`megasora.perf.hardware.load_hardware`).

    Raises:
        UserError: there is no such profile, or this version cannot predict.
    """
    if hardware is None:
        return None
    from megasora.perf.hardware import load_hardware

    load_hardware(hardware)
    # WIRED HERE: return lambda config, ranks: the prediction of megasora.scaling.forecast on this profile, as a `Predicted`
    raise UserError("--hardware: predictions are not in this version; run the study without it, report and compare need none")
