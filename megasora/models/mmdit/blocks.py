"""The two kinds of block. A block maps token shares to token shares; linear layers gather and scatter them over TP.

Between matrix products and attention stand the operations of `kernels`, each one pass over its tensors.
What is cheap to make again is freed at `seams` (see `recompute`).
Layouts: qkv rows of a TP rank are [q; k; v] of its heads, `linear1` is [q; k; v; mlp], `linear2` takes [attention; mlp].
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from megasora.config.schema import ModelConfig
from megasora.models.mmdit.heads import HeadLayout, Projected, collect_heads, place_heads
from megasora.models.mmdit.layers import Modulation, QueryKeyNorm
from megasora.models.mmdit.modulation import gated_norm_modulate, gated_residual, norm_modulate
from megasora.models.mmdit.recompute import Seams
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

    def up(self, tokens: Tensor) -> Tensor:
        """[s, H] -> [S, F / TP], before the activation."""
        result: Tensor = self.fc1(tokens)[0]
        return result

    def down(self, activated: Tensor) -> Tensor:
        """[S, F / TP] -> [s, H]."""
        result: Tensor = self.fc2(activated)[0]
        return result


class Stream(nn.Module):
    """One stream (text or video) of a double block: its own modulation, projections and feed-forward layer."""

    def __init__(self, model: ModelConfig, *, layers: LayerFactory, seams: Seams) -> None:
        super().__init__()
        self.eps, self.kernels, self.seams = model.norm_eps, layers.kernels, seams
        self.mod = Modulation(model.hidden_size, 6, layers=layers)
        self.attn = StreamAttention(model, layers=layers)
        self.mlp = MLP(model, layers=layers)

    def project(self, tokens: Tensor, mod: tuple[Tensor, ...], runs: Runs, rotation: Rotation, rows: Rows) -> tuple[Tensor, Projected]:
        """The tokens, and the projections of their modulated norm."""
        norm = partial(norm_modulate, shift=mod[0], scale=mod[1], runs=runs, eps=self.eps, kernels=self.kernels)
        passed, normed = norm(tokens)
        projected = self.attn.project(normed, rotation, rows)
        self.seams.discard((passed, normed), norm, tokens, until=projected.tensor)
        return passed, projected

    def attend(self, attended: Tensor, collected: Tensor, rows: Rows) -> Tensor:
        """Output projection [s, H] of what `collect_heads` took from attention's result for this stream."""
        branch: Tensor = self.attn.proj(collected)[0]
        self.seams.discard(collected, lambda x: collect_heads(x, rows=(rows,), kernels=self.kernels), attended, until=branch)
        return branch

    def finish(self, tokens: Tensor, branch: Tensor, mod: tuple[Tensor, ...], runs: Runs) -> Tensor:
        """The output projection is gated and added, then the feed-forward layer."""

        def add(residual: Tensor, projected: Tensor) -> tuple[Tensor, Tensor]:
            rows = {"gate": mod[2], "shift": mod[3], "scale": mod[4]}
            return gated_norm_modulate(residual, branch=projected, **rows, runs=runs, eps=self.eps, kernels=self.kernels)

        passed, normed = add(tokens, branch)
        hidden = self.mlp.up(normed)
        update = self.seams.through(partial(F.gelu, approximate="tanh"), hidden, into=self.mlp.down)
        out = gated_residual(passed, gate=mod[5], branch=update, runs=runs, kernels=self.kernels)
        self.seams.discard((passed, normed), add, tokens, branch, until=hidden)
        return out


