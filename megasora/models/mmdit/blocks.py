"""The two kinds of block. A block maps token shares to token shares; linear layers gather and scatter them over TP.

Between matrix products and attention stand the operations of `kernels`, each one pass over its tensors.
Layouts: qkv rows of a TP rank are [q; k; v] of its heads, `linear1` is [q; k; v; mlp], `linear2` takes [attention; mlp].
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from megasora.config.schema import ModelConfig
from megasora.models.mmdit.heads import HeadLayout, Projected, collect_heads, place_heads
from megasora.models.mmdit.layers import Modulation, QueryKeyNorm
from megasora.models.mmdit.modulation import gated_norm_modulate, gated_residual, norm_modulate
from megasora.models.mmdit.rotary import Rotation, StreamRotations
from megasora.models.mmdit.spec import LayerFactory
from megasora.parallel.context import ContextAttention
from megasora.parallel.pack import HeadRows, Pack, Rows, Runs


class StreamAttention(nn.Module):
    """Query, key, value and output projections of one stream of a double block."""

    def __init__(self, model: ModelConfig, *, layers: LayerFactory) -> None:
        super().__init__()
        self.qkv = layers.column(model.hidden_size, 3 * model.hidden_size)
        self.norm = QueryKeyNorm(model.head_dim, layers=layers)
        self.proj = layers.row(model.hidden_size, model.hidden_size)

    def project(self, tokens: Tensor, rotation: Rotation, rows: Rows) -> Projected:
        """[s, H] -> queries, keys and values of this TP rank's heads, for `place_heads`."""
        return Projected(tensor=self.qkv(tokens)[0], weights=self.norm.weights, rotation=rotation, rows=rows)


class MLP(nn.Module):
    """Feed-forward layer with GELU (tanh)."""

    def __init__(self, model: ModelConfig, *, layers: LayerFactory) -> None:
        super().__init__()
        self.fc1 = layers.column(model.hidden_size, model.ffn_hidden_size)
        self.fc2 = layers.row(model.ffn_hidden_size, model.hidden_size)

    def forward(self, tokens: Tensor) -> Tensor:
        """[s, H] -> [s, H]."""
        result: Tensor = self.fc2(F.gelu(self.fc1(tokens)[0], approximate="tanh"))[0]
        return result


class Stream(nn.Module):
    """One stream (text or video) of a double block: its own modulation, projections and feed-forward layer."""

    def __init__(self, model: ModelConfig, *, layers: LayerFactory) -> None:
        super().__init__()
        self.eps, self.kernels = model.norm_eps, layers.kernels
        self.mod = Modulation(model.hidden_size, 6, layers=layers)
        self.attn = StreamAttention(model, layers=layers)
        self.mlp = MLP(model, layers=layers)

    def project(self, tokens: Tensor, mod: tuple[Tensor, ...], runs: Runs, rotation: Rotation, rows: Rows) -> tuple[Tensor, Projected]:
        """The tokens, and the projections of their modulated norm."""
        tokens, normed = norm_modulate(tokens, shift=mod[0], scale=mod[1], runs=runs, eps=self.eps, kernels=self.kernels)
        return tokens, self.attn.project(normed, rotation, rows)

    def finish(self, tokens: Tensor, attended: Tensor, mod: tuple[Tensor, ...], runs: Runs) -> Tensor:
        """Output projection and feed-forward layer, each gated."""
        tokens, normed = gated_norm_modulate(
            tokens,
            gate=mod[2],
            branch=self.attn.proj(attended)[0],
            shift=mod[3],
            scale=mod[4],
            runs=runs,
            eps=self.eps,
            kernels=self.kernels,
        )
        return gated_residual(tokens, gate=mod[5], branch=self.mlp(normed), runs=runs, kernels=self.kernels)


