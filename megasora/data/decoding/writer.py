"""Writes a clip as H.264 mp4 and a picture as PNG; the file appears under its name only when complete."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import torch
from torch import Tensor

from megasora.config.files import written_whole


def write_video(path: Path, video: Tensor, *, fps: float, codec: str = "libx264") -> None:
    """Write RGB frames.

    Args:
        path: ends in .mp4 (or .webm with a VP9 codec).
        video: [3, T, H, W] in [-1, 1], even height and width.
        fps: frames per second.
        codec: FFmpeg encoder.
    """
    frames = video.clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8).permute(1, 2, 3, 0).cpu().numpy()
    with written_whole(path) as temporary, av.open(str(temporary), "w") as container:
        stream = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def ending_of(num_frames: int) -> str:
    """Ending of a clip's file: a single frame is a picture."""
    return ".png" if num_frames == 1 else ".mp4"


def write_clip(path: Path, video: Tensor, *, fps: float) -> None:
    """Write [3, T, H, W] in [-1, 1] under a path that ends as `ending_of` says."""
    if video.shape[1] == 1:
        write_picture(path, video[:, 0])
    else:
        write_video(path, video, fps=fps)


def contact_sheet(video: Tensor, *, frames: int = 8) -> Tensor:
    """[3, H, n W]: n evenly spaced frames of a clip [3, T, H, W] side by side, first and last among them; n is `frames`, or T if less."""
    count = min(frames, video.shape[1])
    chosen = torch.linspace(0, video.shape[1] - 1, count).round().long()
    return torch.cat(list(video[:, chosen].unbind(1)), dim=-1)


def write_picture(path: Path, picture: Tensor) -> None:
    """Write [3, H, W] in [-1, 1] as a PNG."""
    from PIL import Image

    pixels = picture.clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    with written_whole(path) as temporary:
        Image.fromarray(pixels, "RGB").save(temporary, format="PNG")
