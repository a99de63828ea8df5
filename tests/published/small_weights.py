"""Small random weights in released form, for runs that are compared with diffusers' classes: an MMDiT with cond_in, a FLUX, encoders."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from safetensors.torch import load_file, save_file

from megasora import recipes
from megasora.checkpoint.export import export_weights
from megasora.config.schema import RunConfig
from megasora.models.encoders.tiny import make_tiny_encoders
from tests.flux import small_flux

AXES = (4, 6, 6)
CAPTIONS = ["A rabbit in a meadow at dawn", "colour bars, rain. 24 FPS. 4 motion score."]


def small_config(folder: Path) -> RunConfig:
    """The tiny recipe with the sizes of `transformer`, and tiny encoders."""
    config = recipes.get("tiny")
    model = replace(
        config.model, hidden_size=64, num_attention_heads=4, ffn_hidden_size=256, num_double_blocks=2, num_single_blocks=2, axes_dim=AXES
    )
    encoders = make_tiny_encoders(folder / "encoders", captions=CAPTIONS, model=model, base=config.encoders)
    sample = replace(config.sample, guidance=3.0, guidance_img=2.0, motion_score=4.0, fps=24.0)
    return replace(config, model=model, encoders=encoders, sample=sample, device="cpu")


def transformer(*, guidance: bool) -> FluxTransformer2DModel:
    """diffusers' class with weights that leave no branch idle."""
    return small_flux(
        in_channels=64, num_single_layers=2, num_attention_heads=4, text_dim=64, vec_dim=32, guidance=guidance, axes=AXES
    ).eval()


def save_mmdit(model: FluxTransformer2DModel, cond_in: torch.nn.Linear, path: Path) -> None:
    """Write the weights as the released file: converted, with cond_in added."""
    model.save_pretrained(path.parent / "theirs")
    export_weights(path.parent / "theirs", path.parent / "without_cond.safetensors", target_format="opensora", axes_dim=AXES)
    tensors = load_file(path.parent / "without_cond.safetensors")
    save_file({**tensors, "cond_in.weight": cond_in.weight.data, "cond_in.bias": cond_in.bias.data}, path)


def image_autoencoder() -> AutoencoderKL:
    """A tiny 2D autoencoder of FLUX's kind."""
    torch.manual_seed(2)
    return AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=4,
        scaling_factor=0.4,
        shift_factor=0.1,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()
