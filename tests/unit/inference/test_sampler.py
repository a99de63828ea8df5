"""`from megasora import Sampler` draws what the command draws."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megasora import Sampler
from megasora.config.errors import UserError
from megasora.inference.requests import Common
from megasora.inference.sample import Wanted, run_sample
from megasora.parallel import groups
from tests.pool import RankPool
from tests.published.small_weights import save_mmdit, small_config, transformer


def draw(rank: int, folder: str) -> tuple[dict[str, object], dict[str, object], list[str]]:
    """Clips of the object in `api`, the command's in `command`; records of both, and what bad calls say."""
    path = Path(folder)
    config = small_config(path)
    config = replace(config, sample=replace(config.sample, height=32, width=48, num_frames=5, steps=2))
    sampler = Sampler.load(path / "mmdit.safetensors", recipe=config)
    errors: list[str] = []
    for arguments in ({"image": path / "none.png"}, {"steps": "two"}, {"setps": 2}, {"height": 30, "width": 48}):
        try:
            sampler.sample("A rabbit", **arguments)  # type: ignore[arg-type]
        except UserError as error:
            errors.append(str(error))
    clip = sampler.sample("A rabbit", seed=7, guidance=2.5)
    assert clip.video is not None and clip.video.shape == (3, 5, 32, 48)
    clip.save(path / "api" / "sample_000.mp4")
    picture = sampler.sample("A rabbit", num_frames=1)
    assert picture.video is not None
    picture.save(path / "api" / "picture.png")
    with pytest.raises(UserError, match=r"must end in \.png"):
        picture.save(path / "api" / "picture.mp4")

    with pytest.raises(UserError, match="beside"):
        Sampler.load(path / "mmdit.safetensors", recipe=config)
    twin = Sampler.load(path / "mmdit.safetensors", recipe=config, beside=sampler).sample("A rabbit", seed=7, guidance=2.5)
    assert torch.equal(twin.latent, clip.latent)
    groups.destroy()

    common = Common(kind=None, negative="", resolution=None, aspect=None, num_samples=1)
    config = replace(config, sample=replace(config.sample, seed=7, guidance=2.5))
    run_sample(config, Wanted(prompt=("A rabbit",), common=common), weights=path / "mmdit.safetensors", output=path / "command")
    records = [json.loads((path / name / "sample_000.json").read_text()) for name in ("api", "command")]
    return records[0], records[1], errors


def test_the_object_draws_the_commands_clip(pool: RankPool, tmp_path: Path) -> None:
    torch.manual_seed(3)
    save_mmdit(transformer(guidance=False), torch.nn.Linear(68, 64), tmp_path / "mmdit.safetensors")
    small_config(tmp_path)
    ((api, command, errors),) = pool.run(1, draw, str(tmp_path))
    unsettled = ("made",)
    assert {name: value for name, value in api.items() if name not in unsettled} == {
        name: value for name, value in command.items() if name not in unsettled
    }
    assert (tmp_path / "api" / "sample_000.mp4").read_bytes() == (tmp_path / "command" / "sample_000.mp4").read_bytes()
    missing, kind, unknown, size = errors
    assert "none.png is missing" in missing and "sample.steps: expected int" in kind
    assert "did you mean" in unknown and "height 30 is not a multiple of 16; use 32" in size
