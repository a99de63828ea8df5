"""A run's teacher and projector: found, loaded, built, and what of them a run keeps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from megasora.config.autoencoder_run import AutoencoderRunConfig
from megasora.config.distillation_checks import TINY_RECIPE
from megasora.config.errors import UserError
from megasora.data.cache.identity import encoder_facts
from megasora.models.autoencoders.alignment import Projector
from megasora.models.autoencoders.dc_ae.model import VideoDCAE
from megasora.models.autoencoders.teacher import Teacher, load_teacher_model, make_tiny_teacher
from megasora.training.autoencoder.distillation import Distillation
from megasora.training.autoencoder.network import TrainedNetwork


def with_teacher(config: AutoencoderRunConfig, *, folder: Path) -> AutoencoderRunConfig:
    """The config with a teacher; tiny_ae_distill makes one where none is given. All ranks call it together."""
    settings = config.distillation
    if not config.has_distillation or settings.teacher is not None:
        return config
    assert config.recipe == TINY_RECIPE, "validation refuses a run without a teacher"
    if dist.get_rank() == 0:
        make_tiny_teacher(folder / "teacher")
    dist.barrier()
    return replace(config, distillation=replace(settings, teacher=str(folder / "teacher")))


def build_distillation(config: AutoencoderRunConfig, network: TrainedNetwork, *, device: torch.device, dtype: torch.dtype) -> Distillation:
    """The teacher on the device in the run's type, and a new projector in fp32 on the CPU.

    Also freezes what `distillation.trained` says.

    Raises:
        UserError: the teacher's folder is none, or lacks a tensor.
    """
    settings, module = config.distillation, network.module
    assert isinstance(module, VideoDCAE), "validation refuses another autoencoder"
    if settings.trained == "encoder":
        module.decoder.requires_grad_(False)
    model = load_teacher_model(Path(str(settings.teacher)), dtype=dtype).to(device)
    teacher = Teacher(model, frames=settings.frames, normalisation=settings.normalisation, side_px=settings.teacher_px)
    stage, sizes = settings.stage, module.config
    layer: nn.Module = module.encoder.project_out if stage is None else module.encoder.stages[stage]
    channels = sizes.latent_channels if stage is None else sizes.widths[min(stage + 1, len(sizes.widths) - 1)]
    projector = Projector(channels, teacher.channels, width=settings.projector_width if settings.projector == "mlp" else None)
    projector.initialize(seed=config.init.seed)
    return Distillation(settings=settings, layer=layer, teacher=teacher, projector=projector)


def kept_of(config: AutoencoderRunConfig) -> dict[str, Any] | None:
    """What a run keeps of its distillation: the teacher's files, what is compared and what is trained; None without.

    All ranks call it together; rank 0 reads the files.

    Raises:
        UserError: the teacher's folder cannot be read; the same on every rank.
    """
    if not config.has_distillation:
        return None
    settings = config.distillation
    found: list[str | UserError] = [""]
    if dist.get_rank() == 0:
        try:
            found = [encoder_facts(str(settings.teacher)).sha256]
        except UserError as error:
            found = [error]
    dist.broadcast_object_list(found, src=0)
    (answer,) = found
    if isinstance(answer, UserError):
        raise answer
    names = ("layer", "frames", "teacher_px", "normalisation", "projector", "projector_width", "trained")
    return {"teacher": answer, **{name: getattr(settings, name) for name in names}}
