"""From the steps that runs of a point have written to medians and quartiles."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megasora.config.files import json_lines

METRICS = {
    "step_time_s": "Step time, s",
    "tokens_per_s": "Tokens/s",
    "samples_per_s": "Samples/s",
    "tflops_per_gpu": "TFLOP/s a rank",
    "mfu": "MFU",
    "peak_memory_bytes": "Peak memory, bytes",
    "data_wait_s": "Waiting for clips, s",
    "encode_s": "Encoding, s",
    "pad_share": "Padding",
    "imbalance": "Imbalance of replicas",
    "loss": "Loss",
}
"""What is collected of a step, and its heading."""
SLOWED = frozenset({"eval", "sample", "checkpoint", "checkpoint_failed", "profile", "skip", "left_out", "go_back"})
"""A step with one of these events did more than a step, or less."""


@dataclass(frozen=True, kw_only=True)
class Spread:
    """A metric over the counted steps of all repeats."""

    count: int
    min: float
    q1: float
    median: float
    q3: float
    max: float

    @property
    def relative(self) -> float:
        """(q3 - q1) / median: the width that half of the steps fill."""
        return (self.q3 - self.q1) / abs(self.median) if self.median else 0.0


def spread_of(values: Sequence[float]) -> Spread:
    """Quartiles by linear interpolation.

    Raises:
        ValueError: there is no value.
    """
    if not values:
        raise ValueError("no values")
    low, first, middle, third, high = np.quantile(np.asarray(values, np.float64), (0, 0.25, 0.5, 0.75, 1)).tolist()
    return Spread(count=len(values), min=low, q1=first, median=middle, q3=third, max=high)


def counted_steps(records: Iterable[Mapping[str, Any]], *, warmup_steps: int) -> list[Mapping[str, Any]]:
    """Steps after the warm-up in which nothing but a step happened."""
    return [
        record
        for record in records
        if record["step"] > warmup_steps and not any(event.get("event") in SLOWED for event in record.get("events", ()))
    ]


def collect(run_dirs: Iterable[Path], *, warmup_steps: int) -> dict[str, Spread]:
    """Metrics of a point over its runs; one that no step has (MFU on a CPU) is left out."""
    values: dict[str, list[float]] = {name: [] for name in METRICS}
    for run_dir in run_dirs:
        for record in counted_steps(json_lines(run_dir / "metrics.jsonl"), warmup_steps=warmup_steps):
            extended = {**record, "samples_per_s": record["samples"] / record["step_time_s"]}
            for name, into in values.items():
                if (value := extended.get(name)) is not None:
                    into.append(float(value))
    return {name: spread_of(found) for name, found in values.items() if found}
