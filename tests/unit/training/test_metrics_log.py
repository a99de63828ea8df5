"""The log of a run: one line per step whatever happened before, and JSON that any reader takes."""

from __future__ import annotations

import errno
import json
import math
from pathlib import Path

import pytest
import torch

from megasora.training.metrics import MetricsLog, RecordFile, StepMetrics


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


class Disk:
    """A file that takes so many bytes."""

    def __init__(self) -> None:
        self.room, self.content = 0, b""

    def write(self, data: bytes) -> int:
        taken = data[: self.room]
        if not taken:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.room, self.content = self.room - len(taken), self.content + taken
        return len(taken)

    def close(self) -> None: ...


def test_a_full_disk_costs_no_record(tmp_path: Path) -> None:
    records, disk = RecordFile(tmp_path / "file"), Disk()
    records._file = disk  # type: ignore[assignment]
    disk.room = 3
    records.write("first\n")
    assert (records.problem, disk.content) == ("No space left on device", b"fir")
    records.write("second\n")
    disk.room = 100
    records.write("third\n")
    assert (records.problem, disk.content) == (None, b"first\nsecond\nthird\n")
    disk.room = 0
    records.write("lost\n")
    assert records.close() == 5


class Broken:
    """A TensorBoard writer whose thread has met a full disk."""

    def add_scalar(self, *arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    add_images = add_scalar


@pytest.mark.parametrize("first", ["scalars", "pictures"])
def test_tensorboard_is_given_up_when_it_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str], first: str) -> None:
    with MetricsLog(tmp_path, active=True, total_steps=9, first_step=0, interval_steps=9, tensorboard=False) as log:
        log._writer = Broken()
        if first == "pictures":
            log.add_images("samples/0", torch.zeros(1, 3, 4, 4), step=1)
        log.write(step(1))
        log.write(step(2))
    assert capsys.readouterr().err.count("TensorBoard's file cannot be written (No space left on device)") == 1
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
