"""The time of one optimizer step on all ranks of a job.

The step waits for its busiest replica, whose pipeline is run event by event with its own packs; what data-parallel exchanges take beyond
the passes they run beside, the optimizer and the encoders come on top.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megasora.config.memory import memory_estimate
from megasora.config.schema import RunConfig
from megasora.data.plan import PlannedClip, sample_cost
from megasora.parallel.pack import PackSplit
from megasora.parallel.topology import Topology, topology_of
from megasora.perf.flops import training_flops
from megasora.perf.hardware import Hardware
from megasora.perf.network import collective_s, placement_of
from megasora.scaling.forecast.block import BlockSetting, PackWork, row_multiple, setting_of
from megasora.scaling.forecast.chunk import chunk_backward, chunk_forward, chunk_of
from megasora.scaling.forecast.cost import Cost, StepParts
from megasora.scaling.forecast.encoders import encoding_s
from megasora.scaling.forecast.exchange import Beside, data_parallel_s
from megasora.scaling.forecast.optimizer import optimizer_s
from megasora.scaling.forecast.pipeline import Schedule, simulate
from megasora.scaling.workload import StepPacks, shapes_of_pack

BUSIEST = 3
"""Replicas whose pipelines are run: the busiest by the planner's own measure, which is near enough to the time's."""
ROUNDS = 4
"""Times that a computer's load is corrected by the pipeline it gives."""


@dataclass(frozen=True, kw_only=True)
class StepForecast:
    """One step."""

    step_time_s: float
    parts: StepParts
    """Of the busiest stage of the busiest replica."""
    stages: tuple[StepParts, ...]
    """Of every stage of that replica."""
    bubble: float
    """Share of the stages' time in which they wait for each other."""
    samples: int
    tokens: int
    flops: float
    """Of the model, forward and backward, as MFU counts them."""
    world_size: int
    peak: float | None
    """FLOP/s that MFU is a share of."""
    peak_memory_bytes: float
    """Of the fullest rank's model and activations (`config.memory`)."""

    @property
    def tokens_per_s(self) -> float:
        """Of the job."""
        return self.tokens / self.step_time_s

    @property
    def samples_per_s(self) -> float:
        """Of the job."""
        return self.samples / self.step_time_s

    @property
    def tflops_per_gpu(self) -> float:
        """Model TFLOP/s of a rank, recomputation not counted."""
        return self.flops / self.step_time_s / self.world_size / 1e12

    @property
    def mfu(self) -> float | None:
        """Share of the data sheet's bf16 FLOP/s; None where there is none."""
        return None if self.peak is None else self.tflops_per_gpu * 1e12 / self.peak


@dataclass(frozen=True, kw_only=True)
class _Replica:
    """One replica's step."""

    schedule: Schedule
    stages: tuple[Cost, ...]
    """What each stage's passes take, by category."""
    beside: tuple[Beside, ...]
    """What each stage's exchanges can hide behind."""


def forecast_step(config: RunConfig, packs: StepPacks, *, world_size: int, hardware: Hardware) -> StepForecast:
    """Time of a step with these packs.

    Raises:
        UserError: the layout does not divide the world, or the model does not divide into its stages.
    """
    topology = topology_of(config.parallel, world_size=world_size)
    replicas = [_replica(config, packs, number, topology=topology, hardware=hardware) for number in _busiest(config, packs)]
    slowest = max(replicas, key=lambda replica: replica.schedule.end)
    data = _data_s(config, packs, world_size=world_size, hardware=hardware)
    stages = tuple(_stage_parts(config, slowest, stage, data=data, topology=topology, hardware=hardware) for stage in range(topology.pp))
    busiest = max(range(topology.pp), key=lambda stage: (stages[stage].total, -stages[stage].bubble))
    flops = training_flops([clip.tokens for clip in packs.clips], hidden_size=config.model.hidden_size, num_blocks=config.model.num_blocks)
    return StepForecast(
        step_time_s=stages[busiest].total,
        parts=stages[busiest],
        stages=stages,
        bubble=slowest.schedule.bubble,
        samples=len(packs.clips),
        tokens=packs.tokens,
        flops=flops,
        world_size=world_size,
        peak=hardware.peak_of("bf16"),
        peak_memory_bytes=memory_estimate(config, world_size=world_size).total,
    )


