"""Whole commands as a user gives them, on one GPU: train, go on from a checkpoint, sample, encode; losses beside the CPU's.

They run side by side, each in a process of its own, so their times say nothing of speed.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from benchmarks.gpu.rig import Setup
from benchmarks.gpu.table import Case, LeftOutError, Row

STEPS = 12
MIDDLE, LAST = (f"step_{step:08d}" for step in (STEPS // 2, STEPS))
AT_ONCE = 8
LIMIT_S = 110
"""Of one command."""
NEEDED = ("tyro", "cattrs", "av", "diffusers", "transformers")
"""What the commands import, beyond what the other sections do."""
HEADS_OF_128 = ["--model.hidden_size", "256", "--model.num_attention_heads", "2", "--model.ffn_hidden_size", "1024"]
HEADS_OF_128 += ["--model.axes_dim", "16", "56", "56"]
"""The tiny recipe with heads of the 11.9 B model's size, for which all attention kernels exist."""
BF16, FP8 = ["--precision.dtype", "bf16"], ["--precision.dtype", "bf16", "--precision.fp8", "tensorwise"]
OFFLOAD = ["--parallel.recompute", "full", "--parallel.offload", "inputs"]
MOMENTS = ["--optimizer.exp_avg_dtype", "bf16", "--optimizer.exp_avg_sq_dtype", "fp16", "--optimizer.eps", "1e-8"]

HIDES_TRANSFORMER_ENGINE = """
import sys
from importlib.machinery import PathFinder

class Hiding(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] == "transformer_engine" else super().find_spec(name, path, target)

sys.meta_path[:] = [Hiding if finder is PathFinder else finder for finder in sys.meta_path]
"""


@dataclass(frozen=True, kw_only=True)
class Command:
    """One run of `megasora`; `{root}` in its words is the folder of them all."""

    name: str
    words: Sequence[str]
    needs: str | None = None
    """The run whose files it reads."""
    goes_on_from: str | None = None
    """Training only: it starts at step 6 of this run."""
    same_as: str | None = None
    """Training only: whose losses its own are compared with."""


