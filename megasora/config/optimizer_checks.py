"""Checks of the formats of Adam's moments; part of `config.validate`."""

from __future__ import annotations

from collections.abc import Iterator

from megasora.config.problem import Problem
from megasora.config.schema import RunConfig

SMALLEST_RATE = {"bf16": 2.0**-8, "fp16": 2.0**-11}
"""What 1 - beta must be for a moment to decay whatever its value is: half a step of the format above 1, or beta x rounds back to x (bf16
has 7 bits behind the point, fp16 10: IEEE 754, binary16)."""
SMALLEST_EPS = 1e-8
"""Of an fp16 second moment: below 2^-40 of a run's largest it is zero (half of the smallest subnormal, 2^-25, over half the range, 2^15),
and the update is the first moment over eps alone. Megatron-core's and Transformer Engine's default."""


def check_moments(config: RunConfig, world_size: int) -> Iterator[Problem]:
    """optimizer.exp_avg_dtype and exp_avg_sq_dtype."""
    settings = config.optimizer
    for name, beta in (("exp_avg", "beta1"), ("exp_avg_sq", "beta2")):
        field, kept = f"optimizer.{name}_dtype", getattr(settings, f"{name}_dtype")
        if kept == "fp32":
            continue
        if config.device == "cpu":
            yield Problem(field=field, message=f"{kept} is kept by Transformer Engine's FusedAdam, which needs CUDA", cure="use fp32")
        if 1 - getattr(settings, beta) < SMALLEST_RATE[kept]:
            finer = f", or --{field} fp16" if kept == "bf16" and 1 - getattr(settings, beta) >= SMALLEST_RATE["fp16"] else ", or fp32"
            yield Problem(
                field=field,
                message=f"{kept} rounds away what {beta} {getattr(settings, beta)} changes in a step: the moment would stand still",
                cure=f"use {beta} {1 - SMALLEST_RATE[kept]:.4g} or less{finer}",
            )
    if settings.exp_avg_sq_dtype == "fp16" and settings.eps < SMALLEST_EPS:
        yield Problem(
            field="optimizer.eps",
            message=f"{settings.eps:g} is what updates are divided by where an fp16 second moment is too small for its scale",
            cure=f"use --optimizer.eps {SMALLEST_EPS:g}, or --optimizer.exp_avg_sq_dtype bf16 or fp32",
        )
