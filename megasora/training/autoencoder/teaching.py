"""A run's teacher and projector: found, loaded, built, and what of them a run keeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from megasora.config.autoencoder_run import AutoencoderRunConfig
from megasora.config.distillation import DistillationConfig
from megasora.config.distillation_checks import TINY_RECIPE
from megasora.data.cache.identity import encoder_facts
from megasora.data.cache.teacher import TeacherCache, check_teacher_cache, read_teacher_facts
from megasora.data.plan import PlannedClip
from megasora.models.autoencoders.alignment import Projector
from megasora.models.autoencoders.dc_ae.model import VideoDCAE
from megasora.models.autoencoders.teacher import Teacher, load_teacher_model, make_tiny_teacher
from megasora.parallel.agreement import told_by_rank_0
from megasora.training.autoencoder.distillation import Distillation
from megasora.training.autoencoder.network import TrainedNetwork

T = TypeVar("T")


def with_teacher(config: AutoencoderRunConfig, *, folder: Path) -> AutoencoderRunConfig:
    """The config with a teacher; tiny_ae_distill makes one where none is given. All ranks call it together."""
    settings = config.distillation
    if not config.has_distillation or settings.teacher is not None or settings.cache is not None:
        return config
    assert config.recipe == TINY_RECIPE, "validation refuses a run without a teacher"
    if dist.get_rank() == 0:
        make_tiny_teacher(folder / "teacher")
    dist.barrier()
    return replace(config, distillation=replace(settings, teacher=str(folder / "teacher")))


def build_distillation(config: AutoencoderRunConfig, network: TrainedNetwork, *, device: torch.device, dtype: torch.dtype) -> Distillation:
    """The teacher on the device in the run's type, where no cache stands for it, and a new projector in fp32 on the CPU.

    Also freezes what `distillation.trained` says.

    Raises:
        UserError: the teacher's folder is none, or lacks a tensor.
    """
    settings = config.distillation
    teacher = None if settings.cache is not None else load_teacher(settings, device=device, dtype=dtype)
    distillation = distillation_of(settings, network, teacher=teacher)
    distillation.projector.initialize(seed=config.init.seed)
    return distillation


def distillation_of(settings: DistillationConfig, network: TrainedNetwork, *, teacher: Teacher | None) -> Distillation:
    """With a projector that is yet to be given values. Freezes what `distillation.trained` says.

    Args:
        settings: what is aligned and how.
        network: the autoencoder.
        teacher: None where its features come from `distillation.cache`, which is read for their channels.
    """
    module = network.module
    assert isinstance(module, VideoDCAE), "validation refuses another autoencoder"
    if settings.trained == "encoder":
        module.decoder.requires_grad_(False)
    out = read_teacher_facts(Path(str(settings.cache))).settings.channels if teacher is None else teacher.channels
    stage, sizes = settings.stage, module.config
    layer: nn.Module = module.encoder.project_out if stage is None else module.encoder.stages[stage]
    channels = sizes.latent_channels if stage is None else sizes.widths[min(stage + 1, len(sizes.widths) - 1)]
    projector = Projector(channels, out, width=settings.projector_width if settings.projector == "mlp" else None)
    return Distillation(settings=settings, layer=layer, teacher=teacher, projector=projector)


def load_teacher(settings: DistillationConfig, *, device: torch.device, dtype: torch.dtype) -> Teacher:
    """The teacher of a folder.

    Raises:
        UserError: the folder is none, or lacks a tensor.
    """
    return teacher_of(settings, load_teacher_model(Path(str(settings.teacher)), dtype=dtype).to(device))


def teacher_of(settings: DistillationConfig, model: nn.Module) -> Teacher:
    """A DINOv2 that is asked as the settings say."""
    return Teacher(model, frames=settings.frames, normalisation=settings.normalisation, side_px=settings.teacher_px)


def open_features(config: AutoencoderRunConfig, clips: Sequence[PlannedClip], *, manifest_sha256: str) -> TeacherCache | None:
    """The cache of the teacher's features of a run's clips; None where it has none. All ranks call it together.

    Raises:
        UserError: it is unfinished, or was made of other clips or settings or another teacher; the same on every rank.
    """
    if not config.has_distillation or config.distillation.cache is None:
        return None
    told_by_rank_0(lambda: check_teacher_cache(config, manifest_sha256=manifest_sha256))
    return TeacherCache(Path(config.distillation.cache), clips)


def kept_of(config: AutoencoderRunConfig) -> dict[str, Any] | None:
    """What a run keeps of its distillation: the teacher's files, what is compared and what is trained; None without.

    All ranks call it together; rank 0 reads the files.

    Raises:
        UserError: the teacher's folder cannot be read; the same on every rank.
    """
    if not config.has_distillation:
        return None
    settings = config.distillation
    if settings.cache is not None:
        teacher = read_teacher_facts(Path(settings.cache)).settings.teacher_sha256
    else:
        teacher = told_by_rank_0(lambda: encoder_facts(str(settings.teacher)).sha256)
    names = ("layer", "frames", "teacher_px", "normalisation", "projector", "projector_width", "trained")
    return {"teacher": teacher, **{name: getattr(settings, name) for name in names}}
