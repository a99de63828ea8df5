"""Multi-scale linear attention (LiteMLA): ReLU kernels instead of a softmax, so that all places of all frames meet at linear cost.

No position, no causality. Source: opensora/models/dc_ae/models/nn/ops.py (LiteMLA); arXiv 2205.14756.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from megasora.models.autoencoders.dc_ae.convolution import Convolution
from megasora.models.autoencoders.dc_ae.layers import ConvNormAct

EPS = 1e-15
"""Added to the sum of the kernels before it divides."""
AGGREGATION_KERNEL = 5
"""Side of the second scale's depthwise convolution (EViTS5_GLU: scales (5,))."""


class LiteMLA(nn.Module):
    """Heads over the places themselves, and heads over neighbourhoods of 5x5x5.

    Args:
        channels: of the input and the output.
        head_dim: channels of a head.
    """

    def __init__(self, channels: int, *, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        heads = channels // head_dim
        self.qkv = ConvNormAct(Convolution(channels, 3 * channels, kernel=1))
        neighbours = Convolution(3 * channels, 3 * channels, kernel=AGGREGATION_KERNEL, groups=3 * channels)
        self.aggreg = nn.ModuleList([nn.Sequential(neighbours, Convolution(3 * channels, 3 * channels, kernel=1, groups=3 * heads))])
        self.proj = ConvNormAct(Convolution(2 * channels, channels, kernel=1), norm=True)

    def forward(self, x: Float[Tensor, "B C T H W"]) -> Float[Tensor, "B C T H W"]:
        """What is added to x."""
        qkv = self.qkv(x)
        scales = torch.cat([qkv, *(scale(qkv) for scale in self.aggreg)], dim=1)
        attended: Tensor = self.proj(linear_attention(scales, head_dim=self.head_dim).to(x.dtype))
        return attended


def linear_attention(qkv: Float[Tensor, "B heads_3K T H W"], *, head_dim: int) -> Float[Tensor, "B heads_K T H W"]:
    """(v k^T) q over all places of all frames, divided by (1 k^T) q; fp32 where the input has half the digits.

    Args:
        qkv: channels of each head one after another: its K of q, of k, of v.
        head_dim: K.
    """
    batch, _, *grid = qkv.shape
    if qkv.dtype == torch.float16:
        qkv = qkv.float()  # the sums outgrow it
    q, k, v = qkv.reshape(batch, -1, 3 * head_dim, grid[0] * grid[1] * grid[2]).split(head_dim, dim=2)
    out = keys_and_values(F.relu(k), v) @ F.relu(q)
    out = out.float() if out.dtype == torch.bfloat16 else out
    return (out[:, :, :-1] / (out[:, :, -1:] + EPS)).reshape(batch, -1, *grid)


def keys_and_values(k: Float[Tensor, "B heads K N"], v: Float[Tensor, "B heads K N"]) -> Float[Tensor, "B heads K1 K"]:
    """Sum over all N places of v k^T, with the sum of k as its last row: the only thing one place learns of all others."""
    return F.pad(v, (0, 0, 0, 1), value=1.0) @ k.transpose(-1, -2)
