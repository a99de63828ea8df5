"""Held-out loss: fixed clips, noise and times, so that two checkpoints differ only by their weights.

Every clip is encoded as training encodes it (a sample of the posterior comes from a fixed draw) and measured at the middle of each of B
equal bins of t with its own fixed noise; clips are dealt out over the replicas.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.transformer import TransformerConfig
from torch import nn

from megasora.config.pack_tokens import FP8_ROW_MULTIPLE
from megasora.config.schema import RunConfig
from megasora.data.decoding.contract import Decoder
from megasora.data.plan import PlannedClip, Taken, start_of
from megasora.diffusion.patchify import patchify
from megasora.diffusion.philox import Stream, key_of, uniform
from megasora.models.encoders.bundle import Encoders
from megasora.models.mmdit.schedule import MicroBatch, run_schedule
from megasora.parallel.groups import ParallelContext
from megasora.parallel.pack import Pack, PackSplit, SampleShape
from megasora.training.material import Material, scaled_latents
from megasora.training.microbatch import TrainingSample, build_microbatch, velocity_loss
from megasora.training.samples import SampleSource

EVAL_SEED = 20_250_312
"""Fixed, so that every run of a model measures the same noise."""


@dataclass(frozen=True, kw_only=True, eq=False)
class HeldOut:
    """A held-out clip, encoded."""

    clip: PlannedClip
    number: int
    """Among the clips that could be encoded; names its fixed draws."""
    tokens: torch.Tensor
    text: torch.Tensor
    vec: torch.Tensor


class Evaluator:
    """Encodes the held-out clips once and measures the loss when asked.

    Args:
        clips: held-out clips that fit the model.
        config, context, encoders, decoder: the run's; all encoders are loaded.
        dtype: activations of the model.
    """

    def __init__(
        self,
        clips: Sequence[PlannedClip],
        *,
        config: RunConfig,
        context: ParallelContext,
        encoders: Encoders,
        decoder: Decoder,
        dtype: torch.dtype,
    ) -> None:
        self.config, self.context, self.dtype = config, context, dtype
        self.held_out: list[HeldOut] = []
        self.failed: list[tuple[str, str]] = []
        one_by_one = ([self._taken(sample, clip)] for sample, clip in enumerate(clips))
        source = SampleSource(one_by_one, clips=clips, config=config, encoders=encoders, decoder=decoder, cache=None, device=context.device)
        try:
            for clip, step in zip(clips, source, strict=True):
                (material,) = step.clips
                if isinstance(material, str):
                    self.failed.append((clip.clip.id, material))
                else:
                    self.held_out.append(self._encoded(clip, material, scaling_factor=source.scaling_factor))
        finally:
            source.close()

    def _taken(self, sample: int, clip: PlannedClip) -> Taken:
        """The same frames of a clip every time, drawn where training draws."""
        if self.config.data.temporal_start == "first":
            return Taken(sample)
        return Taken(sample, start_of(clip, uniform=uniform(key=key_of(seed=EVAL_SEED, stream=Stream.START, sample=sample))))

    def _encoded(self, clip: PlannedClip, material: Material, *, scaling_factor: float) -> HeldOut:
        number = len(self.held_out)
        (latent,) = scaled_latents(
            material.latents,
            posterior=self.config.encoders.posterior,
            key=key_of(seed=EVAL_SEED, stream=Stream.VAE, sample=number),
            scaling_factor=scaling_factor,
        )
        tokens = patchify(latent, patch=self.config.model.patch_size)
        return HeldOut(clip=clip, number=number, tokens=tokens, text=material.text, vec=material.vec)

    def measure(self, chunks: Sequence[nn.Module], megatron_config: TransformerConfig) -> dict[str, float]:
        """Mean loss by time bin (keys are the bins' middles), the same on every rank; all ranks call it together."""
        bins = self.config.evaluation.num_timestep_bins
        topology, at = self.context.topology, self.context.at
        result: dict[str, float] = {}
        for number in range(bins):
            t = (number + 0.5) / bins
            own = self.held_out[at.dp :: topology.dp]
            count = -(-len(self.held_out) // topology.dp)
            group = topology.pp if topology.vp else 1
            count = -(-count // group) * group
            batches = [self._microbatch(own[m] if m < len(own) else None, t=t) for m in range(count)]
            with torch.no_grad():
                reports = run_schedule(
                    chunks,
                    batches,
                    config=megatron_config,
                    context=self.context,
                    loss_function=lambda output, batch: velocity_loss(output, batch, context_rank=at.cp),
                    forward_only=True,
                )
            total = torch.stack(reports).sum().double() if reports else torch.zeros((), dtype=torch.float64, device=self.context.device)
            dist.all_reduce(total)
            result[f"{t:.2f}"] = float(total) / len(self.held_out)
        return result

    def _microbatch(self, held_out: HeldOut | None, *, t: float) -> MicroBatch:
        real = held_out or self.held_out[0]
        at, topology = self.context.at, self.context.topology
        shape = (len(real.tokens), self.config.model.cond_channels)
        cond = torch.zeros(shape, device=self.context.device) if self.config.model.cond_embed else None
        sample = TrainingSample(
            tokens=real.tokens,
            text=real.text,
            vec=real.vec,
            cond=cond,
            t=t,
            noise_key=key_of(seed=EVAL_SEED, stream=Stream.EVAL, sample=real.number),
            weight=1.0 if held_out is not None else 0.0,
        )
        pack = Pack(
            [SampleShape(text_tokens=real.clip.text_tokens, grid=real.clip.grid)],
            split=PackSplit(tp=topology.tp, cp=topology.cp, row_multiple=FP8_ROW_MULTIPLE[self.config.precision.fp8]),
            tp_rank=at.tp,
            cp_rank=at.cp,
            device=self.context.device,
        )
        pack.prepare(self.context.context.members)
        return build_microbatch(
            pack,
            [sample],
            sigma_min=self.config.flow.sigma_min,
            dtype=self.dtype,
            first_stage=at.pp == 0,
            last_stage=at.pp == topology.pp - 1,
        )