class DoubleBlock(nn.Module):
    """Text and video keep their own weights and meet in attention."""

    def __init__(self, model: ModelConfig, *, layers: LayerFactory, attention: ContextAttention, seams: Seams) -> None:
        super().__init__()
        self.heads, self.head_dim, self.eps = model.num_attention_heads // layers.tp_group.size(), model.head_dim, model.norm_eps
        self.kernels, self.seams = layers.kernels, seams
        self.txt = Stream(model, layers=layers, seams=seams)
        self.img = Stream(model, layers=layers, seams=seams)
        self.attention = attention

    def forward(self, txt: Tensor, img: Tensor, vec: Tensor, rotations: StreamRotations, pack: Pack) -> tuple[Tensor, Tensor]:
        """Text share [., H] and video share [., H] -> the same."""
        of_txt, of_img = self.txt.mod(vec), self.img.mod(vec)
        rows = self.attention.rows(pack)
        txt, txt_projected = self.txt.project(txt, of_txt, pack.text_runs, rotations.txt, rows.text)
        img, img_projected = self.img.project(img, of_img, pack.video_runs, rotations.img, rows.video)
        layout = _layout(self.attention, rows, head_dim=self.head_dim, eps=self.eps)

        def place(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
            streams = [replace(txt_projected, tensor=a), replace(img_projected, tensor=b)]
            return place_heads(streams, heads=self.heads, layout=layout, kernels=self.kernels)

        attend = partial(self.attention, pack=pack)
        attended = self.seams.through(place, txt_projected.tensor, img_projected.tensor, into=attend)
        txt_attended, img_attended = collect_heads(attended, rows=(rows.text, rows.video), kernels=self.kernels)
        txt_branch, img_branch = self.txt.attend(attended, txt_attended, rows.text), self.img.attend(attended, img_attended, rows.video)
        return self.txt.finish(txt, txt_branch, of_txt, pack.text_runs), self.img.finish(img, img_branch, of_img, pack.video_runs)


class SingleBlock(nn.Module):
    """Text and video share weights; attention and feed-forward run side by side between two linear layers."""

    def __init__(self, model: ModelConfig, *, layers: LayerFactory, attention: ContextAttention, seams: Seams) -> None:
        super().__init__()
        self.heads, self.head_dim, self.eps = model.num_attention_heads // layers.tp_group.size(), model.head_dim, model.norm_eps
        self.kernels, self.seams = layers.kernels, seams
        self.modulation = Modulation(model.hidden_size, 3, layers=layers)
        self.linear1 = layers.column(model.hidden_size, 3 * model.hidden_size + model.ffn_hidden_size)
        self.norm = QueryKeyNorm(model.head_dim, layers=layers)
        self.linear2 = layers.row(model.hidden_size + model.ffn_hidden_size, model.hidden_size)
        self.attention = attention

    def forward(self, joint: Tensor, vec: Tensor, rotations: StreamRotations, pack: Pack) -> Tensor:
        """Joint share [s, H] -> the same."""
        shift, scale, gate = self.modulation(vec)
        runs, rows = pack.joint_runs, self.attention.rows(pack)
        layout = _layout(self.attention, rows, head_dim=self.head_dim, eps=self.eps)

        def place(hidden: Tensor) -> tuple[Tensor, ...]:
            projected = Projected(tensor=hidden, weights=self.norm.weights, rotation=rotations.joint, rows=rows.joint)
            return place_heads([projected], heads=self.heads, layout=layout, kernels=self.kernels)

        def collect(attended: Tensor, wide: Tensor) -> tuple[Tensor, ...]:
            return collect_heads(attended, rows=(rows.joint,), kernels=self.kernels, wide=wide)

        norm = partial(norm_modulate, shift=shift, scale=scale, runs=runs, eps=self.eps, kernels=self.kernels)
        passed, normed = norm(joint)
        hidden = self.linear1(normed)[0]
        self.seams.discard((passed, normed), norm, joint, until=hidden)
        q, k, v, wide = place(hidden)
        attended = self.attention(q, k, v, pack)
        self.seams.discard((q, k, v, wide), place, hidden, until=attended)
        branch = self.seams.through(collect, attended, wide, into=lambda merged: self.linear2(merged)[0])
        return gated_residual(passed, gate=gate, branch=branch, runs=runs, kernels=self.kernels)


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
