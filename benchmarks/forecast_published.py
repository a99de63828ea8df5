"""Forecasts against what others published, with hardware numbers that none of them was fitted on.

    python -m benchmarks.forecast_published [--json]

Rates are those of one H100 with megasora's and Transformer Engine's kernels (megasora/perf/profiles.py). A system that is no MMDiT of ours
stands as one of the same width, depth and FLOPs per token: that is said beside it. What a source does not say (micro-batches, overlap) is
chosen, and said too. Nothing here is measured; the published figures are facts of the sources named.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass, replace

from megasora import recipes
from megasora.config.schema import ModelConfig, ParallelConfig, RunConfig
from megasora.data.plan import PlannedClip
from megasora.perf.hardware import Hardware, load_hardware
from megasora.scaling.forecast.step import StepForecast, forecast_step
from megasora.scaling.workload import planned_clips, steps_of

OPEN_SORA = "Open-Sora 2.0 report (arXiv 2503.09642), section 4 and table 2"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One published figure."""

    system: str
    figure: str
    published: float
    forecast: float
    note: str
    source: str

    @property
    def error(self) -> float:
        """Relative, of the forecast."""
        return self.forecast / self.published - 1


def open_sora(name: str, *, cached: bool, repeated: int = 1) -> StepForecast:
    """A published stage: torch's kernels, its recomputation, its ranks. Encoding is repeated by `repeated` ranks as published."""
    base = recipes.get(name)
    data = replace(base.data, cache="latents" if cached else None)
    full = ParallelConfig(recompute="count", recompute_double_blocks=8, recompute_single_blocks=38)
    ring = ParallelConfig(recompute="full", context_parallel_size=4, context_parallel_backend="ring")
    parallel = replace(full if name == "opensora2_stage1" else ring, zero_stage=2)
    config = replace(base, data=data, parallel=parallel, precision=replace(base.precision, kernels="torch"))
    gpus = 224 if name == "opensora2_stage1" else 192
    hardware = load_hardware("h200")
    rates = replace(hardware.rates, encoder=hardware.rates.encoder / repeated)
    return _step(config, gpus, replace(hardware, rates=rates))


def _step(config: RunConfig, gpus: int, hardware: Hardware) -> StepForecast:
    (packs,) = steps_of(config, planned_clips(config), world_size=gpus)
    return forecast_step(config, packs, world_size=gpus, hardware=hardware)


def other(model: ModelConfig, parallel: ParallelConfig, *, tokens: int, gpus: int, per_replica: int) -> StepForecast:
    """Another system's training on clips of `tokens` tokens, `per_replica` of them one after another."""
    base = recipes.get("opensora2_stage3")
    replicas = gpus // parallel.model_parallel_size
    data = replace(base.data, cache="latents", num_microbatches=per_replica, global_tokens=per_replica * replicas * tokens, text_tokens=512)
    config = replace(base, model=model, parallel=parallel, data=data)
    (clip,) = planned_clips(base)
    sized: tuple[PlannedClip, ...] = (replace(clip, grid=(1, 1, tokens - 512)),)
    (packs,) = steps_of(config, sized, world_size=gpus)
    return forecast_step(config, packs, world_size=gpus, hardware=load_hardware("h100"))


def _dit(*, hidden: int, heads: int, layers: int, ffn: int) -> ModelConfig:
    """A DiT of single blocks."""
    axes = (hidden // heads // 8, hidden // heads // 16 * 7, hidden // heads // 16 * 7)
    return ModelConfig(
        hidden_size=hidden, num_attention_heads=heads, num_double_blocks=0, num_single_blocks=layers, ffn_hidden_size=ffn, axes_dim=axes
    )


def rows() -> list[Row]:
    """All comparisons."""
    found = []
    for name, published in (("opensora2_stage1", 0.3819), ("opensora2_stage3", 0.3575)):
        step = open_sora(name, cached=True)
        note = "the DiT alone; torch's kernels, recomputed as published, full 129-frame clips"
        found.append(Row(system=name, figure="MFU", published=published, forecast=step.mfu or 0.0, note=note, source=OPEN_SORA))
    for name, published, repeated in (("opensora2_stage1", 3.2, 1), ("opensora2_stage3", 0.08, 4)):
        step = open_sora(name, cached=False, repeated=repeated)
        note = "whole step on 8 GPUs with VAE and text" + (f", each clip encoded by all {repeated} context ranks" if repeated > 1 else "")
        rate = step.samples_per_s / step.world_size * 8
        found.append(Row(system=name, figure="clips/s", published=published, forecast=rate, note=note, source=OPEN_SORA))
    nemo = "Training Video Foundation Models with NVIDIA NeMo (arXiv 2503.12964)"
    # cross-attention: two more H^2 matrices a token, so 28 H^2 of FLOPs; ours is 8 H^2 + 4 H F
    dit28 = _dit(hidden=6144, heads=48, layers=48, ffn=6144 * 5)
    dit7 = _dit(hidden=4096, heads=32, layers=28, ffn=4096 * 5)
    wan = _dit(hidden=5120, heads=40, layers=40, ffn=18_944)
    step = other(dit28, ParallelConfig(tensor_model_parallel_size=4, pipeline_model_parallel_size=4), tokens=8192, gpus=64, per_replica=32)
    note = "width 6144, 48 layers (from 28 B parameters), 32 micro-batches a replica (chosen), nothing recomputed"
    found.append(
        Row(
            system="NeMo DiT-28B, TP4 PP4, 8k tokens", figure="TFLOP/s", published=468, forecast=step.tflops_per_gpu, note=note, source=nemo
        )
    )
    step = other(dit7, ParallelConfig(tensor_model_parallel_size=2, context_parallel_size=4), tokens=74_000, gpus=64, per_replica=1)
    note = "width 4096, 28 layers (from 7 B parameters), nothing recomputed (fits)"
    found.append(
        Row(
            system="NeMo DiT-7B, TP2 CP4, 74k tokens", figure="TFLOP/s", published=439, forecast=step.tflops_per_gpu, note=note, source=nemo
        )
    )
    parallel = ParallelConfig(tensor_model_parallel_size=2, context_parallel_size=4, recompute="full")
    step = other(wan, parallel, tokens=37_000, gpus=128, per_replica=1)
    note = "width 5120, 40 layers, F 13,824 and cross-attention as F 18,944; recomputed in full (chosen; NeMo's recipe does)"
    bridge = "NVIDIA NeMo Megatron-Bridge, Wan2.1-14B on 128 H100 (performance summary)"
    found.append(
        Row(
            system="Wan2.1-14B, TP2 CP4, 37k tokens",
            figure="TFLOP/s",
            published=326,
            forecast=step.tflops_per_gpu,
            note=note,
            source=bridge,
        )
    )
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="only the JSON line")
    arguments = parser.parse_args()
    found = rows()
    if not arguments.json:
        print("| system | figure | published | forecast | error | what was assumed | source |")
        print("|---|---|---|---|---|---|---|")
        for row in found:
            print(
                f"| {row.system} | {row.figure} | {row.published:g} | {row.forecast:.3g} | {row.error:+.0%} | {row.note} | {row.source} |"
            )
    print(json.dumps([{**asdict(row), "error": row.error} for row in found]))


if __name__ == "__main__":
    main()
