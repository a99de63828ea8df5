"""Problems of latent distillation's settings, each with its cure."""

from __future__ import annotations

from collections.abc import Iterator

from megasora.config.autoencoder_run import AutoencoderRunConfig
from megasora.config.problem import Problem

TINY_RECIPE = "tiny_ae_distill"
"""Makes its teacher itself."""


def distillation_problems(config: AutoencoderRunConfig) -> Iterator[Problem]:
    """What cannot work; nothing where there is no distillation."""
    settings = config.distillation
    if settings.weight < 0:
        yield Problem(field="distillation.weight", message=f"is {settings.weight}", cure="use 0 (none), or 0.1")
    if not config.has_distillation:
        return
    if config.autoencoder.kind != "dc-ae":
        yield Problem(
            field="distillation.weight",
            message="latents are distilled of a DC-AE only; HunyuanVideo's first frame has a latent frame of its own",
            cure="use 0",
        )
    if config.parallel.context_parallel_size != 1:
        yield Problem(
            field="parallel.context_parallel_size",
            message="a rank that has a part of a clip cannot compare all of its places with the teacher's",
            cure="use 1 with distillation",
        )
    if settings.cache is not None and config.data.temporal_start != "first":
        yield Problem(
            field="distillation.cache",
            message=f"data.temporal_start is {config.data.temporal_start}: a clip begins elsewhere each time, a cache holds one beginning",
            cure="use --data.temporal_start first, or leave distillation.cache out",
        )
    if settings.cache is not None and config.data.max_frame_interval != 1:
        yield Problem(
            field="distillation.cache",
            message=f"data.max_frame_interval is {config.data.max_frame_interval}: a clip has other frames each time, a cache one choice",
            cure="use --data.max_frame_interval 1, or leave distillation.cache out",
        )
    if settings.teacher is None and settings.cache is None and config.recipe != TINY_RECIPE:
        yield Problem(
            field="distillation.teacher",
            message="no teacher is given, and it is never random",
            cure="add --distillation.teacher FOLDER (transformers' Dinov2Model), or --distillation.weight 0",
        )
    yield from _layer(config)
    yield from _numbers(config)
    adversary = config.discriminator
    if settings.trained == "encoder" and config.has_discriminator and adversary.balance == "adaptive":
        yield Problem(
            field="discriminator.balance",
            message="is adaptive, which is measured at the decoder's last weight, and distillation.trained encoder keeps the decoder",
            cure="use --discriminator.balance plain, or --discriminator.weight 0",
        )


def _layer(config: AutoencoderRunConfig) -> Iterator[Problem]:
    settings, stages = config.distillation, len(config.autoencoder.sizes.widths)
    known = f"use latent, or stages.0 to stages.{stages - 1}"
    try:
        stage = settings.stage
    except ValueError:
        yield Problem(field="distillation.layer", message=f"is {settings.layer!r}", cure=known)
    else:
        if stage is not None and stage >= stages:
            yield Problem(field="distillation.layer", message=f"is {settings.layer}, the encoder has {stages} stages", cure=known)


def _numbers(config: AutoencoderRunConfig) -> Iterator[Problem]:
    settings = config.distillation
    if settings.teacher_px is not None and settings.teacher_px < 1:
        yield Problem(field="distillation.teacher_px", message=f"is {settings.teacher_px}", cure="use 224, or leave it out")
    if settings.projector_width < 1:
        yield Problem(field="distillation.projector_width", message=f"is {settings.projector_width}", cure="use 2048")
    for name, most in (("cosine_margin", 2), ("gram_margin", 2)):
        value = getattr(settings, name)
        if not 0 <= value < most:
            yield Problem(field=f"distillation.{name}", message=f"is {value}, a difference of cosines", cure=f"use 0 to below {most}")
    if settings.optimizer.ema_decay != 0:
        yield Problem(field="distillation.optimizer.ema_decay", message="no moving average is kept of the projector", cure="use 0")
