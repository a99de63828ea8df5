"""Small jobs in many layouts, for dry runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megasora.config.schema import DataConfig, ModelConfig, OptimizerConfig, ParallelConfig, RunConfig
from megasora.scaling.workload import Clips

SMALL = ModelConfig(
    hidden_size=512,
    num_attention_heads=8,
    num_double_blocks=3,
    num_single_blocks=5,
    ffn_hidden_size=2048,
    in_channels=64,
    text_dim=96,
    vec_dim=48,
    time_dim=32,
    axes_dim=(16, 24, 24),
)


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job and the ranks of it that are tried."""

    config: RunConfig
    world_size: int
    ranks: tuple[int, ...] = (0,)
    clips: Clips = "largest"


def job(
    world_size: int, *ranks: int, m: int = 1, clips: Clips = "largest", samples: int = 6, text_tokens: int = 64, **parallel: Any
) -> Job:
    """Each replica gets so many samples in each of m micro-batches."""
    layout = ParallelConfig(**parallel)
    replicas = world_size // layout.model_parallel_size
    frames = (33, 17, 1) if clips == "drawn" else (33,)
    data = DataConfig(
        global_tokens=replicas * m * samples * (9 * 8 * 8 + text_tokens),
        num_microbatches=m,
        text_tokens=text_tokens,
        resolution="128px",
        frame_counts=frames,
    )
    config = RunConfig(recipe="small", model=SMALL, parallel=layout, data=data, optimizer=OptimizerConfig(ema_decay=0.99))
    return Job(config=config, world_size=world_size, ranks=ranks or (0,), clips=clips)


TP2, PP2, CP2 = {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}, {"context_parallel_size": 2}
PP4 = {"pipeline_model_parallel_size": 4}
RING = {"context_parallel_backend": "ring"}
CASES = {
    "alone": job(1),
    "one sample": job(1, samples=1, m=6),
    "dp2": job(2, 0, 1, m=2),
    "dp3 uneven": job(3, 0, 2, m=2, clips="drawn", samples=12),
    "selective": job(2, recompute="selective"),
    "full": job(2, m=2, recompute="full"),
    "count": job(1, recompute="count", recompute_double_blocks=1, recompute_single_blocks=2),
    "tp2": job(2, 0, 1, **TP2),
    "tp4 full": job(4, 3, tensor_model_parallel_size=4, recompute="full"),
    "tp2 dp2 uneven": job(4, 0, 3, m=2, clips="drawn", samples=12, **TP2),
    "cp2": job(2, 0, 1, **CP2),
    "cp4 full uneven": job(4, 2, m=2, clips="drawn", samples=12, context_parallel_size=4, recompute="full"),
    "cp2 ring": job(2, 0, 1, **CP2, **RING),
    "cp4 ring full uneven": job(4, 0, 3, clips="drawn", samples=12, context_parallel_size=4, recompute="full", **RING),
    "cp4 both": job(4, 1, context_parallel_size=4, context_parallel_backend="ulysses_ring", ulysses_size=2),
    "pp2": job(2, 0, 1, m=3, **PP2),
    "pp4 dp2": job(8, 0, 3, 4, 7, m=6, **PP4),
    "pp2 vp2": job(2, 0, 1, m=4, virtual_pipeline_model_parallel_size=2, **PP2),
    "pp2 vp2 dp2": job(4, 0, 3, m=4, virtual_pipeline_model_parallel_size=2, **PP2),
    "tp2 pp2 cp2": job(8, 0, 7, m=2, **TP2, **PP2, **CP2),
    "tp2 pp2 cp2 ring full": job(8, 0, 7, m=2, recompute="full", **TP2, **PP2, **CP2, **RING),
    "zero2": job(3, 0, 2, m=2, zero_stage=2),
    "zero3": job(3, 0, 2, m=2, zero_stage=3),
    "zero3 full": job(4, 0, m=2, zero_stage=3, recompute="full"),
    "zero3 tp2 pp2": job(8, 0, 7, m=2, zero_stage=3, **TP2, **PP2),
    "zero3 pp2 vp2": job(4, 0, 3, m=2, zero_stage=3, virtual_pipeline_model_parallel_size=2, **PP2),
}
