"""A whole training step of a small MMDiT against diffusers' FluxTransformer2DModel and torch's AdamW, on a CPU, in one process.

    python -m benchmarks.step [--pairs 50] [--threads 2] [--json]

Ours is what `megasora train` does with a prepared batch: gradients zeroed, the schedule's forward and backward, agreement of the ranks,
clipping, the distributed Adam, the moving average of the weights, the step's line in metrics.jsonl. Theirs is the bare loop a user of
diffusers writes: forward, mean squared error to the velocity, backward, `torch.optim.AdamW` as it comes (on a CPU a loop over the
parameters), zero_grad; no clipping, no moving average, no log. The same with `AdamW(fused=True)` is a row of its own.

Same weights, the same noised sample and target, fp32; hidden 512, 2 + 4 blocks, S = 320 and 1,024 tokens, 64 of them text. Pairs alternate;
diffusers against itself is the noise of the machine. CPU time (of all threads) stands beside wall time: other work on the machine moves
it less. Ends with one JSON line: ratio_median is ours / theirs, wall time of the slower length, so below 1 is faster.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F

from benchmarks.mmdit_step import MODEL, TEXT_TOKENS, copy_weights, one_rank, their_model
from benchmarks.prepared import step_batch
from megasora import recipes
from megasora.config.schema import GuardConfig, OptimizerConfig
from megasora.models.mmdit.schedule import MicroBatch
from megasora.parallel.groups import ParallelContext
from megasora.parallel.pack import Pack, PackSplit, SampleShape
from megasora.training import step as training_step
from megasora.training.feed import StepBatch
from megasora.training.guard import Guard
from megasora.training.metrics import MetricsLog
from megasora.training.microbatch import TrainingSample, build_microbatch
from megasora.training.optimizer import EMA, ensure_adam_state, refresh_masters
from megasora.training.step import Trainee, build_trainee, step_metrics, train_step

CONFIG = replace(recipes.get("tiny"), model=MODEL, optimizer=OptimizerConfig(lr=1e-4, eps=1e-8, ema_decay=0.9999))
STEPS_KNOWN = 100_000
"""For the progress bar."""


def trainee_like(theirs: torch.nn.Module, *, context: ParallelContext) -> Trainee:
    """Our model, optimizer and moving average with diffusers' weights."""
    trainee = build_trainee(CONFIG, context=context)
    copy_weights(theirs, trainee.chunks, context=context)
    refresh_masters(trainee.optimizer)
    ensure_adam_state(trainee.optimizer, step=0)
    assert trainee.ema is not None
    trainee.ema.reset()
    return trainee