def mean_forecast(forecasts: Sequence[StepForecast]) -> StepForecast:
    """One forecast of several steps: the mean of each figure; the stages are the first's."""
    count = len(forecasts)
    first = forecasts[0]
    if count == 1:
        return first
    names = StepParts.__dataclass_fields__
    return StepForecast(
        step_time_s=sum(one.step_time_s for one in forecasts) / count,
        parts=StepParts(**{name: sum(getattr(one.parts, name) for one in forecasts) / count for name in names}),
        stages=first.stages,
        bubble=sum(one.bubble for one in forecasts) / count,
        samples=round(sum(one.samples for one in forecasts) / count),
        tokens=round(sum(one.tokens for one in forecasts) / count),
        flops=sum(one.flops for one in forecasts) / count,
        world_size=first.world_size,
        peak=first.peak,
        peak_memory_bytes=max(one.peak_memory_bytes for one in forecasts),
    )


def work_of(config: RunConfig, pack: Sequence[PlannedClip]) -> PackWork:
    """A pack as one rank sees it."""
    parallel = config.parallel
    split = PackSplit(tp=parallel.tensor_model_parallel_size, cp=parallel.context_parallel_size, row_multiple=row_multiple(config))
    shapes = shapes_of_pack(pack)
    text = split.padded(sum(shape.text_tokens for shape in shapes)) // (split.tp * split.cp)
    return PackWork(share=split.share_tokens(shapes), text_share=text, lengths=tuple(sorted(shape.tokens for shape in shapes)))


def _busiest(config: RunConfig, packs: StepPacks) -> list[int]:
    hidden = config.model.hidden_size
    loads: dict[tuple[tuple[int, ...], ...], tuple[float, int]] = {}
    for number in range(len(packs.replicas)):
        computed = packs.computed(number)
        shape = tuple(tuple(clip.tokens for clip in pack) for pack in computed)
        if shape not in loads:
            loads[shape] = (sum(sample_cost(tokens, hidden_size=hidden) for pack in shape for tokens in pack), number)
    return [number for _, number in sorted(loads.values(), reverse=True)[:BUSIEST]]


def _most_clips(packs: StepPacks) -> list[PlannedClip]:
    """Clips of the replica with most pixels to encode."""
    replicas = [[clip for pack in packs for clip in pack] for packs in packs.replicas]
    return max(replicas, key=lambda clips: sum(clip.num_frames * clip.height * clip.width for clip in clips))


def _replica(config: RunConfig, packs: StepPacks, number: int, *, topology: Topology, hardware: Hardware) -> _Replica:
    works = [work_of(config, pack) for pack in packs.computed(number)]
    found = _run(config, works, topology=topology, setting=setting_of(config, hardware=hardware))
    if not hardware.compute_loss:
        return found
    for _ in range(ROUNDS):  # ranks share a computer: those that wait leave it to the others
        active = sum(found.schedule.busy) / found.schedule.end * topology.cp * topology.tp * topology.dp
        setting = setting_of(config, hardware=hardware, slower=hardware.slowed(max(1.0, active)))
        found = _run(config, works, topology=topology, setting=setting)
    return found


def _run(config: RunConfig, works: Sequence[PackWork], *, topology: Topology, setting: BlockSetting) -> _Replica:
    """A replica's pipeline, event by event."""
    passes = [_stage_passes(config, works, stage, setting=setting) for stage in range(topology.pp)]
    stride = topology.tp * topology.cp * topology.dp
    group = placement_of(size=topology.pp, stride=stride, domain=setting.hardware.node.ranks)
    h = setting.model.hidden_size
    message_s = [
        collective_s("send", (work.share + work.samples) * h * setting.number, placement=group, hardware=setting.hardware) for work in works
    ]
    schedule = simulate(
        [one.forward for one in passes], [one.backward for one in passes], message_s=message_s, overlapped=topology.vp is not None
    )
    return _Replica(schedule=schedule, stages=tuple(one.cost for one in passes), beside=tuple(one.beside for one in passes))


