"""One evaluation of the whole model as sampling makes it: every block once, forward only, one clip."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

import torch

from benchmarks.gpu.rig import SMALL, Load, Setup, build, fill_on_device, inputs_of, timed
from benchmarks.gpu.table import Case, Row
from megasora.config.schema import Fp8, ModelConfig, PrecisionConfig
from megasora.perf.flops import training_flops

STEPS, BRANCHES = 50, 2
"""Text-to-video: the prompt's branch and the negative prompt's in every step."""


def evaluation_cases(setup: Setup) -> Iterator[Case]:
    """Both resolutions in bf16 and FP8."""
    precisions: tuple[Fp8, ...] = ("none", "tensorwise")
    for load in setup.loads:
        one = Load(name=load.name, clip=load.clip, count=1)
        for fp8 in precisions:

            def measure(one: Load = one, fp8: Fp8 = fp8) -> Row:
                return _evaluation(setup, one, fp8)

            yield Case(labels={"size": one.name, "tokens": one.tokens, "fp8": fp8}, measure=measure)


def _evaluation(setup: Setup, load: Load, fp8: Fp8) -> Row:
    if fp8 != "none":
        setup.need_cuda()
    model = SMALL if setup.small else ModelConfig()
    chunk, config = build(setup, model, PrecisionConfig(dtype="bf16", fp8=fp8))
    fill_on_device(chunk)
    chunk.eval()
    pack, inputs = inputs_of(setup, model, load.samples, fp8=fp8, dtype=config.params_dtype)

    def step() -> None:
        with torch.no_grad():
            chunk(inputs, pack)

    times = timed(setup, step, warm=1, repeats=5, seconds=6)
    median = statistics.median(times)
    flops = training_flops([sample.tokens for sample in load.samples], hidden_size=model.hidden_size, num_blocks=model.num_blocks) // 3
    return {
        "blocks": f"{model.num_double_blocks} + {model.num_single_blocks}",
        "ms": 1e3 * median,
        "ms_max": 1e3 * max(times),
        "tflops": flops / median / 1e12,
        "s_for_50_steps": STEPS * BRANCHES * median,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if setup.on_gpu else None,
    }
