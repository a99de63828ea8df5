"""The estimate of `config.memory` against what a rank of the real widths allocates, within 5 %."""

from __future__ import annotations

from typing import Any

import pytest

from megasora.config.memory import MemoryEstimate, memory_estimate
from megasora.config.schema import DataConfig, ModelConfig, ParallelConfig, PrecisionConfig, RunConfig
from megasora.parallel.pack import SampleShape
from tests.memory.measure import Bytes, Case, measure
from tests.pool import RankPool

CLOSE = 0.05
"""What the estimate promises; what it leaves out (rows of samples, a rank's own inputs) is below 1 % here."""
VIDEO = SampleShape(text_tokens=512, grid=(33, 16, 16))
IMAGE = SampleShape(text_tokens=512, grid=(1, 16, 16))
FEW = ModelConfig(num_double_blocks=3, num_single_blocks=5)
"""The real widths; blocks of a kind all keep the same."""


def run_config(case: Case, *, image: bool = False) -> RunConfig:
    """The run whose fullest pack is the case's."""
    size = sum(sample.tokens for sample in case.samples)
    data = DataConfig(
        global_tokens=size * case.num_microbatches, num_microbatches=case.num_microbatches, frame_counts=(1,) if image else (129,)
    )
    return RunConfig(recipe="memory", model=case.model, parallel=case.parallel, precision=case.precision, data=data)


def case(
    *,
    samples: tuple[SampleShape, ...] = (VIDEO, VIDEO),
    model: ModelConfig = FEW,
    m: int = 1,
    stage: int = 0,
    dtype: str = "bf16",
    **parallel: Any,
) -> Case:
    return Case(
        model=model,
        parallel=ParallelConfig(**parallel),
        precision=PrecisionConfig(dtype=dtype, provider="local", attention="torch"),  # type: ignore[arg-type]
        samples=samples,
        num_microbatches=m,
        stage=stage,
    )


ALL = ModelConfig()
EIGHT = ModelConfig(num_double_blocks=4, num_single_blocks=8)
PP4 = {"pipeline_model_parallel_size": 4}
CASES = {
    "keep all": case(),
    "keep all, one sample": case(samples=(VIDEO,)),
    "selective": case(recompute="selective"),
    "selective, one sample": case(samples=(VIDEO,), recompute="selective"),
    "full, all 57 blocks": case(model=ALL, recompute="full"),
    "count": case(recompute="count", recompute_double_blocks=1, recompute_single_blocks=2),
    "selective with counts": case(recompute="selective", recompute_double_blocks=1, recompute_single_blocks=2),
    "tp2": case(tensor_model_parallel_size=2),
    "tp4 selective": case(tensor_model_parallel_size=4, recompute="selective"),
    "cp2": case(context_parallel_size=2),
    "cp2 ring selective": case(context_parallel_size=2, context_parallel_backend="ring", recompute="selective"),
    "fp32": case(dtype="fp32", samples=(VIDEO,)),
    "fp32 selective": case(dtype="fp32", recompute="selective"),
    "images": case(samples=(IMAGE,) * 24),
    "pp4 first stage": case(samples=(VIDEO,), model=EIGHT, m=6, **PP4),
    "pp4 second stage": case(samples=(VIDEO,), model=EIGHT, m=6, stage=1, recompute="selective", **PP4),
    "pp4 last stage": case(samples=(VIDEO,), model=EIGHT, m=6, stage=3, **PP4),
    "pp4 fewer micro-batches than stages": case(samples=(VIDEO,), model=EIGHT, m=2, **PP4),
    "pp2 vp2": case(samples=(VIDEO,), model=EIGHT, m=4, pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2),
    "tp2 pp2": case(model=EIGHT, m=3, stage=1, tensor_model_parallel_size=2, pipeline_model_parallel_size=2),
}


def estimate(pool: RankPool, of: Case, *, image: bool = False) -> tuple[Bytes, MemoryEstimate]:
    (found,) = pool.run(1, measure, of)
    return found, memory_estimate(run_config(of, image=image), world_size=of.parallel.model_parallel_size)


@pytest.mark.parametrize("name", CASES)
def test_activations_of_a_rank_are_known_in_advance(pool: RankPool, name: str) -> None:
    found, expected = estimate(pool, CASES[name], image=name == "images")
    print(name, found.kept, expected.activations / found.kept, (expected.activations + expected.working_set) / found.peak)
    assert expected.activations == pytest.approx(found.kept, rel=CLOSE)
    assert expected.activations + expected.working_set == pytest.approx(found.peak, rel=CLOSE)
