"""What a run reports: one JSON object per step in metrics.jsonl, the same scalars in TensorBoard, one line for the person at 3 a.m."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor


class StepRecord(Protocol):
    """One optimizer step; a dataclass, whose fields are what is written."""

    @property
    def step(self) -> int:
        """1-based number of the step."""
        ...

    @property
    def loss(self) -> float: ...

    @property
    def events(self) -> list[dict[str, Any]]:
        """What happened with the step; what one has `said` is a line of the log."""
        ...

    def line(self) -> str:
        """For the log."""
        ...


@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """One optimizer step."""

    step: int
    """1-based number of the step."""
    loss: float
    grad_norm: float
    lr: float
    samples: int
    tokens: int
    step_time_s: float
    tokens_per_s: float
    tflops_per_gpu: float
    mfu: float | None
    data_wait_s: float
    """Longest wait of any rank for its clips."""
    encode_s: float
    """Longest time of any rank in the encoders."""
    decode_frames_per_s: float | None
    """Frames a decoding thread delivers per second; None when nothing was decoded."""
    pad_share: float
    """Padding over all tokens computed."""
    imbalance: float
    """Work of the busiest replica over the mean."""
    peak_memory_bytes: int
    events: list[dict[str, Any]] = field(default_factory=list)
    """checkpoint, skip, restart, eval, goodput, ... with their facts; what one has `said` is a line of the log."""

    def line(self) -> str:
        """For the log."""
        mfu = "" if self.mfu is None else f" mfu {self.mfu:.1%}"
        events = "".join(f" [{event['event']}]" for event in self.events)
        return (
            f"step {self.step:>6}  loss {self.loss:.4f}  grad {self.grad_norm:.3f}  lr {self.lr:.2e}  {self.tokens_per_s:,.0f} tokens/s"
            f"{mfu}  {self.peak_memory_bytes / 2**30:.2f} GiB  wait {self.data_wait_s:.2f} s{events}"
        )


class MetricsLog:
    """Writer of a run's metrics; does nothing on ranks other than 0.

    Args:
        run_dir: folder of the run.
        active: whether this rank writes.
        total_steps: for the progress bar.
        first_step: steps done before.
        interval_steps: steps between log lines.
        tensorboard: also write TensorBoard events.
    """

    def __init__(self, run_dir: Path, *, active: bool, total_steps: int, first_step: int, interval_steps: int, tensorboard: bool) -> None:
        self.active = active
        self.interval_steps = interval_steps
        if not active:
            return
        self._run_dir, self._tensorboard = run_dir, tensorboard
        self._open(first_step)
        self._progress = Progress(
            TextColumn("train"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[loss]}"),
            console=Console(stderr=True),
            disable=not Console(stderr=True).is_terminal,
        )
        self._task = self._progress.add_task("train", total=total_steps, completed=first_step, loss="")

    def __enter__(self) -> MetricsLog:
        if self.active:
            self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.active:
            self._progress.stop()
            self._close()

    def _open(self, step: int) -> None:
        """Write behind what was recorded until this step."""
        path = self._run_dir / "metrics.jsonl"
        trim(path, last_step=step)
        self._records = RecordFile(path)
        self._writer = _summary_writer(self._run_dir / "tensorboard", purge_step=step + 1) if self._tensorboard else None

    def _close(self) -> None:
        if lost := self._records.close():
            self.say(f"metrics.jsonl lacks {lost} bytes of its last records: {self._records.problem}")
        if self._writer is not None:
            with suppress(OSError):
                self._writer.close()

    def rewind(self, step: int) -> None:
        """Forget the records after a step that the run went back to."""
        if self.active:
            self._close()
            self._open(step)
            self._progress.update(self._task, completed=step)

    def write(self, metrics: StepRecord) -> None:
        """Record a step."""
        if not self.active:
            return
        values = {name: _finite(getattr(metrics, name)) for name in vars(metrics)}
        well = self._records.problem is None
        self._records.write(json.dumps(values) + "\n")
        if well and self._records.problem is not None:
            self.say(f"metrics.jsonl cannot be written ({self._records.problem}): records are kept in memory until it can")
        self._show_scalars(values, metrics)
        self._progress.update(self._task, completed=metrics.step, loss=f"loss {metrics.loss:.4f}")
        if metrics.step % self.interval_steps == 0:
            self.say(metrics.line())
        for event in metrics.events:
            if "said" in event:
                self.say(event["said"])

    def _show_scalars(self, values: Mapping[str, Any], metrics: StepRecord) -> None:
        """In TensorBoard, which is given up when its file cannot be written: its writer does not recover."""
        if self._writer is None:
            return
        try:
            for name, value in values.items():
                if name not in ("step", "events") and value is not None:
                    self._writer.add_scalar(f"train/{name}", value, metrics.step)
            for name, value in (scalar for event in metrics.events for scalar in _scalars(event)):
                self._writer.add_scalar(name, value, metrics.step)
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self._writer = None
        self.say(f"TensorBoard's file cannot be written ({error.strerror or error}): it is left out until the run starts again")

    def add_images(self, name: str, images: Tensor, *, step: int) -> None:
        """Show images uint8 [N, 3, H, W] in TensorBoard on rank 0."""
        if not self.active or self._writer is None:
            return
        try:
            self._writer.add_images(name, images, step)
        except OSError as error:
            self._give_up(error)

    def say(self, text: str) -> None:
        """A line for the log on rank 0."""
        if self.active:
            self._progress.console.print(text, highlight=False, markup=False, soft_wrap=True)


class RecordFile:
    """A file that is written behind its end; what cannot be written is kept and tried again, so that a full disk costs no record.

    Args:
        path: made when it is not there.

    Attributes:
        problem: why the last write failed; None when it did not.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab", buffering=0)
        self._pending = b""
        self.problem: str | None = None

    def write(self, text: str) -> None:
        """Write what is kept, then this."""
        self._pending += text.encode()
        try:
            while self._pending:
                self._pending = self._pending[self._file.write(self._pending) :]
            self.problem = None
        except OSError as error:
            self.problem = error.strerror or str(error)

    def close(self) -> int:
        """Try a last time; bytes that are lost."""
        self.write("")
        with suppress(OSError):
            self._file.close()
        return len(self._pending)


