"""What a checkpoint costs training: an asynchronous save against a synchronous one of the same state, and the steps beside the writer.

    python -m benchmarks.checkpoint [--rounds 5] [--hidden 1024] [--threads 2] [--folder DIR] [--megatron] [--json]

One rank on a CPU, fp32: model, Adam's moments and moving average, 2.2 GB at the default size. In each round: a synchronous save, a few
quiet steps, an asynchronous save, steps until it is committed. Both are the same code (checkpoint/writer.py), which copies, writes, hashes,
syncs and commits; the synchronous one waits for it. `--megatron` times Megatron's own synchronous save as well, which hashes nothing.
The first save, which plans and allocates, is a line of its own. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from benchmarks.mmdit_step import MODEL, one_rank
from benchmarks.prepared import step_batch
from benchmarks.step import CONFIG, TEXT_TOKENS
from megasora.checkpoint.lease import Lease
from megasora.checkpoint.writer import CheckpointWriter, Retention
from megasora.models.mmdit.initialization import initialize_weights
from megasora.models.mmdit.sharded_state import model_tensors
from megasora.parallel.groups import ParallelContext
from megasora.parallel.pack import Pack, PackSplit, SampleShape
from megasora.training.guard import Guard
from megasora.training.microbatch import TrainingSample, build_microbatch
from megasora.training.moments import moments_of
from megasora.training.optimizer import ensure_adam_state, owned_shards, refresh_masters
from megasora.training.state import optimizer_tensors
from megasora.training.step import Trainee, build_trainee, train_step

QUIET_STEPS = 4
TOKENS = 128
State = Callable[[], dict[str, ShardedTensor]]


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Of some seconds."""

    median: float
    least: float
    most: float
    number: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Spread:
        """Of a list that is not empty."""
        return cls(median=statistics.median(seconds), least=min(seconds), most=max(seconds), number=len(seconds))

    def __str__(self) -> str:
        return f"{self.median:.3f} s ({self.least:.3f} to {self.most:.3f}, {self.number} times)"


@dataclass(kw_only=True)
class Times:
    """Seconds."""

    synchronous: list[float]
    stalls: list[float]
    until_committed: list[float]
    quiet_steps: list[float]
    steps_beside: list[float]
    megatron: list[float]


def prepare(hidden: int) -> tuple[Callable[[], None], State, ParallelContext]:
    """A step of a trainee of this width, and the tensors of its checkpoint."""
    context = one_rank()
    model = replace(MODEL, hidden_size=hidden, num_attention_heads=hidden // 128, ffn_hidden_size=4 * hidden)
    config = replace(CONFIG, model=model)
    trainee: Trainee = build_trainee(config, context=context)
    initialize_weights(trainee.chunks, model=model, context=context, seed=1)
    refresh_masters(trainee.optimizer)
    ensure_adam_state(trainee.optimizer, step=0)
    assert trainee.ema is not None
    trainee.ema.reset()
    torch.manual_seed(1)
    video = TOKENS - TEXT_TOKENS
    sample = TrainingSample(
        tokens=torch.randn(video, model.in_channels),
        text=torch.randn(TEXT_TOKENS, model.text_dim),
        vec=torch.randn(model.vec_dim),
        cond=None,
        t=0.4,
        noise_key=7,
    )
    pack = Pack([SampleShape(text_tokens=TEXT_TOKENS, grid=(video // 64, 8, 8))], split=PackSplit())
    micro = build_microbatch(pack, [sample], sigma_min=1e-5, dtype=torch.float32, first_stage=True, last_stage=True)
    batch = step_batch([micro], tokens=TOKENS)

    guard = Guard(config.guard)

    def step() -> None:
        train_step(trainee, batch, config=config, context=context, guard=guard, stop=False)

    def tensors() -> dict[str, ShardedTensor]:
        shards = list(owned_shards(trainee.optimizer))
        averages = trainee.ema.averages if trainee.ema is not None else []
        return {
            **model_tensors(trainee.chunks, model=model, context=context),
            **optimizer_tensors(trainee.chunks, shards, moments=moments_of(shards), averages=averages, model=model, context=context),
        }

    return step, tensors, context


def timed(work: Callable[[], object]) -> float:
    """Seconds of a call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def megatron_save(tensors: State, folder: Path) -> float:
    """Seconds of Megatron's synchronous save, with its files on disk."""
    folder.mkdir()
    seconds = timed(lambda: (dist_checkpointing.save(tensors(), str(folder)), os.sync()))
    shutil.rmtree(folder)
    return seconds


def measure(folder: Path, *, hidden: int, rounds: int, megatron: bool) -> tuple[Times, float, int, int]:
    """(times, stall of the first save, bytes of the state, bytes of the copy)."""
    step, tensors, _ = prepare(hidden)
    times = Times(synchronous=[], stalls=[], until_committed=[], quiet_steps=[], steps_beside=[], megatron=[])
    num_bytes = sum(one.data.numel() * one.data.element_size() for one in tensors().values())
    for _ in range(2):
        step()
    lease = Lease.take(folder / "checkpoints")
    writer = CheckpointWriter(folder / "checkpoints", lease=lease, retention=Retention(keep=1))
    numbers = iter(range(1, 1000))

    def save() -> None:
        writer.save(step=next(numbers), tensors=tensors(), state={})

    first = timed(save)
    writer.wait()
    for _ in range(rounds):
        writer.asynchronous = False
        times.synchronous.append(timed(save))
        times.quiet_steps += [timed(step) for _ in range(QUIET_STEPS)]
        writer.asynchronous = True
        times.stalls.append(timed(save))
        started = time.perf_counter()
        while writer.pending:
            times.steps_beside.append(timed(step))
            writer.poll()
        times.until_committed.append(time.perf_counter() - started)
        times.quiet_steps += [timed(step) for _ in range(QUIET_STEPS)]
        if megatron:
            times.megatron.append(megatron_save(tensors, folder / "megatron"))
    held = writer.host_bytes
    writer.close()
    lease.release()
    return times, first, num_bytes, held


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=None, help="on the disk to measure; the default is the temporary one")
    parser.add_argument("--megatron", action="store_true", help="also Megatron's own synchronous save; it copies the state once more")
    parser.add_argument("--json", action="store_true", help="only the JSON line")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        times, first, num_bytes, held = measure(Path(folder), hidden=arguments.hidden, rounds=arguments.rounds, megatron=arguments.megatron)
    spreads = {name: Spread.of(seconds) for name, seconds in asdict(times).items() if seconds}
    quiet = spreads["quiet_steps"].median
    share = spreads["stalls"].median / spreads["synchronous"].median
    slowest = spreads["steps_beside"].most / quiet
    if not arguments.json:
        print(f"state {num_bytes / 1e9:.2f} GB, copy in host memory {held / 1e9:.2f} GB, load average {os.getloadavg()[0]:.1f}")
        for name, spread in spreads.items():
            print(f"{name:>16}  {spread}")
        print(f"first save stalls {first:.3f} s; stall / synchronous save {share:.3f}; slowest step beside / quiet median {slowest:.2f}")
        beside = sorted(seconds / quiet for seconds in times.steps_beside)
        print(f"steps beside the writer / quiet median: median {statistics.median(beside):.2f}, slowest quiet step", end=" ")
        print(f"{spreads['quiet_steps'].most / quiet:.2f}")
    facts = {"state_bytes": num_bytes, "host_bytes": held, "first_stall_s": first, "stall_share": share, "slowest_step": slowest}
    print(json.dumps({**facts, **{name: asdict(spread) for name, spread in spreads.items()}}))


if __name__ == "__main__":
    main()
