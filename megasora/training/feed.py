"""From a step's plan to this rank's micro-batches: encode or read a share of the replica's clips, exchange, draw, slice.

Within one replica (TP x CP x PP ranks) whole clips are dealt out to the ranks, each encodes or reads only its own, and one all-gather
gives every rank all latents and texts; nothing is encoded twice. A clip that fails travels as a zero flag in the same message, so all ranks
agree about it before the step starts.

With data.encode_ahead a thread encodes the next step while this one trains. The all-gather stays on the caller's thread: the collectives of
a group must be started in the same order on all its ranks, and a step's are started there.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor

from megasora.config.pack_tokens import FP8_ROW_MULTIPLE
from megasora.config.schema import RunConfig
from megasora.data.cache.reading import Cache
from megasora.data.decoding.contract import Decoder
from megasora.data.plan import PlannedClip, SamplerState, StepPlan, Taken, assign_packs, mix_of, next_step, sample_cost, start_of
from megasora.data.quarantine import Quarantine
from megasora.diffusion.conditions import GivenFrames, condition_latent, draw_kind, given_frames, holding_frames
from megasora.diffusion.flow import shift_of, training_time
from megasora.diffusion.patchify import patchify
from megasora.diffusion.philox import Stream, key_of, normal, uniform
from megasora.models.encoders.bundle import Encoders
from megasora.models.mmdit.schedule import MicroBatch
from megasora.parallel.groups import ParallelContext
from megasora.parallel.pack import Pack, PackSplit, SampleShape
from megasora.parallel.transfer import send
from megasora.training.ahead import Ahead
from megasora.training.material import Material, scaled_latents
from megasora.training.microbatch import TrainingSample, build_microbatch
from megasora.training.samples import SampleSource


@dataclass(frozen=True, kw_only=True)
class StepBatch:
    """One step's micro-batches on this rank, and what is known about them."""

    batches: list[MicroBatch]
    plan: StepPlan
    tokens: int
    """Real tokens of the whole step, text and video, over all replicas."""
    flops_tokens: tuple[int, ...]
    """Tokens of every sample of the step (for FLOP counts)."""
    skipped: tuple[tuple[str, str], ...]
    """(clip id, reason) of this rank's own clips that failed."""
    wait_s: float
    """Time this rank waited for its clips, and for the encoders when they work ahead."""
    frames: int
    """Frames this rank decoded."""
    decode_s: float
    """Time its threads took for them, summed."""
    encode_s: float
    """Time this rank spent in the encoders, or on reading the cache's tensors, ahead of the step or not."""
    balance: Balance


@dataclass(frozen=True, kw_only=True)
class Balance:
    """How evenly a step is dealt out, over all replicas."""

    pad_share: float
    """Padding over all tokens computed."""
    imbalance: float
    """Work of the busiest replica over the mean; the step waits for the busiest."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _Encoded:
    """This rank's share of a step, before the exchange."""

    planned: _Planned
    clips: dict[int, dict[str, Tensor]]
    """Place in the step -> what travels for it."""
    skipped: tuple[tuple[str, str], ...]
    wait_s: float
    frames: int
    decode_s: float
    encode_s: float


@dataclass(frozen=True, kw_only=True)
class _Planned:
    step: int
    plan: StepPlan
    packs: list[tuple[int, ...]]
    """This replica's packs, as places within the step."""
    own: list[int]
    """Places this rank encodes or reads."""
    balance: Balance