class DoubleBlock(nn.Module):
    """Text and video keep their own weights and meet in attention."""

    def __init__(self, model: ModelConfig, *, layers: LayerFactory, attention: ContextAttention) -> None:
        super().__init__()
        self.heads, self.head_dim, self.eps = model.num_attention_heads // layers.tp_group.size(), model.head_dim, model.norm_eps
        self.kernels = layers.kernels
        self.txt = Stream(model, layers=layers)
        self.img = Stream(model, layers=layers)
        self.attention = attention

    def forward(self, txt: Tensor, img: Tensor, vec: Tensor, rotations: StreamRotations, pack: Pack) -> tuple[Tensor, Tensor]:
        """Text share [., H] and video share [., H] -> the same."""
        of_txt, of_img = self.txt.mod(vec), self.img.mod(vec)
        rows = self.attention.rows(pack)
        txt, txt_projected = self.txt.project(txt, of_txt, pack.text_runs, rotations.txt, rows.text)
        img, img_projected = self.img.project(img, of_img, pack.video_runs, rotations.img, rows.video)
        layout = _layout(self.attention, rows, head_dim=self.head_dim, eps=self.eps)
        q, k, v = place_heads([txt_projected, img_projected], heads=self.heads, layout=layout, kernels=self.kernels)
        attended = self.attention(q, k, v, pack)
        txt_attended, img_attended = collect_heads(attended, rows=(rows.text, rows.video), kernels=self.kernels)
        return (
            self.txt.finish(txt, txt_attended, of_txt, pack.text_runs),
            self.img.finish(img, img_attended, of_img, pack.video_runs),
        )


class SingleBlock(nn.Module):
    """Text and video share weights; attention and feed-forward run side by side between two linear layers."""

    def __init__(self, model: ModelConfig, *, layers: LayerFactory, attention: ContextAttention) -> None:
        super().__init__()
        self.heads, self.head_dim, self.eps = model.num_attention_heads // layers.tp_group.size(), model.head_dim, model.norm_eps
        self.kernels = layers.kernels
        self.modulation = Modulation(model.hidden_size, 3, layers=layers)
        self.linear1 = layers.column(model.hidden_size, 3 * model.hidden_size + model.ffn_hidden_size)
        self.norm = QueryKeyNorm(model.head_dim, layers=layers)
        self.linear2 = layers.row(model.hidden_size + model.ffn_hidden_size, model.hidden_size)
        self.attention = attention

    def forward(self, joint: Tensor, vec: Tensor, rotations: StreamRotations, pack: Pack) -> Tensor:
        """Joint share [s, H] -> the same."""
        shift, scale, gate = self.modulation(vec)
        runs, rows = pack.joint_runs, self.attention.rows(pack)
        joint, normed = norm_modulate(joint, shift=shift, scale=scale, runs=runs, eps=self.eps, kernels=self.kernels)
        projected = Projected(tensor=self.linear1(normed)[0], weights=self.norm.weights, rotation=rotations.joint, rows=rows.joint)
        layout = _layout(self.attention, rows, head_dim=self.head_dim, eps=self.eps)
        q, k, v, wide = place_heads([projected], heads=self.heads, layout=layout, kernels=self.kernels)
        (merged,) = collect_heads(self.attention(q, k, v, pack), rows=(rows.joint,), kernels=self.kernels, wide=wide)
        return gated_residual(joint, gate=gate, branch=self.linear2(merged)[0], runs=runs, kernels=self.kernels)


class FinalLayer(nn.Module):
    """Modulated norm and the projection back to latent channels, on video tokens."""

    def __init__(self, model: ModelConfig, *, layers: LayerFactory) -> None:
        super().__init__()
        self.eps, self.kernels = model.norm_eps, layers.kernels
        self.adaLN_modulation = Modulation(model.hidden_size, 2, layers=layers)
        self.linear = layers.on_tokens(model.hidden_size, model.in_channels)

    def forward(self, img: Tensor, vec: Tensor, runs: Runs) -> Tensor:
        """[., H] -> [., C]; the rows are (shift, scale)."""
        shift, scale = self.adaLN_modulation(vec)
        normed = norm_modulate(img, shift=shift, scale=scale, runs=runs, eps=self.eps, kernels=self.kernels)[1]
        result: Tensor = self.linear(normed)
        return result


def _layout(attention: ContextAttention, rows: HeadRows, *, head_dim: int, eps: float) -> HeadLayout:
    return HeadLayout(num_groups=attention.num_groups, length=rows.length, head_dim=head_dim, eps=eps)
