"""What only a real step shows, from traced runs of one rank: host time of launches, the optimizer with its many small tensors, the feed.

Kernels' rates are measured apart (`kernels`). What a single run took beyond them is spread over its launches; two runs with packs of other
sizes tell launches from kernels, whose rates are then corrected by one factor. On a GPU, where kernels hide the host, a launch stays as
measured unless launches are what the step waits for.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from megasora.config.errors import UserError
from megasora.config.files import json_lines
from megasora.config.io import load_yaml
from megasora.config.memory import memory_estimate
from megasora.config.profile_steps import profiled_steps
from megasora.config.schema import RunConfig
from megasora.perf.hardware import Hardware
from megasora.scaling.forecast.step import StepForecast, forecast_step, mean_forecast
from megasora.scaling.study.trace.breakdown import OTHER
from megasora.scaling.study.trace.summary import mean_parts
from megasora.scaling.workload import planned_clips, steps_of

STEPS = 8
"""Steps that the forecast is the mean of."""
WARMUP_STEPS = 3
"""First steps that are not counted."""
LAUNCH_SCALE = 1e-5
"""Seconds: a launch's order of magnitude, for the least squares."""
ALIKE = 100.0
"""Condition number above which runs do not tell launches from kernels."""
LEAST_FACTOR = 0.1
"""On kernels' times; less would say that they were not measured on this machine."""


@dataclass(frozen=True, kw_only=True)
class _Run:
    """One reference run; seconds of a step."""

    measured: dict[str, float]
    """By part, as without the profiler."""
    compute: float
    """What the forecast says without launches."""
    launches: float
    """That the step waits for."""
    optimizer: float
    tokens: int
    process_bytes: float

    @property
    def passes(self) -> float:
        """Forward and backward passes, measured."""
        return self.measured["compute"] + self.measured["gaps"]


def with_reference(hardware: Hardware, run_dirs: Sequence[Path]) -> Hardware:
    """The profile with what traced runs of one rank on this machine took beyond its kernels.

    Args:
        hardware: rates that were measured on the same machine.
        run_dirs: runs of one rank, `--profile.steps` among their steps; several differ in the tokens of their packs.

    Raises:
        UserError: a run is not there, not of one rank, or was not traced; or several have packs of the same tokens.
    """
    runs = [_read(hardware, run_dir) for run_dir in run_dirs]
    factor, launch_s = _fit(runs, run_dirs)
    names = " and ".join(run_dir.name for run_dir in run_dirs)
    slower = hardware.rates.scaled(1 / factor)
    return replace(
        hardware,
        process_bytes=max(run.process_bytes for run in runs) if hardware.device == "cpu" else 0.0,
        launch_s=hardware.launch_s if launch_s is None else launch_s,
        feed_s=sum(run.measured["data"] for run in runs) / sum(run.tokens for run in runs),
        rates=replace(
            slower, adam=hardware.rates.adam * statistics.mean(run.optimizer / max(run.measured["optimizer"], 1e-9) for run in runs)
        ),
        sources=(*hardware.sources, f"launches, optimizer and feed: traced runs of one rank ({names}); kernels' times x {factor:.3g}"),
    )


def _read(hardware: Hardware, run_dir: Path) -> _Run:
    config = load_yaml(run_dir / "config.yaml")
    if config.parallel.model_parallel_size != 1:
        raise UserError(f"--reference {run_dir} is a run of several ranks; make one of a single rank")
    parts = mean_parts([run_dir / "profile"])
    if parts is None:
        raise UserError(f"--reference {run_dir} was not traced; run it again with --profile.steps 8:10")
    bare = replace(hardware, feed_s=0.0)
    none, some = (_forecast(config, replace(bare, launch_s=launch)) for launch in (0.0, 1e-6))
    return _Run(
        measured=_untraced(parts, run_dir),
        compute=none.parts.compute,
        launches=(some.parts.total - none.parts.total) / 1e-6,
        optimizer=none.parts.optimizer,
        tokens=none.tokens,
        process_bytes=_process_bytes(config, run_dir) if hardware.device == "cpu" else 0.0,
    )


def _fit(runs: Sequence[_Run], run_dirs: Sequence[Path]) -> tuple[float, float | None]:
    """(factor on kernels' times, seconds of a launch or None where none shows) that give the runs' passes, relative errors squared least.

    Raises:
        UserError: several runs that do not differ.
    """
    if all(run.launches < 1 for run in runs):  # but for rounding
        return 1.0, None
    if len(runs) == 1:
        (run,) = runs
        return 1.0, max(0.0, (run.passes - run.compute) / run.launches)
    shares = np.array([[run.compute / run.passes, run.launches * LAUNCH_SCALE / run.passes] for run in runs])
    if np.linalg.cond(shares) > ALIKE:
        raise UserError(
            f"--reference {' '.join(map(str, run_dirs))}: packs of the same tokens; make one with other --data.num_microbatches"
        )
    factor, launch = (float(value) for value in np.linalg.lstsq(shares, np.ones(len(runs)), rcond=None)[0])
    if launch < 0:
        factor, launch = float(shares[:, 0].sum() / (shares[:, 0] ** 2).sum()), 0.0
    return max(factor, LEAST_FACTOR), launch * LAUNCH_SCALE


def _process_bytes(config: RunConfig, run_dir: Path) -> float:
    """Resident memory beside the model and its activations, before the profiler took its own."""
    first = profiled_steps(config.profile.steps)[0]
    peak = max(line["peak_memory_bytes"] for line in json_lines(run_dir / "metrics.jsonl") if line["step"] < first)
    estimate = memory_estimate(config, world_size=1)
    return max(0.0, float(peak) - (estimate.total - estimate.workspace))


def _untraced(parts: Mapping[str, float], run_dir: Path) -> dict[str, float]:
    """The trace's parts, scaled to the run's steps without the profiler; saves and evaluations (`other`) are in neither."""
    lines = [line for line in json_lines(run_dir / "metrics.jsonl") if line["step"] > WARMUP_STEPS]
    quiet = [line["step_time_s"] for line in lines if not line["events"]]
    if not quiet:
        raise UserError(f"--reference {run_dir} has no step without a trace; give it more steps")
    factor = statistics.median(quiet) / sum(seconds for name, seconds in parts.items() if name != OTHER)
    return {name: seconds * factor for name, seconds in parts.items()}


def _forecast(config: RunConfig, hardware: Hardware) -> StepForecast:
    steps = steps_of(config, planned_clips(config), world_size=1, steps=STEPS)
    return mean_forecast([forecast_step(config, packs, world_size=1, hardware=hardware) for packs in steps])
