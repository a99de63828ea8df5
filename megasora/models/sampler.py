"""Draws clips from a model in any layout: every rank keeps its share of the tokens through all steps, only the finished latent is gathered.

What a clip is decoded to or written as is left to the caller. Shape letters: n tokens of a share, C token channels, N tokens of the clip.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from megasora.config.latent_frames import latent_frames
from megasora.config.schema import EncodersConfig, FlowConfig, ModelConfig, SampleConfig
from megasora.diffusion.captions import inference_caption
from megasora.diffusion.conditions import GivenFrames, condition_latent
from megasora.diffusion.flow import sampling_times, shift_of
from megasora.diffusion.guidance import Branch, Guidance, GuidedVelocity, denoise, latent_frame_of
from megasora.diffusion.patchify import patchify, unpatchify
from megasora.diffusion.philox import Stream, key_of, normal_at
from megasora.diffusion.reuse import StepReuse
from megasora.models.encoders.bundle import Encoders
from megasora.models.mmdit.megatron_config import row_multiple
from megasora.models.mmdit.model import ModelInputs
from megasora.models.mmdit.schedule import MicroBatch, run_schedule
from megasora.parallel.groups import ParallelContext
from megasora.parallel.pack import Pack, PackSplit, SampleShape


@dataclass(frozen=True, kw_only=True)
class ClipSize:
    """Size of a clip in frames and pixels."""

    num_frames: int
    height: int
    width: int

    def latent_shape(self, model: ModelConfig, encoders: EncodersConfig) -> tuple[int, int, int, int]:
        """(C, T, H, W) of its latent."""
        unit = encoders.spatial_compression
        frames = latent_frames(self.num_frames, compression=encoders.temporal_compression, causal=encoders.causal)
        return model.latent_channels, frames, self.height // unit, self.width // unit


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What one clip is made from, encoded."""

    text: Tensor
    """[L, D]"""
    vec: Tensor
    """[V]"""
    null_text: Tensor
    """Of the negative prompt; the empty one by default."""
    null_vec: Tensor
    kind: str = "t2v"
    """Which frames are given (`diffusion.conditions`)."""
    given: tuple[tuple[GivenFrames, Tensor], ...] = field(default=())
    """Runs of given frames and their scaled latents [C, latent_count, H, W]."""


def caption_of_prompt(text: str, *, settings: SampleConfig, num_frames: int) -> str:
    """The prompt as the text encoders get it; a picture has no frame rate and no motion."""
    moves = num_frames > 1
    return inference_caption(
        text, fps=settings.fps if moves and settings.prompt_fps else None, motion_score=settings.motion_score if moves else None
    )


def encode_prompt(encoders: Encoders, caption: str, *, negative: str = "", text_tokens: int) -> Prompt:
    """Text to `Prompt`, without given frames."""
    texts, vecs = encoders.encode_text([caption, negative], max_tokens=text_tokens)
    return Prompt(text=texts[0], vec=vecs[0], null_text=texts[1], null_vec=vecs[1])


