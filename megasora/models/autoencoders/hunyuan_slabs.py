"""HunyuanVideo's network on a slab of height: the steps of diffusers' modules, with their parameters, and what they need of other ranks.

diffusers' layers cannot be handed surroundings, so their forwards (diffusers/models/autoencoders/autoencoder_kl_hunyuan_video.py) stand
here once more, layer by layer. A convolution reads one row above and below, and repeats the clip's first and last row as diffusers pads;
GroupNorm takes its statistics over all ranks; the middle attention keys and values of all. No slabs of time: frame 0 stands alone
in every layer, so a first slab would not have its share of frames.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megasora.models.autoencoders.group_norm import group_norm_over
from megasora.models.autoencoders.slabs import halo_lines
from megasora.parallel.slabs import Slabs


class HunyuanSlab:
    """Encoder and decoder of an AutoencoderKLHunyuanVideo on one rank's rows.

    Where diffusers' module is told to recompute (enable_gradient_checkpointing), each residual block keeps its input only.

    Args:
        module: whose parameters are used.
        slabs: of height.
    """

    def __init__(self, module: Any, slabs: Slabs) -> None:
        self.module, self.slabs = module, slabs
        self.recompute = bool(module.encoder.gradient_checkpointing)

    def moments(self, pixels: Float[Tensor, "B 3 T H W"]) -> Float[Tensor, "B M t h w"]:
        """See `HunyuanNetwork.moments`."""
        encoder = self.module.encoder
        x = self._convolved(encoder.conv_in, pixels)
        for block in encoder.down_blocks:
            for resnet in block.resnets:
                x = self._resnet(resnet, x)
            for sampler in block.downsamplers or ():
                x = self._convolved(sampler.conv, x)
        moments: Tensor = self.module.quant_conv(self._end(encoder, self._middle(encoder.mid_block, x)))
        return moments

    def pixels(self, z: Float[Tensor, "B C t h w"]) -> Float[Tensor, "B 3 T H W"]:
        """See `HunyuanNetwork.pixels`."""
        decoder = self.module.decoder
        x = self._middle(decoder.mid_block, self._convolved(decoder.conv_in, self.module.post_quant_conv(z)))
        for block in decoder.up_blocks:
            for resnet in block.resnets:
                x = self._resnet(resnet, x)
            for sampler in block.upsamplers or ():
                x = self._convolved(sampler.conv, _enlarged(x, sampler.upsample_factor))
        return self._end(decoder, x)

    def _end(self, half: Any, x: Tensor) -> Tensor:
        return self._convolved(half.conv_out, half.conv_act(self._normalised(half.conv_norm_out, x)))

    def _resnet(self, resnet: Any, x: Tensor) -> Tensor:
        if not (self.recompute and torch.is_grad_enabled()):
            return self._residual(resnet, x)
        kept: Tensor = checkpoint(self._residual, resnet, x, use_reentrant=False)
        return kept

    def _residual(self, resnet: Any, x: Tensor) -> Tensor:
        made = self._convolved(resnet.conv1, resnet.nonlinearity(self._normalised(resnet.norm1, x)))
        made = self._convolved(resnet.conv2, resnet.dropout(resnet.nonlinearity(self._normalised(resnet.norm2, made))))
        return made + (x if resnet.conv_shortcut is None else self._convolved(resnet.conv_shortcut, x))

    def _middle(self, block: Any, x: Tensor) -> Tensor:
        x = self._resnet(block.resnets[0], x)
        for attention, resnet in zip(block.attentions, block.resnets[1:], strict=True):
            x = self._resnet(resnet, x if attention is None else self._attended(attention, x))
        return x

    def _convolved(self, layer: Any, x: Tensor) -> Tensor:
        """HunyuanVideoCausalConv3d: padded with copies of the edge, in time before frame 0 only."""
        kernel, stride = layer.conv.kernel_size, layer.conv.stride
        before, after = halo_lines(x.shape[3], kernel=kernel[1], stride=stride[1])
        x = self.slabs.with_halo(x, before=before, after=after)
        above = before if self.slabs.is_first else 0
        below = after if self.slabs.is_last else 0
        x = x.narrow(3, above, x.shape[3] - above - below)  # what was zeros there becomes copies
        side = kernel[2] // 2
        made: Tensor = layer.conv(F.pad(x, (side, side, above, below, kernel[0] - 1, 0), mode=layer.pad_mode))
        return made

    def _normalised(self, norm: nn.GroupNorm, x: Float[Tensor, "B C *places"]) -> Tensor:
        """GroupNorm with mean and variance over all ranks."""
        return group_norm_over(x, groups=norm.num_groups, weight=norm.weight, bias=norm.bias, eps=norm.eps, total=self.slabs.total)

    def _attended(self, layer: Any, x: Tensor) -> Tensor:
        """diffusers' Attention with its residual: places of a frame attend to all places of it and of earlier frames."""
        frames, rows = x.shape[2], self.slabs.num_lines(x)
        hidden = self._normalised(layer.group_norm, x).permute(0, 2, 3, 4, 1)
        q, k, v = (project(hidden) for project in (layer.to_q, layer.to_k, layer.to_v))
        k, v = (self.slabs.gather_for_all(part.movedim(2, -2)).movedim(-2, 2) for part in (k, v))  # rows where slabs have them
        q, k, v = (part.flatten(1, 3).unflatten(-1, (layer.heads, -1)).transpose(1, 2) for part in (q, k, v))
        at = torch.arange(frames, device=x.device)
        of_queries, of_keys = at.repeat_interleave(q.shape[2] // frames), at.repeat_interleave(rows * x.shape[4])
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=of_keys[None, :] <= of_queries[:, None])
        made = layer.to_out[0](out.transpose(1, 2).flatten(2)).unflatten(1, (frames, *x.shape[3:]))
        added: Tensor = made.permute(0, 4, 1, 2, 3) + x
        return added


def _enlarged(x: Tensor, factors: tuple[int, int, int]) -> Tensor:
    """Copies of every pixel; frame 0 stays one frame (HunyuanVideoUpsampleCausal3D)."""
    first, others = x[:, :, :1], x[:, :, 1:]
    if others.shape[2]:
        others = others.repeat_interleave(int(factors[0]), dim=2)
    joined = torch.cat((first, others), dim=2)
    return joined.repeat_interleave(int(factors[1]), dim=3).repeat_interleave(int(factors[2]), dim=4)
