"""Nothing of ours makes the host wait for the GPU inside a step."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from megasora.config.schema import ParallelConfig, RunConfig
from tests.gpu_emulated.memory import HostWait, watch
from tests.gpu_emulated.runs import gpu_run
from tests.pool import RankPool

STEPS = 3


@dataclass(frozen=True, kw_only=True)
class StepWaits:
    """What the host waited for in one step of a rank."""

    within: list[HostWait]
    """From the first micro-batch to the updated weights."""
    before: list[HostWait]
    """Since the step before: clips, micro-batches, metrics."""


def train_watched(rank: int, config: RunConfig) -> list[StepWaits]:
    """One rank of a run."""
    from megasora.training import run

    steps: list[StepWaits] = []
    real = run.train_step
    with watch() as memory:

        def step(*args: Any, **kwargs: Any) -> Any:
            before, memory.waits = memory.waits, []
            result = real(*args, **kwargs)
            steps.append(StepWaits(within=memory.waits, before=before))
            memory.waits = []
            return result

        run.train_step = step
        try:
            run.train(config)
        finally:
            run.train_step = real
    return steps


def layout(tp: int = 1, pp: int = 1, cp: int = 1, vp: int | None = None, **more: Any) -> ParallelConfig:
    return ParallelConfig(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        context_parallel_size=cp,
        virtual_pipeline_model_parallel_size=vp,
        **more,
    )


LAYOUTS = {
    "one rank, recompute": (1, layout(recompute="full")),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_step_waits_only_where_it_must(gpus: RankPool, tmp_path: Path, name: str) -> None:
    world_size, parallel = LAYOUTS[name]
    for steps in gpus.run(world_size, train_watched, gpu_run(tmp_path / "run", steps=STEPS, parallel=parallel)):
        for n, step in enumerate(steps):
            print("STEP", n)
            for w in step.before: print("   before", w)
            for w in step.within: print("   within", w)
    assert 0
