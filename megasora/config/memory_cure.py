"""What makes a run that is too large for a GPU fit: changes that the estimate says help, cheapest in time first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from megasora.config.memory import memory_estimate
from megasora.config.pack_tokens import fullest_pack
from megasora.config.schema import ParallelConfig, RunConfig

H200_BYTES = 141e9
"""Memory of an H200 (NVIDIA data sheet: 141 GB): what a check without a GPU is made for."""


def memory_cure(config: RunConfig, *, world_size: int, gpu_bytes: float = H200_BYTES) -> str:
    """The first change, cheapest in time first, with which the run fits a GPU of `gpu_bytes`."""
    for text, changed in _smaller_runs(config, world_size):
        needed = memory_estimate(changed, world_size=world_size).total
        if needed <= gpu_bytes:
            return f"use {text} ({needed / 1e9:.0f} GB)"
    return "raise TP, PP and CP together, or the number of GPUs"


def _smaller_runs(config: RunConfig, world_size: int) -> Iterator[tuple[str, RunConfig]]:
    """Flags and the run they make."""
    parallel = config.parallel
    selective = replace(parallel, recompute="selective", recompute_double_blocks=0, recompute_single_blocks=0)
    full = replace(selective, recompute="full")
    selective = replace(selective, offload="none")
    weaker = parallel.recompute not in ("selective", "full")
    recomputed = [("", parallel)] + ([(" --parallel.recompute selective", selective)] if weaker else [])
    if weaker:
        yield "--parallel.recompute selective", replace(config, parallel=selective)
    for flag, limit in _smaller_packs(config, world_size):
        for more, chosen in recomputed:
            yield flag + more, replace(config, data=replace(config.data, max_pack_tokens=limit), parallel=chosen)
    if parallel.recompute != "full":
        yield "--parallel.recompute full", replace(config, parallel=full)
        recomputed.append((" --parallel.recompute full", full))
    if parallel.offload == "none":
        offloaded = replace(full, offload="inputs")
        flags = ("" if parallel.recompute == "full" else "--parallel.recompute full ") + "--parallel.offload inputs"
        yield flags, replace(config, parallel=offloaded)
    for flag, name, size in _larger_axes(config, world_size):
        for more, chosen in recomputed:
            larger = replace(config, parallel=replace(chosen, **{name: size}))  # type: ignore[arg-type]
            yield flag + more, larger
            *_, (smallest, limit) = [("", 0), *_smaller_packs(larger, world_size)]
            if limit:
                yield f"{flag}{more} {smallest}", replace(larger, data=replace(config.data, max_pack_tokens=limit))


def _smaller_packs(config: RunConfig, world_size: int) -> Iterator[tuple[str, int]]:
    """Limits of half, a quarter and one of the samples that a pack holds now."""
    pack = fullest_pack(config, world_size=world_size)
    for samples in dict.fromkeys((pack.samples // 2, pack.samples // 4, 1)):
        if 0 < samples < pack.samples:
            limit = (pack.text + pack.video) // pack.samples * samples
            yield f"--data.max_pack_tokens {limit}", limit


def _larger_axes(config: RunConfig, world_size: int) -> Iterator[tuple[str, str, int]]:
    """(flag, setting, size) for an axis that is doubled up to three times, where the layout stays sound."""
    parallel = config.parallel
    for name in ("context_parallel_size", "tensor_model_parallel_size", "pipeline_model_parallel_size"):
        for factor in (2, 4, 8):
            size = getattr(parallel, name) * factor
            if _is_sound(config, replace(parallel, **{name: size}), world_size):
                yield f"--parallel.{name} {size}", name, size


def _is_sound(config: RunConfig, parallel: ParallelConfig, world_size: int) -> bool:
    heads, tp, pp = config.model.num_attention_heads, parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    fixed = parallel.pipeline_split == "given" or parallel.virtual_pipeline_model_parallel_size is not None
    return (
        world_size % parallel.model_parallel_size == 0
        and heads % tp == 0
        and config.model.ffn_hidden_size % tp == 0
        and (pp == config.parallel.pipeline_model_parallel_size or (not fixed and pp <= config.model.num_blocks))
        and (parallel.context_parallel_backend != "ulysses" or heads // tp % parallel.context_parallel_size == 0)
        and parallel.context_parallel_backend != "ulysses_ring"
    )
