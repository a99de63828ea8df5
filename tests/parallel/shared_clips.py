"""Gradients of a training step of an autoencoder whose clips several ranks share; run by the rank pool and compared with one rank."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megasora import recipes
from megasora.config.autoencoder_run import DiscriminatorConfig, LossConfig
from megasora.config.dc_ae import DCAEConfig
from megasora.config.schema import ParallelConfig, SlabAxis
from megasora.diffusion.philox import Stream, key_of
from megasora.models.autoencoders.discriminator import ClipDiscriminator
from megasora.models.autoencoders.hunyuan import CLASS_NAME as HUNYUAN
from megasora.models.autoencoders.hunyuan import HunyuanNetwork
from megasora.parallel import groups
from megasora.training.autoencoder.backward import ClipDraws, Losses, backward_clip
from megasora.training.autoencoder.network import TrainedNetwork, new_network
from tests.unit.models.autoencoders.test_tiling import tiny_vae

SIZES = DCAEConfig(
    widths=(4, 8, 8),
    encoder_depths=(1, 1, 1),
    decoder_depths=(1, 1, 1),
    attention_from=2,
    temporal_stages=(0, 1),
    latent_channels=8,
    head_dim=4,
)
"""4x4x4."""
Clip = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A step: its clips, what they are trained for, and how ranks share them."""

    kind: str
    clips: tuple[Clip, ...]
    adversarial: bool = True
    norm: str = "clip"
    axis: SlabAxis = "height"
    context_parallel_size: int = 1
    recompute: bool = False


def networks(case: Case) -> tuple[TrainedNetwork, ClipDiscriminator]:
    """fp64, with weights that let every part count."""
    if case.kind == "dc-ae":
        settings = replace(recipes.get_autoencoder("tiny_ae").autoencoder, sizes=SIZES, spatial_compression=4)
        settings = replace(settings, recompute="stages" if case.recompute else "none")
        network = new_network(settings, weights=None, load=True, seed=7)
        with torch.no_grad():
            generator = torch.Generator().manual_seed(7)
            for parameter in network.module.parameters():
                parameter.normal_(0.3 if parameter.dim() == 1 else 0.0, 0.3, generator=generator)
    else:
        module = tiny_vae().requires_grad_(True).train()
        if case.recompute:
            module.enable_gradient_checkpointing()
        network = TrainedNetwork(
            network=HunyuanNetwork(module),
            last_weight=module.get_parameter("decoder.conv_out.conv.weight"),
            about={"_class_name": HUNYUAN},
        )
    network.module.double()
    discriminator = ClipDiscriminator(width=16 if case.norm == "group" else 4, num_layers=2, norm=case.norm, dropout=0.3)  # type: ignore[arg-type]
    discriminator.initialize(seed=7)
    return network, discriminator.double()


def frame_distance(a: Tensor, b: Tensor) -> Tensor:
    """A distance of pictures that no part of a picture can tell, as LPIPS: features of neighbourhoods, squared again after their mean."""
    kernel = torch.linspace(-1, 1, 5 * 3 * 3 * 3, dtype=torch.float64).view(5, 3, 3, 3).sin()
    features = [F.relu(F.conv2d(picture.double(), kernel, padding=1)) for picture in (a, b)]
    distances: Tensor = (features[0] - features[1]).square().mean(dim=(2, 3)).square().sum(dim=1)
    return distances


def step_on_rank(rank: int, case: Case) -> tuple[dict[str, Tensor], Tensor]:
    """(gradients by name, numbers of the step), summed over all ranks as training sums them."""
    network, discriminator = networks(case)
    layout = ParallelConfig(context_parallel_size=case.context_parallel_size)
    context = groups.initialize(layout, device=torch.device("cpu"), num_attention_heads=1, seed=0)
    network = network.shared_by(context.replica, axis=case.axis)
    losses_of = Losses(
        settings=LossConfig(lpips_weight=0.7, kl_weight=0.01 if case.kind == "hunyuan" else 0.0, reduction="sum"),
        lpips=frame_distance,
        adversary=DiscriminatorConfig(weight=0.5),
        discriminator=discriminator if case.adversarial else None,
    )
    sums: Tensor | int = 0
    for sample in range(context.at.dp, len(case.clips), context.topology.dp):
        generator = torch.Generator().manual_seed(sample)
        levels = torch.randint(0, 256, (3, *case.clips[sample]), generator=generator, dtype=torch.uint8)
        keys = [key_of(seed=1, stream=stream, sample=sample) for stream in (Stream.VAE, Stream.PATCHES)]
        draws = ClipDraws(posterior=keys[0], patches=keys[1])
        sums = sums + backward_clip(network, levels, losses_of=losses_of, draws=draws, share=1 / len(case.clips))
    total = sums if isinstance(sums, Tensor) else torch.zeros(9, dtype=torch.float64)
    dist.all_reduce(total)
    found = {}
    for name, parameter in (*network.module.named_parameters(), *discriminator.named_parameters(prefix="discriminator")):
        found[name] = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        dist.all_reduce(found[name])
    return found, total
