"""Speed of a block stack, and where its time goes."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache

import torch

from benchmarks import block_bytes
from benchmarks.gpu.rig import Load, Setup, build, clear, fill_on_device, inputs_of, prepare_gradients, timed
from benchmarks.gpu.table import Case, LeftOutError, Row
from benchmarks.gpu.timeline import Interval, summarise
from megasora.config.schema import Fp8, ModelConfig, PrecisionConfig
from megasora.models.mmdit.build import choose_attention, choose_provider
from megasora.perf.flops import training_flops
from megasora.perf.peaks import peak_bf16_tflops

SHEET_BANDWIDTH = {"H200": 4.8e12, "H100": 3.35e12}
"""Bytes per second by a part of the device name: NVIDIA's data sheets, SXM."""
ASSUMED_FOR = "H200"
"""What `block_bytes.BANDWIDTH` is assumed for; other devices get the same part of their data sheet's."""
SETTINGS: tuple[PrecisionConfig, ...] = (
    PrecisionConfig(dtype="bf16", kernels="torch"),
    PrecisionConfig(dtype="bf16", kernels="triton"),
    PrecisionConfig(dtype="bf16", kernels="triton", fp8="tensorwise"),
    PrecisionConfig(dtype="bf16", kernels="triton", fp8="blockwise"),
)


def speed_cases(setup: Setup) -> Iterator[Case]:
    """Every setting at both resolutions."""
    for load in setup.loads:
        for precision in SETTINGS:
            labels: Row = {
                "size": load.name,
                "clips": load.count,
                "tokens": load.tokens,
                "kernels": precision.kernels,
                "fp8": precision.fp8,
            }

            def measure(load: Load = load, precision: PrecisionConfig = precision) -> Row:
                return _speed(setup, load, precision)

            yield Case(labels=labels, measure=measure)


def _check(setup: Setup, precision: PrecisionConfig) -> None:
    if precision.kernels == "triton" or precision.fp8 != "none":
        setup.need_cuda()


def _speed(setup: Setup, load: Load, precision: PrecisionConfig) -> Row:
    """The largest of three stacks that fits in the device's memory."""
    _check(setup, precision)
    for parts in (1, 2, 4):
        model = setup.model
        model = replace(model, num_double_blocks=model.num_double_blocks // parts, num_single_blocks=model.num_single_blocks // parts)
        try:
            return _speed_of(setup, model, load, precision)
        except torch.OutOfMemoryError:
            print(f"  {load.name}: {model.num_blocks} blocks do not fit", flush=True)
        clear(setup)
    raise LeftOutError("a quarter of the stack does not fit in memory")


def stack_step(setup: Setup, model: ModelConfig, load: Load, precision: PrecisionConfig) -> Callable[[], None]:
    """Forward and backward of the stack on one pack."""
    chunk, config = build(setup, model, precision)
    fill_on_device(chunk)
    prepare_gradients(chunk)
    pack, inputs = inputs_of(setup, model, load.samples, fp8=precision.fp8, dtype=config.params_dtype)

    def step() -> None:
        chunk(inputs, pack).float().square().mean().backward()
        for parameter in chunk.parameters():
            parameter.grad = None

    return step


def _speed_of(setup: Setup, model: ModelConfig, load: Load, precision: PrecisionConfig) -> Row:
    step = stack_step(setup, model, load, precision)
    times = timed(setup, step, warm=2, repeats=8, seconds=10)
    median = statistics.median(times)
    flops = training_flops([sample.tokens for sample in load.samples], hidden_size=model.hidden_size, num_blocks=model.num_blocks)
    device = torch.cuda.get_device_name() if setup.on_gpu else "cpu"
    peak = peak_bf16_tflops(device)
    return {
        "provider": choose_provider(precision.provider, device=setup.device, dtype=torch.bfloat16),
        "attention": choose_attention(precision.attention, device=setup.device, dtype=torch.bfloat16),
        "blocks": f"{model.num_double_blocks} + {model.num_single_blocks}",
        "steps": len(times),
        "ms": 1e3 * median,
        "ms_min": 1e3 * min(times),
        "ms_max": 1e3 * max(times),
        "ms_per_block": 1e3 * median / model.num_blocks,
        "ms_per_block_computed": computed_ms(model, load, precision.kernels, precision.fp8, device) / model.num_blocks,
        "tflops": flops / median / 1e12,
        "mfu_of_bf16_peak": flops / median / 1e12 / peak if peak else None,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if setup.on_gpu else None,
    }


def computed_ms(model: ModelConfig, load: Load, kernels: str, fp8: Fp8, device: str) -> float:
    """Forward + backward of the blocks at the assumed rates of `block_bytes`, not measured.

    In FP8 products are taken at twice the rate, and what quantising moves is left out. Devices without a data sheet here are taken as H200.
    """
    sheet = next((rate for name, rate in SHEET_BANDWIDTH.items() if name in device), SHEET_BANDWIDTH[ASSUMED_FOR])
    slower = SHEET_BANDWIDTH[ASSUMED_FOR] / sheet
    total = 0.0
    for block, number in (("double", model.num_double_blocks), ("single", model.num_single_blocks)):
        row = _count(block, kernels, load, replace(model, num_double_blocks=1, num_single_blocks=1))
        total += number * (row.products_ms / (1 if fp8 == "none" else 2) + row.attention_ms + row.memory_ms * slower)
    return total


@cache
def _count(block: str, kernels: str, load: Load, model: ModelConfig) -> block_bytes.Row:
    return block_bytes.count(block, kernels, load.count, clip=load.clip, model=model)


def trace_cases(setup: Setup) -> Iterator[Case]:
    """Two steps with Triton's kernels at 256px, in bf16 and FP8."""
    load = setup.loads[0]
    recipes: tuple[Fp8, ...] = ("none", "tensorwise")
    for fp8 in recipes:

        def measure(fp8: Fp8 = fp8) -> list[Row]:
            return _trace(setup, load, fp8)

        yield Case(labels={"size": load.name, "tokens": load.tokens, "fp8": fp8}, measure=measure)


def _trace(setup: Setup, load: Load, fp8: Fp8) -> list[Row]:
    setup.need_cuda()
    precision = PrecisionConfig(dtype="bf16", kernels="triton", fp8=fp8)
    doubles, singles = max(1, setup.model.num_double_blocks // 2), setup.model.num_single_blocks // 2
    model = replace(setup.model, num_double_blocks=doubles, num_single_blocks=singles)
    step = stack_step(setup, model, load, precision)
    for _ in range(2):
        step()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(2):
            step()
        torch.cuda.synchronize()
    intervals = [
        Interval(name=event.name, start=event.time_range.start, stop=event.time_range.end)
        for event in profiler.events()
        if event.device_type.name == "CUDA" and not getattr(event, "is_user_annotation", False)
    ]
    blocks: Row = {"blocks": f"{model.num_double_blocks} + {model.num_single_blocks}"}
    return [blocks | row for row in summarise(intervals, steps=2)]
