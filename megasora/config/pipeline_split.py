"""Which blocks of the 19 + 38 list each pipeline chunk owns, and what a stage then weighs. Pure arithmetic, shared by model and checks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from megasora.config.errors import UserError
from megasora.config.parameters import (
    double_block_parameters,
    embedder_parameters,
    final_layer_parameters,
    replicated_in_block,
    single_block_parameters,
)
from megasora.config.schema import ModelConfig, ParallelConfig

PARAMETERS_PER_H2 = {"double": 36.0, "single": 15.0}
"""Weights of a block in units of H^2 with FFN = 4 H: double 2 x (6 modulation + 4 attention + 8 MLP), single 3 + 7 + 5
(339.8 M and 141.6 M at H = 3072)."""


def block_costs(model: ModelConfig, *, by: str, activation_share: float = 1.0) -> list[float]:
    """Cost of each block in pipeline order.

    Both kinds of block cost the same FLOPs per token; parameters differ 36 : 15; memory adds the weights to the activations in flight.
    """
    kinds = ["double"] * model.num_double_blocks + ["single"] * model.num_single_blocks
    if by == "flops":
        return [1.0] * len(kinds)
    weights = [PARAMETERS_PER_H2[kind] for kind in kinds]
    if by == "parameters":
        return weights
    mean = sum(weights) / len(weights)
    return [weight + mean * activation_share for weight in weights]


@lru_cache(maxsize=1024)
def _balanced(model: ModelConfig, by: str, num_chunks: int) -> tuple[int, ...]:
    return split_by_cost(block_costs(model, by=by), num_chunks)


def chunk_lengths(model: ModelConfig, parallel: ParallelConfig) -> tuple[int, ...]:
    """Blocks per chunk in pipeline order, length PP x VP.

    Raises:
        UserError: the given split has the wrong length or sum, or there are fewer blocks than chunks.
    """
    num_chunks = parallel.pipeline_model_parallel_size * parallel.num_model_chunks
    if parallel.pipeline_split != "given":
        return _balanced(model, parallel.pipeline_split, num_chunks)
    lengths = parallel.pipeline_blocks or ()
    if len(lengths) != num_chunks or sum(lengths) != model.num_blocks or min(lengths) < 1:
        raise UserError(
            f"parallel.pipeline_blocks {lengths} must be {num_chunks} positive numbers (PP x VP) that sum to {model.num_blocks} blocks"
        )
    return tuple(lengths)


def split_by_cost(costs: Sequence[float], num_chunks: int) -> tuple[int, ...]:
    """Lengths of `num_chunks` runs of `costs` whose largest sum is smallest; every run has at least one block.

    Linear partition by dynamic programming; ties give the earlier chunk fewer blocks. O(chunks x blocks^2), exact.

    Raises:
        UserError: fewer blocks than chunks.
    """
    n = len(costs)
    if num_chunks > n:
        raise UserError(f"{n} blocks cannot fill {num_chunks} pipeline chunks (PP x VP); use at most {n}")
    prefix = [0.0]
    for cost in costs:
        prefix.append(prefix[-1] + cost)
    best = [[float("inf")] * (n + 1) for _ in range(num_chunks + 1)]
    cut = [[0] * (n + 1) for _ in range(num_chunks + 1)]
    best[0][0] = 0.0
    for k in range(1, num_chunks + 1):
        for end in range(k, n + 1):
            for start in range(k - 1, end):
                worst = max(best[k - 1][start], prefix[end] - prefix[start])
                if worst < best[k][end] * (1 - 1e-12):
                    best[k][end], cut[k][end] = worst, start
    lengths: list[int] = []
    end = n
    for k in range(num_chunks, 0, -1):
        start = cut[k][end]
        lengths.append(end - start)
        end = start
    return tuple(reversed(lengths))


def chunk_blocks(lengths: Sequence[int], *, pp_rank: int, pp_size: int, vp_stage: int) -> range:
    """Indices (into the list of double then single blocks) owned by chunk `vp_stage` of stage `pp_rank`.

    Interleaving: chunk v of stage p is number v x PP + p in pipeline order.
    """
    order = vp_stage * pp_size + pp_rank
    start = sum(lengths[:order])
    return range(start, start + lengths[order])


def stage_parameters(model: ModelConfig, parallel: ParallelConfig) -> list[int]:
    """Parameters of each pipeline stage (all its chunks, all tensor ranks together): the embedders are the first stage's, the final layer
    the last one's.

    Raises:
        UserError: see `chunk_lengths`.
    """
    blocks = {True: double_block_parameters(model), False: single_block_parameters(model)}
    return _per_stage(model, parallel, blocks=blocks, first=embedder_parameters(model), last=final_layer_parameters(model))


def rank_parameters(model: ModelConfig, parallel: ParallelConfig) -> list[int]:
    """Parameters on one tensor rank of each pipeline stage: what TP shares, and what each of its ranks holds whole.

    Raises:
        UserError: see `chunk_lengths`.
    """
    tp = parallel.tensor_model_parallel_size

    def on_rank(parameters: int, replicated: int) -> int:
        return (parameters - replicated) // tp + replicated

    blocks = {
        True: on_rank(double_block_parameters(model), replicated_in_block(model, double=True)),
        False: on_rank(single_block_parameters(model), replicated_in_block(model, double=False)),
    }
    last = on_rank(final_layer_parameters(model), (model.hidden_size + 1) * model.in_channels)
    return _per_stage(model, parallel, blocks=blocks, first=embedder_parameters(model), last=last)


def _per_stage(model: ModelConfig, parallel: ParallelConfig, *, blocks: dict[bool, int], first: int, last: int) -> list[int]:
    """Sums over each stage's chunks; `blocks` by whether the block is double, `first` before the blocks, `last` after them."""
    lengths, pp = chunk_lengths(model, parallel), parallel.pipeline_model_parallel_size
    stages = []
    for stage in range(pp):
        owned = [i for v in range(parallel.num_model_chunks) for i in chunk_blocks(lengths, pp_rank=stage, pp_size=pp, vp_stage=v)]
        stages.append(sum(blocks[i < model.num_double_blocks] for i in owned))
    stages[0] += first
    stages[-1] += last
    return stages