def _train(name: str, device: str, *flags: str, goes_on_from: str | None = None, same_as: str | None = None) -> Command:
    run = ["train", "tiny", "--run_dir", "{root}/" + name, "--device", device, "--train.steps", str(STEPS), "--data.decoder", "pyav"]
    often = ["--checkpoint.interval_steps", str(STEPS // 2), "--evaluation.interval_steps", str(STEPS), "--train.no-tensorboard"]
    return Command(name=name, words=[*run, *often, *flags], needs=goes_on_from, goes_on_from=goes_on_from, same_as=same_as)


def _sharded(stage: int) -> list[str]:
    return ["--parallel.zero_stage", str(stage), "--parallel.recompute", "full"]


COMMANDS = (
    _train("cpu_fp32", "cpu", *HEADS_OF_128),
    _train("gpu_fp32", "cuda", *HEADS_OF_128, same_as="cpu_fp32"),
    _train("gpu_bf16", "cuda", *HEADS_OF_128, *BF16, same_as="cpu_fp32"),
    _train("gpu_fp8", "cuda", *HEADS_OF_128, *FP8, same_as="gpu_bf16"),
    _train("gpu_bf16_recompute", "cuda", *HEADS_OF_128, *BF16, "--parallel.recompute", "full", same_as="gpu_bf16"),
    _train("gpu_bf16_offload", "cuda", *HEADS_OF_128, *BF16, *OFFLOAD, same_as="gpu_bf16"),
    _train("gpu_bf16_moments", "cuda", *HEADS_OF_128, *BF16, *MOMENTS),
    _train("gpu_bf16_zero2", "cuda", *HEADS_OF_128, *BF16, *_sharded(2), same_as="gpu_bf16"),
    _train("gpu_bf16_zero3", "cuda", *HEADS_OF_128, *BF16, *_sharded(3), same_as="gpu_bf16"),
    _train("gpu_bf16_heads_of_16", "cuda", *BF16),
    _train("gpu_bf16_again", "cuda", *HEADS_OF_128, *BF16, goes_on_from="gpu_bf16", same_as="gpu_bf16"),
    _train("gpu_fp8_again", "cuda", *HEADS_OF_128, *FP8, goes_on_from="gpu_fp8", same_as="gpu_fp8"),
    _train("cpu_bf16_from_gpu_bf16", "cpu", *HEADS_OF_128, *BF16, goes_on_from="gpu_bf16", same_as="gpu_bf16"),
    _train("gpu_bf16_zero2_again", "cuda", *HEADS_OF_128, *BF16, *_sharded(2), goes_on_from="gpu_bf16_zero2", same_as="gpu_bf16_zero2"),
    _train("gpu_bf16_moments_again", "cuda", *HEADS_OF_128, *BF16, *MOMENTS, goes_on_from="gpu_bf16_moments", same_as="gpu_bf16_moments"),
    Command(
        name="sample",
        needs="gpu_bf16",
        words=["sample", "{root}/gpu_bf16/config.yaml", "--weights", "{root}/gpu_bf16/checkpoints/" + LAST]
        + ["--prompt", "A test card", "--output", "{root}/clips", "--steps", "4"],
    ),
    Command(
        name="sample_fp8",
        needs="gpu_fp8",
        words=["sample", "{root}/gpu_fp8/config.yaml", "--weights", "{root}/gpu_fp8/checkpoints/" + LAST]
        + ["--prompt", "A test card", "--output", "{root}/clips_fp8", "--steps", "4", "--offload", "model"],
    ),
    Command(
        name="train_ae",
        words=["train-ae", "tiny_ae", "--run_dir", "{root}/train_ae", "--device", "cuda", "--train.steps", str(STEPS)]
        + ["--data.decoder", "pyav", "--train.no-tensorboard"],
    ),
    Command(name="calibrate", words=["study", "calibrate", "opensora2_stage1", "--device", "cuda", "--output", "{root}/profile.yaml"]),
    Command(name="encode", needs="gpu_bf16", words=["data", "encode", "{root}/gpu_bf16/config.yaml", "--output", "{root}/cache"]),
)


class _Runs:
    """All commands, started together; what goes on from another waits for it in its thread."""

    def __init__(self, commands: Sequence[Command]) -> None:
        self._folder = tempfile.TemporaryDirectory()  # removed with this object
        self.root = Path(self._folder.name)
        _hide_transformer_engine(self.root / "hidden")
        threads = ThreadPoolExecutor(max_workers=AT_ONCE)
        self._futures: dict[str, Future[Row]] = {}
        for command in commands:
            self._futures[command.name] = threads.submit(self._run, command)

    def _run(self, command: Command) -> Row:
        if command.needs is not None:
            self._futures[command.needs].result()
        return _run(command, self.root)

    def row(self, command: Command) -> Row:
        """What the command took, its losses and how far they are from another's."""
        row = self._futures[command.name].result()
        if command.same_as is not None:
            self._futures[command.same_as].result()
        return row | _compared(command, self.root)


def command_cases(setup: Setup) -> Iterator[Case]:
    """A case each; the first starts them all."""
    commands = [command for command in COMMANDS if setup.on_gpu or (command.name == "cpu_fp32")]
    started: list[_Runs] = []

    def measure(command: Command) -> Row:
        if missing := [name for name in NEEDED if find_spec(name) is None]:
            raise LeftOutError(f"no {', '.join(missing)}")
        if not started:
            started.append(_Runs(commands))
        return started[0].row(command)

    for command in commands:
        yield Case(labels={"command": command.name}, measure=partial(measure, command))


def _run(command: Command, root: Path) -> Row:
    if command.goes_on_from is not None:
        _copy_half(root / command.goes_on_from, root / command.name)
    words = [word.replace("{root}", str(root)) for word in command.words]
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "PYTHONWARNINGS": "ignore"}
    if command.name.startswith("cpu"):
        environment["PYTHONPATH"] = os.pathsep.join([str(root / "hidden"), environment.get("PYTHONPATH", "")])
    started = time.time()
    try:
        done = subprocess.run([sys.executable, "-m", "megasora", *words], env=environment, capture_output=True, text=True, timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        return {"failed": f"still running after {LIMIT_S} s"}
    row: Row = {"seconds": time.time() - started}
    if done.returncode:
        output = (done.stdout + done.stderr).strip()
        print(f"---- {command.name}: exit code {done.returncode}\n{output[-6000:]}", flush=True)
        row["failed"] = f"exit code {done.returncode}: {(output.splitlines() or ['no output'])[-1][:200]}"
    return row


def _hide_transformer_engine(folder: Path) -> None:
    """Where it is installed Megatron-core takes its Adam, which runs on GPUs only; the CPU's reference is torch's."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(HIDES_TRANSFORMER_ENGINE)


def _copy_half(run_dir: Path, target: Path) -> None:
    """A run that stands at the middle of another."""
    if (run_dir / "checkpoints" / MIDDLE).exists():
        (target / "checkpoints").mkdir(parents=True)
        shutil.copytree(run_dir / "checkpoints" / MIDDLE, target / "checkpoints" / MIDDLE)
        shutil.copytree(run_dir / "assets", target / "assets")


def _losses(run_dir: Path) -> dict[int, float]:
    file = run_dir / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return {record["step"]: record["loss"] for record in map(json.loads, lines)}


def _compared(command: Command, root: Path) -> Row:
    losses = _losses(root / command.name)
    if not losses:
        return {}
    row: Row = {"steps": f"{min(losses)} to {max(losses)}", "first_loss": losses[min(losses)], "last_loss": losses[max(losses)]}
    if command.same_as is not None and (others := _losses(root / command.same_as)):
        common = losses.keys() & others.keys()
        row |= {"compared_with": command.same_as, "largest_relative_gap": max(abs(losses[step] / others[step] - 1) for step in common)}
    return row | {"losses": losses}
