"""What each chunk of a pipeline rank is made of."""

from __future__ import annotations

from megasora.config.pipeline_split import chunk_blocks, chunk_lengths
from megasora.config.schema import ModelConfig, ParallelConfig
from megasora.models.mmdit.model import StageSpec


def stage_specs(model: ModelConfig, parallel: ParallelConfig, *, pp_rank: int) -> list[StageSpec]:
    """The chunks of one pipeline rank, in virtual-stage order."""
    lengths = chunk_lengths(model, parallel)
    pp, vp = parallel.pipeline_model_parallel_size, parallel.num_model_chunks
    every = model.num_blocks
    recompute = {
        "none": (0, 0),
        "full": (every, every),
        "count": (parallel.recompute_double_blocks, parallel.recompute_single_blocks),
        "selective": (parallel.recompute_double_blocks, parallel.recompute_single_blocks),
    }[parallel.recompute]
    return [
        StageSpec(
            blocks=chunk_blocks(lengths, pp_rank=pp_rank, pp_size=pp, vp_stage=v),
            pre_process=v == 0 and pp_rank == 0,
            post_process=v == vp - 1 and pp_rank == pp - 1,
            vp_stage=v if parallel.virtual_pipeline_model_parallel_size else None,
            recompute_double=recompute[0],
            recompute_single=recompute[1],
            selective=parallel.recompute == "selective",
            offload=parallel.offload == "inputs",
        )
        for v in range(vp)
    ]
