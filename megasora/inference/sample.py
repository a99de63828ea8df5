"""`megasora sample`: text (and a first frame) to mp4, on one rank or in any layout; the seed gives the same clip in all."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch.distributed as dist
from rich.progress import Progress
from torch import Tensor

from megasora.checkpoint.source import Select, open_source
from megasora.config.errors import UserError
from megasora.config.schema import RunConfig, SampleConfig
from megasora.config.validate import raise_on_problems
from megasora.data.decoding.contract import DecodeError, DecodeRequest
from megasora.data.decoding.pyav import PyAVDecoder
from megasora.data.decoding.writer import write_video
from megasora.models.encoders.bundle import load_encoders
from megasora.models.mmdit.build import build_chunks
from megasora.models.mmdit.weights import fill_parameters
from megasora.models.sampler import Sampler
from megasora.parallel import groups


def run_sample(
    config: RunConfig,
    *,
    weights: Path,
    prompt: tuple[str, ...],
    output: Path,
    image: Path | None = None,
    select: Select = "model",
    height: int | None = None,
    width: int | None = None,
    num_frames: int | None = None,
    fps: float | None = None,
    steps: int | None = None,
    seed: int | None = None,
) -> list[Path]:
    """Sample one clip per prompt; returns the files (written by rank 0).

    Raises:
        UserError: settings, weights or the image do not fit.
    """
    given = {"height": height, "width": width, "num_frames": num_frames, "fps": fps, "steps": steps, "seed": seed}
    chosen = {name: value for name, value in given.items() if value is not None}
    config = replace(config, sample=replace(config.sample, **chosen))  # type: ignore[arg-type]
    sampler = open_sampler(config, weights=weights, select=select, with_image=image is not None)
    first_frame = None if image is None else _read_image(image, config.sample)
    rank = sampler.context.rank
    files: list[Path] = []
    with Progress(disable=rank != 0, transient=True) as progress:
        task = progress.add_task("sample", total=len(prompt) * config.sample.steps)
        for number, text in enumerate(prompt):
            encoded = sampler.encode(text, first_frame=first_frame, text_tokens=config.data.text_tokens)
            latent = sampler.sample(encoded, number=number, on_step=lambda _: progress.advance(task))
            path = output / f"sample_{number:03d}.mp4"
            if rank == 0:
                output.mkdir(parents=True, exist_ok=True)
                write_video(path, sampler.encoders.vae.decode(latent).float(), fps=config.sample.fps)
            files.append(path)
    if rank == 0:
        print("\n".join(map(str, files)))
    return files


def open_sampler(config: RunConfig, *, weights: Path, select: Select = "model", with_image: bool = False) -> Sampler:
    """Start this rank's part of a replica that samples: groups, encoders and the model with its weights.

    Raises:
        UserError: settings, ranks or weights do not fit, or a first frame is to be given to weights that take none.
    """
    device = groups.choose_device(config.device)
    groups.start_world(device, timeout_minutes=config.parallel.timeout_minutes)
    config = replace(config, device="cpu" if device.type == "cpu" else "cuda")
    raise_on_problems(config, world_size=dist.get_world_size())
    if dist.get_world_size() != config.parallel.model_parallel_size:
        raise UserError(
            f"sampling runs one replica: TP x PP x CP = {config.parallel.model_parallel_size}, but {dist.get_world_size()} rank(s) were "
            "started; use torchrun with that many, or set --parallel.* to 1"
        )
    source = open_source(weights, axes_dim=config.model.axes_dim, select=select)
    model = replace(config.model, cond_embed=source.model.cond_embed, guidance_embed=source.model.guidance_embed)
    source.fits(model)
    if with_image and not model.cond_embed:
        raise UserError(f"weights {weights} have no cond_in, so --image cannot be used with them")
    encoders = load_encoders(config.encoders, model=model, device=device)
    context = groups.initialize(config.parallel, device=device, num_attention_heads=model.num_attention_heads, seed=0)
    chunks, megatron_config = build_chunks(model, config.parallel, config.precision, context=context)
    fill_parameters(chunks, source.read, known=source.shapes, model=model, context=context)
    return Sampler(
        chunks,
        megatron_config=megatron_config,
        model=model,
        sample=config.sample,
        flow=config.flow,
        encoders=encoders,
        context=context,
    )


def _read_image(image: Path, settings: SampleConfig) -> Tensor:
    """[3, 1, H, W] in [-1, 1] at the clip's size."""
    request = DecodeRequest(path=str(image), start=0, stride=1, num_frames=1, height=settings.height, width=settings.width)
    try:
        return PyAVDecoder().decode(request)
    except DecodeError as error:
        raise UserError(f"--image {error}") from error
