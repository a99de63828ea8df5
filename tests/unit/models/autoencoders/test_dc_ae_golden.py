"""The authors' class and ours give the same latents and pixels from the same weights, tiles included.

dc_ae_golden.json holds what hpcaitech/Open-Sora at 7ad6a96 (opensora/models/dc_ae, DCAE) gave in fp32 on a CPU, with spatial_tile_size 128
and temporal_tile_size 16; ours was then equal to it bit for bit, in bf16 too.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megasora.config.dc_ae import TINY
from megasora.diffusion.philox import normal_at
from megasora.models.autoencoders.autoencoder import Autoencoder
from megasora.models.autoencoders.dc_ae.model import VideoDCAE
from megasora.models.autoencoders.dc_ae.network import DCAENetwork
from megasora.models.autoencoders.tiling import Tiling

GOLDEN = json.loads(Path(__file__).with_name("dc_ae_golden.json").read_text())
CONFIG = replace(
    TINY,
    widths=(8, 8, 16, 16, 32, 32),
    encoder_depths=(2, 1, 1, 1, 2, 1),
    decoder_depths=(1, 1, 1, 1, 2, 2),
    attention_from=4,
    head_dim=32,
)


def drawn(shape: tuple[int, ...], *, key: int) -> Tensor:
    return normal_at(torch.arange(torch.Size(shape).numel()).view(shape), key=key)


@pytest.fixture(scope="module")
def autoencoder() -> Autoencoder:
    module = VideoDCAE(CONFIG).requires_grad_(False)
    for number, tensor in enumerate(module.state_dict().values()):
        tensor.copy_(0.25 * drawn(tuple(tensor.shape), key=number))
    return Autoencoder(DCAENetwork(module), tiling=Tiling(size=128, overlap=0.25, frames=16))


@pytest.mark.parametrize("size", GOLDEN)
def test_ours_is_the_authors(autoencoder: Autoencoder, size: str) -> None:
    lengths = tuple(map(int, size.split("x")))
    clip = drawn((3, *lengths), key=1000).clamp(-1, 1)
    if lengths[0] == 4:  # no clip of ours, but the last window of longer ones
        latent = autoencoder.network.moments(clip[None])[0]
    else:
        latent = autoencoder.encode(clip)
    pixels = autoencoder.decode(latent)
    assert pixels is not None
    for made, known in ((latent, GOLDEN[size]["latent"]), (pixels, GOLDEN[size]["pixels"])):
        assert list(made.shape) == known["shape"]
        assert float(made.norm()) == pytest.approx(known["norm"], rel=1e-5)
        values = made.flatten()[:: max(1, made.numel() // 16)][:16]
        scale = float(made.norm()) / made.numel() ** 0.5
        torch.testing.assert_close(values, torch.tensor(known["values"]), rtol=1e-4, atol=1e-4 * scale)
