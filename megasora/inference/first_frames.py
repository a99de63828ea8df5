"""Text to image to video, the published default: FLUX draws the first frame, the clip goes on from it.

The picture is drawn at its own resolution by the guidance-distilled weights (one evaluation a step, guidance 4), written as a PNG, and read
back as any given image. Source: hpcaitech/Open-Sora scripts/diffusion/inference.py, opensora/utils/inference.py (modify_option_to_t2i),
configs/diffusion/inference/plugins/t2i2v.py (img_resolution 768px).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megasora.config.errors import UserError
from megasora.data.buckets import pixels_of
from megasora.data.decoding.writer import write_picture
from megasora.inference.record import Hashes, differences, read_record, weights_sha256, write_record
from megasora.inference.requests import ClipRequest
from megasora.inference.session import Offload, Session, World
from megasora.inference.shelf import EncoderShelf
from megasora.inference.sizes import size_named
from megasora.models.autoencoders.autoencoder import Autoencoder
from megasora.models.autoencoders.image import load_image_autoencoder
from megasora.models.sampler import ClipSize

GUIDANCE = 4.0
"""hpcaitech/Open-Sora opensora/utils/inference.py: modify_option_to_t2i."""


@dataclass(frozen=True, kw_only=True)
class FirstFrames:
    """Where first frames come from."""

    weights: Path
    """FLUX.1-dev: its single file, or a diffusers folder."""
    vae: Path
    """Its 2D autoencoder: ae.safetensors, or a diffusers folder."""
    resolution: str = "768px"


def picture_size(request: ClipRequest, *, resolution: str, multiple: int) -> ClipSize:
    """Size of a clip's first frame: its aspect by name, or near its own sides' ratio, at the pictures' resolution."""
    if request.aspect is not None:
        height, width = size_named(resolution, request.aspect, multiple=multiple)
    else:
        scale = math.sqrt(pixels_of(resolution) / (request.size.height * request.size.width))
        height, width = (max(1, round(side * scale / multiple)) * multiple for side in (request.size.height, request.size.width))
    return ClipSize(num_frames=1, height=height, width=width)


def draw_first_frames(
    world: World,
    requests: Sequence[ClipRequest],
    *,
    settings: FirstFrames,
    shelf: EncoderShelf,
    offload: Offload,
    folder: Path,
    clip_hashes: Callable[[], Hashes],
    on_step: Callable[[int], None] | None = None,
) -> list[ClipRequest]:
    """Draw the first frames of this rank's clips; the requests come back as i2v_head, those of another kind unchanged.

    A picture that is there, and was made from the same, is kept. `clip_hashes` are those of the clips' weights and encoders, asked for on a
    clip's first rank; the encoders are the same here.

    Raises:
        UserError: the weights are not guidance-distilled, or a picture of that name was made from something else.
    """
    sample = replace(world.config.sample, guidance=GUIDANCE)
    world = replace(world, config=replace(world.config, sample=sample))
    session = Session(world, weights=settings.weights, shelf=shelf, offload=offload)
    if not session.model.guidance_embed:
        raise UserError(f"--t2i_weights {settings.weights} are no guidance-distilled weights (no guidance_in); give FLUX.1-dev's")
    dtype = torch.bfloat16 if world.config.encoders.dtype == "bf16" else torch.float32
    vae: Autoencoder | None = None
    hashes: Hashes | None = None
    unit = world.config.encoders.spatial_compression * session.model.patch_size
    made: list[ClipRequest] = []
    for request in requests:
        if request.kind != "t2v" or request.size.num_frames == 1:
            made.append(request)
            continue
        size = picture_size(request, resolution=settings.resolution, multiple=unit)
        picture = replace(request, size=size, prompt=request.picture_prompt or request.prompt)
        path = folder / f"{request.name}.png"
        if world.leads:
            hashes = hashes or _hashes(settings, clip_hashes())
            record = session.record(picture, hashes)
        different = world.agreed(lambda: _differences(path, record))  # noqa: B023 - called at once
        if different:
            raise UserError(f"{path} was made from something else ({different[0]}); choose another --output")
        if different is None:
            latent, _ = session.draw(picture, session.prompt(picture), on_step=on_step)
            session.make_room()
            if world.leads:
                vae = vae or load_image_autoencoder(settings.vae, device=session.device, dtype=dtype)
                folder.mkdir(parents=True, exist_ok=True)
                pixels = vae.decode(latent)
                assert pixels is not None  # no group: it is decoded here
                write_picture(path, pixels[:, 0].float())
                write_record(path.with_suffix(".json"), record)
            dist.barrier(group=world.groups.clip)
        made.append(replace(request, kind="i2v_head", image=path))
    session.close()
    return made


def _hashes(settings: FirstFrames, of_clips: Hashes) -> Hashes:
    encoders = {**of_clips.encoders, "image_vae": weights_sha256(settings.vae)}
    return Hashes(weights=weights_sha256(settings.weights), encoders=encoders)


def _differences(path: Path, record: dict[str, Any]) -> list[str] | None:
    """How the picture that is there differs from the one of this record; None when there is none."""
    there = path.with_suffix(".json")
    return differences(record, read_record(there)) if path.is_file() and there.is_file() else None
