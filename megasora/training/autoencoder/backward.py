"""Losses of one clip and their gradients, added up in the parameters. No optimizer: what tests compare over ranks.

The reconstruction's graph is walked once. Losses of pixels, LPIPS and the discriminator are differentiated down to the reconstruction
first; the adaptive weight needs only the last convolution's gradient of either; then their sum goes back through the autoencoder. The
discriminator's own loss takes the same reconstruction, as it does when the two step one after the other.

Ranks that share a clip each compute their part (`share.ClipShare`): parts of losses, numbers and gradients add up to the clip's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from megasora.config.autoencoder_run import DiscriminatorConfig, LossConfig
from megasora.diffusion.philox import Stream, key_of
from megasora.models.autoencoders import losses
from megasora.models.autoencoders.discriminator import ClipDiscriminator
from megasora.models.autoencoders.losses import Perceptual
from megasora.parallel.cuts import Cut
from megasora.training.autoencoder.distillation import Distillation, Tap
from megasora.training.autoencoder.network import TrainedNetwork
from megasora.training.autoencoder.share import ClipShare

AGAINST = ("generator", "balance", "discriminator", "logits_real", "logits_made")
ALIGNED = ("cosine", "gram", "alignment_balance")
MEASURED = ("objective", "pixels", "lpips", "kl", *AGAINST, *ALIGNED)
"""Numbers of a clip, in their order: objective is the weighted sum without the discriminator and the teacher, pixels and lpips are means,
kl is summed over the latent, balance is what the generator's loss was multiplied by, alignment_balance what cosine + gram was."""
LPIPS_PIXELS = 8 * 256 * 256
"""Most pixels whose features are held at once: frames go through LPIPS in runs, which change nothing but the memory."""


@dataclass(frozen=True, kw_only=True)
class ClipDraws:
    """Keys of what is random about a clip in a step."""

    posterior: int
    patches: int
    """Of the discriminator's dropout."""

    def dropout(self, number: int) -> int:
        """Key of a pass of the discriminator."""
        return key_of(seed=self.patches, stream=Stream.PATCHES, epoch=number)


@dataclass(frozen=True, kw_only=True)
class Losses:
    """What a clip is trained for in a step."""

    settings: LossConfig
    lpips: Perceptual | None
    adversary: DiscriminatorConfig
    discriminator: ClipDiscriminator | None
    """None before it takes part."""
    distillation: Distillation | None = None

    def tapped(self) -> AbstractContextManager[Tap | None]:
        """While the clip goes through the networks; None where no features are aligned."""
        return nullcontext() if self.distillation is None else self.distillation.tapped()


def backward_clip(
    network: TrainedNetwork,
    levels: UInt8[Tensor, "3 T H W"],
    *,
    losses_of: Losses,
    draws: ClipDraws,
    share: float,
    features: Tensor | None = None,
) -> Float[Tensor, " MEASURED"]:
    """Add `share` times the gradients of a clip's losses to the parameters; fp64 numbers, see `MEASURED`.

    Where ranks share the clip all of them call it together, and gradients and numbers are this rank's part of the clip's.

    Args:
        network: the autoencoder.
        levels: 0 to 255, of the whole clip, on its device.
        losses_of: which losses.
        draws: the clip's keys.
        share: 1 / clips of the step.
        features: the teacher's [D, t, h, w] of the clip; None asks it.
    """
    _, frames, height, width = levels.shape
    clip = _Clip(network, levels, losses_of, draws, network.share(num_frames=frames, height=height, width=width))
    video = clip.real(clip.share.slab)
    with losses_of.tapped() as tap:
        made = network.reconstruct(video, clip.share, key=draws.posterior)
    pixels = made.pixels
    leaf = pixels.detach().to(torch.promote_types(pixels.dtype, torch.float32))
    settings = losses_of.settings
    scale = losses.scale_of(levels, settings.reduction)
    upstream = scale * clip.of_reconstruction(leaf)
    if losses_of.discriminator is not None:
        upstream = upstream + clip.of_generator(losses_of.discriminator, pixels, leaf, upstream)
    outputs, gradients = [pixels], [(share * upstream).to(pixels.dtype)]
    objective = scale * clip.said["reconstruction"]
    if settings.kl_weight > 0:
        kl = losses.kl_of(made.posterior)
        weight = settings.kl_weight * scale / losses.frame_elements(levels)
        clip.said["kl"], objective = kl.detach(), objective + weight * kl.detach()
        outputs.append(kl)
        gradients.append(torch.full_like(kl, share * weight))
    torch.autograd.backward(outputs, gradients)
    if losses_of.distillation is not None and tap is not None:
        assert clip.share.ranks == 1, "validation refuses a teacher where ranks share a clip"
        clip.said |= losses_of.distillation.backward(tap, video, share=share, features=features)
    if losses_of.discriminator is not None:
        clip.discern(losses_of.discriminator, share)
    clip.said["objective"] = objective
    zero = objective.new_zeros(())
    return torch.stack([clip.said.get(name, zero).detach().double() for name in MEASURED])


