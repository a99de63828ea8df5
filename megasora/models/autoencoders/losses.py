"""Losses of one clip: reconstruction, KL, and those of a generator and its discriminator.

Source: Open-Sora's VAELoss, AdversarialLoss and DiscriminatorLoss (opensora/models/vae/losses.py), themselves after taming-transformers'
(arXiv 2012.09841). Each is of one clip, so that a step's loss, the mean over its clips, does not know of ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from megasora.models.autoencoders.posterior import Posterior

Distance = Literal["l1", "l2"]
Reduction = Literal["sum", "mean"]
Adversarial = Literal["hinge", "vanilla", "wasserstein"]
Perceptual = Callable[[Tensor, Tensor], Tensor]
"""Pictures [n, 3, h, w] in [-1, 1], twice -> distances [n]."""
BALANCE_EPSILON = 1e-4
BALANCE_MOST = 1e4
"""Of the adaptive weight (calculate_adaptive_weight)."""


def frame_elements(video: Tensor) -> int:
    """Numbers 3 H W of a frame of a clip [3, T, H, W]."""
    return int(video.shape[0] * video.shape[2] * video.shape[3])


def scale_of(video: Tensor, reduction: Reduction) -> int:
    """What a mean over a frame's numbers is multiplied by."""
    return frame_elements(video) if reduction == "sum" else 1


def pixel_distance(
    video: Float[Tensor, "3 T H W"], made: Float[Tensor, "3 T H W"], *, distance: Distance, elements: int | None = None
) -> Float[Tensor, ""]:
    """Mean |a - b| or (a - b)^2 of a clip and its reconstruction, in fp32 or better.

    Args:
        video, made: the clip and its reconstruction, or the same part of both.
        distance: which.
        elements: numbers of the whole clip, where these are a part: then the parts' distances add up to the clip's.
    """
    difference = _wide(made) - _wide(video)
    sums = difference.abs().sum() if distance == "l1" else difference.square().sum()
    return sums / (video.numel() if elements is None else elements)


def perceptual_distance(
    video: Float[Tensor, "3 T H W"], made: Float[Tensor, "3 T H W"], *, lpips: Perceptual, frames: int | None = None
) -> Float[Tensor, ""]:
    """LPIPS of a clip's frames, on average over them, or over `frames` where these are some of a clip's."""
    return lpips(_wide(video).transpose(0, 1), _wide(made).transpose(0, 1)).sum() / (video.shape[1] if frames is None else frames)


def kl_of(posterior: Posterior) -> Float[Tensor, ""]:
    """KL divergence of a posterior from a standard normal distribution, summed over the latent (DiagonalGaussianDistribution.kl)."""
    mean, std = _wide(posterior.mean), _wide(posterior.std)
    return 0.5 * (mean.square() + std.square() - 1 - 2 * std.log()).sum()


def generator_loss(logits: Tensor, *, patches: int | None = None) -> Float[Tensor, ""]:
    """-mean of the discriminator's logits of a reconstruction (AdversarialLoss with "hinge"); over `patches` of the whole clip, where these
    are some of them."""
    return -_wide(logits).sum() / (logits.numel() if patches is None else patches)


def discriminator_loss(real: Tensor, made: Tensor, *, kind: Adversarial, patches: int | None = None) -> Float[Tensor, ""]:
    """Of the logits of a clip and of its reconstruction: hinge (mean relu(1 - real) + mean relu(1 + made)) / 2, vanilla the same with
    softplus of -real and made, wasserstein mean made - mean real (no penalty); means over `patches`, as of `generator_loss`."""
    real, made = _wide(real), _wide(made)
    count = real.numel() if patches is None else patches
    if kind == "wasserstein":
        return (made.sum() - real.sum()) / count
    if kind == "vanilla":
        return 0.5 * (F.softplus(-real).sum() + F.softplus(made).sum()) / count
    return 0.5 * (F.relu(1 - real).sum() + F.relu(1 + made).sum()) / count


def adaptive_weight(of_reconstruction: Tensor, of_other: Tensor, *, most: float = BALANCE_MOST) -> Float[Tensor, ""]:
    """|a| / (|b| + 1e-4), at most `most`, of two losses' gradients at the weight where they are compared."""
    ratio = torch.linalg.vector_norm(_wide(of_reconstruction)) / (torch.linalg.vector_norm(_wide(of_other)) + BALANCE_EPSILON)
    return ratio.clamp(0.0, most)


def _wide(x: Tensor) -> Tensor:
    """In fp32, or fp64 as it is."""
    return x if x.dtype == torch.float64 else x.float()
