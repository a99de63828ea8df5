"""Whole commands on emulated GPUs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from megasora import recipes
from megasora.config.schema import ParallelConfig, PrecisionConfig, RunConfig
from megasora.inference.sample import run_sample
from megasora.training.run import train
from tests.gpu_emulated.extension import CALLS


def gpu_run(run_dir: Path, *, steps: int, parallel: ParallelConfig | None = None, fp8: str = "none", **changes: Any) -> RunConfig:
    """The tiny recipe, smaller, in bf16 on an emulated GPU: layers, attention and optimizer are what `auto` takes there."""
    config = recipes.get("tiny")
    sizes = {"num_double_blocks": 1, "num_single_blocks": 2, "hidden_size": 128, "ffn_hidden_size": 256, "num_attention_heads": 4}
    model = replace(config.model, axes_dim=(4, 14, 14), **sizes)
    return replace(
        config,
        run_dir=str(run_dir),
        device="cuda",
        parallel=parallel or ParallelConfig(),
        precision=PrecisionConfig(dtype="bf16", fp8=fp8, kernels=changes.pop("kernels", "torch")),  # type: ignore[arg-type]
        model=model,
        data=replace(config.data, global_tokens=300, decoder="pyav"),
        train=replace(config.train, steps=steps, tensorboard=False),
        evaluation=replace(config.evaluation, interval_steps=changes.pop("eval_steps", 0)),
        checkpoint=replace(config.checkpoint, interval_steps=changes.pop("interval_steps", 0)),
        **changes,
    )


def train_on_gpu(rank: int, config: RunConfig) -> dict[str, list[Any]]:
    """One rank of a run; what was called in the emulated extension, by kind."""
    CALLS.clear()
    train(config)
    return _by_kind()


def sample_on_gpu(rank: int, config: RunConfig, weights: Path, output: Path) -> dict[str, list[Any]]:
    """`megasora sample` with the run's settings; what was called in the emulated extension, by kind."""
    CALLS.clear()
    run_sample(config, weights=weights, prompt=("A test card",), output=output, steps=2)
    return _by_kind()


def _by_kind() -> dict[str, list[Any]]:
    return {kind: [call.detail for call in CALLS if call.kind == kind] for kind in {call.kind for call in CALLS}}
