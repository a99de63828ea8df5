"""Bytes a step allocates on the GPU against what `megasora validate` says beforehand, and what each way of recomputing costs in time."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import replace

import torch

from benchmarks.gpu.rig import SMALL, Load, Setup, build, fill_on_device, inputs_of, prepare_gradients, timed
from benchmarks.gpu.table import Case, Row
from megasora.config.memory import stage_estimate
from megasora.config.schema import DataConfig, Fp8, ParallelConfig, PrecisionConfig, RunConfig

RECOMPUTE = ("none", "selective", "full")


def memory_cases(setup: Setup) -> Iterator[Case]:
    """Two clips at 256px, in bf16 and FP8."""
    load = replace(setup.loads[0], count=2)
    precisions: tuple[Fp8, ...] = ("none", "tensorwise")
    for fp8 in precisions:
        for recompute in RECOMPUTE:

            def measure(fp8: Fp8 = fp8, recompute: str = recompute) -> Row:
                setup.need_cuda()
                return _memory(setup, load, fp8, recompute)

            yield Case(labels={"fp8": fp8, "recompute": recompute, "tokens": load.tokens}, measure=measure)


def _memory(setup: Setup, load: Load, fp8: Fp8, recompute: str) -> Row:
    model = SMALL if setup.small else replace(setup.model, num_double_blocks=3, num_single_blocks=5)
    parallel, precision = ParallelConfig(recompute=recompute), PrecisionConfig(dtype="bf16", fp8=fp8)  # type: ignore[arg-type]
    chunk, config = build(setup, model, precision, parallel)
    fill_on_device(chunk)
    prepare_gradients(chunk)
    pack, inputs = inputs_of(setup, model, load.samples, fp8=fp8, dtype=config.params_dtype)
    kept: list[int] = []

    def step() -> None:
        loss = chunk(inputs, pack).float().square().mean()
        kept.append(torch.cuda.memory_allocated())
        loss.backward()
        for parameter in chunk.parameters():
            parameter.grad = None

    step()  # workspaces and index tensors are there from now on
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    peak = torch.cuda.max_memory_allocated()
    times = timed(setup, step, warm=1, repeats=5, seconds=3)
    data = DataConfig(global_tokens=load.tokens, frame_counts=(129,))
    expected = stage_estimate(
        RunConfig(recipe="memory", model=model, parallel=parallel, precision=precision, data=data), stage=0, world_size=1
    )
    return {
        "blocks": f"{model.num_double_blocks} + {model.num_single_blocks}",
        "kept_gib": (kept[1] - before) / 2**30,
        "kept_gib_computed": expected.activations / 2**30,
        "peak_gib": (peak - before) / 2**30,
        "peak_gib_computed": (expected.activations + expected.working_set + expected.workspace) / 2**30,
        "ms": 1e3 * statistics.median(times),
    }
