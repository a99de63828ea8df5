"""The two kinds of block. A block maps token shares to token shares; linear layers gather and scatter them over TP.

Layouts: qkv rows of a TP rank are [q; k; v] of its heads, `linear1` is [q; k; v; mlp], `linear2` takes [attention; mlp].
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megasora.config.schema import ModelConfig
from megasora.models.mmdit.layers import Modulation, QueryKeyNorm
from megasora.models.mmdit.modulation import gated_residual, norm_modulate
from megasora.models.mmdit.recompute import Seams
from megasora.models.mmdit.rotary import Rotation, StreamRotations
from megasora.models.mmdit.spec import LayerFactory
from megasora.parallel.context import ContextAttention
from megasora.parallel.pack import Pack, Runs


class StreamAttention(nn.Module):
    """Query, key, value and output projections of one stream of a double block."""

    def __init__(self, model: ModelConfig, *, layers: LayerFactory) -> None:
        super().__init__()
        self.head_dim = model.head_dim
        self.qkv = layers.column(model.hidden_size, 3 * model.hidden_size)
        self.norm = QueryKeyNorm(model.head_dim, layers=layers, eps=model.norm_eps)
        self.proj = layers.row(model.hidden_size, model.hidden_size)

    def rotate(self, qkv: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        """[S, 3 H / TP] -> q, k, v [S, heads of this TP rank, K], q and k normed and rotated."""
        result: tuple[Tensor, Tensor, Tensor] = self.norm(qkv.view(qkv.shape[0], 3, -1, self.head_dim), rotation)
        return result


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


def gelu(x: Tensor) -> Tensor:
    """GELU, tanh approximation."""
    return F.gelu(x, approximate="tanh")


class Stream(nn.Module):
    """One stream (text or video) of a double block: its own modulation, projections and feed-forward layer."""

    def __init__(self, model: ModelConfig, *, layers: LayerFactory, seams: Seams) -> None:
        super().__init__()
        self.eps, self.seams = model.norm_eps, seams
        self.mod = Modulation(model.hidden_size, 6, layers=layers)
        self.attn = StreamAttention(model, layers=layers)
        self.mlp = MLP(model, layers=layers)

    def project(self, tokens: Tensor, rows: tuple[Tensor, ...], runs: Runs) -> Tensor:
        """Queries, keys and values of modulated tokens, [S, 3 H / TP]."""
        modulate = partial(norm_modulate, shift=rows[0], scale=rows[1], runs=runs, eps=self.eps)
        return self.seams.through(modulate, tokens, into=lambda x: self.attn.qkv(x)[0])

    def finish(self, tokens: Tensor, attended: Tensor, rows: tuple[Tensor, ...], runs: Runs) -> Tensor:
        """Output projection and feed-forward layer, each gated."""

        def add(residual: Tensor, branch: Tensor) -> Tensor:
            return gated_residual(residual, gate=rows[2], branch=branch, runs=runs)

        projected = self.attn.proj(attended)[0]
        middle = add(tokens, projected)
        modulate = partial(norm_modulate, shift=rows[3], scale=rows[4], runs=runs, eps=self.eps)
        hidden = self.seams.through(modulate, middle, into=self.mlp.up)
        branch = self.seams.through(gelu, hidden, into=self.mlp.down)
        out = gated_residual(middle, gate=rows[5], branch=branch, runs=runs)
        self.seams.discard(middle, add, tokens, projected, until=branch)
        return out


class DoubleBlock(nn.Module):
    """Text and video keep their own weights and meet in attention."""

    def __init__(self, model: ModelConfig, *, layers: LayerFactory, attention: ContextAttention, seams: Seams = Seams()) -> None:  # noqa: B008
        super().__init__()
        self.seams = seams
        self.txt = Stream(model, layers=layers, seams=seams)
        self.img = Stream(model, layers=layers, seams=seams)
        self.attention = attention

    def forward(self, txt: Tensor, img: Tensor, vec: Tensor, rotations: StreamRotations, pack: Pack) -> tuple[Tensor, Tensor]:
        """Text share [., H] and video share [., H] -> the same."""
        txt_rows, img_rows = self.txt.mod(vec), self.img.mod(vec)

        def join(of_txt: Tensor, of_img: Tensor) -> tuple[Tensor, ...]:
            streams = zip(self.txt.attn.rotate(of_txt, rotations.txt), self.img.attn.rotate(of_img, rotations.img), strict=True)
            return tuple(pack.join_streams(a, b) for a, b in streams)

        attended = self.seams.through(
            join,
            self.txt.project(txt, txt_rows, pack.text_runs),
            self.img.project(img, img_rows, pack.video_runs),
            into=lambda q, k, v: self.attention(q, k, v, pack).flatten(1),
        )
        txt_attended, img_attended = pack.split_streams(attended)
        return (
            self.txt.finish(txt, txt_attended, txt_rows, pack.text_runs),
            self.img.finish(img, img_attended, img_rows, pack.video_runs),
        )


class SingleBlock(nn.Module):
    """Text and video share weights; attention and feed-forward run side by side between two linear layers."""

    def __init__(self, model: ModelConfig, *, layers: LayerFactory, attention: ContextAttention, seams: Seams = Seams()) -> None:  # noqa: B008
        super().__init__()
        self.head_dim, self.eps, self.seams = model.head_dim, model.norm_eps, seams
        tp = layers.tp_group.size()
        self.qkv_size, self.mlp_size = 3 * model.hidden_size // tp, model.ffn_hidden_size // tp
        self.modulation = Modulation(model.hidden_size, 3, layers=layers)
        self.linear1 = layers.column(model.hidden_size, 3 * model.hidden_size + model.ffn_hidden_size)
        self.norm = QueryKeyNorm(model.head_dim, layers=layers, eps=model.norm_eps)
        self.linear2 = layers.row(model.hidden_size + model.ffn_hidden_size, model.hidden_size)
        self.attention = attention

    def forward(self, joint: Tensor, vec: Tensor, rotations: StreamRotations, pack: Pack) -> Tensor:
        """Joint share [s, H] -> the same."""
        shift, scale, gate = self.modulation(vec)
        runs = pack.joint_runs
        modulate = partial(norm_modulate, shift=shift, scale=scale, runs=runs, eps=self.eps)
        hidden = self.seams.through(modulate, joint, into=lambda x: self.linear1(x)[0])
        qkv, mlp = hidden.split([self.qkv_size, self.mlp_size], dim=-1)
        attended = self.seams.through(
            lambda x: self.norm(x.unflatten(-1, (3, -1, self.head_dim)), rotations.joint),
            qkv,
            into=lambda q, k, v: self.attention(q, k, v, pack).flatten(1),
        )
        branch = self.seams.through(lambda a, b: torch.cat([a, gelu(b)], dim=-1), attended, mlp, into=lambda x: self.linear2(x)[0])
        return gated_residual(joint, gate=gate, branch=branch, runs=runs)


class FinalLayer(nn.Module):
    """Modulated norm and the projection back to latent channels, on video tokens."""

    def __init__(self, model: ModelConfig, *, layers: LayerFactory) -> None:
        super().__init__()
        self.eps = model.norm_eps
        self.adaLN_modulation = Modulation(model.hidden_size, 2, layers=layers)
        self.linear = layers.on_tokens(model.hidden_size, model.in_channels)

    def forward(self, img: Tensor, vec: Tensor, runs: Runs) -> Tensor:
        """[., H] -> [., C]; the rows are (shift, scale)."""
        shift, scale = self.adaLN_modulation(vec)
        result: Tensor = self.linear(norm_modulate(img, shift=shift, scale=scale, runs=runs, eps=self.eps))
        return result
