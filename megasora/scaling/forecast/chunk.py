"""A pipeline chunk's forward and backward pass of a pack: its blocks, and what stands before the first and after the last."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from megasora.config.memory import block_modes
from megasora.config.schema import RunConfig
from megasora.perf.hardware import rate_at
from megasora.scaling.forecast.block import BlockSetting, PackWork, backward_cost, forward_cost
from megasora.scaling.forecast.cost import Cost

END_LAUNCHES = (25, 31)
"""Kernels of the embedders or of the final layer, forward and backward: 50 and 61 for both ends (tests/unit/scaling/test_forecast.py)."""


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """What a chunk holds."""

    blocks: tuple[tuple[bool, str, int], ...]
    """(double, recompute mode, how many) in any order."""
    first: bool
    last: bool


def chunk_of(config: RunConfig, *, stage: int, chunk: int) -> Chunk:
    """The chunk `chunk` of a stage."""
    parallel = config.parallel
    counts = Counter(block_modes(config.model, parallel, stage=stage, chunk=chunk))
    return Chunk(
        blocks=tuple((double, mode, count) for (double, mode), count in counts.items()),
        first=stage == 0 and chunk == 0,
        last=stage == parallel.pipeline_model_parallel_size - 1 and chunk == parallel.num_model_chunks - 1,
    )


def chunk_forward(setting: BlockSetting, chunk: Chunk, work: PackWork) -> Cost:
    """Forward pass of a pack."""
    cost = _ends(setting, chunk, work, times=1)
    for double, _, count in chunk.blocks:
        cost += forward_cost(setting, work, double=double) * count
    return cost


def chunk_backward(setting: BlockSetting, chunk: Chunk, work: PackWork) -> Cost:
    """Backward pass of a pack."""
    cost = _ends(setting, chunk, work, times=2)
    for double, mode, count in chunk.blocks:
        cost += backward_cost(setting, work, double=double, mode=mode) * count
    return cost


def _ends(setting: BlockSetting, chunk: Chunk, work: PackWork, *, times: int) -> Cost:
    """Embedders and final layer: their products (counted as if every token were video, but text's own width for text) and launches."""
    model, h = setting.model, setting.model.hidden_size
    flops = 0
    if chunk.first:
        flops += 2 * h * (model.in_channels + (model.cond_channels if model.cond_embed else 0)) * work.share
        flops += 2 * h * model.text_dim * work.text_share
    if chunk.last:
        flops += 2 * h * model.in_channels * work.share
    if not flops:
        return Cost()
    rates = setting.hardware.rates
    device = times * flops / rate_at(rates.matmul, work.share) * setting.slower
    host = END_LAUNCHES[times - 1] * (int(chunk.first) + int(chunk.last)) * setting.hardware.launch_s * setting.slower
    if setting.hardware.device == "cpu":
        return Cost(compute=device, gaps=host)
    return Cost(compute=device, gaps=max(0.0, host - device))
