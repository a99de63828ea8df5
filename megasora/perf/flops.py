"""FLOPs of the MMDiT, counted as multiply-adds x 2 (facts section 1)."""

from __future__ import annotations

from collections.abc import Iterable


def block_forward_flops(tokens: int, *, hidden_size: int) -> int:
    """Forward FLOPs of one block, either kind, on a sample of S tokens: 24 H^2 S + 4 S^2 H."""
    return 24 * hidden_size**2 * tokens + 4 * tokens**2 * hidden_size


def training_flops(samples: Iterable[int], *, hidden_size: int, num_blocks: int) -> int:
    """FLOPs of forward and backward (3 x forward) of all blocks over samples of these token counts; recompute is not counted."""
    return 3 * num_blocks * sum(block_forward_flops(tokens, hidden_size=hidden_size) for tokens in samples)
