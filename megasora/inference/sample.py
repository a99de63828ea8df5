"""`megasora sample`: text (and a first frame) to mp4, on one rank or in TP/CP; the seed gives the same clip in every layout.

Every rank keeps its share of the tokens through all steps; only the finished latent is gathered.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from rich.progress import Progress
from torch import Tensor

from megasora.checkpoint.source import Select, open_source
from megasora.config.errors import UserError
from megasora.config.schema import FlowConfig, ModelConfig, RunConfig, SampleConfig
from megasora.config.validate import raise_on_problems
from megasora.data.captions import inference_caption
from megasora.data.decode import DecodeError, DecodeRequest
from megasora.data.decode_pyav import PyAVDecoder
from megasora.data.video_writer import write_video
from megasora.diffusion.conditions import condition_latent, given_frames
from megasora.diffusion.flow import sampling_times, shift_of
from megasora.diffusion.guidance import denoise, latent_frame_of
from megasora.diffusion.patchify import patchify, unpatchify
from megasora.diffusion.philox import Stream, key_of, normal_at
from megasora.models.encoders.bundle import Encoders, load_encoders
from megasora.models.mmdit.build import build_chunks
from megasora.models.mmdit.model import MMDiT, ModelInputs
from megasora.models.mmdit.weights import fill_parameters
from megasora.parallel import groups
from megasora.parallel.groups import ParallelContext
from megasora.parallel.pack import Pack, PackSplit, SampleShape


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What one clip is made from, encoded."""

    text: Tensor
    """[L, D]"""
    vec: Tensor
    """[V]"""
    null_text: Tensor
    null_vec: Tensor
    cond: Tensor | None
    """[N, C + p^2] condition tokens of a given image, None without."""


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
    if config.parallel.pipeline_model_parallel_size > 1:
        raise UserError("sampling runs in TP and CP; use --parallel.pipeline_model_parallel_size 1")
    device = groups.choose_device(config.device)
    groups.start_world(device, timeout_minutes=config.parallel.timeout_minutes)
    config = replace(config, device="cpu" if device.type == "cpu" else "cuda")
    raise_on_problems(config, world_size=dist.get_world_size())
    if dist.get_world_size() != config.parallel.model_parallel_size:
        raise UserError(
            f"sampling runs one replica: TP x CP = {config.parallel.model_parallel_size}, but {dist.get_world_size()} rank(s) were started"
        )
    source = open_source(weights, axes_dim=config.model.axes_dim, select=select)
    model = replace(config.model, cond_embed=source.model.cond_embed, guidance_embed=source.model.guidance_embed)
    source.fits(model)
    if image is not None and not model.cond_embed:
        raise UserError(f"weights {weights} have no cond_in, so --image cannot be used with them")
    encoders = load_encoders(config.encoders, model=model, device=device)
    context = groups.initialize(config.parallel, device=device, num_attention_heads=model.num_attention_heads, seed=0)
    chunks, _ = build_chunks(model, config.parallel, config.precision, context=context)
    fill_parameters(chunks, source.read, known=source.shapes, model=model, context=context)
    sampler = Sampler(chunks[0], model=model, sample=config.sample, flow=config.flow, encoders=encoders, context=context)
    files: list[Path] = []
    with Progress(disable=context.rank != 0, transient=True) as progress:
        task = progress.add_task("sample", total=len(prompt) * config.sample.steps)
        for number, text in enumerate(prompt):
            encoded = sampler.encode(text, image=image, text_tokens=config.data.text_tokens)
            video = sampler.sample(encoded, number=number, on_step=lambda _: progress.advance(task))
            path = output / f"sample_{number:03d}.mp4"
            if context.rank == 0:
                output.mkdir(parents=True, exist_ok=True)
                write_video(path, video.float().cpu(), fps=config.sample.fps)
            files.append(path)
    if context.rank == 0:
        print("\n".join(map(str, files)))
    return files


