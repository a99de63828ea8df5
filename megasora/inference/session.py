"""Weights and groups that draw clips; the model is loaded when it is needed first and moved away where memory asks for it."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from megasora.checkpoint.source import Select, WeightSource, open_source
from megasora.config.errors import UserError
from megasora.config.schema import ModelConfig, RunConfig, SampleConfig
from megasora.config.validate import raise_on_problems
from megasora.diffusion.conditions import holding_frames, without_holding
from megasora.inference.given import encode_given
from megasora.inference.record import Hashes, record_of
from megasora.inference.requests import ClipRequest, check_model
from megasora.inference.shelf import EncoderShelf, release
from megasora.models.mmdit.build import build_chunks
from megasora.models.mmdit.weights import fill_parameters
from megasora.models.sampler import ClipSampler, Prompt, caption_of_prompt
from megasora.parallel import groups
from megasora.parallel.groups import ParallelContext, SamplingGroups

Offload = Literal["none", "encoders", "model"]
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class World:
    """This rank's place in a job that draws clips."""

    config: RunConfig
    context: ParallelContext
    groups: SamplingGroups

    @property
    def leads(self) -> bool:
        """Whether this rank gets its clips' pixels and writes them."""
        return self.groups.clip.rank() == 0

    def agreed(self, look: Callable[[], T]) -> T:
        """What the clip's first rank finds, on all of its ranks; they call it together."""
        found: list[Any] = [look() if self.leads else None]
        clip = self.groups.clip
        if clip.size() > 1:
            dist.broadcast_object_list(found, src=dist.get_global_rank(clip, 0), group=clip)
        result: T = found[0]
        return result


def start(config: RunConfig) -> World:
    """Start the ranks and their groups.

    Raises:
        UserError: the settings, or the number of ranks, cannot work, or this process has groups already.
    """
    if groups.initialized():
        raise UserError("this process has its groups already: share them with Sampler.load(..., beside=the first sampler)")
    device = groups.choose_device(config.device)
    groups.start_world(device, timeout_minutes=config.parallel.timeout_minutes)
    config = replace(config, device="cpu" if device.type == "cpu" else "cuda")
    raise_on_problems(config, world_size=dist.get_world_size(), check_memory=False, training=False)  # no gradients, no optimizer
    context = groups.initialize(config.parallel, device=device, num_attention_heads=config.model.num_attention_heads, seed=0)
    replicas = config.sample.guidance_parallel
    shared = groups.sampling_groups(context, replicas=replicas, timeout_minutes=config.parallel.timeout_minutes)
    return World(config=config, context=context, groups=shared)


