"""The autoencoder's memory, counted on the meta device, is what the same calls allocate when they compute."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megasora import cli, recipes
from megasora.config.schema import EncodersConfig
from megasora.models.autoencoders.choice import blank_autoencoder, load_autoencoder
from megasora.models.autoencoders.memory import AutoencoderMemory
from megasora.models.autoencoders.tiny import make_tiny_autoencoder
from megasora.models.encoders.bundle import load_encoders
from megasora.models.encoders.tiny import make_tiny_encoders
from megasora.perf.allocations import Allocations

TINY = recipes.get("tiny")
CPU = torch.device("cpu")


@pytest.mark.parametrize("tile_size", [32, 256])
def test_counted_is_allocated(tmp_path: Path, tile_size: int) -> None:
    config: EncodersConfig = make_tiny_encoders(tmp_path / "e", captions=["a"], model=TINY.model, base=TINY.encoders)
    config = replace(config, tile_size=tile_size)
    vae = load_encoders(config, model=TINY.model, device=torch.device("cpu"), parts=("vae",)).vae
    blank = blank_autoencoder(config, dtype=torch.float32)
    assert blank is not None
    memory = AutoencoderMemory(blank)
    weights = list(vae.parameters())
    assert memory.weights == sum(weight.nbytes for weight in weights)
    video, latent = torch.zeros(3, 9, 48, 64), torch.zeros(16, 3, 6, 8)
    for given, through, counted in ((video, vae.posterior, memory.encode), (latent, vae.decode, memory.decode)):
        with Allocations([*weights, given]) as allocated:
            through(given)  # type: ignore[operator]
        expected = allocated.peak + given.nbytes
        # the middle block's attention may be composed of other operations on the meta device
        assert counted(num_frames=9, height=48, width=64) == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("tiles", [{"tile_size": 0}, {"tile_size": 128, "tile_frames": 16}])
def test_of_the_dc_ae_too(tmp_path: Path, tiles: dict[str, int]) -> None:
    config = replace(TINY.encoders, spatial_compression=32, causal=False, vae=str(tmp_path / "vae"), **tiles)  # type: ignore[arg-type]
    make_tiny_autoencoder(tmp_path / "vae", latent_channels=16, config=config)
    autoencoder, blank = load_autoencoder(config, device=CPU, dtype=torch.float32), blank_autoencoder(config, dtype=torch.float32)
    assert blank is not None
    memory, weights = AutoencoderMemory(blank), list(autoencoder.parameters())
    video, latent = torch.zeros(3, 28, 160, 32), torch.zeros(16, 7, 5, 1)
    for given, through, counted in ((video, autoencoder.posterior, memory.encode), (latent, autoencoder.decode, memory.decode)):
        with Allocations([*weights, given]) as allocated:
            through(given)  # type: ignore[operator]
        assert counted(num_frames=28, height=160, width=32) == pytest.approx(allocated.peak + given.nbytes, rel=0.01)


def test_validate_shows_the_largest_clip_of_a_mix(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["validate", "opensora2_stage3", "--gpus", "192", "--json"])
    found = json.loads(capsys.readouterr().out)["autoencoder"]
    # 768px at 129 frames has the most tokens of stage 3's mix
    assert {name: found["encode"][name] for name in ("frames", "height", "width")} == {"frames": 129, "height": 768, "width": 768}
    assert 10e9 < found["encode"]["bytes"] < found["decode"]["bytes"] < 25e9
