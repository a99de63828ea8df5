"""Encoder and decoder of the video DC-AE.

Source: opensora/models/dc_ae/models/dc_ae.py (Encoder, Decoder, DCAE); tensor names and shapes are the released file's.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megasora.config.dc_ae import DCAEConfig
from megasora.models.autoencoders.dc_ae.blocks import EfficientViTBlock, ResBlock
from megasora.models.autoencoders.dc_ae.convolution import Convolution
from megasora.models.autoencoders.dc_ae.layers import ConvNormAct, OpList, Residual
from megasora.models.autoencoders.dc_ae.norm import ChannelNorm
from megasora.models.autoencoders.dc_ae.resampling import averaged, down_step, duplicated, up_step

Recompute = Literal["none", "stages"]


def stage_blocks(config: DCAEConfig, *, stage: int, depth: int) -> list[nn.Module]:
    """The blocks of a stage, all of one kind."""
    width = config.widths[stage]
    if stage < config.attention_from:
        return [Residual(ResBlock(width)) for _ in range(depth)]
    return [EfficientViTBlock(width, head_dim=config.head_dim) for _ in range(depth)]


def _through(module: nn.Module, x: Tensor, recompute: Recompute) -> Tensor:
    """A stage; with recompute only its input is kept for the backward pass."""
    if recompute == "none" or not x.is_floating_point() or not _needs_gradient(module, x):
        plain: Tensor = module(x)
        return plain
    kept: Tensor = checkpoint(module, x, use_reentrant=False)
    return kept


def _needs_gradient(module: nn.Module, x: Tensor) -> bool:
    return x.requires_grad or any(parameter.requires_grad for parameter in module.parameters())


class Encoder(nn.Module):
    """Pixels to latents; each stage ends with the step to the next."""

    def __init__(self, config: DCAEConfig, *, recompute: Recompute = "none") -> None:
        super().__init__()
        self.recompute: Recompute = recompute
        widths = config.widths
        self.project_in = ConvNormAct(Convolution(3, widths[0], bias=True))
        stages: list[nn.Module] = []
        for stage, depth in enumerate(config.encoder_depths):
            operations = stage_blocks(config, stage=stage, depth=depth)
            if stage + 1 < len(widths):
                operations.append(down_step(widths[stage], widths[stage + 1], temporal=config.halves_time(stage)))
            stages.append(OpList(operations))
        self.stages = nn.ModuleList(stages)
        out = OpList([ConvNormAct(Convolution(widths[-1], config.latent_channels, bias=True))])
        self.project_out = Residual(out, partial(averaged, channels=config.latent_channels))

    def forward(self, pixels: Float[Tensor, "B 3 T H W"]) -> Float[Tensor, "B C t h w"]:
        """Latents, not scaled, of pixels in [-1, 1]."""
        x = self.project_in(pixels)
        for stage in self.stages:
            x = _through(stage, x, self.recompute)
        latent: Tensor = _through(self.project_out, x, self.recompute)
        return latent


class Decoder(nn.Module):
    """Latents to pixels; each stage begins with the step from the one before, the last stage runs first."""

    def __init__(self, config: DCAEConfig, *, recompute: Recompute = "none") -> None:
        super().__init__()
        self.recompute: Recompute = recompute
        widths = config.widths
        self.project_in = Residual(
            ConvNormAct(Convolution(config.latent_channels, widths[-1], bias=True)), partial(duplicated, channels=widths[-1])
        )
        stages: list[nn.Module] = []
        for stage, depth in enumerate(config.decoder_depths):
            operations = stage_blocks(config, stage=stage, depth=depth)
            if stage + 1 < len(widths):
                operations.insert(0, up_step(widths[stage + 1], widths[stage], temporal=config.halves_time(stage)))
            stages.append(OpList(operations))
        self.stages = nn.ModuleList(stages)
        self.project_out = OpList([ChannelNorm(widths[0]), nn.ReLU(), ConvNormAct(Convolution(widths[0], 3, bias=True))])

    def forward(self, latent: Float[Tensor, "B C t h w"]) -> Float[Tensor, "B 3 T H W"]:
        """Pixels in [-1, 1], not clamped, of latents that are not scaled."""
        x = self.project_in(latent)
        for stage in reversed(self.stages):
            x = _through(stage, x, self.recompute)
        pixels: Tensor = self.project_out(x)  # kept: losses differentiate at its last weight
        return pixels

    @property
    def last_weight(self) -> nn.Parameter:
        """The last convolution's weight, where losses are weighed against each other (DCAE.get_last_layer)."""
        weight: nn.Parameter = self.get_parameter("project_out.op_list.2.conv.weight")
        return weight


class VideoDCAE(nn.Module):
    """Encoder and decoder, whose latents are not scaled.

    Args:
        config: sizes.
        recompute: stages: each stage keeps its input only and computes the rest again in the backward pass.
    """

    def __init__(self, config: DCAEConfig, *, recompute: Recompute = "none") -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config, recompute=recompute)
        self.decoder = Decoder(config, recompute=recompute)

    def forward(self, pixels: Float[Tensor, "B 3 T H W"]) -> tuple[Float[Tensor, "B 3 T H W"], Float[Tensor, "B C t h w"]]:
        """(reconstruction, latent) of clips of 1 or 4k frames."""
        latent: Tensor = self.encoder(pixels)
        return self.decoder(latent), latent