def runs_of_frames(frames: Float[Tensor, "3 n H W"]) -> Iterator[slice]:
    """Frames that go through LPIPS together (`LPIPS_PIXELS`)."""
    run = max(1, LPIPS_PIXELS // (frames.shape[2] * frames.shape[3]))
    for start in range(0, frames.shape[1], run):
        yield slice(start, start + run)


class _Clip:
    """One clip on its way, and what is measured of this rank's part."""

    def __init__(self, network: TrainedNetwork, levels: Tensor, losses_of: Losses, draws: ClipDraws, share: ClipShare) -> None:
        self.network, self.levels, self.losses_of, self.draws, self.share = network, levels, losses_of, draws, share
        self.said: dict[str, Tensor] = {}
        self.patches: Tensor
        """Of the reconstruction, this rank's part by the discriminator's cut, without a graph."""

    def real(self, cut: Cut) -> Tensor:
        """This rank's part of the clip."""
        return self.share.pixels(self.levels, cut)

    def of_reconstruction(self, made: Tensor) -> Tensor:
        """Gradient of the mean distance of pixels, and of features, at this rank's slab of the reconstruction."""
        settings, said, share = self.losses_of.settings, self.said, self.share
        leaf = made.detach().requires_grad_()
        loss = losses.pixel_distance(self.real(share.slab), leaf, distance=settings.distance, elements=share.elements)
        (upstream,) = torch.autograd.grad(loss, leaf)
        said["pixels"] = said["reconstruction"] = loss.detach()
        if self.losses_of.lpips is not None:
            said["lpips"], own = self._perceptual(self.losses_of.lpips, made)
            upstream = upstream + settings.lpips_weight * own
            said["reconstruction"] = said["reconstruction"] + settings.lpips_weight * said["lpips"]
        return upstream

    def _perceptual(self, lpips: Perceptual, made: Tensor) -> tuple[Tensor, Tensor]:
        """(this rank's part of LPIPS, gradient of the whole at its slab): each rank looks at its own frames."""
        share = self.share
        real = self.real(share.frames)
        frames = share.moved(made, source=share.slab, target=share.frames)
        gradient, total = torch.empty_like(frames), made.new_zeros(())
        for own in runs_of_frames(frames):
            leaf = frames[:, own].detach().requires_grad_()
            loss = losses.perceptual_distance(real[:, own], leaf, lpips=lpips, frames=share.num_frames)
            (gradient[:, own],) = torch.autograd.grad(loss, leaf)
            total = total + loss.detach()
        return total, share.moved(gradient, source=share.frames, target=share.slab)

    def of_generator(self, discriminator: ClipDiscriminator, pixels: Tensor, made: Tensor, upstream: Tensor) -> Tensor:
        """Weighted gradient of the generator's loss at this rank's slab of the reconstruction.

        Args:
            discriminator: whose parameters get no gradient here.
            pixels: the slab with its graph.
            made: the same without.
            upstream: the reconstruction loss's gradient there.
        """
        settings, said, share = self.losses_of.adversary, self.said, self.share
        cut = share.patches(discriminator)
        self.patches = share.moved(made, source=share.slab, target=cut)
        leaf = self.patches.detach().requires_grad_()
        logits = share.logits(discriminator, leaf, key=self.draws.dropout(0))
        loss = losses.generator_loss(logits, patches=share.num_patches(discriminator))
        said["generator"] = loss.detach()
        (own,) = torch.autograd.grad(loss, leaf)
        own = share.moved(own, source=cut, target=share.slab)
        balance = made.new_full((), settings.weight)
        if settings.balance == "adaptive":
            weight = self.network.last_weight
            parts = [torch.autograd.grad(pixels, weight, one.to(pixels.dtype), retain_graph=True)[0] for one in (upstream, own)]
            balance = settings.weight * losses.adaptive_weight(*share.total(torch.stack(parts)))
        said["balance"] = balance / share.ranks  # the same on each
        return balance * own

    def discern(self, discriminator: ClipDiscriminator, weight: float) -> None:
        """Add `weight` times the gradients of the discriminator's loss to its parameters."""
        said, draws, share = self.said, self.draws, self.share
        patches = share.num_patches(discriminator)
        real = share.logits(discriminator, self.real(share.patches(discriminator)), key=draws.dropout(1))
        fake = share.logits(discriminator, self.patches, key=draws.dropout(2))
        loss = losses.discriminator_loss(real, fake, kind=self.losses_of.adversary.loss, patches=patches)
        said["discriminator"] = loss.detach()
        said["logits_real"], said["logits_made"] = (logits.detach().double().sum() / patches for logits in (real, fake))
        (weight * loss).backward()
