"""Whole training runs on pool ranks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megasora import recipes
from megasora.config.schema import ModelConfig, ParallelConfig, RecoveryConfig, RunConfig
from megasora.training.run import train

SMALL_STEPS = 10


def smaller(model: ModelConfig) -> ModelConfig:
    """The tiny recipe's model with two blocks of each kind, half as wide."""
    return replace(model, num_double_blocks=2, num_single_blocks=2, hidden_size=64, ffn_hidden_size=256, axes_dim=(2, 2, 4))


def tiny_run(run_dir: Path, *, steps: int, parallel: ParallelConfig, **changes: Any) -> RunConfig:
    """The tiny recipe in a folder and layout, with a smaller model and no evaluation."""
    config = recipes.get("tiny")
    return replace(
        config,
        run_dir=str(run_dir),
        device="cpu",
        parallel=parallel,
        model=smaller(config.model),
        data=replace(config.data, **{"global_tokens": 300, **changes.pop("data", {})}),
        train=replace(config.train, steps=steps, tensorboard=False),
        evaluation=replace(config.evaluation, interval_steps=0),
        checkpoint=replace(config.checkpoint, interval_steps=changes.pop("interval_steps", 0)),
        optimizer=replace(config.optimizer, **changes.pop("optimizer", {})),
        recovery=RecoveryConfig(watchdog=False),  # nobody starts a pool's ranks again
        **changes,
    )


def train_on_rank(rank: int, config: RunConfig) -> None:
    """One rank of a training run; the world is the pool's."""
    torch.manual_seed(1000 + rank)  # nothing may draw from it
    train(config)


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The run's metrics, one record per step."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
