"""The video DC-AE with random weights of the published sizes: a clip in, a latent out, and a step of training on both."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from benchmarks.gpu.encoders import peak_gib, random_model
from benchmarks.gpu.rig import Setup, timed
from benchmarks.gpu.table import Case, Row
from megasora.config.dc_ae import DCAEConfig
from megasora.models.autoencoders.dc_ae.model import VideoDCAE

SMALL = DCAEConfig(widths=(8, 8, 8, 8, 16, 16), encoder_depths=(1,) * 6, decoder_depths=(1,) * 6, latent_channels=8, head_dim=8)
CLIP, TRAINED = (128, 256), (32, 256)
"""(frames, side): the DC-AE's clip of the DiT's stage, and the published first stage's (arXiv 2503.09642, section 3.1)."""
SMALL_CLIP = (4, 32)


def autoencoder_cases(setup: Setup) -> Iterator[Case]:
    """Encoding, decoding, and forward and backward of an L1 loss with each stage recomputed."""
    works: dict[str, Callable[[Setup], Row]] = {"encode": _encode, "decode": _decode, "train": _train}
    for name, work in works.items():
        frames, side = SMALL_CLIP if setup.small else TRAINED if name == "train" else CLIP
        yield Case(labels={"DC-AE": name, "input": f"{frames} x {side} x {side}"}, measure=lambda work=work: work(setup))


def _model(setup: Setup) -> tuple[VideoDCAE, DCAEConfig]:
    config = SMALL if setup.small else DCAEConfig()
    return random_model(setup, lambda: VideoDCAE(config, recompute="stages")), config


def _draw(setup: Setup, model: VideoDCAE, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.rand(shape, device=setup.device, dtype=next(model.parameters()).dtype) * 2 - 1


def _encode(setup: Setup) -> Row:
    model, _ = _model(setup)
    frames, side = SMALL_CLIP if setup.small else CLIP
    clip = _draw(setup, model, (1, 3, frames, side, side))
    return _timed(setup, lambda: model.encoder(clip), frames=frames, gradients=False)


def _decode(setup: Setup) -> Row:
    model, config = _model(setup)
    frames, side = SMALL_CLIP if setup.small else CLIP
    size = (frames // config.temporal_compression, *[side // config.spatial_compression] * 2)
    latent = _draw(setup, model, (1, config.latent_channels, *size))
    return _timed(setup, lambda: model.decoder(latent), frames=frames, gradients=False)


def _train(setup: Setup) -> Row:
    model, _ = _model(setup)
    model.requires_grad_(True)
    frames, side = SMALL_CLIP if setup.small else TRAINED
    clip = _draw(setup, model, (1, 3, frames, side, side))

    def step() -> None:
        F.l1_loss(model.decoder(model.encoder(clip)).float(), clip.float()).backward()
        model.zero_grad(set_to_none=True)

    return _timed(setup, step, frames=frames, gradients=True)


def _timed(setup: Setup, step: Callable[[], object], *, frames: int, gradients: bool) -> Row:
    def once() -> None:
        with torch.set_grad_enabled(gradients):
            step()

    median = statistics.median(timed(setup, once, warm=1, repeats=5, seconds=8))
    return {"ms": 1e3 * median, "frames_per_s": frames / median, "peak_gib": peak_gib(setup)}