class Feeder:
    """Yields `StepBatch`es from a sampler state on.

    Args:
        clips: planned clips, the same on every rank.
        config: the run.
        context: this rank's groups.
        encoders: those that the samples need.
        decoder: the run's decoder.
        cache: the opened cache of data.cache.
        state: where the sampler stands.
        first_step: 0-based number of the next step.
        last_step: where to stop.
        dtype: activations of the model.
        left_out: positions of the sampler whose step is passed over.
        quarantine: clips that are not decoded.
        on_exchange: called when this rank's clips are there and those of the others are waited for.
    """

    def __init__(
        self,
        clips: Sequence[PlannedClip],
        *,
        config: RunConfig,
        context: ParallelContext,
        encoders: Encoders,
        decoder: Decoder,
        state: SamplerState,
        first_step: int,
        last_step: int,
        dtype: torch.dtype,
        cache: Cache | None = None,
        left_out: Collection[SamplerState] = (),
        quarantine: Quarantine | None = None,
        on_exchange: Callable[[], object] = lambda: None,
    ) -> None:
        assert (cache is None) == (config.data.cache is None), (
            "a run with data.cache opens it (prerequisites.open_training_cache) and passes it"
        )
        self.clips, self.config, self.context, self.dtype = clips, config, context, dtype
        self._left_out, self._on_exchange = frozenset(left_out), on_exchange
        self._tokens = [clip.tokens for clip in clips]
        self._planned: deque[_Planned] = deque()
        self._weights = {field.name: float(getattr(config.condition, field.name)) for field in fields(config.condition)}
        self._split = PackSplit(tp=context.topology.tp, cp=context.topology.cp, row_multiple=FP8_ROW_MULTIPLE[config.precision.fp8])
        self._source = SampleSource(
            self._own_samples(state, first_step, last_step),
            clips=clips,
            config=config,
            encoders=encoders,
            decoder=decoder,
            cache=cache,
            device=context.device,
            quarantine=quarantine,
        )

        ahead = context.device.type == "cuda" if config.data.encode_ahead is None else config.data.encode_ahead
        self._ahead = Ahead(self._encode(), tensors=_tensors, device=context.device) if ahead else None

    def __iter__(self) -> Iterator[StepBatch]:
        """Steps until last_step."""
        for step in self._encode() if self._ahead is None else self._ahead:
            self._on_exchange()
            everything = self._exchange(step.planned, step.clips)
            weights = _weights(everything)
            plan = step.planned.plan
            yield StepBatch(
                batches=[self._microbatch(step.planned, pack, everything, weights) for pack in step.planned.packs],
                plan=plan,
                tokens=sum(self._tokens[sample] for sample in plan.samples),
                flops_tokens=tuple(self._tokens[sample] for sample in plan.samples),
                skipped=step.skipped,
                wait_s=step.wait_s if self._ahead is None else self._ahead.wait_s,
                frames=step.frames,
                decode_s=step.decode_s,
                encode_s=step.encode_s,
                balance=step.planned.balance,
            )

    def settle(self) -> None:
        """Wait until nothing here uses the encoders, which belong to the caller until the next step is taken."""
        if self._ahead is not None:
            self._ahead.settle()

    def close(self) -> None:
        """Stop working ahead."""
        self._source.close()  # first: the thread may be waiting for a clip
        if self._ahead is not None:
            self._ahead.close()

    def _encode(self) -> Iterator[_Encoded]:
        """This rank's clips of each step; no collective in it, for a thread may run it."""
        for loaded in self._source:
            planned = self._planned.popleft()
            clips: dict[int, dict[str, Tensor]] = {}
            skipped: list[tuple[str, str]] = []
            started = time.perf_counter()
            for place, material in zip(planned.own, loaded.clips, strict=True):
                if isinstance(material, str):
                    skipped.append((self.clips[planned.plan.samples[place]].clip.id, material))
                else:
                    clips[place] = self._draw(planned, place, material)
            yield _Encoded(
                planned=planned,
                clips=clips,
                skipped=tuple(skipped),
                wait_s=loaded.wait_s,
                frames=loaded.frames,
                decode_s=loaded.decode_s,
                encode_s=loaded.encode_s + time.perf_counter() - started,
            )

    def _own_samples(self, state: SamplerState, first_step: int, last_step: int) -> Iterator[list[Taken]]:
        data, topology = self.config.data, self.context.topology
        ranks = dist.get_process_group_ranks(self.context.replica)
        mix = mix_of(self.clips, data)
        for step in range(first_step, last_step):
            while True:
                plan = next_step(self._tokens, state, seed=self.config.train.seed, global_tokens=data.global_tokens, mix=mix)
                position, state = state, plan.state_after
                if plan.samples and position not in self._left_out:  # of a few clips a mix may take none in an epoch
                    break
            replicas = assign_packs(
                [self._tokens[sample] for sample in plan.samples],
                data_parallel_size=topology.dp,
                num_microbatches=data.num_microbatches,
                hidden_size=self.config.model.hidden_size,
                max_tokens=data.max_pack_tokens,
                microbatch_multiple=self.config.parallel.microbatch_multiple,
            )
            packs = replicas[self.context.at.dp]
            places = sorted(place for pack in packs for place in pack)
            own = places[ranks.index(self.context.rank) :: len(ranks)]
            planned = _Planned(step=step, plan=plan, packs=packs, own=own, balance=self._balance(plan, replicas))
            self._planned.append(planned)
            yield [Taken(plan.samples[place], self._offset(planned, place)) for place in own]

    def _offset(self, planned: _Planned, place: int) -> int:
        """First frame of a clip that is decoded this time."""
        clip = self.clips[planned.plan.samples[place]]
        if self.config.data.temporal_start == "first" or clip.num_starts == 1:
            return 0
        return start_of(clip, uniform=uniform(key=self._key(planned, place, Stream.START)))

    def _balance(self, plan: StepPlan, replicas: list[list[tuple[int, ...]]]) -> Balance:
        hidden = self.config.model.hidden_size
        loads = [sum(sample_cost(self._tokens[plan.samples[p]], hidden_size=hidden) for pack in packs for p in pack) for packs in replicas]
        shapes = [SampleShape(text_tokens=self.clips[s].text_tokens, grid=self.clips[s].grid) for s in plan.samples]
        computed = sum(self._split.share_tokens([shapes[p] for p in pack]) for packs in replicas for pack in packs if pack)
        computed *= self._split.tp * self._split.cp
        real = sum(self._tokens[sample] for sample in plan.samples)
        return Balance(pad_share=1 - real / computed, imbalance=max(loads) * len(loads) / sum(loads))

    def _key(self, planned: _Planned, place: int, stream: Stream) -> int:
        sample = planned.plan.samples[place]
        return key_of(seed=self.config.train.seed, stream=stream, epoch=planned.plan.epoch, sample=sample, step=planned.step)

    def _draw(self, planned: _Planned, place: int, material: Material) -> dict[str, Tensor]:
        """Latent, condition and text of one clip this rank owns."""
        clip = self.clips[planned.plan.samples[place]]
        patch = self.config.model.patch_size
        runs: tuple[GivenFrames, ...] = ()
        latents = material.latents
        if self.config.model.cond_embed:
            drawn, causal = uniform(key=self._key(planned, place, Stream.CONDITION)), self.config.encoders.causal
            kind = draw_kind(self._weights, num_frames=clip.num_frames, uniform=drawn, causal=causal)
            compression = self.config.encoders.temporal_compression
            runs = given_frames(kind, num_frames=clip.num_frames, temporal_compression=compression, causal=causal)
            if self.config.encoders.hold_given:
                latents = latents.holding(holding_frames(kind, temporal_compression=compression, causal=causal))
        latent, *given = scaled_latents(
            latents,
            runs,
            posterior=self.config.encoders.posterior,
            key=self._key(planned, place, Stream.VAE),
            scaling_factor=self._source.scaling_factor,
        )
        result = {"tokens": patchify(latent, patch=patch)}
        if self.config.model.cond_embed:
            channels, frames, height, width = latent.shape
            condition = condition_latent((channels, frames, height, width), list(zip(runs, given, strict=True)))
            result["cond"] = patchify(condition, patch=patch)
        data = self.config.data
        drop_t5 = uniform(key=self._key(planned, place, Stream.DROPOUT_T5)) < data.dropout_t5
        drop_clip = uniform(key=self._key(planned, place, Stream.DROPOUT_CLIP)) < data.dropout_clip
        null_text, null_vec = self._source.null
        result["text"] = null_text if drop_t5 else material.text
        result["vec"] = null_vec if drop_clip else material.vec
        return dict(zip(result, send(list(result.values()), device=self.context.device), strict=True))

    def _shapes(self, clip: PlannedClip) -> dict[str, tuple[int, ...]]:
        """Shapes of what travels for a clip, in order."""
        model = self.config.model
        video = clip.tokens - clip.text_tokens
        shapes: dict[str, tuple[int, ...]] = {"ok": (1,), "tokens": (video, model.in_channels)}
        if model.cond_embed:
            shapes["cond"] = (video, model.cond_channels)
        return {**shapes, "text": (clip.text_tokens, model.text_dim), "vec": (model.vec_dim,)}

    def _exchange(self, planned: _Planned, encoded: dict[int, dict[str, Tensor]]) -> dict[int, dict[str, Tensor]]:
        """All clips of the replica on every rank of it; one all-gather of equal, padded buffers."""
        size = self.context.replica.size()
        places = sorted(place for pack in planned.packs for place in pack)
        owners = [places[rank::size] for rank in range(size)]
        shapes = {place: self._shapes(self.clips[planned.plan.samples[place]]) for place in places}
        lengths = {place: sum(torch.Size(shape).numel() for shape in parts.values()) for place, parts in shapes.items()}
        longest = max(sum(lengths[place] for place in own) for own in owners)
        buffer = torch.zeros(longest, device=self.context.device)
        _write(buffer, planned.own, lengths, shapes, encoded)
        gathered = torch.empty(size * longest, device=self.context.device)
        if size > 1:
            dist.all_gather_into_tensor(gathered, buffer, group=self.context.replica)
        else:
            gathered = buffer
        everything: dict[int, dict[str, Tensor]] = {}
        for rank, own in enumerate(owners):
            position = rank * longest
            for place in own:
                flat = gathered[position : position + lengths[place]]
                sizes = [torch.Size(shape).numel() for shape in shapes[place].values()]
                parts = flat.split(sizes)
                everything[place] = {name: part.view(shape) for (name, shape), part in zip(shapes[place].items(), parts, strict=True)}
                position += lengths[place]
        return everything

    def _microbatch(
        self, planned: _Planned, places: tuple[int, ...], everything: dict[int, dict[str, Tensor]], weights: dict[int, float]
    ) -> MicroBatch:
        samples = [self._sample(planned, place, everything[place], weight=weights[place]) for place in places] or [self._filler()]
        clips = [self.clips[planned.plan.samples[place]] for place in places] or [self._smallest]
        at, topology = self.context.at, self.context.topology
        pack = Pack(
            [SampleShape(text_tokens=clip.text_tokens, grid=clip.grid) for clip in clips],
            split=self._split,
            tp_rank=at.tp,
            cp_rank=at.cp,
            device=self.context.device,
        )
        pack.prepare(self.context.context.members)
        return build_microbatch(
            pack,
            samples,
            sigma_min=self.config.flow.sigma_min,
            dtype=self.dtype,
            first_stage=at.pp == 0,
            last_stage=at.pp == topology.pp - 1,
        )

    def _sample(self, planned: _Planned, place: int, parts: dict[str, Tensor], *, weight: float) -> TrainingSample:
        clip = self.clips[planned.plan.samples[place]]
        flow, patch = self.config.flow, self.config.model.patch_size
        frames, height, width = clip.grid
        shift = shift_of((frames, height * patch, width * patch), points=flow.shift_points, temporal=flow.temporal_shift)
        return TrainingSample(
            tokens=parts["tokens"],
            text=parts["text"],
            vec=parts["vec"],
            cond=parts.get("cond"),
            t=training_time(normal(key=self._key(planned, place, Stream.TIMESTEP)), shift=shift),
            noise_key=self._key(planned, place, Stream.NOISE),
            weight=weight,
        )

    @cached_property
    def _smallest(self) -> PlannedClip:
        return min(self.clips, key=lambda clip: clip.tokens)

    def _filler(self) -> TrainingSample:
        """A sample of weight 0 for a pack that got none (a step with fewer samples than packs)."""
        shapes = self._shapes(self._smallest)
        zeros = {name: torch.zeros(shape, device=self.context.device) for name, shape in shapes.items()}
        return TrainingSample(
            tokens=zeros["tokens"],
            text=zeros["text"],
            vec=zeros["vec"],
            cond=zeros.get("cond"),
            t=0.5,
            noise_key=0,
            weight=0.0,
        )


def _tensors(step: _Encoded) -> Iterator[Tensor]:
    for parts in step.clips.values():
        yield from parts.values()


def _weights(everything: dict[int, dict[str, Tensor]]) -> dict[int, float]:
    """The flag of each clip of the step, on the host: the one time that a step's clips make it wait."""
    flags = torch.cat([parts["ok"] for parts in everything.values()]).tolist() if everything else []
    return dict(zip(everything, flags, strict=True))


def _write(
    buffer: Tensor,
    own: list[int],
    lengths: dict[int, int],
    shapes: dict[int, dict[str, tuple[int, ...]]],
    encoded: dict[int, dict[str, Tensor]],
) -> None:
    """Lay this rank's clips into its buffer; a clip that failed stays all zeros, flag included."""
    position = 0
    for place in own:
        if place in encoded:
            parts = {"ok": torch.ones(1, device=buffer.device), **encoded[place]}
            flat = torch.cat([parts[name].reshape(-1).to(buffer.dtype) for name in shapes[place]])
            buffer[position : position + lengths[place]] = flat
        position += lengths[place]
