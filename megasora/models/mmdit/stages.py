"""Which blocks each pipeline chunk owns: the split of the 19 + 38 list by cost. Pure arithmetic."""

from __future__ import annotations

from megasora.config.errors import UserError
from megasora.config.schema import ModelConfig, ParallelConfig
from megasora.models.mmdit.model import StageSpec
from megasora.parallel.topology import chunk_blocks, split_by_cost

PARAMETERS_PER_H2 = {"double": 36.0, "single": 15.0}
"""Weights of a block in units of H^2 with FFN = 4 H: double 2 x (6 modulation + 4 attention + 8 MLP), single 3 + 7 + 5
(339.8 M and 141.6 M at H = 3072)."""
OPTIMIZER_BYTES_PER_PARAMETER = 6.0
"""bf16 weight and fp32 gradient, the part of a parameter's memory no data-parallel rank shares."""


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


def chunk_lengths(model: ModelConfig, parallel: ParallelConfig) -> tuple[int, ...]:
    """Blocks per chunk in pipeline order, length PP x VP.

    Raises:
        UserError: the given split has the wrong length or sum, or there are fewer blocks than chunks.
    """
    num_chunks = parallel.pipeline_model_parallel_size * parallel.num_model_chunks
    if parallel.pipeline_split != "given":
        return split_by_cost(block_costs(model, by=parallel.pipeline_split), num_chunks)
    lengths = parallel.pipeline_blocks or ()
    if len(lengths) != num_chunks or sum(lengths) != model.num_blocks or min(lengths) < 1:
        raise UserError(
            f"parallel.pipeline_blocks {lengths} must be {num_chunks} positive numbers (PP x VP) that sum to {model.num_blocks} blocks"
        )
    return tuple(lengths)


def stage_specs(model: ModelConfig, parallel: ParallelConfig, *, pp_rank: int) -> list[StageSpec]:
    """The chunks of one pipeline rank, in virtual-stage order."""
    lengths = chunk_lengths(model, parallel)
    pp, vp = parallel.pipeline_model_parallel_size, parallel.num_model_chunks
    every = model.num_blocks
    recompute = {
        "none": (0, 0),
        "full": (every, every),
        "count": (parallel.recompute_double_blocks, parallel.recompute_single_blocks),
    }[parallel.recompute]
    return [
        StageSpec(
            blocks=chunk_blocks(lengths, pp_rank=pp_rank, pp_size=pp, vp_stage=v),
            pre_process=v == 0 and pp_rank == 0,
            post_process=v == vp - 1 and pp_rank == pp - 1,
            vp_stage=v if parallel.virtual_pipeline_model_parallel_size else None,
            recompute_double=recompute[0],
            recompute_single=recompute[1],
        )
        for v in range(vp)
    ]
