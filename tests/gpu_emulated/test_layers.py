"""Transformer Engine's layers compute what Megatron's own do, in every layout, and run in FP8 wherever FP8 is asked for.

Expected values are those of the `local` layers on one rank in fp32, which tests/parallel holds against diffusers.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from megasora.config.schema import ParallelConfig, PrecisionConfig
from tests.gpu_emulated.layouts import MODEL, SHORT, UNEVEN, Case, Step, gap, one_step, one_step_in_dirty_memory
from tests.pool import RankPool

FP32 = 1e-5
"""Relative Frobenius gap of fp32 gradients (rounding gives about 1e-6)."""
FP8 = ("tensorwise", "delayed", "blockwise")
FP8_GAP = 2.0**-3
"""Of all gradients together: the largest relative error of one rounding to E5M2, which has 2 bits of mantissa. A weight's gradient is a sum
of products of two rounded factors, and rounding errors of a sum partly cancel (measured 0.08)."""
LINEARS = 2 * 8 + 2 * 2
"""Block linears of MODEL: qkv, proj and two of the MLP for each stream of 2 double blocks; 2 for each of 2 single blocks."""


def layout(tp: int = 1, pp: int = 1, cp: int = 1, vp: int | None = None, **more: Any) -> ParallelConfig:
    return ParallelConfig(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        context_parallel_size=cp,
        virtual_pipeline_model_parallel_size=vp,
        **more,
    )


def precision(dtype: str = "bf16", fp8: str = "none", provider: str = "te", kernels: str = "torch") -> PrecisionConfig:
    return PrecisionConfig(dtype=dtype, fp8=fp8, provider=provider, attention="torch", kernels=kernels)  # type: ignore[arg-type]


_reference: dict[int, Step] = {}


def reference(gpus: RankPool, *, num_microbatches: int = 2) -> Step:
    """One rank, fp32, Megatron's own layers."""
    if num_microbatches not in _reference:
        (_reference[num_microbatches],) = gpus.run(
            1, one_step, Case(precision=precision("fp32", provider="local"), num_microbatches=num_microbatches)
        )
    return _reference[num_microbatches]


def all_together(step: Step, expected: Step) -> float:
    """Gap of all gradients as one vector."""
    assert step.gradients.keys() == expected.gradients.keys()
    pairs = [(step.gradients[key].double(), value.double()) for key, value in expected.gradients.items()]
    wrong, right = (torch.stack([x.square().sum() for x in each]).sum() for each in ([a - b for a, b in pairs], [b for _, b in pairs]))
    return float((wrong / right).sqrt())


@cache
def layouts() -> dict[str, tuple[int, ParallelConfig]]:
    return {
        "one rank": (1, layout()),
        "recompute": (1, layout(recompute="full")),
        "selective": (1, layout(recompute="selective")),
        "tp2": (2, layout(tp=2)),
        "pp2": (2, layout(pp=2)),
        "pp2 vp2": (2, layout(pp=2, vp=2)),
        "cp2 ulysses": (2, layout(cp=2, context_parallel_backend="ulysses")),
        "cp2 ring": (2, layout(cp=2, context_parallel_backend="ring")),
        "tp2 pp2 recompute": (4, layout(tp=2, pp=2, recompute="full")),
        "tp2 pp2 selective": (4, layout(tp=2, pp=2, recompute="selective")),
        "tp2 pp2 cp2": (8, layout(tp=2, pp=2, cp=2)),
    }


@pytest.mark.parametrize("name", layouts())
def test_te_in_fp32_gives_the_gradients_of_local_layers_on_one_rank(gpus: RankPool, name: str) -> None:
    world_size, parallel = layouts()[name]
    step = gpus.run(world_size, one_step, Case(parallel=parallel, precision=precision("fp32")))[0]
    expected = reference(gpus)
    assert step.gradients.keys() == expected.gradients.keys()
    wrong = {key: gap(step.gradients[key], value) for key, value in expected.gradients.items() if gap(step.gradients[key], value) > FP32}
    assert not wrong
    assert abs(step.loss / expected.loss - 1) < FP32
    assert set(step.gemms) == {"fp32"}


@pytest.mark.parametrize("name", ["one rank", "tp2", "pp2"])
def test_te_in_bf16_is_as_near_to_fp32_as_local_layers_are(gpus: RankPool, name: str) -> None:
    world_size, parallel = layouts()[name]
    (local,) = gpus.run(1, one_step, Case(precision=precision(provider="local")))
    step = gpus.run(world_size, one_step, Case(parallel=parallel, precision=precision()))[0]
    expected = reference(gpus)
    assert all_together(step, expected) < 1.5 * all_together(local, expected)
    assert set(step.gemms) == {"bf16"}


@pytest.mark.parametrize("fp8", FP8)
@pytest.mark.parametrize("name", ["one rank", "tp2", "pp2", "recompute", "selective"])
def test_fp8_is_near_to_fp32(gpus: RankPool, fp8: str, name: str) -> None:
    world_size, parallel = layouts()[name]
    step = gpus.run(world_size, one_step, Case(parallel=parallel, precision=precision(fp8=fp8)))[0]
    assert all_together(step, reference(gpus)) < FP8_GAP


