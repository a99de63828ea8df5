"""A PatchGAN of clips: convolutions that say of every patch whether it is of a clip or of a reconstruction.

Source: Open-Sora's NLayerDiscriminator3D (opensora/models/vae, n_layers 5, ndf 64: 18,823,553 parameters; 32 x 256 x 256 gives 8 x 8 x 8
logits), after pix2pix's (arXiv 1611.07004). It takes one clip at a time, so that its answer never depends on what else is on a rank. What
the published one calls batch norm is, at its batch of one clip per GPU, a norm of each channel over that clip: `clip` here. Its running
statistics were never read, and are not kept. Of a clip in slabs, layers ask their `Surroundings` for the rest.

Layers, in its order: convolution, LeakyReLU; num_layers times convolution without bias, norm, LeakyReLU, dropout; convolution.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from megasora.diffusion.philox import Stream, key_of
from megasora.models.autoencoders.group_norm import group_norm_over
from megasora.models.autoencoders.surroundings import WHOLE, Lengths, Surroundings

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
MOST_SEED = 0x7FFFFFFFFFFFFFFF
"""What a torch generator takes."""


class ClipNorm(nn.Module):
    """Each channel brought to mean 0 and variance 1 over the clip, or over the clip and its group of channels; then weight and bias."""

    def __init__(self, channels: int, *, groups: int) -> None:
        super().__init__()
        self.groups = groups
        self.weight = nn.Parameter(torch.empty(channels))
        self.bias = nn.Parameter(torch.empty(channels))

    def forward(self, x: Float[Tensor, "1 C t h w"], surroundings: Surroundings = WHOLE) -> Float[Tensor, "1 C t h w"]:
        """Normalised."""
        if surroundings is WHOLE:  # one kernel
            return F.group_norm(x, self.groups, self.weight, self.bias, eps=NORM_EPS)
        return group_norm_over(x, groups=self.groups, weight=self.weight, bias=self.bias, eps=NORM_EPS, total=surroundings.total)


def convolved(layer: nn.Conv3d, x: Tensor, surroundings: Surroundings) -> Tensor:
    """A convolution with one zero beyond each end of the clip."""
    stride: Lengths = (layer.stride[0], layer.stride[1], layer.stride[2])
    x, padding = surroundings.reached(x, kernel=(KERNEL, KERNEL, KERNEL), stride=stride)
    return F.conv3d(x, layer.weight, layer.bias, stride, padding)


def dropped(x: Float[Tensor, "1 C t h w"], *, share: float, key: int, surroundings: Surroundings) -> Float[Tensor, "1 C t h w"]:
    """Features with a share of them set to zero and the others enlarged (torch.nn.Dropout).

    Frames are drawn one by one, whole, from torch's generator of the device: a slab has its part of what the clip has.
    """
    (frame, row, _), (_, rows, columns) = surroundings.place(x)
    own = slice(row, row + x.shape[3])
    if own.stop > rows:  # the zeros that stand for a slab without lines
        return x
    kept = torch.empty(x.shape, dtype=torch.bool, device=x.device)
    if x.is_meta:  # where memory is counted nothing is drawn
        return x * kept / (1 - share)
    generator = torch.Generator(device=x.device)
    for number in range(x.shape[2]):
        generator.manual_seed(key_of(seed=key, stream=Stream.PATCHES, sample=frame + number) & MOST_SEED)
        drawn = torch.rand((x.shape[1], rows, columns), generator=generator, device=x.device)
        kept[0, :, number] = drawn[:, own] >= share
    return x * kept / (1 - share)


class Layer(nn.Module):
    """A convolution, a norm, LeakyReLU and dropout."""

    def __init__(self, channels: int, out: int, *, stride: int | tuple[int, int, int], norm: Norm | None) -> None:
        super().__init__()
        self.conv = nn.Conv3d(channels, out, KERNEL, stride=stride, padding=1, bias=norm is None)
        self.norm = ClipNorm(out, groups=out if norm == "clip" else NUM_GROUPS) if norm in ("clip", "group") else None
        self.drops = norm is not None

    def forward(self, x: Tensor, surroundings: Surroundings, *, dropout: float, key: int | None) -> Tensor:
        """Features; dropout only where there is a key to draw with."""
        x = convolved(self.conv, x, surroundings)
        if self.norm is not None:
            x = self.norm(x, surroundings)
        x = F.leaky_relu(x, SLOPE)
        if not self.drops or key is None or dropout == 0:
            return x
        return dropped(x, share=dropout, key=key, surroundings=surroundings)


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

    @property
    def units(self) -> Lengths:
        """Frames, rows and columns that one of a patch stands for: slabs are cut in these."""
        halvings = len(self.layers) - 1
        return (2 ** min(2, halvings), 2**halvings, 2**halvings)

    def forward(
        self, clip: Float[Tensor, "1 3 T H W"], surroundings: Surroundings = WHOLE, *, key: int | None = None
    ) -> Float[Tensor, "1 1 t h w"]:
        """Logits of a clip in [-1, 1].

        Args:
            clip: one, or its slab.
            surroundings: what is not in the slab.
            key: of dropout's draws; None drops nothing.
        """
        x = clip
        for number, layer in enumerate(self.layers):
            of_layer = None if key is None else key_of(seed=key, stream=Stream.PATCHES, step=number)
            x = layer(x, surroundings, dropout=self.dropout, key=of_layer)
        return convolved(self.out, x, surroundings)

    @torch.no_grad()
    def initialize(self, *, seed: int) -> None:
        """Start values that depend on the seed only (on the CPU)."""
        generator = torch.Generator().manual_seed(seed)
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                module.weight.normal_(0.0, START_STD, generator=generator)
                if module.bias is not None:  # which the published start leaves as torch.nn.Conv3d draws it
                    bound = module.weight[0].numel() ** -0.5
                    module.bias.uniform_(-bound, bound, generator=generator)
            elif isinstance(module, ClipNorm):
                module.weight.normal_(1.0, START_STD, generator=generator)
                module.bias.zero_()


def smallest_side(num_layers: int) -> int:
    """Pixels a side that leave two rows of patches after so many halvings, which a norm over a picture needs."""
    return int(2 ** (num_layers + 1))
