"""diffusers' FLUX class with weights that leave no branch idle."""

from __future__ import annotations

import torch
from diffusers import FluxTransformer2DModel

Axes = tuple[int, int, int]


def small_flux(
    *, in_channels: int, num_single_layers: int, num_attention_heads: int, text_dim: int, vec_dim: int, guidance: bool, axes: Axes
) -> FluxTransformer2DModel:
    """Two double blocks and some single ones, the same weights every time; the head size is the sum of the rotary axes."""
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=in_channels,
        num_layers=2,
        num_single_layers=num_single_layers,
        attention_head_dim=sum(axes),
        num_attention_heads=num_attention_heads,
        joint_attention_dim=text_dim,
        pooled_projection_dim=vec_dim,
        guidance_embeds=guidance,
        axes_dims_rope=axes,
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1 + (1.0 if "norm_" in name and parameter.dim() == 1 else 0.0))
    return model
