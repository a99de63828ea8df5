"""The log of a run: one line per step whatever happened before, and JSON that any reader takes."""

from __future__ import annotations

import json
import math
from pathlib import Path

from megasora.training.metrics import MetricsLog, StepMetrics


def step(number: int, *, loss: float = 1.0) -> StepMetrics:
    zeros = dict.fromkeys(("step_time_s", "tokens_per_s", "tflops_per_gpu", "data_wait_s", "encode_s", "pad_share"), 0.0)
    return StepMetrics(
        step=number, loss=loss, grad_norm=1.0, lr=1.0, samples=1, tokens=1, mfu=None, decode_frames_per_s=None, imbalance=1.0,
        peak_memory_bytes=0, **zeros,
    )  # fmt: skip


def write(run_dir: Path, *steps: StepMetrics, first_step: int = 0) -> list[str]:
    with MetricsLog(run_dir, active=True, total_steps=9, first_step=first_step, interval_steps=9, tensorboard=False) as log:
        for metrics in steps:
            log.write(metrics)
    return (run_dir / "metrics.jsonl").read_text().splitlines()


def test_a_resumed_run_has_one_line_per_step(tmp_path: Path) -> None:
    write(tmp_path, step(1), step(2), step(3, loss=7.0))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # a run that was killed while it wrote
    lines = write(tmp_path, step(3, loss=8.0), first_step=2)
    assert [(json.loads(line)["step"], json.loads(line)["loss"]) for line in lines] == [(1, 1.0), (2, 1.0), (3, 8.0)]


def test_a_value_that_is_no_number_is_null(tmp_path: Path) -> None:
    (line,) = write(tmp_path, step(1, loss=math.nan))
    assert json.loads(line)["loss"] is None and "NaN" not in line
