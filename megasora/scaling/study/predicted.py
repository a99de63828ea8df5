"""What a prediction of a point holds, and the names of a step's parts, which predictions and traces share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from megasora.config.memory import memory_estimate
from megasora.config.schema import RunConfig
from megasora.perf.hardware import Hardware, load_hardware
from megasora.scaling.forecast.messages import message_bytes
from megasora.scaling.forecast.step import forecast_step, mean_forecast, parts_dict
from megasora.scaling.workload import planned_clips, steps_of

STEPS = 4
"""Steps that a prediction is the mean of."""

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
        UserError: there is no such profile.
    """
    if hardware is None:
        return None
    profile = load_hardware(hardware)
    return lambda config, ranks: predict(config, world_size=ranks, hardware=profile)


def predict(config: RunConfig, *, world_size: int, hardware: Hardware) -> Predicted:
    """The forecast of a run's first step, on the clips that it trains on.

    Raises:
        UserError: the layout does not divide the ranks, or there are clips of no known size.
    """
    clips = planned_clips(config)
    packs = steps_of(config, clips, world_size=world_size, steps=STEPS)
    forecasts = [forecast_step(config, one, world_size=world_size, hardware=hardware) for one in packs]
    step = mean_forecast(forecasts)
    return Predicted(
        step_time_s=step.step_time_s,
        peak_memory_bytes=_memory(config, step.peak_memory_bytes, world_size=world_size, hardware=hardware),
        communication_bytes=message_bytes(config, packs[0], world_size=world_size),
        parts=parts_dict(step.parts),
    )


def _memory(config: RunConfig, total: float, *, world_size: int, hardware: Hardware) -> float:
    """What a run's metrics call its peak: allocated by torch on a GPU, resident in a process on a CPU, which has no GPU's workspace."""
    if hardware.device == "cuda":
        return total
    return total - memory_estimate(config, world_size=world_size).workspace + hardware.process_bytes
