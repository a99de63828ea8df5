"""What only a real step shows, from a traced run of one rank: host time of launches, the optimizer with its many small tensors, the feed.

Kernels' rates are measured apart (`kernels`); what the run took beyond them is spread over its launches. On a GPU, where kernels hide the
host, launches come out as 0 unless they are what the step waits for.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from megasora.config.errors import UserError
from megasora.config.files import json_lines
from megasora.config.io import load_yaml
from megasora.config.memory import memory_estimate
from megasora.config.profile_steps import profiled_steps
from megasora.config.schema import RunConfig
from megasora.perf.hardware import Hardware
from megasora.scaling.forecast.step import StepForecast, forecast_step, mean_forecast
from megasora.scaling.study.trace.summary import mean_parts
from megasora.scaling.workload import planned_clips, steps_of

STEPS = 8
"""Steps that the forecast is the mean of."""
WARMUP_STEPS = 3
"""First steps that are not counted."""


def with_reference(hardware: Hardware, run_dir: Path) -> Hardware:
    """The profile with what a traced run of one rank on this machine took beyond its kernels.

    Args:
        hardware: rates that were measured on the same machine.
        run_dir: a run of one rank, `--profile.steps` among its steps.

    Raises:
        UserError: the run is not there, not of one rank, or was not traced.
    """
    config = load_yaml(run_dir / "config.yaml")
    if config.parallel.model_parallel_size != 1:
        raise UserError(f"--reference {run_dir} is a run of several ranks; make one of a single rank")
    parts = mean_parts([run_dir / "profile"])
    if parts is None:
        raise UserError(f"--reference {run_dir} was not traced; run it again with --profile.steps 8:10")
    measured = _untraced(parts, run_dir)
    forward_backward = measured["compute"] + measured["gaps"]
    bare = replace(hardware, launch_s=0.0, feed_s=0.0)
    none, some = (_forecast(config, replace(bare, launch_s=launch)) for launch in (0.0, 1e-6))
    launches = (some.parts.total - none.parts.total) / 1e-6
    launch_s = max(0.0, (forward_backward - none.parts.compute) / launches)
    tokens = none.tokens
    optimizer = none.parts.optimizer * hardware.rates.adam / max(measured["optimizer"], 1e-9)
    return replace(
        hardware,
        process_bytes=_process_bytes(config, run_dir) if hardware.device == "cpu" else 0.0,
        launch_s=launch_s,
        feed_s=measured["data"] / tokens,
        rates=replace(hardware.rates, adam=optimizer),
        sources=(*hardware.sources, f"launches, optimizer and feed: a traced run of {config.recipe} on one rank ({run_dir.name})"),
    )


def _process_bytes(config: RunConfig, run_dir: Path) -> float:
    """Resident memory beside the model and its activations, before the profiler took its own."""
    first = profiled_steps(config.profile.steps)[0]
    peak = max(line["peak_memory_bytes"] for line in json_lines(run_dir / "metrics.jsonl") if line["step"] < first)
    estimate = memory_estimate(config, world_size=1)
    return max(0.0, float(peak) - (estimate.total - estimate.workspace))


def _untraced(parts: Mapping[str, float], run_dir: Path) -> dict[str, float]:
    """The trace's parts, scaled to the run's steps without the profiler."""
    lines = [line for line in json_lines(run_dir / "metrics.jsonl") if line["step"] > WARMUP_STEPS]
    quiet = [line["step_time_s"] for line in lines if not line["events"]]
    if not quiet:
        raise UserError(f"--reference {run_dir} has no step without a trace; give it more steps")
    factor = statistics.median(quiet) / sum(parts.values())
    return {name: seconds * factor for name, seconds in parts.items()}


def _forecast(config: RunConfig, hardware: Hardware) -> StepForecast:
    steps = steps_of(config, planned_clips(config), world_size=1, steps=STEPS)
    return mean_forecast([forecast_step(config, packs, world_size=1, hardware=hardware) for packs in steps])
