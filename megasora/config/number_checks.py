"""Ranges of numbers; part of the checks before a run. One that is outside fails late, or does something else in silence: a negative warm-up
trains uphill, `checkpoint.keep -1` would keep nothing."""

from __future__ import annotations

import math
from collections.abc import Iterator

from megasora.config.problem import Problem
from megasora.config.run_basics import RunBasics
from megasora.config.schema import OptimizerConfig, RunConfig

Range = tuple[str, object, bool, str]
"""Field, value, whether it is good, the rule."""


def check_numbers(config: RunConfig, world_size: int) -> Iterator[Problem]:
    """Of a diffusion transformer's run."""
    data, evaluation, model = config.data, config.evaluation, config.model
    scale = config.encoders.scaling_factor
    yield from outside(
        (
            *optimizer_ranges("optimizer", config.optimizer),
            *run_ranges(config),
            ("flow.sigma_min", config.flow.sigma_min, 0 <= config.flow.sigma_min < 1, "in [0, 1)"),
            ("evaluation.interval_steps", evaluation.interval_steps, evaluation.interval_steps >= 0, "0 or positive"),
            ("evaluation.sample_interval_steps", evaluation.sample_interval_steps, evaluation.sample_interval_steps >= 0, "0 or positive"),
            ("evaluation.num_timestep_bins", evaluation.num_timestep_bins, evaluation.num_timestep_bins >= 1, "at least 1"),
            ("sample.steps", config.sample.steps, config.sample.steps >= 1, "at least 1"),
            ("data.text_tokens", data.text_tokens, data.text_tokens >= 1, "at least 1"),
            ("data.target_fps", data.target_fps, data.target_fps > 0, "positive"),
            ("encoders.scaling_factor", scale, scale is None or (math.isfinite(scale) and scale > 0), "positive"),
            ("model.axes_dim", model.axes_dim, min(model.axes_dim) >= 0, "0 or positive on every axis"),
            ("model.norm_eps", model.norm_eps, model.norm_eps > 0, "positive"),
            ("model.rope_theta", model.rope_theta, model.rope_theta > 0, "positive"),
        )
    )
    yield from check_milestones("optimizer", config.optimizer)


def run_ranges(config: RunBasics) -> tuple[Range, ...]:
    """Of any run."""
    saving, guard, train = config.checkpoint, config.guard, config.train
    return (
        ("train.steps", train.steps, train.steps > 0, "positive"),
        ("train.log_interval_steps", train.log_interval_steps, train.log_interval_steps >= 1, "at least 1"),
        ("checkpoint.interval_steps", saving.interval_steps, saving.interval_steps >= 0, "0 or positive"),
        ("checkpoint.keep", saving.keep, saving.keep >= 0, "positive, or 0 to keep all"),
        ("checkpoint.keep_every_steps", saving.keep_every_steps, saving.keep_every_steps >= 0, "0 or positive"),
        (
            "checkpoint.local_interval_steps",
            saving.local_interval_steps,
            (saving.local_interval_steps > 0) == (saving.local_dir is not None),
            "positive with checkpoint.local_dir, and 0 without",
        ),
        (
            "recovery.report_interval_steps",
            config.recovery.report_interval_steps,
            config.recovery.report_interval_steps >= 0,
            "0 or positive",
        ),
        ("data.quarantine_after", config.data.quarantine_after, config.data.quarantine_after >= 0, "0 or positive"),
        ("guard.window", guard.window, guard.window >= 4, "at least 4"),
        ("guard.loss_deviations", guard.loss_deviations, guard.loss_deviations >= 0, "0 or positive"),
        ("guard.norm_factor", guard.norm_factor, guard.norm_factor == 0 or guard.norm_factor > 1, "0 or above 1"),
        ("guard.patience", guard.patience, guard.patience >= 1, "at least 1"),
        ("guard.budget", guard.budget, guard.budget >= 0, "0 or positive"),
    )


def optimizer_ranges(section: str, settings: OptimizerConfig) -> tuple[Range, ...]:
    """Of an optimizer."""
    return (
        (f"{section}.lr", settings.lr, math.isfinite(settings.lr) and settings.lr > 0, "positive"),
        (f"{section}.warmup_steps", settings.warmup_steps, settings.warmup_steps >= 0, "0 or positive"),
        (f"{section}.beta1", settings.beta1, 0 <= settings.beta1 < 1, "in [0, 1)"),
        (f"{section}.beta2", settings.beta2, 0 <= settings.beta2 < 1, "in [0, 1)"),
        (f"{section}.eps", settings.eps, settings.eps > 0, "positive"),
        (f"{section}.weight_decay", settings.weight_decay, settings.weight_decay >= 0, "0 or positive"),
        (f"{section}.ema_decay", settings.ema_decay, 0 <= settings.ema_decay < 1, "in [0, 1)"),
        (f"{section}.clip_grad", settings.clip_grad, settings.clip_grad >= 0, "0 or positive"),
    )


def check_milestones(section: str, settings: OptimizerConfig) -> Iterator[Problem]:
    """lr_milestones: steps that increase, rates that train."""
    steps = [step for step, _ in settings.lr_milestones]
    if steps != sorted(set(steps)):
        yield Problem(field=f"{section}.lr_milestones", message=f"steps {steps} must increase", cure="sort them")
    if wrong := [rate for _, rate in settings.lr_milestones if not (math.isfinite(rate) and rate >= 0)]:
        yield Problem(field=f"{section}.lr_milestones", message=f"{wrong[0]} is no rate", cure="use rates that are 0 or positive")


def outside(ranges: tuple[Range, ...]) -> Iterator[Problem]:
    """Those that are not good."""
    for name, value, good, rule in ranges:
        if not good:
            yield Problem(field=name, message=f"is {value}", cure=f"use a value that is {rule}")
