"""Small results made by hand."""

from __future__ import annotations

from typing import Any

from megasora.scaling.study.collect import spread_of
from megasora.scaling.study.results import PointResult, Results


def point(name: str, gpus: int, tokens_per_s: float, **changes: Any) -> PointResult:
    """A measured point; steps of 1 s within 2 %."""
    layout = name.split("_")[0]
    values: dict[str, Any] = {
        "id": name,
        "layout": layout,
        "size": "small",
        "gpus": gpus,
        "scaling": ("strong",),
        "axes": {"tp": 1, "pp": 1, "vp": 1, "cp": 1, "dp": gpus},
        "status": "done",
        "repeats": 1,
        "command": "megasora train tiny",
        "metrics": {
            "step_time_s": spread_of([0.99, 1.0, 1.01]),
            "tokens_per_s": spread_of([tokens_per_s * 0.99, tokens_per_s, tokens_per_s * 1.01]),
            "peak_memory_bytes": spread_of([2e9]),
        },
    }
    return PointResult(**{**values, **changes})


def results(*points: PointResult, **changes: Any) -> Results:
    """A study of these points."""
    values: dict[str, Any] = {
        "name": "made",
        "created": "2026-11-28 12:00:00",
        "command": "megasora study run grid.yaml --output made",
        "machine": {"host": "h", "cpu": "a <CPU>", "cores": 2, "memory_bytes": 8e9, "gpus": []},
        "versions": {"torch": "2.13.0"},
        "commit": "abc",
        "grid": {"steps": 5, "warmup_steps": 2, "repeats": 1},
        "points": points,
    }
    return Results(**{**values, **changes})
