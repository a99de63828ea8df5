"""A whole run from one step: its steps, the stalls of its checkpoints, the failures of its GPUs, hours and money."""

from __future__ import annotations

from dataclasses import dataclass

from megasora.config.pipeline_split import stage_parameters
from megasora.config.schema import RunConfig
from megasora.perf.hardware import Hardware
from megasora.scaling.forecast.step import StepForecast
from megasora.scaling.settings import Failures

ASYNCHRONOUS_SHARE = 0.04
"""Stall of an asynchronous save over a synchronous one (benchmarks/results/2026-11-28_checkpoint_cpu.md: 0.035 to 0.043 at 2.3 GB)."""


@dataclass(frozen=True, kw_only=True)
class RunForecast:
    """A run of all its steps."""

    step: StepForecast
    steps: int
    stall_s: float
    """Of one checkpoint: the copy to host memory, which training waits for."""
    goodput: float
    """Share of the wall time that trains steps that are kept."""
    hours: float
    """Wall time of the run."""
    gpu_hours: float
    dollars: float | None
    """None without a price."""


def forecast_run(config: RunConfig, step: StepForecast, *, hardware: Hardware, failures: Failures) -> RunForecast:
    """The run from its step.

    Between two failures, M seconds apart, a job loses half of an interval between checkpoints and a restart; a checkpoint takes its stall
    out of every interval (Young's first-order model, CACM 17(9), 1974).
    """
    seconds = step.step_time_s * (1 + failures.straggling)
    steps = config.train.steps
    interval = config.checkpoint.interval_steps or steps
    stall = _stall_s(config, world_size=step.world_size, hardware=hardware)
    stalled = stall / (interval * seconds + stall)
    between = failures.gpu_hours_between * 3600 / step.world_size
    lost = min(1.0, (min(interval, steps) * seconds / 2 + failures.restart_s) / between)
    goodput = (1 - stalled) * (1 - lost)
    hours = steps * seconds / 3600 / goodput if goodput > 0 else float("inf")
    price = hardware.dollars_per_gpu_hour
    return RunForecast(
        step=step,
        steps=steps,
        stall_s=stall,
        goodput=goodput,
        hours=hours,
        gpu_hours=hours * step.world_size,
        dollars=None if price is None else price * hours * step.world_size,
    )


def _stall_s(config: RunConfig, *, world_size: int, hardware: Hardware) -> float:
    """Copy of a rank's share of weights, optimizer and moving average (14 bytes a parameter in bf16, 12 in fp32, 4 more with the average),
    which all ranks share out (checkpoint/staging.py)."""
    parallel = config.parallel
    fullest = max(stage_parameters(config.model, parallel)) * parallel.pipeline_model_parallel_size
    size = (14 if config.precision.dtype == "bf16" else 12) + (4 if config.optimizer.ema_decay > 0 else 0)
    copied = fullest * size / world_size
    stall = copied / hardware.host_bytes_per_s
    return stall if config.checkpoint.asynchronous else stall / ASYNCHRONOUS_SHARE
