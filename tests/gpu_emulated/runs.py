"""Whole commands on emulated GPUs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from megasora import recipes
from megasora.config.schema import ParallelConfig, PrecisionConfig, RecoveryConfig, RunConfig
from megasora.inference.forward import run_forward
from megasora.inference.requests import Common
from megasora.inference.sample import Wanted, run_sample
from megasora.training.encode.run import run_encode
from megasora.training.encode.settings import EncodeResult, EncodeSettings
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
        recovery=RecoveryConfig(watchdog=False),  # nobody starts a pool's ranks again
        **changes,
    )


def layout(tp: int = 1, pp: int = 1, cp: int = 1, vp: int | None = None, **more: Any) -> ParallelConfig:
    """Sizes of the axes in short."""
    return ParallelConfig(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        context_parallel_size=cp,
        virtual_pipeline_model_parallel_size=vp,
        **more,
    )


def train_on_gpu(rank: int, config: RunConfig) -> dict[str, list[Any]]:
    """One rank of a run; what was called in the emulated extension, by kind."""
    CALLS.clear()
    train(config)
    return _by_kind()


def sample_on_gpu(rank: int, config: RunConfig, weights: Path, output: Path) -> dict[str, list[Any]]:
    """`megasora sample` with the run's settings; what was called in the emulated extension, by kind."""
    CALLS.clear()
    common = Common(kind=None, negative="", resolution=None, aspect=None, num_samples=1)
    config = replace(config, sample=replace(config.sample, steps=2))
    run_sample(config, Wanted(prompt=("A test card",), common=common), weights=weights, output=output)
    return _by_kind()


def _by_kind() -> dict[str, list[Any]]:
    return {kind: [call.detail for call in CALLS if call.kind == kind] for kind in {call.kind for call in CALLS}}


def forward_on_gpu(rank: int, folder: Path, output: str, grads: str | None, axes_dim: tuple[int, int, int], layout: dict[str, Any]) -> None:
    """`megasora forward` of weights.safetensors on inputs.safetensors."""
    run_forward(
        weights=folder / "weights.safetensors",
        inputs=folder / "inputs.safetensors",
        output=folder / output,
        grads=None if grads is None else folder / grads,
        axes_dim=axes_dim,
        device="cuda",
        **layout,
    )


def encode_on_gpu(rank: int, config: RunConfig, settings: EncodeSettings, stop_after: int | None = None) -> EncodeResult | None:
    """`megasora data encode`; interrupted after that many clips, it returns None."""

    def progress(done: int, total: int, num_bytes: int) -> None:
        if done == stop_after:
            raise KeyboardInterrupt

    try:
        return run_encode(config, settings, on_progress=progress)
    except KeyboardInterrupt:
        return None
