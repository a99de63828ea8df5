"""Bytes a step allocates on the GPU against what `megasora validate` says beforehand, and what recomputing and offloading cost in time."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import replace

import torch

from benchmarks.gpu.rig import SMALL, Load, Setup, build, clear, fill_on_device, inputs_of, prepare_gradients, timed
from benchmarks.gpu.table import Case, Row
from megasora.config.memory import stage_estimate
from megasora.config.schema import DataConfig, Fp8, ParallelConfig, PrecisionConfig, RunConfig
from megasora.models.mmdit.offload import host_memory

RECOMPUTE = ("none", "selective", "full")


def memory_cases(setup: Setup) -> Iterator[Case]:
    """Two clips at 256px, in bf16 and FP8."""
    load = replace(setup.loads[0], count=2)
    precisions: tuple[Fp8, ...] = ("none", "tensorwise")
    for fp8 in precisions:
        for recompute in RECOMPUTE:

            def measure(fp8: Fp8 = fp8, recompute: str = recompute) -> Row:
                setup.need_cuda()
                return _memory(setup, load, fp8, ParallelConfig(recompute=recompute))  # type: ignore[arg-type]

            yield Case(labels={"fp8": fp8, "recompute": recompute, "tokens": load.tokens}, measure=measure)


def offload_cases(setup: Setup) -> Iterator[Case]:
    """Each block recomputed in full, its inputs on the GPU or in host memory; before them the link alone."""
    yield Case(labels={"copy": "out and back", "tokens": setup.loads[0].tokens}, measure=lambda: _link(setup, setup.loads[0]))
    settings: tuple[tuple[int, Fp8], ...] = ((0, "none"), (1, "none"), (0, "tensorwise"))
    for number, fp8 in settings:
        load = setup.loads[number]
        for offload in ("none", "inputs"):

            def measure(load: Load = load, fp8: Fp8 = fp8, offload: str = offload) -> Row:
                if fp8 != "none":
                    setup.need_cuda()
                return _memory(setup, load, fp8, ParallelConfig(recompute="full", offload=offload))  # type: ignore[arg-type]

            yield Case(labels={"size": load.name, "tokens": load.tokens, "fp8": fp8, "offload": offload}, measure=measure)


def _link(setup: Setup, load: Load) -> Row:
    """One block's inputs to page-locked memory and back, each alone."""
    on_device = torch.zeros(load.tokens, setup.model.hidden_size, dtype=torch.bfloat16, device=setup.device)
    on_host = host_memory(on_device)
    ways = {"out": lambda: on_host.copy_(on_device, non_blocking=True), "back": lambda: on_device.copy_(on_host, non_blocking=True)}
    row: Row = {"gb": on_device.nbytes / 1e9}
    for way, copy in ways.items():
        row[f"{way}_gb_per_s"] = on_device.nbytes / statistics.median(timed(setup, copy, warm=2, repeats=10, seconds=2)) / 1e9
    return row


def _memory(setup: Setup, load: Load, fp8: Fp8, parallel: ParallelConfig) -> Row:
    model = SMALL if setup.small else replace(setup.model, num_double_blocks=3, num_single_blocks=5)
    precision = PrecisionConfig(dtype="bf16", fp8=fp8)
    chunk, config = build(setup, model, precision, parallel)
    fill_on_device(chunk)
    prepare_gradients(chunk)
    pack, inputs = inputs_of(setup, model, load.samples, fp8=fp8, dtype=config.params_dtype)
    kept: list[int] = []

    def step() -> None:
        loss = chunk(inputs, pack).float().square().mean()
        kept.append(_allocated(setup))
        loss.backward()
        for parameter in chunk.parameters():
            parameter.grad = None

    step()  # workspaces and index tensors are there from now on
    clear(setup)
    before = _allocated(setup)
    step()
    peak = torch.cuda.max_memory_allocated() if setup.on_gpu else 0
    times = timed(setup, step, warm=1, repeats=5, seconds=3)
    data = DataConfig(global_tokens=load.tokens, frame_counts=(129,))
    expected = stage_estimate(
        RunConfig(recipe="memory", model=model, parallel=parallel, precision=precision, data=data), stage=0, world_size=1
    )
    row: Row = {"blocks": f"{model.num_double_blocks} + {model.num_single_blocks}", "ms": 1e3 * statistics.median(times)}
    if not setup.on_gpu:
        return row
    return row | {
        "kept_gib": (kept[1] - before) / 2**30,
        "kept_gib_computed": expected.activations / 2**30,
        "peak_gib": (peak - before) / 2**30,
        "peak_gib_computed": (expected.activations + expected.working_set + expected.workspace) / 2**30,
    }


def _allocated(setup: Setup) -> int:
    return torch.cuda.memory_allocated() if setup.on_gpu else 0
