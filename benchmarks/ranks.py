"""A training step on 1, 2, 4 and 8 gloo ranks of this machine, one thread each: what splitting it by TP, PP, CP or DP adds.

    python -m benchmarks.ranks [--steps 8] [--ranks 1 2 4 8] [--json]

Every layout does the same step: 8 samples of 32 text and 256 video tokens, one to a micro-batch, hidden 256, 4 + 4 blocks, fp32, with
agreement, clipping, Adam and moving average. More ranks than cores share the cores, so wall time says little; the columns that mean
something anywhere are

  work   CPU seconds of all ranks together over those of one rank alone: 1.00 is a split that costs nothing; system = the OS's share
  wall   seconds of a step over one rank's divided by the cores it could use: 1.00 is all cores busy with useful work
  gloo   time inside gloo's operations for a rank and step (torch.profiler, steps of their own), and its share of the step; waiting for
         the other ranks, which share the cores, is in it
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.prepared import step_batch
from megasora import recipes
from megasora.config.schema import GuardConfig, ModelConfig, OptimizerConfig, ParallelConfig, RunConfig
from megasora.models.mmdit.initialization import initialize_weights
from megasora.parallel import groups
from megasora.parallel.groups import ParallelContext
from megasora.parallel.pack import Pack, PackSplit, SampleShape
from megasora.training.feed import StepBatch
from megasora.training.guard import Guard
from megasora.training.microbatch import TrainingSample, build_microbatch
from megasora.training.optimizer import ensure_adam_state, refresh_masters
from megasora.training.step import build_trainee, train_step
from tests.pool import RankPool

MODEL = ModelConfig(
    hidden_size=256,
    num_attention_heads=8,
    num_double_blocks=4,
    num_single_blocks=4,
    ffn_hidden_size=1024,
    in_channels=16,
    patch_size=2,
    text_dim=64,
    vec_dim=32,
    time_dim=64,
    cond_embed=False,
    axes_dim=(8, 12, 12),
)
SHAPE = SampleShape(text_tokens=32, grid=(4, 8, 8))
SAMPLES = 8
WARM_STEPS = 2
AXES = {
    "TP": "tensor_model_parallel_size",
    "PP": "pipeline_model_parallel_size",
    "CP": "context_parallel_size",
}


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a step cost a rank."""

    wall_s: float
    user_s: float
    """CPU time in the program."""
    system_s: float
    """CPU time in the operating system: sockets, pages, switches."""
    gloo_s: float
    loss: float

    @property
    def cpu_s(self) -> float:
        """All CPU time."""
        return self.user_s + self.system_s


def config_of(axis: str, ranks: int) -> RunConfig:
    """The run that spends all ranks on one axis."""
    sizes = {AXES[axis]: ranks} if axis in AXES else {}
    return replace(
        recipes.get("tiny"),
        model=MODEL,
        parallel=ParallelConfig(**sizes),  # type: ignore[arg-type]
        optimizer=OptimizerConfig(lr=1e-4, eps=1e-8),
    )


def own_batches(context: ParallelContext) -> StepBatch:
    """This rank's share of the step."""
    topology, at = context.topology, context.at
    split = PackSplit(tp=topology.tp, cp=topology.cp)
    batches = []
    for number in range(at.dp, SAMPLES, topology.dp):
        generator = torch.Generator().manual_seed(number)
        sample = TrainingSample(
            tokens=torch.randn(SHAPE.video_tokens, MODEL.in_channels, generator=generator),
            text=torch.randn(SHAPE.text_tokens, MODEL.text_dim, generator=generator),
            vec=torch.randn(MODEL.vec_dim, generator=generator),
            cond=None,
            t=(number + 1) / (SAMPLES + 1),
            noise_key=number,
        )
        stages = {"first_stage": at.pp == 0, "last_stage": at.pp == topology.pp - 1}
        pack = Pack([SHAPE], split=split, tp_rank=at.tp, cp_rank=at.cp)
        batches.append(build_microbatch(pack, [sample], sigma_min=1e-5, dtype=torch.float32, **stages))
    return step_batch(batches, tokens=SAMPLES * (SHAPE.text_tokens + SHAPE.video_tokens))


