"""ZeRO-2 and ZeRO-3 compute what one rank computes, in every layout, and move to and from ZeRO-1 through checkpoints."""

from __future__ import annotations

import pytest

from megasora.config.schema import ParallelConfig
from tests.parallel.layouts import Case, assemble, relative_gaps
from tests.parallel.sharded_steps import sharded_step
from tests.parallel.test_parity import EXACT, layout, reference
from tests.pool import RankPool

STEPS_IN = {
    "dp2": (2, layout()),
    "dp3": (3, layout()),
    "cp2 dp2": (4, layout(cp=2)),
    "tp2 dp2": (4, layout(tp=2)),
    "pp2 dp2": (4, layout(pp=2)),
    "pp2 vp2 dp2": (4, layout(pp=2, vp=2)),
    "tp2 cp2 pp2": (8, layout(tp=2, cp=2, pp=2)),
    "recompute": (2, layout(recompute="full")),
    "recompute pp2 tp2 dp2": (8, layout(tp=2, pp=2, recompute="full")),
}


def of_stage(parallel: ParallelConfig, stage: int) -> ParallelConfig:
    from dataclasses import replace

    return replace(parallel, zero_stage=stage)


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("name", STEPS_IN)
def test_a_step_has_the_gradients_of_one_rank(pool: RankPool, name: str, stage: int) -> None:
    world_size, parallel = STEPS_IN[name]
    case = Case(parallel=of_stage(parallel, stage), num_microbatches=2)
    results = pool.run(world_size, sharded_step, case)
    expected, gradients = reference(pool, case)
    assert results[0].loss == pytest.approx(expected.loss, rel=EXACT)
    assert results[0].grad_norm == pytest.approx(expected.grad_norm, rel=EXACT)
    gaps = relative_gaps(assemble(results), gradients)
    assert max(gaps.values()) < EXACT, max(gaps.items(), key=lambda item: item[1])
