"""The two kinds of blocks: residual convolutions where pixels are many, linear attention with a gated convolution where they are few.

Source: opensora/models/dc_ae/models/nn/ops.py (ResBlock, GLUMBConv, EfficientViTBlock). No norm stands before a block.
"""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from megasora.models.autoencoders.dc_ae.attention import LiteMLA
from megasora.models.autoencoders.dc_ae.convolution import Convolution
from megasora.models.autoencoders.dc_ae.layers import ConvNormAct, Residual

EXPANSION = 4
"""Channels of a gated convolution, and as many of its gate, per channel of the block (EfficientViTBlock: expand_ratio)."""


class ResBlock(nn.Module):
    """conv SiLU conv norm."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = ConvNormAct(Convolution(channels, channels, bias=True), act="silu")
        self.conv2 = ConvNormAct(Convolution(channels, channels), norm=True)

    def forward(self, x: Float[Tensor, "B C T H W"]) -> Float[Tensor, "B C T H W"]:
        """What is added to x."""
        made: Tensor = self.conv2(self.conv1(x))
        return made


class GLUMBConv(nn.Module):
    """Widen, mix each channel with its neighbours, gate one half by the other, narrow."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        wide = 2 * EXPANSION * channels
        self.inverted_conv = ConvNormAct(Convolution(channels, wide, kernel=1, bias=True), act="silu")
        self.depth_conv = ConvNormAct(Convolution(wide, wide, groups=wide, bias=True))
        self.point_conv = ConvNormAct(Convolution(wide // 2, channels, kernel=1), norm=True)

    def forward(self, x: Float[Tensor, "B C T H W"]) -> Float[Tensor, "B C T H W"]:
        """What is added to x."""
        value, gate = self.depth_conv(self.inverted_conv(x)).chunk(2, dim=1)
        made: Tensor = self.point_conv(value * F.silu(gate))
        return made


class EfficientViTBlock(nn.Module):
    """Attention, then a gated convolution, each added to its input."""

    def __init__(self, channels: int, *, head_dim: int) -> None:
        super().__init__()
        self.context_module = Residual(LiteMLA(channels, head_dim=head_dim))
        self.local_module = Residual(GLUMBConv(channels))

    def forward(self, x: Float[Tensor, "B C T H W"]) -> Float[Tensor, "B C T H W"]:
        """The block's output."""
        made: Tensor = self.local_module(self.context_module(x))
        return made
