"""What a traced run of one rank adds to a profile: the forecast of that very run is then its own time."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from megasora import recipes
from megasora.config.errors import UserError
from megasora.config.io import save_yaml
from megasora.config.schema import ParallelConfig, ProfileConfig
from megasora.perf.hardware import Hardware, load_hardware
from megasora.scaling.study.calibrate import reference
from megasora.scaling.study.predicted import predict

PARTS = {"compute": 0.2, "gaps": 0.1, "optimizer": 0.05, "data": 0.05, "tensor_parallel": 0.0}
"""Seconds of a traced step: 0.4; the steps without a trace took half of that."""


def machine() -> Hardware:
    """A computer whose kernels are quick: what the run takes is its host's time."""
    h100 = load_hardware("h100")
    return replace(h100, device="cpu", compute_loss=((1.0, 1.0),), rates=replace(h100.rates, encoder=0.0), name="desk")


def run_folder(folder: Path, **parallel: int) -> Path:
    config = replace(recipes.get("tiny"), profile=ProfileConfig(steps="8:10"), parallel=ParallelConfig(**parallel))  # type: ignore[arg-type]
    save_yaml(config, folder / "config.yaml")
    lines = [
        {"step": step, "step_time_s": 9.0 if step < 4 else 0.2, "peak_memory_bytes": 500_000_000, "events": []} for step in range(1, 8)
    ]
    lines += [
        {"step": step, "step_time_s": 0.4, "peak_memory_bytes": 2_000_000_000, "events": [{"event": "profile"}]} for step in (8, 9, 10)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_the_run_is_forecast_at_its_own_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "mean_parts", lambda folders: PARTS)
    hardware = reference.with_reference(machine(), run_folder(tmp_path))
    forecast = predict(recipes.get("tiny"), world_size=1, hardware=hardware)
    assert forecast.step_time_s == pytest.approx(0.2, rel=0.02)
    assert forecast.parts["compute"] + forecast.parts["gaps"] == pytest.approx(0.15, rel=0.02)
    assert forecast.parts["optimizer"] == pytest.approx(0.025, rel=0.02)
    assert forecast.parts["data"] == pytest.approx(0.025, rel=0.02)
    assert forecast.peak_memory_bytes == pytest.approx(500_000_000, rel=1e-6)


def test_what_is_no_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "mean_parts", lambda folders: None)
    with pytest.raises(UserError, match="--profile.steps 8:10"):
        reference.with_reference(machine(), run_folder(tmp_path))
    with pytest.raises(UserError, match="make one of a single rank"):
        reference.with_reference(machine(), run_folder(tmp_path, tensor_model_parallel_size=2))
