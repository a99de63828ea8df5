"""What a traced run of one rank adds to a profile: the forecast of that very run is then its own time."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from megasora import recipes
from megasora.config.errors import UserError
from megasora.config.io import load_yaml, save_yaml
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


def run_folder(folder: Path, *, num_microbatches: int = 2, **parallel: int) -> Path:
    folder.mkdir(exist_ok=True)
    config = replace(recipes.get("tiny"), profile=ProfileConfig(steps="8:10"), parallel=ParallelConfig(**parallel))  # type: ignore[arg-type]
    config = replace(config, data=replace(config.data, num_microbatches=num_microbatches))
    save_yaml(config, folder / "config.yaml")
    write_metrics(folder, 0.2)
    return folder


def write_metrics(folder: Path, step_time_s: float) -> None:
    lines = [
        {"step": step, "step_time_s": 9.0 if step < 4 else step_time_s, "peak_memory_bytes": 500_000_000, "events": []}
        for step in range(1, 8)
    ]
    lines += [
        {"step": step, "step_time_s": 0.4, "peak_memory_bytes": 2_000_000_000, "events": [{"event": "profile"}]} for step in (8, 9, 10)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_the_run_is_forecast_at_its_own_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "mean_parts", lambda folders: PARTS)
    hardware = reference.with_reference(machine(), [run_folder(tmp_path)])
    forecast = predict(recipes.get("tiny"), world_size=1, hardware=hardware)
    assert forecast.step_time_s == pytest.approx(0.2, rel=0.02)
    assert forecast.parts["compute"] + forecast.parts["gaps"] == pytest.approx(0.15, rel=0.02)
    assert forecast.parts["optimizer"] == pytest.approx(0.025, rel=0.02)
    assert forecast.parts["data"] == pytest.approx(0.025, rel=0.02)
    assert forecast.peak_memory_bytes == pytest.approx(500_000_000, rel=1e-6)


def test_what_is_no_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "mean_parts", lambda folders: None)
    with pytest.raises(UserError, match="--profile.steps 8:10"):
        reference.with_reference(machine(), [run_folder(tmp_path)])
    with pytest.raises(UserError, match="make one of a single rank"):
        reference.with_reference(machine(), [run_folder(tmp_path, tensor_model_parallel_size=2)])


def test_two_runs_tell_launches_from_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps made from known kernels (1.5 times as slow as measured) and launches give both back."""
    runs, truth = {}, {}
    for count in (1, 8):
        folder = run_folder(tmp_path / str(count), num_microbatches=count)
        config = load_yaml(folder / "config.yaml")
        bare = replace(machine(), rates=machine().rates.scaled(1 / 1.5), launch_s=30e-6, feed_s=0.0)
        step = predict(config, world_size=1, hardware=bare)
        truth[count], runs[folder / "profile"] = step, {**step.parts, "other": 5.0}
        write_metrics(folder, step.step_time_s)
    monkeypatch.setattr(reference, "mean_parts", lambda folders: runs[folders[0]])
    hardware = reference.with_reference(machine(), [folder.parent for folder in runs])
    assert hardware.launch_s == pytest.approx(30e-6, rel=0.02)
    assert machine().rates.matmul[0][1] / hardware.rates.matmul[0][1] == pytest.approx(1.5, rel=0.02)
    for folder, step in zip(runs, truth.values(), strict=True):
        again = predict(load_yaml(folder.parent / "config.yaml"), world_size=1, hardware=hardware)
        assert again.step_time_s == pytest.approx(step.step_time_s, rel=0.02)


def test_two_runs_that_are_alike_tell_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "mean_parts", lambda folders: PARTS)
    with pytest.raises(UserError, match="packs of the same tokens; make one with other --data.num_microbatches"):
        reference.with_reference(machine(), [run_folder(tmp_path / name) for name in ("one", "other")])


def test_a_gpu_that_hides_its_launches_keeps_theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "mean_parts", lambda folders: PARTS)
    slow = load_hardware("h100")
    slow = replace(slow, rates=replace(slow.rates.scaled(1e-6), encoder=0.0))
    assert reference.with_reference(slow, [run_folder(tmp_path)]).launch_s == slow.launch_s
