"""Memory of a GPU that trains an autoencoder, before there is one: the run's own forward and backward pass of its largest clip on fake
tensors, every allocation counted, beside the states whose bytes follow from the number of parameters.

Of ranks that share clips it is the first, whose slab is the largest. Not counted: work space of convolutions and attention kernels (the
library's choice; attention of HunyuanVideo's middle block is counted as torch composes it, with its scores), the library's own context,
fragmentation, clips that a decoder on the GPU keeps ahead.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from megasora.config.autoencoder_run import AutoencoderRunConfig
from megasora.config.errors import UserError
from megasora.config.problem import Problem
from megasora.data.buckets import pixels_of
from megasora.data.cache.teacher import DTYPES, read_teacher_facts
from megasora.models.autoencoders.discriminator import ClipDiscriminator
from megasora.models.autoencoders.teacher import blank_teacher_model
from megasora.models.lpips import Lpips, expected_shapes
from megasora.perf.allocations import Allocations
from megasora.training.autoencoder.backward import ClipDraws, Losses, backward_clip
from megasora.training.autoencoder.distillation import Distillation
from megasora.training.autoencoder.network import TrainedNetwork, new_discriminator, new_network, recompute_blocks
from megasora.training.autoencoder.teaching import distillation_of, teacher_of

Clip = tuple[int, int, int]
"""Frames, height, width."""


@dataclass(frozen=True, kw_only=True)
class AutoencoderMemoryEstimate:
    """Bytes on a GPU at the worst moment of a step."""

    weights: int
    """Of both networks, in the run's type."""
    gradients: int
    """fp32, whole on every rank."""
    optimizer: int
    """This rank's share of Adam's moments, and of fp32 masters in bf16."""
    ema: int
    """This rank's share of the moving average."""
    lpips: int
    """Weights of LPIPS."""
    teacher: int
    """Weights of a distillation's teacher, or its features of the step's clips from a cache."""
    clips: int
    """Levels of the step's clips."""
    activations: int
    """Whatever the forward and backward pass of a clip allocates, at its most: activations, gradients of them, LPIPS's features."""
    clip: Clip
    """The largest of the run."""

    def parts(self) -> dict[str, int]:
        """Bytes by name, largest first."""
        named = {field.name: int(getattr(self, field.name)) for field in fields(self) if field.name != "clip"}
        return dict(sorted(named.items(), key=lambda item: -item[1]))

    @property
    def total(self) -> int:
        """Bytes of all parts."""
        return sum(self.parts().values())


def largest_clip_of(config: AutoencoderRunConfig) -> Clip | None:
    """The largest clip that a run's settings allow; None where clips keep their own sizes."""
    if config.data.resolution == "manifest":
        return None
    unit = config.autoencoder.spatial_compression
    side = round(pixels_of(config.data.resolution) ** 0.5 / unit) * unit
    return max(config.data.frame_counts), side, side


