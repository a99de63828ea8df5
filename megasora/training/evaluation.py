"""Held-out loss: fixed clips, noise and times, so that two checkpoints differ only by their weights.

Every clip is encoded as training encodes it (a sample of the posterior comes from a fixed draw) and measured at the middle of each of B
equal bins of t with its own fixed noise; clips are dealt out over the replicas. Beside the loss without given frames stand those of every
kind of given frames that the run trains, each over the clips that are long enough for it, with the same noise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.transformer import TransformerConfig
from torch import nn

from megasora.config.pack_tokens import FP8_ROW_MULTIPLE
from megasora.config.schema import RunConfig
from megasora.data.decoding.contract import Decoder
from megasora.data.plan import PlannedClip, Taken, start_of
from megasora.diffusion.conditions import GivenFrames, condition_latent, given_frames, possible_kinds
from megasora.diffusion.patchify import patchify
from megasora.diffusion.philox import Stream, key_of, uniform
from megasora.models.encoders.bundle import Encoders
from megasora.models.mmdit.schedule import MicroBatch, run_schedule
from megasora.parallel.agreement import had_by_all
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
    """Among the planned clips; names its fixed draws."""
    tokens: torch.Tensor
    text: torch.Tensor
    vec: torch.Tensor
    shape: tuple[int, int, int, int]
    """(C, T, H, W) of its latent."""
    given: Mapping[str, tuple[tuple[GivenFrames, torch.Tensor], ...]]
    """Kind of given frames -> runs and their scaled latents, for the kinds it is long enough for; t2v gives none."""


@dataclass(frozen=True, kw_only=True)
class HeldOutLoss:
    """Mean losses, the same on every rank."""

    by_t: dict[str, float]
    """Without given frames, by the middle of the time bin."""
    by_kind: dict[str, float]
    """Over all bins, by kind of given frames; t2v is the mean of by_t."""
    by_resolution: dict[str, float]
    """Without given frames, over all bins, by resolution class."""

    @property
    def mean(self) -> float:
        """Without given frames, over all bins."""
        return sum(self.by_t.values()) / len(self.by_t)


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
        self.num_clips = len(clips)
        self.failed: list[tuple[str, str]] = []
        """Clips that some rank could not decode: all leave them out."""
        found: dict[int, HeldOut] = {}
        reasons: dict[int, str] = {}
        one_by_one = ([self._taken(sample, clip)] for sample, clip in enumerate(clips))
        source = SampleSource(one_by_one, clips=clips, config=config, encoders=encoders, decoder=decoder, cache=None, device=context.device)
        try:
            for number, (clip, step) in enumerate(zip(clips, source, strict=True)):
                (material,) = step.clips
                if isinstance(material, str):
                    reasons[number] = material
                else:
                    found[number] = self._encoded(clip, material, number=number, scaling_factor=source.scaling_factor)
        finally:
            source.close()
        self.held_out = [found[number] for number in had_by_all(found)]
        numbers = {held_out.number for held_out in self.held_out}
        for number, clip in enumerate(clips):
            if number not in numbers:
                self.failed.append((clip.clip.id, reasons.get(number, "another rank could not decode it")))

    def _taken(self, sample: int, clip: PlannedClip) -> Taken:
        """The same frames of a clip every time, drawn where training draws."""
        if self.config.data.temporal_start == "first":
            return Taken(sample)
        return Taken(sample, start_of(clip, uniform=uniform(key=key_of(seed=EVAL_SEED, stream=Stream.START, sample=sample))))

    def _encoded(self, clip: PlannedClip, material: Material, *, number: int, scaling_factor: float) -> HeldOut:
        encoders = self.config.encoders
        weights = {**vars(self.config.condition), "t2v": 1.0} if self.config.model.cond_embed else {"t2v": 1.0}
        kinds = possible_kinds(weights, num_frames=clip.num_frames, causal=encoders.causal)
        ratio, causal = encoders.temporal_compression, encoders.causal
        runs = {kind: given_frames(kind, num_frames=clip.num_frames, temporal_compression=ratio, causal=causal) for kind in kinds}
        every = list(dict.fromkeys(run for kind in kinds for run in runs[kind]))  # several kinds give the same frame
        latent, *alone = scaled_latents(
            material.latents,
            every,
            posterior=encoders.posterior,
            key=key_of(seed=EVAL_SEED, stream=Stream.VAE, sample=number),
            scaling_factor=scaling_factor,
        )
        known = dict(zip(every, alone, strict=True))
        channels, frames, height, width = latent.shape
        return HeldOut(
            clip=clip,
            number=number,
            tokens=patchify(latent, patch=self.config.model.patch_size),
            text=material.text,
            vec=material.vec,
            shape=(channels, frames, height, width),
            given={kind: tuple((run, known[run]) for run in runs[kind]) for kind in kinds},
        )

    def measure(self, chunks: Sequence[nn.Module], megatron_config: TransformerConfig) -> HeldOutLoss:
        """Mean losses; all ranks call it together."""
        bins = self.config.evaluation.num_timestep_bins
        kinds = list(dict.fromkeys(kind for held_out in self.held_out for kind in held_out.given))
        losses = torch.zeros(len(kinds), bins, self.num_clips, dtype=torch.float64, device=self.context.device)
        for row, kind in enumerate(kinds):
            fitting = [held_out for held_out in self.held_out if kind in held_out.given]
            for column in range(bins):
                self._measure(fitting, losses[row, column], kind=kind, t=(column + 0.5) / bins, chunks=chunks, config=megatron_config)
        dist.all_reduce(losses)  # a clip's loss is the sum over the ranks that hold its tokens
        by_kind = {}
        for row, kind in enumerate(kinds):
            numbers = [held_out.number for held_out in self.held_out if kind in held_out.given]
            by_kind[kind] = float(losses[row][:, numbers].mean())
        plain, every = losses[kinds.index("t2v")], [held_out.number for held_out in self.held_out]
        classes = {
            name: [h.number for h in self.held_out if h.clip.resolution == name] for h in self.held_out for name in [h.clip.resolution]
        }
        return HeldOutLoss(
            by_t={f"{(column + 0.5) / bins:.2f}": float(plain[column, every].mean()) for column in range(bins)},
            by_kind=by_kind,
            by_resolution={name: float(plain[:, numbers].mean()) for name, numbers in sorted(classes.items())},
        )

    def _measure(
        self, clips: Sequence[HeldOut], losses: torch.Tensor, *, kind: str, t: float, chunks: Sequence[nn.Module], config: TransformerConfig
    ) -> None:
        """Put this rank's part of each clip's loss at the clip's number."""
        topology, at = self.context.topology, self.context.at
        own = clips[at.dp :: topology.dp]
        group = topology.pp if topology.vp else 1
        count = -(-len(clips) // (topology.dp * group)) * group
        batches = [self._microbatch(own[m] if m < len(own) else None, kind=kind, t=t) for m in range(count)]
        with torch.no_grad():
            reports = run_schedule(
                chunks,
                batches,
                config=config,
                context=self.context,
                loss_function=lambda output, batch: velocity_loss(output, batch, context_rank=at.cp),
                forward_only=True,
            )
        for held_out, report in zip(own, reports, strict=False):  # no reports but on the last stage, and some for no clip
            losses[held_out.number] = report.double()

    def _microbatch(self, held_out: HeldOut | None, *, kind: str, t: float) -> MicroBatch:
        """A clip's, or for None one that counts nothing."""
        real = held_out or self.held_out[0]
        at, topology = self.context.at, self.context.topology
        cond = None
        if self.config.model.cond_embed:
            cond = patchify(condition_latent(real.shape, list(real.given.get(kind, ()))), patch=self.config.model.patch_size)
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
