"""The process that measures, started by blocks.py: `python -m benchmarks.gpu.worker`, with its arguments and a deadline."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from benchmarks.gpu.autoencoders import autoencoder_cases
from benchmarks.gpu.blocks import arguments_of
from benchmarks.gpu.checks import curve_cases, decode_cases, parity_cases, ring_cases
from benchmarks.gpu.commands import command_cases
from benchmarks.gpu.encoders import encoder_cases
from benchmarks.gpu.evaluation import evaluation_cases
from benchmarks.gpu.memory import memory_cases, offload_cases
from benchmarks.gpu.operations import adam_cases, attention_cases, kernel_cases, state_cases
from benchmarks.gpu.rig import Setup, clear, versions
from benchmarks.gpu.stack import speed_cases, trace_cases
from benchmarks.gpu.table import Case, Section, Table, run_sections
from megasora.config.errors import UserError
from megasora.config.schema import ParallelConfig
from megasora.parallel import groups

LOST_DEVICE = 3
"""Exit code: CUDA no longer works in this process."""


def sections_of(setup: Setup, videos: list[Path]) -> dict[str, Section]:
    """All sections by name."""
    computed = (
        "Forward + backward, no recompute; FLOPs and milliseconds are of the blocks as MFU counts them. Computed: block_bytes.count at "
        "720 TFLOP/s in products (twice that in FP8), 660 and 530 in attention, 4.1 TB/s on an H200 and 4.1 / 4.8 of the data sheet's "
        "bandwidth on an H100. Where a stack does not fit in memory half or a quarter of it was taken: see blocks."
    )
    bytes_ = "bf16. Bytes: computed for each implementation from its operations' tensors and schemas. Gap: ||a - b|| / ||b||, worst result."
    about: dict[str, tuple[str, Callable[[Setup], Iterable[Case]]]] = {
        "speed": (computed, speed_cases),
        "kernels": (bytes_, kernel_cases),
        "attention": ("bf16; FLOPs 4 s^2 H forward, 2.5 times that backward.", attention_cases),
        "parity": ("||a - b|| / ||b|| against local layers in fp32 with torch's kernels.", parity_cases),
        "adam": (
            "bf16 parameters, fp32 masters and moments; gradient norm and clipping are part of it. Bytes: 34 a parameter.",
            adam_cases,
        ),
        "trace": (
            "Triton's kernels, half the stack, bf16 and FP8; kinds by kernels' names, share of the time between first and last.",
            trace_cases,
        ),
        "curves": ("Losses on new data in every step, in full in blocks.json; last: mean of the last ten.", curve_cases),
        "encoders": ("Random weights of the real sizes.", encoder_cases),
        "memory": (
            "Beyond weights, gradients and inputs: what the forward pass keeps, and the most of a step. Computed: config/memory.py.",
            memory_cases,
        ),
        "offload": (
            "Every block recomputed in full; inputs: what they keep is in page-locked host memory. As in memory; the copies are of one "
            "block's inputs, nothing beside them.",
            offload_cases,
        ),
        "states": (
            "As in adam; bytes a parameter: of both moments, and what a step takes beyond what is held. gb_per_s as if moments were fp32.",
            state_cases,
        ),
        "autoencoder": ("Random weights of the published sizes (bf16); train: forward and backward, stages recomputed.", autoencoder_cases),
        "evaluation": (
            "The whole 11.9 B model with random weights, one clip, forward only; 50 steps: 100 such evaluations, nothing else. Published "
            "(hpcaitech/Open-Sora README, text-to-video, 50 steps, one H100 or H800, all in): 60 s at 256px, 1656 s at 768px.",
            evaluation_cases,
        ),
        "commands": ("Losses of the tiny recipe's steps: ||a / b - 1||, worst step.", command_cases),
        "ring": ("||a - b|| / ||b|| of two merged key chunks against whole attention in fp32.", ring_cases),
        "decode": ("Frames of [frames, height, width, channels].", partial(decode_cases, videos=videos)),
    }
    return {name: Section(about=text, cases=partial(cases, setup)) for name, (text, cases) in about.items()}


def main() -> None:
    """Measure what the table lacks."""
    words, (flag, deadline) = sys.argv[1:-2], sys.argv[-2:]
    assert flag == "--deadline", "blocks.py gives it last"
    arguments = arguments_of(words)
    try:
        device = groups.choose_device(arguments.device)
    except UserError as error:
        sys.exit(f"error: {error}")
    groups.start_world(device, timeout_minutes=10)
    context = groups.initialize(ParallelConfig(), device=device, num_attention_heads=24, seed=0)
    setup = Setup(context=context, small=arguments.small)
    table = Table(arguments.output, resume=True)
    table.describe(versions(device) | {"sizes": "toy, to check the benchmark" if arguments.small else "full"})

    def before_case() -> None:
        try:
            clear(setup)
        except RuntimeError as error:
            print(f"  the device is lost: {error}", flush=True)
            os._exit(LOST_DEVICE)  # cleaning up would wait for it

    sections = sections_of(setup, arguments.videos)
    chosen = {name: sections[name] for name in arguments.only.split(",")}
    started = time.time()
    run_sections(table, chosen, deadline=float(deadline), before_case=before_case, watch=True)
    print(f"measured for {time.time() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
