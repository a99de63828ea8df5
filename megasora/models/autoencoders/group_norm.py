"""GroupNorm of a clip of which a rank may have a part only: mean and variance are those of the whole."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor


def group_norm_over(
    x: Float[Tensor, "B C *places"], *, groups: int, weight: Tensor, bias: Tensor, eps: float, total: Callable[[Tensor], Tensor]
) -> Float[Tensor, "B C *places"]:
    """torch's group_norm, with mean and variance over all places of the clip, in fp32 at least.

    Args:
        x: this rank's places.
        groups: of channels.
        weight, bias: of each channel.
        eps: inside the root.
        total: sums over all places of the clip, from sums over those of x.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(1, (groups, -1)).flatten(2)
    places = total(torch.full_like(wide[..., :1], wide.shape[-1]))
    centred = wide - total(wide.sum(dim=-1, keepdim=True)) / places
    variance = total(centred.square().sum(dim=-1, keepdim=True)) / places
    made = (centred * torch.rsqrt(variance + eps)).view_as(x).to(x.dtype)
    shape = (1, -1, *[1] * (x.dim() - 2))
    normalised: Tensor = made * weight.view(shape) + bias.view(shape)
    return normalised
