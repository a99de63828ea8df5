"""Steps between stages: a convolution that halves or doubles the size, added to a shortcut that only moves and averages channels.

Down: pixels (and frames) of a coarse one become channels, and groups of channels are averaged. Up: channels are repeated and become pixels.
Source: opensora/models/dc_ae/models/nn/ops.py (PixelUnshuffleChannelAveragingDownSampleLayer, ChannelDuplicatingPixelShuffleUpSampleLayer,
InterpolateConvUpSampleLayer) and vo_ops.py (pixel_unshuffle_3d, pixel_shuffle_3d).
"""

from __future__ import annotations

from functools import partial

from jaxtyping import Float
from torch import Tensor, nn

from megasora.models.autoencoders.dc_ae.convolution import Convolution
from megasora.models.autoencoders.dc_ae.layers import ConvNormAct, Residual

Factors = tuple[int, int, int]
ONE: Factors = (1, 1, 1)


def changes_time(x: Tensor, *, temporal: bool) -> bool:
    """Whether a step changes the number of frames here: a temporal step does, but for a single frame, which stays one."""
    return temporal and x.shape[2] != 1


def factors_at(x: Tensor, *, temporal: bool) -> Factors:
    """Frames, rows and columns of a fine grid per one of the coarse grid, for a tensor on either side of a step."""
    return (2 if changes_time(x, temporal=temporal) else 1, 2, 2)


def unshuffled(x: Float[Tensor, "B C T H W"], factors: Factors) -> Float[Tensor, "B D t h w"]:
    """Pixels of each coarse one as channels: of channel c the place (t, h, w) in the cell becomes (((c ft + t) fh + h) fw + w)."""
    batch, channels, *grid = x.shape
    (t, h, w), (ft, fh, fw) = (side // factor for side, factor in zip(grid, factors, strict=True)), factors
    cells = x.reshape(batch, channels, t, ft, h, fh, w, fw).permute(0, 1, 3, 5, 7, 2, 4, 6)
    return cells.reshape(batch, channels * ft * fh * fw, t, h, w)


def shuffled(x: Float[Tensor, "B D t h w"], factors: Factors) -> Float[Tensor, "B C T H W"]:
    """The inverse of `unshuffled`."""
    batch, channels, t, h, w = x.shape
    ft, fh, fw = factors
    cells = x.reshape(batch, channels // (ft * fh * fw), ft, fh, fw, t, h, w).permute(0, 1, 5, 2, 6, 3, 7, 4)
    return cells.reshape(batch, -1, t * ft, h * fh, w * fw)


def averaged(x: Float[Tensor, "B C T H W"], *, channels: int, factors: Factors = ONE) -> Float[Tensor, "B D t h w"]:
    """The shortcut down: unshuffled channels, averaged in `channels` consecutive groups."""
    cells = unshuffled(x, factors)
    return cells.unflatten(1, (channels, cells.shape[1] // channels)).mean(dim=2)


def duplicated(x: Float[Tensor, "B D t h w"], *, channels: int, factors: Factors = ONE) -> Float[Tensor, "B C T H W"]:
    """The shortcut up: every channel repeated until there are enough to shuffle into `channels`."""
    repeats = channels * factors[0] * factors[1] * factors[2] // x.shape[1]
    return shuffled(x.repeat_interleave(repeats, dim=1), factors)


def enlarged(x: Float[Tensor, "B C t h w"], factors: Factors) -> Float[Tensor, "B C T H W"]:
    """Every pixel copied (nearest); only copies, so no tensor is too large for it."""
    batch, channels, t, h, w = x.shape
    ft, fh, fw = factors
    cells = x.view(batch, channels, t, 1, h, 1, w, 1).expand(-1, -1, -1, ft, -1, fh, -1, fw)
    return cells.reshape(batch, channels, t * ft, h * fh, w * fw)


def _averaged_here(x: Tensor, *, channels: int, temporal: bool) -> Tensor:
    return averaged(x, channels=channels, factors=factors_at(x, temporal=temporal))


def _duplicated_here(x: Tensor, *, channels: int, temporal: bool) -> Tensor:
    return duplicated(x, channels=channels, factors=factors_at(x, temporal=temporal))


class _EnlargeConv(nn.Module):
    """Enlarge, then a convolution; the convolution's tensors are named conv.conv."""

    def __init__(self, in_channels: int, out_channels: int, *, temporal: bool) -> None:
        super().__init__()
        self.temporal = temporal
        self.conv = ConvNormAct(Convolution(in_channels, out_channels, bias=True))

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.conv(enlarged(x.contiguous(), factors_at(x, temporal=self.temporal)))
        return made


def down_step(in_channels: int, out_channels: int, *, temporal: bool) -> Residual:
    """Half the height and width, and half the frames of a clip where `temporal`."""
    convolution = ConvNormAct(Convolution(in_channels, out_channels, stride=(2 if temporal else 1, 2, 2), bias=True))
    return Residual(convolution, partial(_averaged_here, channels=out_channels, temporal=temporal))


def up_step(in_channels: int, out_channels: int, *, temporal: bool) -> Residual:
    """Twice the height and width, and twice the frames of a clip where `temporal`."""
    enlarge = _EnlargeConv(in_channels, out_channels, temporal=temporal)
    return Residual(enlarge, partial(_duplicated_here, channels=out_channels, temporal=temporal))