def prepared(tokens: int) -> StepBatch:
    """What the feeder hands over for a step of one sample."""
    video = tokens - TEXT_TOKENS
    torch.manual_seed(1)
    shape = SampleShape(text_tokens=TEXT_TOKENS, grid=(video // 64, 8, 8))
    sample = TrainingSample(
        tokens=torch.randn(video, MODEL.in_channels),
        text=torch.randn(TEXT_TOKENS, MODEL.text_dim),
        vec=torch.randn(MODEL.vec_dim),
        cond=None,
        t=0.4,
        noise_key=7,
    )
    pack = Pack([shape], split=PackSplit())
    batch = build_microbatch(pack, [sample], sigma_min=1e-5, dtype=torch.float32, first_stage=True, last_stage=True)
    return step_batch([batch], tokens=tokens)


def our_step(trainee: Trainee, batch: StepBatch, log: MetricsLog, *, context: ParallelContext) -> Callable[[], float]:
    """A step of `megasora train`; returns its loss."""

    def step() -> float:
        started = time.perf_counter()
        result = train_step(trainee, batch, config=CONFIG, context=context, guard=Guard(GuardConfig()), stop=False)
        seconds = time.perf_counter() - started
        log.write(step_metrics(trainee, batch, result, config=CONFIG, context=context, seconds=seconds, events=[]))
        return result.loss

    return step


def their_step(theirs: torch.nn.Module, batch: MicroBatch, *, fused: bool | None = None) -> Callable[[], float]:
    """A step of a bare loop; returns its loss."""
    inputs, target = batch.inputs, batch.target
    assert inputs is not None and target is not None
    grid = batch.pack.samples[0].grid
    ids = torch.cartesian_prod(*(torch.arange(float(extent)) for extent in grid))
    adam = CONFIG.optimizer
    optimizer = torch.optim.AdamW(
        theirs.parameters(), lr=adam.lr, betas=(adam.beta1, adam.beta2), eps=adam.eps, weight_decay=adam.weight_decay, fused=fused
    )

    def step() -> float:
        output = theirs(
            hidden_states=inputs.img[None],
            encoder_hidden_states=inputs.txt[None],
            pooled_projections=inputs.y_vec,
            timestep=inputs.t,
            img_ids=ids,
            txt_ids=torch.zeros(TEXT_TOKENS, 3),
        ).sample
        loss = F.mse_loss(output[0], target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss)

    return step


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Ratios of alternating pairs."""

    median: float
    p10: float
    p90: float
    fastest: float
    """Of the fastest step of each, which other work on the machine disturbed least."""

    @classmethod
    def of(cls, pairs: list[tuple[float, float]]) -> Spread:
        """Of (first, second) seconds."""
        ordered, tenth = sorted(above / below for above, below in pairs), len(pairs) // 10
        return cls(
            median=statistics.median(ordered),
            p10=ordered[tenth],
            p90=ordered[-1 - tenth],
            fastest=min(above for above, _ in pairs) / min(below for _, below in pairs),
        )


def cost(step: Callable[[], float]) -> tuple[float, float]:
    """(wall, CPU) seconds of a step; the CPU's are those of all threads of the process."""
    wall, cpu = time.perf_counter(), time.process_time()
    step()
    return time.perf_counter() - wall, time.process_time() - cpu


def compare(first: Callable[[], float], second: Callable[[], float], pairs: int) -> tuple[Spread, Spread]:
    """Ratios first / second of wall and of CPU time; the order within a pair alternates."""
    wall, cpu = [], []
    for pair in range(pairs):
        if pair % 2:
            below, above = cost(second), cost(first)
        else:
            above, below = cost(first), cost(second)
        wall.append((above[0], below[0]))
        cpu.append((above[1], below[1]))
    return Spread.of(wall), Spread.of(cpu)


class Clock:
    """Seconds spent in parts of a step, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = defaultdict(list)

    @contextmanager
    def watch(self, name: str, owner: Any, attribute: str) -> Iterator[None]:
        """Time every call of owner.attribute."""
        real = getattr(owner, attribute)

        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return real(*args, **kwargs)
            finally:
                self.seconds[name].append(time.perf_counter() - started)

        with mock.patch.object(owner, attribute, timed):
            yield


def our_parts(step: Callable[[], float], trainee: Trainee, log: MetricsLog, *, steps: int) -> dict[str, float]:
    """Median seconds of the parts of our step; `rest` is what none of them holds."""
    clock = Clock()
    with (
        clock.watch("forward, backward, reduction", training_step, "run_schedule"),
        clock.watch("agreement", training_step, "_agree"),
        clock.watch("clipping and Adam", trainee.optimizer, "step"),
        clock.watch("moving average", EMA, "update"),
        clock.watch("metrics", log, "write"),
        clock.watch("zeroed gradients", trainee.wrapped[0], "zero_grad_buffer"),
    ):
        for _ in range(steps):
            started = time.perf_counter()
            step()
            clock.seconds["whole step"].append(time.perf_counter() - started)
    medians = {name: statistics.median(values) for name, values in clock.seconds.items()}
    whole = medians.pop("whole step")
    return {"whole step": whole, **medians, "rest": whole - sum(medians.values())}


def measure(tokens: int, *, pairs: int, log: MetricsLog, context: ParallelContext) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Rows of ratios for one length, and where our time goes."""
    theirs = their_model()
    trainee = trainee_like(theirs, context=context)
    batch = prepared(tokens)
    fused_model = their_model()
    ours, bare = our_step(trainee, batch, log, context=context), their_step(theirs, batch.batches[0])
    fused = their_step(fused_model, batch.batches[0], fused=True)
    gap = max(abs(ours() / bare() - 1) for _ in range(3))
    fused()
    rows = []
    comparisons = (
        ("megasora / diffusers", ours, bare),
        ("megasora / diffusers, fused AdamW", ours, fused),
        ("diffusers / diffusers", bare, bare),
    )
    for name, first, second in comparisons:
        wall, cpu = compare(first, second, pairs)
        rows.append(
            {"pair": name, "tokens": tokens, "ratio_median": wall.median, "wall": asdict(wall), "cpu": asdict(cpu), "loss_gap": gap}
        )
    return rows, our_parts(ours, trainee, log, steps=max(5, pairs // 4))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=50)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="only the JSON line")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    context = one_rank()
    rows: list[dict[str, Any]] = []
    parts: dict[int, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        log = MetricsLog(Path(folder), active=True, total_steps=STEPS_KNOWN, first_step=0, interval_steps=STEPS_KNOWN, tensorboard=False)
        with log:
            for tokens in (320, 1024):
                found, parts[tokens] = measure(tokens, pairs=arguments.pairs, log=log, context=context)
                rows += found
                if not arguments.json:
                    show(found, parts[tokens])
    worst = max(row["ratio_median"] for row in rows if row["pair"] == "megasora / diffusers")
    print(json.dumps({"ratio_median": worst, "pairs": arguments.pairs, "threads": arguments.threads, "rows": rows, "parts_s": parts}))


def line_of(kind: str, spread: dict[str, float]) -> str:
    """Median, spread and the ratio of the fastest steps."""
    return f"{kind} {spread['median']:.3f} ({spread['p10']:.3f} to {spread['p90']:.3f}; fastest {spread['fastest']:.3f})"


def show(rows: list[dict[str, Any]], parts: dict[str, float]) -> None:
    """Print the rows of one length and the parts of our step."""
    for row in rows:
        print(f"S {row['tokens']:>5}  {row['pair']:<34} {line_of('wall', row['wall'])}  {line_of('CPU', row['cpu'])}")
    whole = parts["whole step"]
    for name, seconds in parts.items():
        print(f"         {name:<30} {1e3 * seconds:8.1f} ms  {seconds / whole:6.1%}", flush=True)


if __name__ == "__main__":
    main()