@pytest.mark.parametrize("fp8", FP8)
@pytest.mark.parametrize(("recompute", "products"), [("none", 3), ("selective", 3), ("full", 4)])
def test_every_product_of_a_block_runs_in_fp8(gpus: RankPool, fp8: str, recompute: str, products: int) -> None:
    """Forward, gradient of the input, gradient of the weight; recomputation runs the forward again."""
    case = Case(parallel=layout(recompute=recompute), precision=precision(fp8=fp8))
    (step,) = gpus.run(1, one_step, case)
    assert step.gemms == {"fp8": products * LINEARS * case.num_microbatches}


@pytest.mark.parametrize("fp8", FP8)
def test_evaluation_runs_in_fp8(gpus: RankPool, fp8: str) -> None:
    (step,) = gpus.run(1, one_step, Case(precision=precision(fp8=fp8), forward_only=True))
    assert step.gemms == {"fp8": LINEARS * 2}


def test_delayed_scales_are_reduced_once_each_way(gpus: RankPool) -> None:
    """Twice a micro-batch, not at each of the blocks."""
    case = Case(precision=precision(fp8="delayed"))
    (step,) = gpus.run(1, one_step, case)
    assert step.amax_updates == 2 * case.num_microbatches


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("fp8", ["none", *FP8])
def test_recomputation_repeats_the_blocks_to_the_bit(gpus: RankPool, fp8: str, recompute: str) -> None:
    """The rest differs by the order in which bf16 gradients of `vec` are added."""
    plain, again = (
        gpus.run(1, one_step, Case(parallel=layout(recompute=kind), precision=precision(fp8=fp8)))[0] for kind in ("none", recompute)
    )
    assert plain.loss == again.loss
    gaps = {key: gap(again.gradients[key], value) for key, value in plain.gradients.items()}
    assert not [key for key, value in gaps.items() if "_blocks." in key and value > 0]
    assert max(gaps.values()) < 2 * 2.0**-8


@pytest.mark.parametrize(("fp8", "sizes"), [("none", {"tp": 2, "pp": 2}), *((recipe, {}) for recipe in FP8)])
def test_inputs_in_host_memory_change_no_bit(gpus: RankPool, fp8: str, sizes: dict[str, int]) -> None:
    """Also through Transformer Engine's own checkpoint, which FP8 takes."""
    parallel = layout(**sizes, recompute="full")
    steps = [
        gpus.run(of.model_parallel_size, one_step, Case(parallel=of, precision=precision(fp8=fp8)))[0]
        for of in (parallel, replace(parallel, offload="inputs"))
    ]
    assert steps[0].loss == steps[1].loss
    assert steps[0].gemms == steps[1].gemms
    assert all(torch.equal(steps[1].gradients[key], value) for key, value in steps[0].gradients.items())


def test_rows_that_are_not_padded_are_refused_by_the_emulation_too(gpus: RankPool) -> None:
    """Or a missing row_multiple would pass here and fail on the GPU."""
    from tests.pool import RankFailedError

    with pytest.raises(RankFailedError, match="FP8"):
        gpus.run(1, unpadded, Case(precision=precision(fp8="tensorwise"), samples=UNEVEN))


def unpadded(rank: int, case: Case) -> Step:
    """`one_step` with packs that know nothing of FP8."""
    from tests.gpu_emulated import layouts as this

    multiples = this.FP8_ROW_MULTIPLE
    this.FP8_ROW_MULTIPLE = dict.fromkeys(multiples, 1)
    try:
        return one_step(rank, case)
    finally:
        this.FP8_ROW_MULTIPLE = multiples


def test_the_model_of_these_tests_has_shards_that_fp8_takes() -> None:
    assert MODEL.hidden_size // 2 % 16 == 0
    assert MODEL.ffn_hidden_size // 2 % 16 == 0
    assert replace(MODEL).head_dim == 16


@pytest.mark.parametrize(
    "parallel",
    [layout(), layout(tp=2, cp=2), layout(cp=2, context_parallel_backend="ring"), layout(recompute="full")],
    ids=["one rank", "tp2 x ulysses 2", "ring 2", "recompute"],
)
def test_triton_kernels_give_the_gradients_of_torch_operations(triton_gpus: RankPool, parallel: ParallelConfig) -> None:
    (expected,) = triton_gpus.run(1, one_step, Case(precision=precision("fp32", provider="local"), samples=SHORT))
    case = Case(parallel=parallel, precision=precision("fp32", kernels="triton"), samples=SHORT)
    ours = triton_gpus.run(parallel.model_parallel_size, one_step_in_dirty_memory, case)[0]
    assert ours.loss == pytest.approx(expected.loss, rel=FP32)
    for key, gradient in expected.gradients.items():
        assert gap(ours.gradients[key], gradient) < FP32, key