class ClipSampler:
    """Draws clips from one model.

    Args:
        chunks: this rank's chunks of the model, in virtual-stage order.
        megatron_config: Megatron's settings.
        model, sample, flow, encoders: settings.
        context: this rank's groups.
        branches: ranks with the same share of tokens in the replicas that share out the branches of guidance; None without such.
    """

    def __init__(
        self,
        chunks: Sequence[nn.Module],
        *,
        megatron_config: TransformerConfig,
        model: ModelConfig,
        sample: SampleConfig,
        flow: FlowConfig,
        encoders: EncodersConfig,
        context: ParallelContext,
        branches: dist.ProcessGroup | None = None,
    ) -> None:
        self.chunks, self.megatron_config, self.model, self.settings, self.flow = chunks, megatron_config, model, sample, flow
        self.encoders, self.context, self.branches = encoders, context, branches
        self.evaluated_steps = 0
        """Steps of the last clip at which the model was asked."""

    @torch.no_grad()
    def sample(self, prompt: Prompt, size: ClipSize, *, seed: int, on_step: Callable[[int], None] | None = None) -> Tensor:
        """The scaled latent [C, T, H, W] of one clip in fp32, the same on every rank.

        Args:
            prompt: what it is made from.
            size: of the clip.
            seed: of its noise; the same seed gives the same latent in every layout.
            on_step: called after each step (progress bar).
        """
        context, latent_shape = self.context, size.latent_shape(self.model, self.encoders)
        _, frames, height, width = latent_shape
        grid = (frames, height // self.model.patch_size, width // self.model.patch_size)
        shape = SampleShape(text_tokens=len(prompt.text), grid=grid)
        pack = Pack(
            [shape],
            split=PackSplit(tp=context.topology.tp, cp=context.topology.cp, row_multiple=row_multiple(self.megatron_config)),
            tp_rank=context.at.tp,
            cp_rank=context.at.cp,
            device=context.device,
        )
        pack.prepare(context.context.members)
        places, tokens = pack.video_tokens_of(0)
        channels = self.model.in_channels
        elements = tokens[:, None] * channels + torch.arange(channels, device=context.device)
        noise = torch.zeros(pack.num_video, channels, device=context.device)
        noise[places] = normal_at(elements, key=key_of(seed=seed, stream=Stream.SAMPLE))
        frame = torch.zeros(pack.num_video, dtype=torch.int64, device=context.device)
        frame[places] = latent_frame_of(tokens, grid=grid)
        model = self._velocity(prompt, pack, latent_shape)
        reuse = None
        if self.settings.reuse_threshold:
            reuse = StepReuse(model, threshold=self.settings.reuse_threshold, sum_over_ranks=self._sum_over_shares)
        velocity = GuidedVelocity(
            velocity=reuse or model,
            guidance=None if self.model.guidance_embed else self.guidance(prompt.kind),
            with_given=bool(prompt.given),
            latent_frame=frame,
            latent_frames=frames,
        )
        share = denoise(velocity, noise, times=self.times(latent_shape), on_step=on_step)
        self.evaluated_steps = self.settings.steps if reuse is None else reuse.evaluated
        whole = torch.zeros(shape.video_tokens, channels, device=context.device)
        whole[tokens] = share[places]
        dist.all_reduce(whole, group=self.context.pg_collection.tp_cp)
        latent = unpatchify(whole, grid=grid, patch=self.model.patch_size)
        if prompt.kind.startswith("i2v"):  # the published code writes given images back, given clips not (utils/sampling.py, api_fn)
            for run, known in prompt.given:
                latent[:, run.latent_start : run.latent_start + run.latent_count] = known.to(latent)
        return latent

    def _sum_over_shares(self, values: Tensor) -> Tensor:
        """Summed over the ranks that share out the clip's tokens."""
        dist.all_reduce(values, group=self.context.pg_collection.tp_cp)
        return values

    def guidance(self, kind: str) -> Guidance:
        """Scales for a kind of given frames."""
        settings = self.settings
        return Guidance(
            text=settings.guidance,
            given=settings.guidance_img,
            text_oscillation=settings.text_oscillation,
            given_oscillation=settings.image_oscillation,
            ramp=settings.image_ramp and kind.startswith("i2v"),
        )

    def times(self, latent_shape: tuple[int, int, int, int]) -> list[float]:
        """Times of the Euler steps."""
        shift = self.settings.flow_shift
        if shift is None:
            points, temporal = self.flow.shift_points, self.flow.temporal_shift
            shift = shift_of(latent_shape[1:], points=points, temporal=temporal, pixels_per_token=self.model.patch_size**2)
        return sampling_times(self.settings.steps, shift=shift)

    def _velocity(
        self, prompt: Prompt, pack: Pack, latent_shape: tuple[int, int, int, int]
    ) -> Callable[[Tensor, float, Sequence[Branch]], list[Tensor]]:
        dtype = self.megatron_config.params_dtype
        places, tokens = pack.video_tokens_of(0)
        text_places, text_tokens = pack.text_tokens_of(0)

        def text_share(text: Tensor) -> Tensor:
            share = torch.zeros(pack.num_text, text.shape[1], dtype=dtype, device=pack.device)
            share[text_places] = text.to(pack.device, dtype)[text_tokens]
            return share

        texts = {True: text_share(prompt.text), False: text_share(prompt.null_text)}
        vecs = {True: prompt.vec, False: prompt.null_vec}
        without = torch.zeros(pack.num_video, self.model.cond_channels, dtype=dtype, device=pack.device)
        conditions = {False: without, True: without.clone()}
        if prompt.given:
            condition = patchify(condition_latent(latent_shape, list(prompt.given)), patch=self.model.patch_size)
            conditions[True][places] = condition.to(pack.device, dtype)[tokens]

        def one(x: Tensor, t: float, branch: Branch) -> Tensor:
            inputs = ModelInputs(
                img=x.to(dtype),
                txt=texts[branch.text],
                t=torch.full((1,), t, device=pack.device),
                y_vec=vecs[branch.text][None].to(pack.device, dtype),
                cond=conditions[branch.given] if self.model.cond_embed else None,
                guidance=torch.full((1,), self.settings.guidance, device=pack.device) if self.model.guidance_embed else None,
            )
            return self._evaluate(inputs, pack).to(x.dtype)

        def velocities(x: Tensor, t: float, branches: Sequence[Branch]) -> list[Tensor]:
            if self.branches is None:
                return [one(x, t, branch) for branch in branches]
            ranks, rank = self.branches.size(), self.branches.rank()
            own = torch.zeros(-(-len(branches) // ranks), *x.shape, dtype=x.dtype, device=x.device)
            for number, branch in enumerate(branches[rank::ranks]):
                own[number] = one(x, t, branch)
            every = torch.empty(ranks * len(own), *x.shape, dtype=x.dtype, device=x.device)
            dist.all_gather_into_tensor(every, own, group=self.branches)
            return [every[number % ranks * len(own) + number // ranks] for number in range(len(branches))]

        return velocities

    def _evaluate(self, inputs: ModelInputs, pack: Pack) -> Tensor:
        """One forward through all stages; every stage gets the last one's output, because each keeps its tokens through all steps."""
        topology, groups = self.context.topology, self.context.pg_collection
        first = self.context.at.pp == 0
        batch = MicroBatch(pack=pack, inputs=inputs if first else None, target=None, weight=None, num_counted=0)
        repeats = topology.pp if topology.vp else 1  # the interleaved schedule takes multiples of PP
        outputs = run_schedule(
            self.chunks,
            [batch] * repeats,
            config=self.megatron_config,
            context=self.context,
            loss_function=lambda output, _: (output.sum(), torch.zeros((), dtype=torch.int32, device=output.device), output),
            forward_only=True,
        )
        shape = (pack.num_video, self.model.in_channels)
        output = outputs[0].contiguous() if outputs else torch.empty(shape, dtype=inputs.img.dtype, device=pack.device)
        if topology.pp > 1:
            dist.broadcast(output, src=dist.get_global_rank(groups.pp, topology.pp - 1), group=groups.pp)
        return output