class Session:
    """One set of weights.

    Args:
        world: of `start`.
        weights: of any format.
        shelf: the encoders.
        select: which weights of a training checkpoint.
        offload: encoders: the text encoders are dropped before the model is loaded, and the autoencoder waits in host memory while the
            model works; model: the model also waits there while the autoencoder works.
    """

    def __init__(
        self, world: World, *, weights: Path, shelf: EncoderShelf | None = None, select: Select = "model", offload: Offload = "none"
    ) -> None:
        self.world, self.config, self.offload, self.device = world, world.config, offload, world.context.device
        self.select: Select = select
        self.source: WeightSource = open_source(weights, axes_dim=self.config.model.axes_dim, select=select)
        found = self.source.model
        self.model: ModelConfig = replace(self.config.model, cond_embed=found.cond_embed, guidance_embed=found.guidance_embed)
        self.source.fits(self.model)
        self.shelf = shelf or EncoderShelf(self.config, model=self.model, device=self.device)
        self._samplers: list[ClipSampler] = []  # the one of these weights, once it is loaded

    def using(self, sample: SampleConfig) -> Session:
        """The same weights and encoders with other settings of sampling; guidance_parallel stays what the ranks were started for."""
        other = copy.copy(self)  # with the same shelf and the same list of samplers
        other.config = replace(self.config, sample=replace(sample, guidance_parallel=self.config.sample.guidance_parallel))
        return other

    def check(self, request: ClipRequest) -> None:
        """Refuse what these weights cannot draw.

        Raises:
            UserError: the request gives frames to a model that takes none.
        """
        check_model(request, self.model)

    def caption(self, request: ClipRequest) -> str:
        """The request's prompt as the text encoders get it; a guidance-distilled model (FLUX) gets it as it is."""
        if self.model.guidance_embed:
            return request.prompt
        sample, own = self.config.sample, request.motion_score
        settings = sample if own is None else replace(sample, motion_score=own)
        return caption_of_prompt(request.prompt, settings=settings, num_frames=request.size.num_frames)

    def record(self, request: ClipRequest, hashes: Hashes) -> dict[str, Any]:
        """The record of a clip drawn here, without what drawing it took."""
        return record_of(
            request,
            caption=self.caption(request),
            config=self.config,
            model=self.model,
            weights=self.source.path,
            select=self.select,
            hashes=hashes,
        )

    def prompt(self, request: ClipRequest) -> Prompt:
        """Everything of a request, encoded, in host memory.

        Raises:
            UserError: a given picture or clip cannot be decoded.
        """
        text, vec = self.shelf.text(self.caption(request))
        null_text, null_vec = self.shelf.text(request.negative)
        given = encode_given(request, self.shelf.vae, self.config.encoders, group=self.world.groups.clip) if request.kind != "t2v" else ()
        return Prompt(text=text, vec=vec, null_text=null_text, null_vec=null_vec, kind=request.kind, given=given)

    def draw(self, request: ClipRequest, prompt: Prompt, *, on_step: Callable[[int], None] | None = None) -> tuple[Tensor, Drawn]:
        """The scaled latent [C, T, H, W] of a clip, the same on every rank of the clip, and what it took."""
        if self.offload != "none":
            self.shelf.put_autoencoder_away()
        sampler = self.sampler
        for chunk in sampler.chunks:
            chunk.to(self.device)
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
        started = time.perf_counter()
        latent = sampler.sample(prompt, request.size, seed=request.seed, on_step=on_step)
        if on_gpu:
            torch.cuda.synchronize(self.device)
        seconds = time.perf_counter() - started
        branches = 1 if self.model.guidance_embed else 3 if prompt.given else 2
        drawn = Drawn(
            steps=self.config.sample.steps,
            evaluations=branches * sampler.evaluated_steps,
            seconds=seconds,
            peak_bytes=torch.cuda.max_memory_allocated(self.device) if on_gpu else None,
            reuse_error=self._reuse_error(request, prompt, latent),
        )
        return latent, drawn

    def _reuse_error(self, request: ClipRequest, prompt: Prompt, latent: Tensor) -> float | None:
        """||with reuse - without|| / ||without|| of the latent, drawn again without."""
        sample = self.config.sample
        if not sample.reuse_check or not sample.reuse_threshold:
            return None
        exact = self.using(replace(sample, reuse_threshold=0.0)).sampler.sample(prompt, request.size, seed=request.seed)
        return float((latent - exact).norm() / exact.norm())

    def make_room(self) -> None:
        """Let the autoencoder work: with offload=model the model goes to host memory."""
        if self.offload == "model" and self._samplers:
            for chunk in self._samplers[0].chunks:
                chunk.to("cpu")
            release(self.device)

    def decode(self, latent: Tensor, *, kind: str) -> Tensor | None:
        """The clip [3, T, H, W] in [-1, 1] of a scaled latent on the clip's first rank, None on its others; all of them call it.

        A kind with given pictures loses the frames that only hold one, where the autoencoder is not causal.
        """
        self.make_room()
        encoders = self.config.encoders
        holding = holding_frames(kind, temporal_compression=encoders.temporal_compression, causal=encoders.causal)
        video = self.shelf.vae.decode(latent, group=self.world.groups.clip)
        return None if video is None else without_holding(video.float(), holding)

    @property
    def sampler(self) -> ClipSampler:
        """The model of this rank, loaded when first asked for, with this session's settings."""
        if not self._samplers:
            if self.offload != "none":
                self.shelf.drop_text_encoders()
            config, context = self.config, self.world.context
            chunks, megatron_config = build_chunks(self.model, config.parallel, config.precision, context=context)
            fill_parameters(chunks, self.source.read, known=self.source.shapes, model=self.model, context=context)
            self._samplers.append(
                ClipSampler(
                    chunks,
                    megatron_config=megatron_config,
                    model=self.model,
                    sample=config.sample,
                    flow=config.flow,
                    encoders=config.encoders,
                    context=context,
                    branches=self.world.groups.branches,
                )
            )
        sampler = copy.copy(self._samplers[0])
        sampler.settings = self.config.sample
        return sampler

    def close(self) -> None:
        """Free the model, so that another session can load its own."""
        self._samplers.clear()
        release(self.device)


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """What a clip took."""

    steps: int
    evaluations: int
    """Evaluations of the model for one token, over all ranks that share out the branches."""
    seconds: float
    peak_bytes: int | None
    """Of this rank's GPU while the model worked; None on the CPU."""
    reuse_error: float | None = None
    """With sample.reuse_check: relative distance of the latent from the one without reuse."""
