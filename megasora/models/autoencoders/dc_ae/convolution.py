"""The one convolution of the network: odd kernels, zeros on both sides of time, height and width, so that no frame comes before another.

Shape letters: B batch, C channels, T H W frames, height, width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

INDEX_LIMIT = 2**31
"""Elements of a tensor that torch's convolutions index with 32 bits (Open-Sora models/vae/utils.py, ChannelChunkConv3d)."""


class Convolution(nn.Conv3d):
    """A convolution that keeps the size, or divides it by the stride.

    Args:
        in_channels, out_channels: channels before and after.
        kernel: side of the cubic kernel, odd.
        stride: of time, height and width.
        groups: channel groups that do not mix.
        bias: whether something is added.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        kernel: int = 3,
        stride: tuple[int, int, int] = (1, 1, 1),
        groups: int = 1,
        bias: bool = False,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel, stride=stride, padding=kernel // 2, groups=groups, bias=bias)

    def reset_parameters(self) -> None:
        """Start values of the published training: normal with deviation 0.02 cut at +-2, biases 0 (dc_ae/utils/init.py, trunc_normal)."""
        nn.init.trunc_normal_(self.weight, std=0.02)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Float[Tensor, "B C T H W"]) -> Float[Tensor, "B D t h w"]:
        """Convolved; a clip whose tensors outgrow 32-bit indices goes through in runs of frames, with the same result."""
        return in_runs(self, x, limit=INDEX_LIMIT)


def in_runs(layer: nn.Conv3d, x: Tensor, *, limit: int) -> Tensor:
    """The layer's convolution, in as few runs of frames as keep every tensor below `limit` elements.

    A run reads the kernel's reach of frames beyond its own, so no sum is cut: each output frame is computed from the same numbers.
    """
    weight, bias = layer.weight, layer.bias
    reach, stride = layer.kernel_size[0] // 2, layer.stride[0]
    frames = (x.shape[2] - 1) // stride + 1
    per_frame = max(x[:, :, 0].numel() * stride, x[:, 0, 0].numel() * layer.out_channels // (layer.stride[1] * layer.stride[2]))
    run = max(1, (limit - 1) // max(1, per_frame) - 2 * reach)
    padding = (reach, *[side // 2 for side in layer.kernel_size[1:]])
    if run >= frames or x.numel() < limit and per_frame * frames < limit:
        return F.conv3d(x, weight, bias, layer.stride, padding, 1, layer.groups)
    parts: list[Tensor] = []
    for start in range(0, frames, run):
        stop = min(start + run, frames)
        first, last = start * stride - reach, (stop - 1) * stride + reach + 1
        part = F.pad(x[:, :, max(0, first) : last], (0, 0, 0, 0, max(0, -first), max(0, last - x.shape[2])))
        parts.append(F.conv3d(part, weight, bias, layer.stride, (0, *padding[1:]), 1, layer.groups))
    return torch.cat(parts, dim=2)