def autoencoder_memory(config: AutoencoderRunConfig, *, world_size: int, clip: Clip | None = None) -> AutoencoderMemoryEstimate | None:
    """Memory of the fullest GPU of a sound run.

    The process must not be a rank of a real world.

    Args:
        config: the run; of HunyuanVideo's the folder that says its sizes is read.
        world_size: ranks of the job.
        clip: instead of the largest that the settings allow.

    Returns:
        None where clips keep their own sizes and none is given.

    Raises:
        UserError: the folder of the weights is none, or a clip is refused.
    """
    clip = clip or largest_clip_of(config)
    if clip is None:
        return None
    dtype = torch.bfloat16 if config.precision.dtype == "bf16" else torch.float32
    cp = config.parallel.context_parallel_size
    with _first_of(_sharing_ranks(config, clip)) as group, FakeTensorMode(allow_non_fake_inputs=True):
        network, adversary = _network(config, dtype), _discriminator(config, dtype)
        lpips = _lpips(config)
        if group is not None:
            network = network.shared_by(group, axis=config.parallel.context_parallel_axis)
        distillation = _distillation(config, network, dtype)
        losses_of = Losses(
            settings=config.loss,
            lpips=lpips.distance if lpips else None,
            adversary=config.discriminator,
            discriminator=adversary,
            distillation=distillation,
        )
        modules: list[nn.Module] = [
            network.module,
            *([adversary] if adversary else []),
            *([distillation.projector] if distillation else []),
        ]
        parameters = [parameter for module in modules for parameter in module.parameters()]
        levels = torch.zeros((3, *clip), dtype=torch.uint8)
        features = _features(config, clip)
        taught = [features] if features is not None else _weights(distillation)
        known: list[Tensor] = [levels, *parameters, *taught, *(lpips.buffers() if lpips else ())]
        learning = [parameter for parameter in parameters if parameter.requires_grad]
        for parameter in learning:
            parameter.register_post_accumulate_grad_hook(_let_go)
        with Allocations(known) as counted:
            backward_clip(network, levels, losses_of=losses_of, draws=ClipDraws(posterior=0, patches=0), share=1.0, features=features)
        learnt = sum(parameter.numel() for parameter in learning)
        averaged = sum(parameter.numel() for parameter in network.module.parameters() if parameter.requires_grad)
        per_rank = -(-config.data.batch_size // (world_size // cp))
        return AutoencoderMemoryEstimate(
            weights=sum(parameter.nbytes for parameter in parameters),
            gradients=4 * learnt,
            optimizer=(12 if dtype == torch.bfloat16 else 8) * learnt // world_size,
            ema=4 * averaged // world_size if config.optimizer.ema_decay > 0 else 0,
            lpips=sum(buffer.nbytes for buffer in lpips.buffers()) if lpips else 0,
            teacher=sum(tensor.nbytes for tensor in taught) * (per_rank if features is not None else 1),
            clips=levels.nbytes * (-(-per_rank // cp) + (cp > 1)),
            activations=counted.peak,
            clip=clip,
        )


def checked_memory(
    config: AutoencoderRunConfig, *, world_size: int, gpu_bytes: float
) -> tuple[AutoencoderMemoryEstimate | None, list[Problem]]:
    """(memory of a sound run, where its clips' sizes are known, the problem where it does not fit); a run on the CPU fits.

    Raises:
        UserError: see `autoencoder_memory`.
    """
    estimate = autoencoder_memory(config, world_size=world_size)
    if estimate is None or config.device == "cpu":
        return estimate, []
    problem = memory_problem(config, estimate, world_size=world_size, gpu_bytes=gpu_bytes)
    return estimate, [] if problem is None else [problem]


def memory_problem(
    config: AutoencoderRunConfig, estimate: AutoencoderMemoryEstimate, *, world_size: int, gpu_bytes: float
) -> Problem | None:
    """Why a run does not fit its GPUs, with the first change that makes it fit; None where it does."""
    if estimate.total <= gpu_bytes:
        return None
    frames, height, width = estimate.clip
    message = f"a clip of {frames} x {height} x {width} needs {estimate.total / 1e9:.0f} GB of a GPU that has {gpu_bytes / 1e9:.0f} GB"
    for flags, changed in _smaller(config, world_size):
        needed = autoencoder_memory(changed, world_size=world_size, clip=estimate.clip)
        if needed is not None and needed.total <= gpu_bytes:
            return Problem(field="memory", message=message, cure=f"use {flags} ({needed.total / 1e9:.0f} GB)")
    return Problem(field="memory", message=message, cure="use smaller or shorter clips (--data.resolution, --data.frame_counts)")


def _smaller(config: AutoencoderRunConfig, world_size: int) -> Iterator[tuple[str, AutoencoderRunConfig]]:
    """Flags and the run they make, cheapest in time first: ranks that share a clip share its work too, recomputing adds to it."""
    recomputed = replace(config, autoencoder=replace(config.autoencoder, recompute="stages"))
    weaker = config.autoencoder.recompute == "none"
    if weaker:
        yield "--autoencoder.recompute stages", recomputed
    for factor in (2, 4, 8):
        size = config.parallel.context_parallel_size * factor
        if world_size % size:
            continue
        flag = f"--parallel.context_parallel_size {size}"
        for more, base in (("", config), *([(" --autoencoder.recompute stages", recomputed)] if weaker else [])):
            yield flag + more, replace(base, parallel=replace(base.parallel, context_parallel_size=size))


def _network(config: AutoencoderRunConfig, dtype: torch.dtype) -> TrainedNetwork:
    """On fake tensors; starting values read numbers, so they are drawn of nothing."""
    with torch.device("meta"):
        network = new_network(config.autoencoder, weights=config.init.weights, load=False, seed=0)
    recompute_blocks(network, config.autoencoder)
    (last,) = [name for name, parameter in network.module.named_parameters() if parameter is network.last_weight]
    _make(network.module, dtype)
    return replace(network, last_weight=network.module.get_parameter(last))


def _discriminator(config: AutoencoderRunConfig, dtype: torch.dtype) -> ClipDiscriminator | None:
    if not config.has_discriminator:
        return None
    with torch.device("meta"):
        module = new_discriminator(config.discriminator)
    _make(module, dtype)
    return module


def _distillation(config: AutoencoderRunConfig, network: TrainedNetwork, dtype: torch.dtype) -> Distillation | None:
    """With the teacher of a folder's config.json; its weights are not read."""
    settings = config.distillation
    if not config.has_distillation:
        return None
    teacher = None
    if settings.cache is None:
        model = blank_teacher_model(None if settings.teacher is None else Path(settings.teacher))
        _make(model, dtype)
        teacher = teacher_of(settings, model)
    distillation = distillation_of(settings, network, teacher=teacher)
    _make(distillation.projector, dtype)
    return distillation


def _weights(distillation: Distillation | None) -> list[Tensor]:
    """Of the teacher."""
    return [] if distillation is None or distillation.teacher is None else list(distillation.teacher.model.parameters())


def _features(config: AutoencoderRunConfig, clip: Clip) -> Tensor | None:
    """The teacher's, of a clip, as its cache holds them."""
    if not config.has_distillation or config.distillation.cache is None:
        return None
    settings = read_teacher_facts(Path(config.distillation.cache)).settings
    return torch.zeros((settings.channels, *settings.grid(*clip)), dtype=DTYPES[settings.dtype])


def _make(module: nn.Module, dtype: torch.dtype) -> None:
    """Give a module of the meta device fake parameters (Module.to cannot), which learn where its own do."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(torch.empty(parameter.shape, dtype=dtype), requires_grad=parameter.requires_grad)


def _lpips(config: AutoencoderRunConfig) -> Lpips | None:
    """VGG16's, as published; AlexNet's is smaller."""
    if config.loss.lpips is None:
        return None
    return Lpips("vgg", {name: torch.empty(shape) for name, shape in expected_shapes("vgg").items()})


def _sharing_ranks(config: AutoencoderRunConfig, clip: Clip) -> int:
    """Ranks of a clip that have a part of it; more leave the first one's slab as it is."""
    settings, sharing = config.autoencoder, config.parallel
    lines = clip[1] // settings.spatial_compression
    if sharing.context_parallel_axis == "time" and clip[0] > 1:
        lines = max(1, clip[0] // settings.temporal_compression)
    return min(sharing.context_parallel_size, lines)


@contextmanager
def _first_of(ranks: int) -> Iterator[dist.ProcessGroup | None]:
    """A group of so many ranks of which this process is the first, and whose messages go nowhere; None for one."""
    if ranks == 1:
        yield None
        return
    if dist.is_initialized():
        raise UserError("memory of ranks that share clips is counted in a process without torch.distributed: this one is a rank")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        yield cast(dist.ProcessGroup, dist.group.WORLD)
    finally:
        dist.destroy_process_group()


def _let_go(parameter: Tensor) -> None:
    """As Megatron's DDP does, once it has added a gradient to its buffer."""
    parameter.grad = None
