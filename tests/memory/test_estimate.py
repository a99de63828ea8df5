"""The estimate of `config.memory` against what a rank of the real widths allocates, within 5 %."""

from __future__ import annotations

from typing import Any

import pytest

from megasora.config.memory import MemoryEstimate, stage_estimate
from megasora.config.schema import DataConfig, ModelConfig, ParallelConfig, PrecisionConfig, RunConfig
from megasora.parallel.pack import SampleShape
from tests.memory.measure import Case, measure
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
    "full, all 57 blocks, offloaded": case(model=ALL, recompute="full", offload="inputs"),
    "tp2 count offloaded": case(tensor_model_parallel_size=2, recompute="count", recompute_single_blocks=4, offload="inputs"),
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


def expected_of(case: Case, *, image: bool = False) -> MemoryEstimate:
    """The estimate for the case's stage."""
    return stage_estimate(run_config(case, image=image), stage=case.stage, world_size=case.parallel.model_parallel_size)


@pytest.mark.parametrize("name", CASES)
def test_a_rank_allocates_what_the_estimate_says(pool: RankPool, name: str) -> None:
    of = CASES[name]
    image = name == "images"
    (found,) = pool.run(1, measure, of, run_config(of, image=image))
    expected = expected_of(of, image=image)
    assert expected.activations == pytest.approx(found.kept, rel=CLOSE)
    assert expected.activations + expected.working_set == pytest.approx(found.peak, rel=CLOSE)


@pytest.mark.parametrize("stage", [1, 3])
def test_an_offloaded_stage_peaks_where_the_estimate_says(pool: RankPool, stage: int) -> None:
    """So little is kept there that the gradient that a stage has received when its first backward pass begins, which the estimate counts
    in the working set, is more than 5 % of it."""
    of = case(samples=(VIDEO,), model=EIGHT, m=6, stage=stage, recompute="full", offload="inputs", **PP4)
    (found,) = pool.run(1, measure, of, run_config(of))
    expected = expected_of(of)
    assert expected.activations + expected.working_set == pytest.approx(found.peak, rel=CLOSE)


H100 = {
    ("none", "none"): (16.82, 17.65),
    ("none", "selective"): (8.757, 10.41),
    ("none", "full"): (1.035, 3.813),
    ("tensorwise", "none"): (14.16, 15.24),
    ("tensorwise", "selective"): (8.756, 10.4),
    ("tensorwise", "full"): (1.035, 3.762),
}
"""GiB kept and at the peak, by FP8 recipe and recomputation: benchmarks/results/2026-11-27_gpu_h100.md, two clips, FEW blocks."""


@pytest.mark.parametrize(("fp8", "recompute"), H100)
def test_an_h100_allocated_what_the_estimate_says(fp8: str, recompute: str) -> None:
    parallel, precision = ParallelConfig(recompute=recompute), PrecisionConfig(fp8=fp8)  # type: ignore[arg-type]
    expected = expected_of(Case(model=FEW, parallel=parallel, precision=precision, samples=(VIDEO, VIDEO)))
    kept, peak = H100[fp8, recompute]
    assert expected.activations == pytest.approx(kept * 2**30, rel=CLOSE)
    assert expected.activations + expected.working_set + expected.workspace == pytest.approx(peak * 2**30, rel=CLOSE)


SMALL = ModelConfig(
    hidden_size=256,
    num_attention_heads=4,
    num_double_blocks=2,
    num_single_blocks=3,
    ffn_hidden_size=1024,
    in_channels=16,
    text_dim=32,
    vec_dim=16,
    time_dim=32,
    axes_dim=(8, 28, 28),
)
CLIP = SampleShape(text_tokens=48, grid=(5, 4, 4))


def fp8_case(fp8: str, *, recompute: str = "none") -> Case:
    return Case(
        model=SMALL,
        parallel=ParallelConfig(recompute=recompute),  # type: ignore[arg-type]
        precision=PrecisionConfig(fp8=fp8, provider="te", attention="torch"),  # type: ignore[arg-type]
        samples=(CLIP,) * 8,
        fake=False,
    )


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("fp8", ["none", "tensorwise", "blockwise"])
def test_copies_in_fp8_are_counted_as_transformer_engine_keeps_them(gpus: RankPool, fp8: str, recompute: str) -> None:
    """Its own Python above an emulated extension, at sizes that a CPU computes."""
    of = fp8_case(fp8, recompute=recompute)
    data = DataConfig(global_tokens=8 * CLIP.tokens, text_tokens=48, resolution="64px", frame_counts=(17,))
    config = RunConfig(recipe="memory", model=SMALL, parallel=of.parallel, precision=of.precision, data=data)
    (found,) = gpus.run(1, measure, of, config)
    expected = stage_estimate(config, stage=0, world_size=1)
    assert expected.activations + expected.fp8_weights == pytest.approx(found.kept, rel=CLOSE)
