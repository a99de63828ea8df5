"""The one norm of the network: root mean square over channels, at every place of every frame by itself."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

EPS = 1e-5
"""Inside the root (opensora/models/dc_ae/models/nn/norm.py, RMSNorm3d)."""


class ChannelNorm(nn.Module):
    """x / sqrt(mean(x^2) + EPS) x weight + bias over the channels; the mean is taken in fp32, the quotient cast back before the weight."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels))
        self.bias = nn.Parameter(torch.empty(channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As published: the weight is drawn like a convolution's and is not 1, so a new network is nearly its shortcuts."""
        nn.init.trunc_normal_(self.weight, std=0.02)
        nn.init.zeros_(self.bias)

    def forward(self, x: Float[Tensor, "B C T H W"]) -> Float[Tensor, "B C T H W"]:
        """Normalised."""
        scale = torch.sqrt(x.float().square().mean(dim=1, keepdim=True) + EPS)
        shape = (1, -1, 1, 1, 1)
        normalised: Tensor = (x / scale).to(x.dtype)
        return normalised * self.weight.view(shape) + self.bias.view(shape)
