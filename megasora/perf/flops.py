"""FLOPs of the MMDiT, counted as multiply-adds x 2 (facts section 1)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from megasora.config.schema import ModelConfig
from megasora.perf.collectives import StageShape


def block_forward_flops(tokens: int, *, hidden_size: int) -> int:
    """Forward FLOPs of one block, either kind, on a sample of S tokens: 24 H^2 S + 4 S^2 H."""
    return 24 * hidden_size**2 * tokens + 4 * tokens**2 * hidden_size


def training_flops(samples: Iterable[int], *, hidden_size: int, num_blocks: int) -> int:
    """FLOPs of forward and backward (3 x forward) of all blocks over samples of these token counts; recompute is not counted."""
    return 3 * num_blocks * sum(block_forward_flops(tokens, hidden_size=hidden_size) for tokens in samples)


LayerKind = Literal["blocks", "attention", "modulation", "embedders", "final", "other"]
"""blocks: linear layers of the blocks on tokens; modulation: on samples, the final layer's too; final: the projection to latents;
other: products of kernels that sum over samples, which belong to no layer."""
LAYER_KINDS: tuple[LayerKind, ...] = ("blocks", "attention", "modulation", "embedders", "final", "other")


@dataclass(frozen=True, kw_only=True)
class LayerFlops:
    """FLOPs (multiply-adds x 2) of one kind of layer on a rank."""

    kind: LayerKind
    forward: int
    backward: int
    """Of attention twice the forward's: what a kernel computes again of its own is not counted."""
    recompute: int
    """Forward passes once more."""

    @property
    def total(self) -> int:
        """Everything the rank computes."""
        return self.forward + self.backward + self.recompute


@dataclass(frozen=True, kw_only=True)
class PackOnRank:
    """One micro-batch as a rank computes it, padding included."""

    samples: int
    num_text: int
    """Text tokens of the rank's share."""
    num_video: int
    """Video tokens of the rank's share."""
    tokens: int
    """Tokens of its context rank: all shares over TP."""
    pairs: int
    """(query, key) pairs that attention looks at with each of the rank's heads; a ring member's queries are its own, its keys everybody's.
    Ulysses ranks hold 1 / U of a TP rank's heads."""


def rank_flops(
    stage: StageShape, pack: PackOnRank, *, model: ModelConfig, tp: int, ulysses: int, recomputed: tuple[int, int] = (0, 0)
) -> tuple[LayerFlops, ...]:
    """FLOPs of a micro-batch through one chunk on one rank, by kind; the first layers need no gradient of their inputs.

    Args:
        stage: the chunk.
        pack: its micro-batch.
        model: sizes.
        tp, ulysses: ranks that share the heads.
        recomputed: double and single blocks that run forward twice.
    """
    h, f, n = model.hidden_size, model.ffn_hidden_size, pack.samples
    linear, pairs = 2 * pack.tokens * (4 * h * h + 2 * h * f) // tp, 4 * pack.pairs * h // (tp * ulysses)  # of a block of either kind
    rows = 2 * n * h * h // tp  # of H rows a sample of a modulation
    in_block: dict[LayerKind, tuple[int, int]] = {
        "blocks": (linear, linear),
        "attention": (pairs, pairs),
        "modulation": (12 * rows, 3 * rows),
    }
    found = []
    for kind, (double, single) in in_block.items():
        forward = stage.num_double * double + stage.num_single * single
        forward += 2 * rows if kind == "modulation" and stage.post_process else 0
        again = recomputed[0] * double + recomputed[1] * single
        found.append(LayerFlops(kind=kind, forward=forward, backward=2 * forward, recompute=again))
    inner = _on_inputs(pack, model) if stage.pre_process else (0, 0)
    found.append(LayerFlops(kind="embedders", forward=sum(inner), backward=inner[0] + 2 * inner[1], recompute=0))
    final = 2 * pack.num_video * h * model.in_channels if stage.post_process else 0
    found.append(LayerFlops(kind="final", forward=final, backward=2 * final, recompute=0))
    return tuple(found)


def _on_inputs(pack: PackOnRank, model: ModelConfig) -> tuple[int, int]:
    """Forward FLOPs of the embedders: layers on inputs, and the second layers on rows of samples. Every TP rank computes them alike."""
    h, n = model.hidden_size, pack.samples
    vectors = [model.time_dim, model.vec_dim] + ([model.time_dim] if model.guidance_embed else [])
    first = pack.num_video * model.in_channels * h + pack.num_text * model.text_dim * h + n * sum(vectors) * h
    first += pack.num_video * model.cond_channels * h if model.cond_embed else 0
    return 2 * first, 2 * n * len(vectors) * h * h


def add_flops(parts: Iterable[Sequence[LayerFlops]]) -> tuple[LayerFlops, ...]:
    """Sums over micro-batches and chunks, every kind once."""
    sums = {kind: [0, 0, 0] for kind in LAYER_KINDS}
    for part in parts:
        for layer in part:
            for place, value in enumerate((layer.forward, layer.backward, layer.recompute)):
                sums[layer.kind][place] += value
    return tuple(LayerFlops(kind=kind, forward=f, backward=b, recompute=r) for kind, (f, b, r) in sums.items())