def film_strip(video: Tensor, *, frames: int = 6) -> Tensor:
    """About `frames` evenly spaced frames, uint8 [N, 3, H, W], of a clip [3, T, H, W] in [-1, 1]."""
    chosen = video[:, :: max(1, video.shape[1] // frames)].permute(1, 0, 2, 3)
    return chosen.clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8).cpu()


def _finite(value: Any) -> Any:
    """JSON has no NaN: a value that is not finite is null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _scalars(event: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """What TensorBoard shows of an event."""
    if event["event"] == "goodput":
        yield from ((f"goodput/{name}", value) for name, value in event.items() if name != "event")
    if event["event"] == "reconstruct":
        yield from ((f"eval/{name}", event[name]) for name in ("psnr", "ssim", "lpips") if event.get(name) is not None)
    if event["event"] == "eval":
        yield "eval/loss", event["loss"]
        yield from ((f"eval/loss_t{name}", value) for name, value in event["loss_by_t"].items())
        for part in ("kind", "resolution"):
            yield from ((f"eval_by_{part}/{name}", value) for name, value in event[f"loss_by_{part}"].items())


def _summary_writer(folder: Path, *, purge_step: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=purge_step)


def trim(path: Path, *, last_step: int) -> None:
    """Drop lines after `last_step` and a half-written last line, so that a resumed run has one line per step."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= last_step:
                kept.append(line)
        except (ValueError, KeyError):
            continue
    path.write_text("".join(line + "\n" for line in kept))
