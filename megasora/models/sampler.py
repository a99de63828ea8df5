"""Draws clips from a model in any layout: every rank keeps its share of the tokens through all steps, only the finished latent is gathered.

What a clip is decoded to or written as is left to the caller. Shape letters: n tokens of a share, C token channels, N tokens of the clip.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from megasora.config.schema import FlowConfig, ModelConfig, SampleConfig
from megasora.diffusion.captions import inference_caption
from megasora.diffusion.conditions import condition_latent, given_frames
from megasora.diffusion.flow import sampling_times, shift_of
from megasora.diffusion.guidance import denoise, latent_frame_of
from megasora.diffusion.patchify import patchify, unpatchify
from megasora.diffusion.philox import Stream, key_of, normal_at
from megasora.models.encoders.bundle import Encoders
from megasora.models.mmdit.megatron_config import row_multiple
from megasora.models.mmdit.model import ModelInputs
from megasora.models.mmdit.schedule import MicroBatch, run_schedule
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


class Sampler:
    """Draws clips from one model.

    Args:
        chunks: this rank's chunks of the model, in virtual-stage order.
        megatron_config: Megatron's settings.
        model, sample, flow: settings.
        encoders: autoencoder and text encoders.
        context: this rank's groups.
    """

    def __init__(
        self,
        chunks: Sequence[nn.Module],
        *,
        megatron_config: TransformerConfig,
        model: ModelConfig,
        sample: SampleConfig,
        flow: FlowConfig,
        encoders: Encoders,
        context: ParallelContext,
    ) -> None:
        self.chunks, self.megatron_config, self.model, self.settings, self.flow = chunks, megatron_config, model, sample, flow
        self.encoders, self.context = encoders, context
        vae = encoders.vae
        frames = (sample.num_frames - 1) // vae.temporal_compression + 1
        self.latent_shape = (vae.latent_channels, frames, sample.height // vae.spatial_compression, sample.width // vae.spatial_compression)
        self.grid = (frames, self.latent_shape[2] // model.patch_size, self.latent_shape[3] // model.patch_size)

    def encode(self, text: str, *, first_frame: Tensor | None, text_tokens: int) -> Prompt:
        """Encode a prompt and, for image-to-video, its first frame [3, 1, H, W] on its own."""
        caption = inference_caption(text, motion_score=self.settings.motion_score if self.settings.num_frames > 1 else None)
        texts, vecs = self.encoders.encode_text([caption, ""], max_tokens=text_tokens)
        cond = None if first_frame is None else self._condition(first_frame)
        return Prompt(text=texts[0], vec=vecs[0], null_text=texts[1], null_vec=vecs[1], cond=cond)

    def _condition(self, first_frame: Tensor) -> Tensor:
        vae = self.encoders.vae
        (run,) = given_frames("i2v_head", num_frames=self.settings.num_frames, temporal_compression=vae.temporal_compression)
        condition = condition_latent(self.latent_shape, [(run, vae.encode(first_frame))])
        return patchify(condition, patch=self.model.patch_size)

    @torch.no_grad()
    def sample(self, prompt: Prompt, *, number: int, on_step: Callable[[int], None] | None = None) -> Tensor:
        """The latent [C, T, H, W] of one clip, the same on every rank; `encoders.vae.decode` makes the clip where it is wanted."""
        settings, context = self.settings, self.context
        shape = SampleShape(text_tokens=len(prompt.text), grid=self.grid)
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
        dist.all_reduce(whole, group=self.context.pg_collection.tp_cp)
        return unpatchify(whole, grid=self.grid, patch=self.model.patch_size)

    def _velocity(self, prompt: Prompt, pack: Pack) -> Callable[[Tensor, float, bool, bool], Tensor]:
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
        with_image = without.clone()
        if prompt.cond is not None:
            with_image[places] = prompt.cond.to(pack.device, dtype)[tokens]

        def velocity(x: Tensor, t: float, text_on: bool, image_on: bool) -> Tensor:
            inputs = ModelInputs(
                img=x.to(dtype),
                txt=texts[text_on],
                t=torch.full((1,), t, device=pack.device),
                y_vec=vecs[text_on][None].to(pack.device, dtype),
                cond=(with_image if image_on else without) if self.model.cond_embed else None,
                guidance=torch.full((1,), self.settings.guidance, device=pack.device) if self.model.guidance_embed else None,
            )
            return self._evaluate(inputs, pack).to(x.dtype)

        return velocity

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
