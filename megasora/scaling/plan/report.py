"""A plan as tables for people and as data for programs."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

from megasora.config.io import to_dict
from megasora.config.schema import RunConfig
from megasora.scaling.forecast.step import parts_dict
from megasora.scaling.plan.reasons import why_slower
from megasora.scaling.plan.search import Answer, Plan
from megasora.slurm.flags import changed_flags

SHOWN_REASONS = 12
"""Classes that were ruled out that a person is shown; --json has all."""

CACHE_PAYS = 0.1
"""Share of a step in the encoders from which a cache of latents is worth a word."""


def overrides(plan: Plan, base: RunConfig) -> list[str]:
    """What is said on the command line to get this layout from the recipe."""
    return list(changed_flags(base, plan.config))


def as_data(answer: Answer, *, base: RunConfig) -> dict[str, Any]:
    """For programs; overrides change the settings `base`."""
    best = answer.plans[0].step.parts if answer.plans else None
    return {
        "recipe": base.recipe,
        "gpus": answer.question.gpus,
        "hardware": to_dict(answer.question.hardware),
        "plans": [
            {
                "name": plan.layout.name,
                "overrides": overrides(plan, base),
                "step_time_s": plan.step.step_time_s,
                "mfu": plan.step.mfu,
                "tflops_per_gpu": plan.step.tflops_per_gpu,
                "tokens_per_s": plan.step.tokens_per_s,
                "samples_per_s": plan.step.samples_per_s,
                "peak_memory_bytes": max(plan.memory_per_stage),
                "memory_per_stage_bytes": list(plan.memory_per_stage),
                "memory_parts_bytes": plan.memory.parts(),
                "bubble": plan.step.bubble,
                "parts_s": parts_dict(plan.step.parts),
                "goodput": plan.run.goodput,
                "checkpoint_stall_s": plan.run.stall_s,
                "hours": plan.run.hours,
                "gpu_hours": plan.run.gpu_hours,
                "cost_usd": plan.run.dollars,
                "steps": plan.run.steps,
                "samples": plan.run.steps * plan.step.samples,
                "against_best": "" if best is None else why_slower(plan.step.parts, best),
            }
            for plan in answer.plans
        ],
        "ruled_out": [to_dict(one) for one in answer.ruled_out],
        "layouts_tried": answer.tried,
        "layouts_forecast": answer.simulated,
    }


def show(answer: Answer, *, base: RunConfig, source: str) -> None:
    """Print tables: the best layouts, why the others lost, what was ruled out, how to start the best."""
    from rich.console import Console

    console = Console()
    question = answer.question
    if not answer.plans:
        console.print(f"no layout of {question.config.recipe} fits {question.gpus} x {question.hardware.name}", highlight=False)
    else:
        console.print(_best(answer))
        console.print(_times(answer.plans))
        if len(answer.plans) > 1:
            console.print(_losers(answer.plans))
    if answer.ruled_out:
        console.print(_ruled_out(answer))
    console.print(f"{answer.tried:,} layouts, {answer.simulated:,} of them forecast; the others cannot be among these", highlight=False)
    if answer.plans:
        data = answer.plans[0].step.parts.data
        if data > CACHE_PAYS * answer.plans[0].step.step_time_s:
            print(f"{data:.2g} s of each step encode clips: megasora data encode once, and --data.cache, save them (and memory)")
        print("the best:", shlex.join(["megasora", "train", source, *overrides(answer.plans[0], base)]))


def _best(answer: Answer) -> Any:
    from rich import box
    from rich.table import Table

    question = answer.question
    price = question.hardware.dollars_per_gpu_hour
    title = f"{question.config.recipe} on {question.gpus} x {question.hardware.name}" + ("" if price is None else f" at ${price:g} an hour")
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("layout", "step s", "MFU", "clips/s", "GB", "GPU-hours", "cost"):
        table.add_column(name, justify="left" if name == "layout" else "right", no_wrap=True)
    for plan in answer.plans:
        step, run = plan.step, plan.run
        table.add_row(
            plan.layout.name,
            f"{step.step_time_s:.3g}",
            "" if step.mfu is None else f"{step.mfu:.1%}",
            f"{step.samples_per_s:.3g}",
            _range([size / 1e9 for size in plan.memory_per_stage]),
            f"{run.gpu_hours:,.0f}",
            "" if run.dollars is None else f"${run.dollars:,.0f}",
        )
    return table


def _times(plans: Sequence[Plan]) -> Any:
    """Where the time goes."""
    from rich import box
    from rich.table import Table

    table = Table(title="where a step's time goes, seconds of its busiest stage", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    columns = ("compute", "tensor_parallel", "context_parallel", "bubble", "pipeline", "data_parallel", "optimizer", "data")
    for name in ("layout", "compute", "TP", "CP", "bubble", "PP", "DP", "Adam", "data"):
        table.add_column(name, justify="left" if name == "layout" else "right", no_wrap=True)
    for plan in plans:
        parts = parts_dict(plan.step.parts)
        told = {**parts, "compute": parts["compute"] + parts["gaps"]}
        table.add_row(plan.layout.name, *(f"{told[name]:.2f}" for name in columns))
    return table


def _range(values: Sequence[float]) -> str:
    least, most = round(min(values)), round(max(values))
    return f"{most}" if least == most else f"{least} to {most}"


def _losers(plans: Sequence[Plan]) -> Any:
    from rich import box
    from rich.table import Table

    table = Table("layout", "step", "against the best", title="why the others lost", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    best = plans[0].step
    for plan in plans[1:]:
        table.add_row(plan.layout.name, f"{plan.step.step_time_s / best.step_time_s - 1:+.1%}", why_slower(plan.step.parts, best.parts))
    return table


def _ruled_out(answer: Answer) -> Any:
    from rich import box
    from rich.table import Table

    table = Table("layouts", "number", "constraint", "why", title="ruled out", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for one in answer.ruled_out[:SHOWN_REASONS]:
        table.add_row(one.layouts, str(one.count), one.constraint, one.reason)
    left = len(answer.ruled_out) - SHOWN_REASONS
    if left > 0:
        table.add_row(f"{left} more classes", str(sum(one.count for one in answer.ruled_out[SHOWN_REASONS:])), "", "--json has all")
    return table
