"""Small modules that give tensors their published names: a convolution with what follows it, a sum with a shortcut, a list."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from megasora.models.autoencoders.dc_ae.convolution import Convolution
from megasora.models.autoencoders.dc_ae.norm import ChannelNorm


class ConvNormAct(nn.Module):
    """`conv`, then `norm` and SiLU where they are asked for.

    Args:
        conv: the convolution.
        norm: whether a norm follows.
        act: what follows that.
    """

    def __init__(self, conv: Convolution, *, norm: bool = False, act: Literal["silu"] | None = None) -> None:
        super().__init__()
        self.conv = conv
        self.norm = ChannelNorm(conv.out_channels) if norm else None
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T, H, W] -> [B, D, t, h, w]."""
        x = self.conv(x)
        if self.norm is not None:
            x = self.norm(x)
        return F.silu(x) if self.act == "silu" else x


class Residual(nn.Module):
    """main(x) + shortcut(x); the shortcut has no parameters."""

    def __init__(self, main: nn.Module, shortcut: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.main = main
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        """The sum."""
        made: Tensor = self.main(x)
        return made + (x if self.shortcut is None else self.shortcut(x))


class OpList(nn.Module):
    """Operations one after another, by number."""

    def __init__(self, operations: Iterable[nn.Module]) -> None:
        super().__init__()
        self.op_list = nn.ModuleList(operations)

    def forward(self, x: Tensor) -> Tensor:
        """Through all of them."""
        for operation in self.op_list:
            x = operation(x)
        return x
