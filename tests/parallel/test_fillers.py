"""Failed clips and the fillers of packs without a sample do not count."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from megasora import recipes
from megasora.config.schema import RunConfig
from megasora.data.decoding.pyav import PyAVDecoder
from megasora.data.manifest import read_manifest
from megasora.data.plan import SamplerState, plan_clips
from megasora.models.encoders.bundle import load_encoders
from megasora.parallel import groups
from megasora.training.assets import with_assets
from megasora.training.feed import Feeder
from tests.pool import RankPool

STEPS = 8


@dataclass(frozen=True, kw_only=True)
class Fed:
    """One step of the feeder."""

    counted: tuple[int, ...]
    weights: tuple[float, ...]
    """Sum of a micro-batch's token weights x channels: the samples it counts."""
    samples: int
    skipped: int


def fed_on_rank(rank: int, config: RunConfig) -> list[Fed]:
    device = torch.device("cpu")
    context = groups.initialize(config.parallel, device=device, num_attention_heads=config.model.num_attention_heads, seed=1)
    config = with_assets(config, folder=Path(str(config.run_dir)) / "assets")
    clips, _ = plan_clips(read_manifest(str(config.data.manifest)).clips, data=config.data, encoders=config.encoders, model=config.model)
    encoders = load_encoders(config.encoders, model=config.model, device=device)
    feeder = Feeder(
        clips,
        config=config,
        context=context,
        encoders=encoders,
        decoder=PyAVDecoder(),
        state=SamplerState(),
        first_step=0,
        last_step=STEPS,
        dtype=torch.float32,
    )
    result = []
    try:
        for step in feeder:
            result.append(
                Fed(
                    counted=tuple(batch.num_counted for batch in step.batches),
                    weights=tuple(
                        float(batch.weight.sum()) * config.model.in_channels for batch in step.batches if batch.weight is not None
                    ),
                    samples=len(step.plan.samples),
                    skipped=len(step.skipped),
                )
            )
    finally:
        feeder.close()
    return result


def run_of(folder: Path, **data: object) -> RunConfig:
    tiny = recipes.get("tiny")
    return replace(tiny, device="cpu", run_dir=str(folder), data=replace(tiny.data, global_tokens=700, **data))  # type: ignore[arg-type]


def test_fillers_and_failed_clips_do_not_count(pool: RankPool, tmp_path: Path) -> None:
    config = run_of(tmp_path, num_microbatches=12)  # more packs than a step has samples
    pool.run(1, fed_on_rank, config)
    broken = sorted((tmp_path / "assets" / "clips").glob("clip*.mp4"))[0]
    broken.write_bytes(broken.read_bytes()[:600])
    (steps,) = pool.run(1, fed_on_rank, config)
    assert any(0 in step.counted for step in steps)
    assert any(step.skipped for step in steps)
    for step in steps:
        assert sum(step.counted) == step.samples - step.skipped
        assert step.weights == pytest.approx(step.counted)
