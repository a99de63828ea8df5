"""Clips whose pixels are known to the level."""

from __future__ import annotations

from pathlib import Path

import av
import torch
from torch import Tensor


def write_exact(path: Path, frames: Tensor) -> Path:
    """Frames [T, H, W, 3] of levels as lossless RGB H.264 (mp4), or the first one as png."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pictures = [av.VideoFrame.from_ndarray(frame.to(torch.uint8).numpy(), format="rgb24") for frame in frames]
    if path.suffix == ".png":
        pictures = pictures[:1]
    codec = "png" if path.suffix == ".png" else "libx264rgb"
    options = {} if path.suffix == ".png" else {"qp": "0"}
    with av.open(str(path), "w", format="image2" if path.suffix == ".png" else None) as container:
        stream = container.add_stream(codec, rate=8, options=options)
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "rgb24"
        for picture in pictures:
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return path


def noise(frames: int, height: int, width: int, *, seed: int = 0, low: int = 40, high: int = 200) -> Tensor:
    """Levels in [low, high)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, (frames, height, width, 3), generator=generator)
