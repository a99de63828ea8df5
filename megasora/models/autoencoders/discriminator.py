"""A PatchGAN of clips: convolutions that say of every patch whether it is of a clip or of a reconstruction.

Source: Open-Sora's NLayerDiscriminator3D (opensora/models/vae, n_layers 5, ndf 64: 18,823,553 parameters; 32 x 256 x 256 gives 8 x 8 x 8
logits), after pix2pix's (arXiv 1611.07004). It takes one clip at a time, so that its answer never depends on what else is on a rank. What
the published one calls batch norm is, at its batch of one clip per GPU, a norm of each channel over that clip: `clip` here. Its running
statistics were never read, and are not kept.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

Norm = Literal["clip", "group", "none"]
KERNEL = 3
MOST_WIDTHS = 8
"""Channels of a layer are at most this many times the first's (NLayerDiscriminator3D: min(2 ** n, 8))."""
SLOPE = 0.2
"""Of LeakyReLU."""
START_STD = 0.02
"""Of weights, and of norm weights around 1 (n_layer_disc_weights_init)."""
NORM_EPS = 1e-5
"""torch.nn.BatchNorm3d's."""
NUM_GROUPS = 32
"""torch.nn.GroupNorm's customary number."""


class ClipNorm(nn.Module):
    """Each channel brought to mean 0 and variance 1 over the clip, or over the clip and its group of channels; then weight and bias."""

    def __init__(self, channels: int, *, groups: int) -> None:
        super().__init__()
        self.groups = groups
        self.weight = nn.Parameter(torch.empty(channels))
        self.bias = nn.Parameter(torch.empty(channels))

    def forward(self, x: Float[Tensor, "1 C t h w"]) -> Float[Tensor, "1 C t h w"]:
        """Normalised."""
        return F.group_norm(x, self.groups, self.weight, self.bias, eps=NORM_EPS)


class Layer(nn.Module):
    """A convolution, a norm, LeakyReLU and dropout."""

    def __init__(self, channels: int, out: int, *, stride: int | tuple[int, int, int], norm: Norm | None) -> None:
        super().__init__()
        self.conv = nn.Conv3d(channels, out, KERNEL, stride=stride, padding=1, bias=norm is None)
        self.norm: nn.Module = nn.Identity()
        if norm in ("clip", "group"):
            self.norm = ClipNorm(out, groups=out if norm == "clip" else NUM_GROUPS)
        self.drops = norm is not None

    def forward(self, x: Tensor, *, dropout: float, generator: torch.Generator | None) -> Tensor:
        """Features; dropout only where there is a generator to draw from."""
        x = F.leaky_relu(self.norm(self.conv(x)), SLOPE)
        if not self.drops or generator is None or dropout == 0:
            return x
        kept = torch.rand(x.shape, generator=generator, device=x.device) >= dropout
        return x * kept / (1 - dropout)


class ClipDiscriminator(nn.Module):
    """Logits of patches, high for clips.

    Args:
        width: channels of the first layer.
        num_layers: layers that halve height and width; the first two halve the frames too.
        norm: of the layers after the first.
        dropout: share of features set to zero after each of them, in training.
    """

    def __init__(self, *, width: int, num_layers: int, norm: Norm, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        layers = [Layer(3, width, stride=2, norm=None)]
        channels = width
        for number in range(1, num_layers + 1):
            out = width * min(2**number, MOST_WIDTHS)
            stride = 1 if number == num_layers else (2 if number == 1 else 1, 2, 2)
            layers.append(Layer(channels, out, stride=stride, norm=norm))
            channels = out
        self.layers = nn.ModuleList(layers)
        self.out = nn.Conv3d(channels, 1, KERNEL, padding=1)

    def forward(self, clip: Float[Tensor, "1 3 T H W"], *, generator: torch.Generator | None = None) -> Float[Tensor, "1 1 t h w"]:
        """Logits of a clip in [-1, 1].

        Args:
            clip: one.
            generator: what dropout draws from; None drops nothing.
        """
        x = clip
        for layer in self.layers:
            x = layer(x, dropout=self.dropout, generator=generator)
        logits: Tensor = self.out(x)
        return logits

    @torch.no_grad()
    def initialize(self, *, seed: int) -> None:
        """Start values that depend on the seed only (on the CPU)."""
        generator = torch.Generator().manual_seed(seed)
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                module.weight.normal_(0.0, START_STD, generator=generator)
                if module.bias is not None:
                    module.bias.zero_()
            elif isinstance(module, ClipNorm):
                module.weight.normal_(1.0, START_STD, generator=generator)
                module.bias.zero_()


def smallest_side(num_layers: int) -> int:
    """Pixels a side that leave two rows of patches after so many halvings, which a norm over a picture needs."""
    return int(2 ** (num_layers + 1))
