"""One clip through one autoencoder: how close it comes back, how long that takes, and what its latent is like.

All pictures are compared as 8-bit levels, as a file would hold them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import UInt8
from numpy.typing import NDArray
from torch import Tensor

from megasora.config.errors import UserError
from megasora.data.decoding.contract import normalise
from megasora.evaluation.autoencoders.frechet import FeatureNetwork
from megasora.evaluation.autoencoders.latents import LatentMoments, moments_of
from megasora.media.likeness import psnr_of, ssim_of_frames
from megasora.models.autoencoders.autoencoder import Autoencoder
from megasora.models.lpips import Lpips

FRAMES_AT_ONCE = 8
"""Frames whose LPIPS and features are worked out together."""
T = TypeVar("T")
Pair = tuple[NDArray[np.float32], NDArray[np.float32]]
"""Features of the clip and of its reconstruction."""


class NotFiniteError(ValueError):
    """A reconstruction is no picture; the clip is listed, not counted."""


@dataclass(frozen=True, kw_only=True)
class Tools:
    """What measures, beside what needs no weights."""

    lpips: Lpips | None
    fid: FeatureNetwork | None
    fvd: FeatureNetwork | None
    pool: Executor
    """Threads of SSIM."""


@dataclass(frozen=True, kw_only=True)
class ClipMeasures:
    """Of one clip."""

    psnr_frames: tuple[float | None, ...]
    """dB of each frame's mean squared error, levels on [0, 1]; None for a frame without any: its PSNR is infinite."""
    ssim: float
    """Mean over frames of Wang's: Gaussian window of 11 and 1.5, places where it lies inside, each channel by itself."""
    lpips: float | None
    """Mean over frames of the spatial mean; None without weights."""
    encode_s: float
    decode_s: float
    warm: bool
    """Whether another clip of this shape went through before in this process; the first also pays for setting up kernels."""
    encode_bytes: int | None
    """Most memory beside the weights, with pixels and latent, as the GPU's allocator counts; None on a CPU."""
    decode_bytes: int | None

    @property
    def psnr(self) -> float:
        """Mean over the frames that differ; infinite when none does."""
        finite = [value for value in self.psnr_frames if value is not None]
        return sum(finite) / len(finite) if finite else math.inf

    @property
    def equal_frames(self) -> int:
        """Frames that came back level for level."""
        return self.psnr_frames.count(None)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What one clip gave."""

    measures: ClipMeasures
    moments: LatentMoments
    features: Mapping[str, Pair]
    """fid: of frames; fvd: of the clip."""
    made: UInt8[Tensor, "3 T H W"]
    """Its reconstruction, on the CPU."""


def levels_of(video: Tensor) -> UInt8[Tensor, "3 T H W"]:
    """Levels of a clip in [-1, 1], rounded and cut off at 0 and 255, on the CPU."""
    return video.float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8).cpu()


def measure_clip(autoencoder: Autoencoder, levels: UInt8[Tensor, "3 T H W"], *, tools: Tools, warm: bool) -> Measured:
    """Encode and decode the posterior's mean, and measure.

    Args:
        autoencoder: frozen, on its device.
        levels: of a size it takes.
        tools: with weights on the same device.
        warm: see `ClipMeasures.warm`.

    Raises:
        NotFiniteError: what comes back is not finite.
        UserError: the device has too little memory.
    """
    device = autoencoder.device
    pixels = normalise(levels.to(device)).to(autoencoder.dtype)
    posterior, encode_s, encode_bytes = _observed(device, lambda: autoencoder.posterior(pixels))
    latent = (posterior.mean.float() - autoencoder.facts.shift_factor) * autoencoder.scaling_factor
    video, decode_s, decode_bytes = _observed(device, lambda: autoencoder.decode(latent))
    if video is None or not bool(video.isfinite().all()):
        raise NotFiniteError("the reconstruction is not finite; try --dtype fp32")
    made = levels_of(video)
    del video
    squared = (levels.int() - made.int()).pow(2).double().mean(dim=(0, 2, 3))
    one, other = levels.transpose(0, 1), made.transpose(0, 1)
    measures = ClipMeasures(
        psnr_frames=tuple(psnr_of(value) if value else None for value in squared.tolist()),
        ssim=ssim_of_frames(one, other, pool=tools.pool) / len(one),
        lpips=None if tools.lpips is None else _lpips(tools.lpips, one, other, device=device),
        encode_s=encode_s,
        decode_s=decode_s,
        warm=warm,
        encode_bytes=None if encode_bytes is None else encode_bytes + pixels.nbytes,
        decode_bytes=None if decode_bytes is None else decode_bytes + latent.nbytes,
    )
    return Measured(measures=measures, moments=moments_of(posterior), features=_features(tools, levels, made), made=made)


def _observed(device: torch.device, act: Callable[[], T]) -> tuple[T, float, int | None]:
    """(result, seconds, most bytes that it allocated beyond those there were; None on a CPU)."""
    on_gpu, before = device.type == "cuda", 0
    if on_gpu:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    started = time.perf_counter()
    try:
        result = act()
        if on_gpu:
            torch.cuda.synchronize(device)
    except torch.OutOfMemoryError as error:
        what = str(error).splitlines()[0][:120]
        raise UserError(f"{device} has too little memory ({what}): cut clips with --tiling 256x32, or use --dtype bf16") from error
    seconds = time.perf_counter() - started
    return result, seconds, torch.cuda.max_memory_allocated(device) - before if on_gpu else None


def _lpips(lpips: Lpips, one: Tensor, other: Tensor, *, device: torch.device) -> float:
    """Mean over frames [T, 3, H, W] of levels."""
    total = 0.0
    for start in range(0, len(one), FRAMES_AT_ONCE):
        batches = (normalise(frames[start : start + FRAMES_AT_ONCE].to(device)) for frames in (one, other))
        total += float(lpips.spatial_mean(*batches).double().sum())
    return total / len(one)


def _features(tools: Tools, levels: Tensor, made: Tensor) -> dict[str, Pair]:
    """Of frames, and of the clip where it is one."""
    found: dict[str, Pair] = {}
    if (network := tools.fid) is not None:
        found["fid"] = _of_frames(network, levels), _of_frames(network, made)
    if (network := tools.fvd) is not None and levels.shape[1] > 1:
        found["fvd"] = network(levels[None].float()), network(made[None].float())
    return found


def _of_frames(network: FeatureNetwork, clip: Tensor) -> NDArray[np.float32]:
    frames = clip.transpose(0, 1).contiguous()
    return np.concatenate([network(frames[start : start + FRAMES_AT_ONCE]) for start in range(0, len(frames), FRAMES_AT_ONCE)])
