"""Losses of one clip and their gradients, added up in the parameters. No collective, no optimizer: what tests compare over ranks.

The reconstruction's graph is walked once. Losses of pixels, LPIPS and the discriminator are differentiated down to the reconstruction
first; the adaptive weight needs only the last convolution's gradient of either; then their sum goes back through the autoencoder. The
discriminator's own loss takes the same reconstruction, as it does when the two step one after the other.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from megasora.config.autoencoder_run import DiscriminatorConfig, LossConfig
from megasora.models.autoencoders import losses
from megasora.models.autoencoders.discriminator import ClipDiscriminator
from megasora.models.autoencoders.losses import Perceptual
from megasora.training.autoencoder.distillation import Cut, Distillation
from megasora.training.autoencoder.network import TrainedNetwork

AGAINST = ("generator", "balance", "discriminator", "logits_real", "logits_made")
ALIGNED = ("cosine", "gram", "alignment_balance")
MEASURED = ("objective", "pixels", "lpips", "kl", *AGAINST, *ALIGNED)
"""Numbers of a clip, in their order: objective is the weighted sum without the discriminator and the teacher, pixels and lpips are means,
kl is summed over the latent, balance is what the generator's loss was multiplied by, alignment_balance what cosine + gram was."""


@dataclass(frozen=True, kw_only=True)
class ClipDraws:
    """Keys of what is random about a clip in a step."""

    posterior: int
    patches: int
    """Of the discriminator's dropout."""

    def generator(self, number: int, device: torch.device) -> torch.Generator:
        """What a pass of the discriminator draws from: torch's own generator, for a clip is never split there."""
        return torch.Generator(device=device).manual_seed((self.patches + number) & 0x7FFFFFFFFFFFFFFF)


@dataclass(frozen=True, kw_only=True)
class Losses:
    """What a clip is trained for in a step."""

    settings: LossConfig
    lpips: Perceptual | None
    adversary: DiscriminatorConfig
    discriminator: ClipDiscriminator | None
    """None before it takes part."""
    distillation: Distillation | None = None

    def cut(self) -> AbstractContextManager[Cut | None]:
        """While the clip goes through the networks; None where no features are aligned."""
        return nullcontext() if self.distillation is None else self.distillation.cut()


def backward_clip(
    network: TrainedNetwork, video: Tensor, *, losses_of: Losses, draws: ClipDraws, share: float, features: Tensor | None = None
) -> Tensor:
    """Add `share` times the gradients of a clip's losses to the parameters; fp64 numbers, see `MEASURED`.

    Args:
        network: the autoencoder.
        video: [3, T, H, W] in [-1, 1], on its device.
        losses_of: which losses.
        draws: the clip's keys.
        share: 1 / clips of the step.
        features: the teacher's [D, t, h, w] of the clip; None asks it.
    """
    clip = _Clip(network, video, losses_of, draws)
    with losses_of.cut() as cut:
        made = network.reconstruct(video, key=draws.posterior)
    pixels = made.pixels
    leaf = pixels.detach().to(torch.promote_types(pixels.dtype, torch.float32)).requires_grad_()
    settings = losses_of.settings
    scale = losses.scale_of(video, settings.reduction)
    reconstruction = clip.reconstruction(leaf) * scale
    (upstream,) = torch.autograd.grad(reconstruction, leaf)
    if losses_of.discriminator is not None:
        upstream = upstream + clip.fooling(losses_of.discriminator, pixels, leaf, upstream)
    outputs, gradients = [pixels], [(share * upstream).to(pixels.dtype)]
    objective = reconstruction.detach()
    if settings.kl_weight > 0:
        kl = losses.kl_of(made.posterior)
        weight = settings.kl_weight * scale / losses.frame_elements(video)
        clip.said["kl"], objective = kl.detach(), objective + weight * kl.detach()
        outputs.append(kl)
        gradients.append(torch.full_like(kl, share * weight))
    torch.autograd.backward(outputs, gradients)
    if losses_of.distillation is not None and cut is not None:
        clip.said |= losses_of.distillation.backward(cut, video, share=share, features=features)
    if losses_of.discriminator is not None:
        clip.discern(losses_of.discriminator, pixels.detach(), share)
    clip.said["objective"] = objective
    zero = objective.new_zeros(())
    return torch.stack([clip.said.get(name, zero).detach().double() for name in MEASURED])


class _Clip:
    """One clip on its way, and what is measured of it."""

    def __init__(self, network: TrainedNetwork, video: Tensor, losses_of: Losses, draws: ClipDraws) -> None:
        self.network, self.video, self.losses_of, self.draws = network, video, losses_of, draws
        self.said: dict[str, Tensor] = {}

    def reconstruction(self, made: Tensor) -> Tensor:
        """Mean distance of pixels, and of features."""
        settings, said = self.losses_of.settings, self.said
        total = said["pixels"] = losses.pixel_distance(self.video, made, distance=settings.distance)
        if self.losses_of.lpips is not None:
            said["lpips"] = losses.perceptual_distance(self.video, made, lpips=self.losses_of.lpips)
            total = total + settings.lpips_weight * said["lpips"]
        return total

    def fooling(self, discriminator: ClipDiscriminator, pixels: Tensor, leaf: Tensor, upstream: Tensor) -> Tensor:
        """Weighted gradient of the generator's loss at the reconstruction.

        Args:
            discriminator: whose parameters get no gradient here.
            pixels: the reconstruction with its graph.
            leaf: the same without, in which losses are differentiated.
            upstream: the reconstruction loss's gradient there.
        """
        settings, said = self.losses_of.adversary, self.said
        dtype = discriminator.out.weight.dtype
        said["generator"] = losses.generator_loss(discriminator(leaf[None].to(dtype), generator=self.draws.generator(0, leaf.device)))
        (own,) = torch.autograd.grad(said["generator"], leaf)
        said["balance"] = leaf.new_tensor(settings.weight)
        if settings.balance == "adaptive":
            weight = self.network.last_weight
            of_both = [torch.autograd.grad(pixels, weight, one.to(pixels.dtype), retain_graph=True)[0] for one in (upstream, own)]
            said["balance"] = settings.weight * losses.adaptive_weight(*of_both)
        return said["balance"] * own

    def discern(self, discriminator: ClipDiscriminator, made: Tensor, share: float) -> None:
        """Add `share` times the gradients of the discriminator's loss to its parameters."""
        video, said, draws = self.video, self.said, self.draws
        dtype = discriminator.out.weight.dtype
        real = discriminator(video[None].to(dtype), generator=draws.generator(1, video.device))
        fake = discriminator(made[None].to(dtype), generator=draws.generator(2, video.device))
        said["discriminator"] = losses.discriminator_loss(real, fake, kind=self.losses_of.adversary.loss)
        said["logits_real"], said["logits_made"] = real.detach().float().mean(), fake.detach().float().mean()
        (share * said["discriminator"]).backward()
