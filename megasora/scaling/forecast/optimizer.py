"""Time of the optimizer: bound by memory, shared out over CP x DP."""

from __future__ import annotations

from megasora.config.pipeline_split import stage_parameters
from megasora.config.schema import RunConfig
from megasora.parallel.topology import Topology
from megasora.perf.hardware import Hardware

ADAM_BYTES = {"bf16": 34, "fp32": 32}
"""Read and written per parameter: gradient (4, and 8 for its norm and its scaling), master, two moments (12 and 12), bf16 weight (2)
(benchmarks/gpu, section adam: 34)."""
WIDENING_BYTES = {"fp32": 0, "bf16": 16, "fp16": 32}
"""More for a moment below fp32, from FusedAdam's Python (computed, not measured): bf16 read 2 and written 4 before the step, read 4,
written 2, read 2 and written 2 behind it; fp16 6 and scaled 8 before, its largest found 4, scaled 8 and narrowed 6 behind it."""
EMA_BYTES = 12
"""The master read, the average read and written."""


def optimizer_s(config: RunConfig, stage: int, *, topology: Topology, hardware: Hardware) -> float:
    """Seconds of the update on a rank of a stage."""
    own = stage_parameters(config.model, config.parallel)[stage] / topology.tp / (topology.cp * topology.dp)
    size = ADAM_BYTES[config.precision.dtype] + (EMA_BYTES if config.optimizer.ema_decay > 0 else 0)
    size += WIDENING_BYTES[config.optimizer.exp_avg_dtype] + WIDENING_BYTES[config.optimizer.exp_avg_sq_dtype]
    return own * size / hardware.rates.adam * hardware.slowed(topology.world_size)