class Sampler:
    """Draws clips from one model.

    Args:
        chunk: the whole model (PP 1).
        model, sample, flow: settings.
        encoders: autoencoder and text encoders.
        context: this rank's groups.
    """

    def __init__(
        self, chunk: MMDiT, *, model: ModelConfig, sample: SampleConfig, flow: FlowConfig, encoders: Encoders, context: ParallelContext
    ) -> None:
        self.chunk, self.model, self.settings, self.flow = chunk, model, sample, flow
        self.encoders, self.context = encoders, context
        vae = encoders.vae
        frames = (sample.num_frames - 1) // vae.temporal_compression + 1
        self.latent_shape = (vae.latent_channels, frames, sample.height // vae.spatial_compression, sample.width // vae.spatial_compression)
        self.grid = (frames, self.latent_shape[2] // model.patch_size, self.latent_shape[3] // model.patch_size)

    def encode(self, text: str, *, image: Path | None, text_tokens: int) -> Prompt:
        """Encode a prompt and, for image-to-video, its first frame on its own."""
        caption = inference_caption(text, motion_score=self.settings.motion_score if self.settings.num_frames > 1 else None)
        texts, vecs = self.encoders.encode_text([caption, ""], max_tokens=text_tokens)
        cond = None if image is None else self._condition(image)
        return Prompt(text=texts[0], vec=vecs[0], null_text=texts[1], null_vec=vecs[1], cond=cond)

    def _condition(self, image: Path) -> Tensor:
        settings = self.settings
        request = DecodeRequest(path=str(image), start=0, stride=1, num_frames=1, height=settings.height, width=settings.width)
        try:
            pixels = PyAVDecoder().decode(request)
        except DecodeError as error:
            raise UserError(f"--image {error}") from error
        (run,) = given_frames("i2v_head", num_frames=settings.num_frames, temporal_compression=self.encoders.vae.temporal_compression)
        condition = condition_latent(self.latent_shape, [(run, self.encoders.vae.encode(pixels))])
        return patchify(condition, patch=self.model.patch_size)

    @torch.no_grad()
    def sample(self, prompt: Prompt, *, number: int, on_step: Callable[[int], None] | None = None) -> Tensor:
        """One clip [3, T, H, W] in [-1, 1], the same on every rank."""
        settings, context = self.settings, self.context
        shape = SampleShape(text_tokens=len(prompt.text), grid=self.grid)
        pack = Pack(
            [shape],
            split=PackSplit(tp=context.topology.tp, cp=context.topology.cp),
            tp_rank=context.at.tp,
            cp_rank=context.at.cp,
            device=context.device,
        )
        places, tokens = pack.video_tokens_of(0)
        channels = self.model.in_channels
        key = key_of(seed=settings.seed, stream=Stream.SAMPLE, sample=number)
        elements = tokens[:, None] * channels + torch.arange(channels, device=context.device)
        noise = torch.zeros(pack.num_video, channels, device=context.device)
        noise[places] = normal_at(elements, key=key)
        frames, height, width = self.latent_shape[1:]
        shift = shift_of((frames, height, width), points=self.flow.shift_points, temporal=self.flow.temporal_shift)
        frame = torch.zeros(pack.num_video, dtype=torch.int64, device=context.device)
        frame[places] = latent_frame_of(tokens, grid=self.grid)
        latent_share = denoise(
            self._velocity(prompt, pack),
            noise,
            times=sampling_times(settings.steps, shift=shift),
            g_txt=settings.guidance,
            g_img=settings.guidance_img,
            with_image=prompt.cond is not None,
            oscillation=settings.guidance_oscillation,
            latent_frame=frame,
            latent_frames=self.grid[0],
            on_step=on_step,
        )
        whole = torch.zeros(shape.video_tokens, channels, device=context.device)
        whole[tokens] = latent_share[places]
        dist.all_reduce(whole)
        return self.encoders.vae.decode(unpatchify(whole, grid=self.grid, patch=self.model.patch_size))

    def _velocity(self, prompt: Prompt, pack: Pack) -> Callable[[Tensor, float, bool, bool], Tensor]:
        dtype = self.chunk.config.params_dtype
        places, tokens = pack.video_tokens_of(0)
        text_places, text_tokens = pack.text_tokens_of(0)

        def text_share(text: Tensor) -> Tensor:
            share = torch.zeros(pack.num_text, text.shape[1], dtype=dtype, device=pack.device)
            share[text_places] = text.to(pack.device, dtype)[text_tokens]
            return share

        texts = {True: text_share(prompt.text), False: text_share(prompt.null_text)}
        vecs = {True: prompt.vec, False: prompt.null_vec}
        without = torch.zeros(pack.num_video, self.model.cond_channels, dtype=dtype, device=pack.device)
        with_image = without.clone()
        if prompt.cond is not None:
            with_image[places] = prompt.cond.to(pack.device, dtype)[tokens]

        def velocity(x: Tensor, t: float, text_on: bool, image_on: bool) -> Tensor:
            inputs = ModelInputs(
                img=x.to(dtype),
                txt=texts[text_on],
                t=torch.tensor([t], device=pack.device),
                y_vec=vecs[text_on][None].to(pack.device, dtype),
                cond=(with_image if image_on else without) if self.model.cond_embed else None,
                guidance=torch.tensor([self.settings.guidance], device=pack.device) if self.model.guidance_embed else None,
            )
            output: Tensor = self.chunk(inputs, pack)
            return output.to(x.dtype)

        return velocity