def cpu_seconds() -> tuple[float, float]:
    """(user, system) CPU time of this process, all threads."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime, usage.ru_stime


def measure_rank(rank: int, config: RunConfig, steps: int) -> Cost:
    """Means over steps of one rank; the profiler runs on steps of its own."""
    context = groups.initialize(config.parallel, device=torch.device("cpu"), num_attention_heads=MODEL.num_attention_heads, seed=0)
    trainee = build_trainee(config, context=context)
    initialize_weights(trainee.chunks, model=MODEL, context=context, seed=0)
    refresh_masters(trainee.optimizer)
    ensure_adam_state(trainee.optimizer, step=0)
    batch = own_batches(context)

    def step() -> float:
        return train_step(trainee, batch, config=config, context=context, guard=Guard(GuardConfig()), stop=False).loss

    first = [step() for _ in range(WARM_STEPS)][0]
    dist.barrier()
    started, (user, system) = time.perf_counter(), cpu_seconds()
    for _ in range(steps):
        step()
    wall, (user_after, system_after) = time.perf_counter() - started, cpu_seconds()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(max(1, steps // 2)):
            step()
    gloo = sum(event.cpu_time_total for event in profile.key_averages() if event.key.startswith("gloo:")) / 1e6
    return Cost(
        wall_s=wall / steps,
        user_s=(user_after - user) / steps,
        system_s=(system_after - system) / steps,
        gloo_s=gloo / max(1, steps // 2),
        loss=first,
    )


def row_of(axis: str, ranks: int, costs: list[Cost], one: Cost) -> dict[str, Any]:
    """A line of the table."""
    cores = min(ranks, os.cpu_count() or 1)
    wall = max(cost.wall_s for cost in costs)
    gloo = statistics.mean(cost.gloo_s for cost in costs)
    return {
        "axis": axis,
        "ranks": ranks,
        "work": sum(cost.cpu_s for cost in costs) / one.cpu_s,
        "cpu_s": sum(cost.cpu_s for cost in costs),
        "system_share": sum(cost.system_s for cost in costs) / sum(cost.cpu_s for cost in costs),
        "wall": wall / (one.wall_s / cores),
        "wall_s": wall,
        "gloo_s": gloo,
        "gloo_share": gloo / wall,
        "loss_gap": abs(costs[0].loss / one.loss - 1),
    }


def line_of(row: dict[str, Any]) -> str:
    """For people."""
    return (
        f"{row['axis']:<5}{row['ranks']}  work {row['work']:.2f} ({1e3 * row['cpu_s']:.0f} CPU ms, {row['system_share']:.0%} system)  "
        f"wall {row['wall']:.2f} ({1e3 * row['wall_s']:.0f} ms)  gloo {1e3 * row['gloo_s']:.0f} ms ({row['gloo_share']:.0%})  "
        f"loss gap {row['loss_gap']:.1e}"
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--ranks", type=int, nargs="+", default=(1, 2, 4, 8), choices=(1, 2, 4, 8))
    parser.add_argument("--json", action="store_true", help="only the JSON line")
    arguments = parser.parse_args()
    pool = RankPool(timeout_s=900)
    rows = []
    try:
        (one,) = pool.run(1, measure_rank, config_of("none", 1), arguments.steps)
        for ranks in arguments.ranks:
            for axis in ("none",) if ranks == 1 else ("TP", "PP", "CP", "DP"):
                costs = [one] if ranks == 1 else pool.run(ranks, measure_rank, config_of(axis, ranks), arguments.steps)
                row = row_of(axis, ranks, costs, one)
                rows.append(row)
                if not arguments.json:
                    print(line_of(row), flush=True)
    finally:
        pool.close()
    print(json.dumps({"steps": arguments.steps, "cores": os.cpu_count(), "rows": rows}))


if __name__ == "__main__":
    main()
