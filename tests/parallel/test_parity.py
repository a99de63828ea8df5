"""Every layout computes what one rank computes: loss, gradient norm and every gradient, in fp64 to rounding (DESIGN invariant 1)."""

from __future__ import annotations

from functools import cache

import pytest
from torch import Tensor

from megasora.config.schema import ParallelConfig
from tests.parallel.layouts import EVEN, UNEVEN, Case, Measured, assemble, one_step, relative_gaps
from tests.pool import RankPool

EXACT = 1e-10
"""Relative Frobenius gap of fp64 gradients; rounding alone gives about 1e-14."""


def layout(tp: int = 1, pp: int = 1, cp: int = 1, vp: int | None = None, **more: object) -> ParallelConfig:
    return ParallelConfig(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        context_parallel_size=cp,
        virtual_pipeline_model_parallel_size=vp,
        **more,  # type: ignore[arg-type]
    )


_references: dict[Case, tuple[Measured, dict[str, Tensor]]] = {}


def reference(pool: RankPool, case: Case) -> tuple[Measured, dict[str, Tensor]]:
    """What one rank measures on the same samples."""
    key = Case(samples=case.samples, zero_weight=case.zero_weight)
    if key not in _references:
        results = pool.run(1, one_step, key)
        _references[key] = results[0], assemble(results)
    return _references[key]


def gaps_to_one_rank(pool: RankPool, world_size: int, case: Case) -> tuple[float, float, dict[str, float]]:
    """Relative gaps of loss, gradient norm and each gradient."""
    results = pool.run(world_size, one_step, case)
    expected, gradients = reference(pool, case)
    return (
        abs(results[0].loss / expected.loss - 1),
        abs(results[0].grad_norm / expected.grad_norm - 1),
        relative_gaps(assemble(results), gradients),
    )


LAYOUTS = {
    "tp2": (2, layout(tp=2)),
    "tp4": (4, layout(tp=4)),
    "pp2": (2, layout(pp=2)),
    "pp4": (4, layout(pp=4)),
    "pp2 vp2": (2, layout(pp=2, vp=2)),
    "pp4 vp2": (4, layout(pp=4, vp=2)),
    "pp2 given split": (2, layout(pp=2, pipeline_split="given", pipeline_blocks=(2, 6))),
    "pp2 by parameters": (2, layout(pp=2, pipeline_split="parameters")),
    "cp2 ulysses": (2, layout(cp=2, context_parallel_backend="ulysses")),
    "cp4 ulysses": (4, layout(cp=4, context_parallel_backend="ulysses")),
    "cp2 ring": (2, layout(cp=2, context_parallel_backend="ring")),
    "cp4 ring": (4, layout(cp=4, context_parallel_backend="ring")),
    "cp4 both": (4, layout(cp=4, context_parallel_backend="ulysses_ring", ulysses_size=2)),
    "dp2": (2, layout()),
    "tp2 pp2": (4, layout(tp=2, pp=2)),
    "tp2 cp2": (4, layout(tp=2, cp=2)),
    "tp2 cp2 ring": (4, layout(tp=2, cp=2, context_parallel_backend="ring")),
    "pp2 cp2": (4, layout(pp=2, cp=2)),
    "dp2 tp2": (4, layout(tp=2)),
    "tp2 pp2 cp2": (8, layout(tp=2, pp=2, cp=2)),
    "tp2 pp2 vp2 recompute": (4, layout(tp=2, pp=2, vp=2, recompute="full")),
    "tp2 recompute one of each": (2, layout(tp=2, recompute="count", recompute_double_blocks=1, recompute_single_blocks=1)),
    "selective": (1, layout(recompute="selective")),
    "tp2 pp2 vp2 selective": (4, layout(tp=2, pp=2, vp=2, recompute="selective")),
    "tp2 cp2 selective, one of each in full": (
        4,
        layout(tp=2, cp=2, recompute="selective", recompute_double_blocks=1, recompute_single_blocks=1),
    ),
    "cp2 ring selective": (2, layout(cp=2, context_parallel_backend="ring", recompute="selective")),
    "tp2 pp2 dp2": (8, layout(tp=2, pp=2)),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_uneven_packs_give_the_gradients_of_one_rank(pool: RankPool, name: str) -> None:
    world_size, parallel = LAYOUTS[name]
    loss, norm, gradients = gaps_to_one_rank(pool, world_size, Case(parallel=parallel))
    wrong = {key: gap for key, gap in gradients.items() if gap > EXACT}
    assert not wrong
    assert loss < EXACT
    assert norm < EXACT


@pytest.mark.parametrize("name", ["tp2 pp2 cp2", "cp4 ring", "pp4 vp2"])
def test_equal_packs_give_the_gradients_of_one_rank(pool: RankPool, name: str) -> None:
    world_size, parallel = LAYOUTS[name]
    loss, norm, gradients = gaps_to_one_rank(pool, world_size, Case(parallel=parallel, samples=EVEN))
    assert max(gradients.values()) < EXACT
    assert max(loss, norm) < EXACT


@pytest.mark.parametrize("name", ["tp2 pp2 cp2", "dp2"])
def test_a_sample_of_weight_zero_changes_nothing_but_the_count(pool: RankPool, name: str) -> None:
    world_size, parallel = LAYOUTS[name]
    loss, norm, gradients = gaps_to_one_rank(pool, world_size, Case(parallel=parallel, zero_weight=(1, 4)))
    assert max(gradients.values()) < EXACT
    assert max(loss, norm) < EXACT


def test_weight_zero_equals_the_sample_not_being_there(pool: RankPool) -> None:
    _, with_zero = reference(pool, Case(zero_weight=(7,)))
    (without,) = pool.run(1, one_step, Case(samples=UNEVEN[:7]))
    assert max(relative_gaps(assemble([without]), with_zero).values()) < EXACT


def test_every_parameter_has_a_part_in_the_loss(pool: RankPool) -> None:
    _, gradients = reference(pool, Case())
    assert [key for key, gradient in gradients.items() if not gradient.any()] == []


@cache
def _mistakes() -> dict[str, tuple[int, ParallelConfig]]:
    return {
        "doubled gradient": (2, layout(tp=2)),
        "dropped reduction": (2, layout(tp=2)),
        "rank-dependent draw": (2, layout(cp=2)),
        "swapped pipeline neighbour": (4, layout(pp=4)),
    }


@pytest.mark.parametrize("mistake", ["doubled gradient", "dropped reduction", "rank-dependent draw", "swapped pipeline neighbour"])
def test_a_seeded_mistake_is_caught(pool: RankPool, mistake: str) -> None:
    world_size, parallel = _mistakes()[mistake]
    try:
        loss, norm, gradients = gaps_to_one_rank(pool, world_size, Case(parallel=parallel, mistake=mistake))
        worst = max(loss, norm, *gradients.values())
    except AssertionError:  # replicas of a tensor disagree
        worst = float("inf")
    assert worst > 1e-3
