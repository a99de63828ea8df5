"""The planner: what it finds is never beaten by forecasting everything; what it leaves out has a reason."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megasora import recipes
from megasora.config.memory import memory_estimate
from megasora.config.schema import RunConfig
from megasora.config.validate import problems
from megasora.perf.hardware import load_hardware
from megasora.scaling.forecast.step import forecast_step, least_step_time, mean_forecast
from megasora.scaling.plan.beside import beside
from megasora.scaling.plan.reasons import why_slower
from megasora.scaling.plan.report import overrides
from megasora.scaling.plan.search import Question, search
from megasora.scaling.plan.space import Layout, Space, layouts
from megasora.scaling.workload import planned_clips, steps_of

SMALL = Space(
    tp=(1, 2, 4), pp=(1, 2, 4), vp=(1, 2), cp=(1, 4), zero=(1, 3), recompute=("none", "selective", "full"), microbatches=(1, 4, 8)
)


def recipe(name: str) -> RunConfig:
    config = recipes.get(name)
    return replace(config, data=replace(config.data, cache="latents"))


def every(question: Question) -> list[tuple[float, Layout]]:
    """All layouts that work and fit, forecast, best first."""
    clips = planned_clips(question.config, clips=question.clips)
    samples = len(steps_of(question.config, clips, world_size=1)[0].clips)
    room, found = question.hardware.memory_bytes - beside(question.config).total, []
    for layout in layouts(question.space, gpus=question.gpus, samples=samples):
        config = layout.config(question.config)
        if samples < question.gpus // layout.ranks or problems(config, world_size=question.gpus, check_memory=False):
            continue
        if memory_estimate(config, world_size=question.gpus).total > room:
            continue
        steps = steps_of(config, clips, world_size=question.gpus, steps=question.steps)
        forecasts = [forecast_step(config, packs, world_size=question.gpus, hardware=question.hardware) for packs in steps]
        bounds = [least_step_time(config, packs, world_size=question.gpus, hardware=question.hardware) for packs in steps]
        time = mean_forecast(forecasts).step_time_s
        assert sum(bounds) / len(bounds) <= time * (1 + 1e-12)
        found.append((time, layout))
    return sorted(found, key=lambda one: one[0])


@pytest.mark.parametrize(
    ("name", "gpus", "gpu", "clips", "steps"),
    [
        ("opensora2_stage3", 64, "h200", "largest", 1),
        ("opensora2_stage1", 32, "h100:ib200", "largest", 1),
        ("opensora2_stage3", 48, "a100", "drawn", 2),
    ],
)
def test_never_beaten_by_forecasting_everything(name: str, gpus: int, gpu: str, clips: str, steps: int) -> None:
    config = recipe(name)
    config = replace(config, data=replace(config.data, global_tokens=config.data.global_tokens // 4))
    question = Question(config=config, gpus=gpus, hardware=load_hardware(gpu), clips=clips, steps=steps, space=SMALL, best=5)  # type: ignore[arg-type]
    answer, brute = search(question), every(question)
    groups: dict[tuple[object, ...], float] = {}
    for time, layout in brute:
        groups.setdefault((layout.tp, layout.pp, layout.vp, layout.cp, layout.fp8), time)
    assert [plan.step.step_time_s for plan in answer.plans] == pytest.approx(sorted(groups.values())[:5], rel=1e-12)
    assert answer.simulated < len(brute)


def test_a_plan_is_a_run_that_training_accepts() -> None:
    base = recipe("opensora2_stage3")
    answer = search(Question(config=base, gpus=64, hardware=load_hardware("h200"), space=SMALL))
    for plan in answer.plans:
        assert problems(plan.config, world_size=64) == []
    words = overrides(answer.plans[0], base)
    assert "--data.num_microbatches" in words or answer.plans[0].config.data.num_microbatches == base.data.num_microbatches


def test_what_does_not_fit_says_what_needs_least() -> None:
    space = replace(SMALL, tp=(1,), pp=(1,), cp=(1,), zero=(1,))
    answer = search(Question(config=recipe("opensora2_stage3"), gpus=8, hardware=load_hardware("h100"), space=space))
    assert answer.plans == ()
    (memory,) = [one for one in answer.ruled_out if one.constraint == "memory"]
    assert memory.layouts == "TP1 PP1 CP1"
    assert memory.count == answer.tried
    assert "full M" in memory.reason
    assert "76 GB are there" in memory.reason


def test_more_replicas_than_clips_are_ruled_out_by_the_batch() -> None:
    config = recipe("opensora2_stage3")
    answer = search(Question(config=config, gpus=1024, hardware=load_hardware("h200"), space=SMALL, best=1))
    (batch,) = [one for one in answer.ruled_out if one.constraint == "data.global_tokens" and "1024 replicas" in one.reason]
    assert "a step has 96 clips" in batch.reason
    assert all(1024 // plan.layout.ranks <= 96 for plan in answer.plans)


def test_fp8_is_tried_when_asked_for_and_refused_where_there_is_none() -> None:
    space = Space(tp=(1,), pp=(1,), cp=(4,), zero=(1,), recompute=("full",), microbatches=(2,), fp8=("none", "tensorwise"))
    with_it = search(Question(config=recipe("opensora2_stage3"), gpus=192, hardware=load_hardware("h200"), space=space))
    assert [plan.layout.fp8 for plan in with_it.plans] == ["tensorwise", "none"]
    without = search(Question(config=recipe("opensora2_stage3"), gpus=192, hardware=load_hardware("a100"), space=space))
    assert any(one.constraint == "precision.fp8" for one in without.ruled_out)


def test_why_a_layout_lost_is_told_by_category() -> None:
    answer = search(Question(config=recipe("opensora2_stage3"), gpus=64, hardware=load_hardware("h200"), space=SMALL))
    best, other = answer.plans[0].step.parts, answer.plans[-1].step.parts
    assert why_slower(best, best) == "as fast"
    assert "s " in why_slower(other, best)
    assert answer.plans[0].step.parts.total == pytest.approx(answer.plans[0].step.step_time_s)