@dataclass(frozen=True, kw_only=True)
class _StagePasses:
    """What a stage runs for a step's packs."""

    forward: list[list[float]]
    """[chunk][micro-batch] seconds."""
    backward: list[list[float]]
    cost: Cost
    """Of all of them."""

    @property
    def beside(self) -> Beside:
        """Passes of all chunks together, micro-batch after micro-batch."""
        return Beside(
            forwards=tuple(sum(chunk) for chunk in zip(*self.forward, strict=True)),
            backwards=tuple(sum(chunk) for chunk in zip(*self.backward, strict=True)),
        )


def _stage_passes(config: RunConfig, works: Sequence[PackWork], stage: int, *, setting: BlockSetting) -> _StagePasses:
    chunks = [chunk_of(config, stage=stage, chunk=chunk) for chunk in range(config.parallel.num_model_chunks)]
    counts = Counter(works)
    forward = [{work: chunk_forward(setting, chunk, work) for work in counts} for chunk in chunks]
    backward = [{work: chunk_backward(setting, chunk, work) for work in counts} for chunk in chunks]
    cost = Cost()
    for passes in (*forward, *backward):
        for work, one in passes.items():
            cost += one * counts[work]
    return _StagePasses(
        forward=[[passes[work].total for work in works] for passes in forward],
        backward=[[passes[work].total for work in works] for passes in backward],
        cost=cost,
    )


def least_step_time(config: RunConfig, packs: StepPacks, *, world_size: int, hardware: Hardware, exchanges: bool = True) -> float:
    """A step cannot be shorter, whatever its schedule: the busiest stage has its passes to run, and what follows them.

    Never more than `forecast_step` gives for the same arguments; several times quicker. Without `exchanges` over DP it is a bound of every
    ZeRO stage.
    """
    topology = topology_of(config.parallel, world_size=world_size)
    setting = setting_of(config, hardware=hardware)
    works = [work_of(config, pack) for pack in packs.computed(_busiest(config, packs)[0])]
    data = _data_s(config, packs, world_size=world_size, hardware=hardware)
    least = 0.0
    for stage in range(topology.pp):
        passes = _stage_passes(config, works, stage, setting=setting)
        exchanged = data_parallel_s(config, stage, passes.beside, topology=topology, hardware=hardware) if exchanges else 0.0
        least = max(least, passes.cost.total + exchanged + optimizer_s(config, stage, topology=topology, hardware=hardware) + data)
    return least


def _data_s(config: RunConfig, packs: StepPacks, *, world_size: int, hardware: Hardware) -> float:
    """Seconds of the busiest rank in the encoders, and of the host that makes its micro-batches where a step waits for it."""
    ranks = config.parallel.model_parallel_size  # all ranks of a replica share out its clips
    encoded = encoding_s(config, _most_clips(packs), ranks=ranks, hardware=hardware)
    if not hardware.feed_s:
        return encoded
    own = (
        sum(clip.tokens for clip in clips[rank::ranks])
        for clips in ([clip for pack in packs.computed(number) for clip in pack] for number in range(len(packs.replicas)))
        for rank in range(ranks)
    )
    return (encoded + hardware.feed_s * max(own)) * hardware.slowed(world_size)


def _stage_parts(config: RunConfig, replica: _Replica, stage: int, *, data: float, topology: Topology, hardware: Hardware) -> StepParts:
    cost, schedule = replica.stages[stage], replica.schedule
    return StepParts(
        compute=cost.compute,
        gaps=cost.gaps,
        tensor_parallel=cost.tensor_parallel,
        context_parallel=cost.context_parallel,
        pipeline=schedule.messages[stage],
        bubble=schedule.end - schedule.busy[stage] - schedule.messages[stage],
        data_parallel=data_parallel_s(config, stage, replica.beside[stage], topology=topology, hardware=hardware),
        optimizer=optimizer_s(config, stage, topology=topology, hardware=hardware),
        data=data,
    )


def parts_dict(parts: StepParts) -> Mapping[str, float]:
    """Seconds by category."""
    return {name: float(getattr(parts, name)) for name in StepParts.__dataclass_fields__}
