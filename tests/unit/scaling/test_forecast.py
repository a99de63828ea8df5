"""Times of blocks and steps: against what was measured, and against hand counts of FLOPs and bytes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megasora import recipes
from megasora.config.schema import ModelConfig, ParallelConfig, PrecisionConfig, RunConfig
from megasora.parallel.topology import Topology
from megasora.perf.hardware import Link, load_hardware, rate_at
from megasora.perf.memory_traffic import MOVE_NOTHING
from megasora.perf.profiles import H100
from megasora.scaling.forecast.block import PackWork, backward_cost, block_launches, forward_cost, linear_flops, setting_of
from megasora.scaling.forecast.chunk import END_LAUNCHES
from megasora.scaling.forecast.cost import StepParts
from megasora.scaling.forecast.encoders import encode_flops
from megasora.scaling.forecast.exchange import Beside, data_parallel_s
from megasora.scaling.forecast.run import forecast_run
from megasora.scaling.forecast.step import StepForecast, forecast_step
from megasora.scaling.settings import Failures
from megasora.scaling.workload import planned_clips, steps_of
from tests.pool import RankPool

SIX_CLIPS = PackWork(share=53_760, text_share=3_072, lengths=(8_960,) * 6)
ONE_CLIP = PackWork(share=76_544, text_share=512, lengths=(76_544,))


def run_of(**parallel: Any) -> RunConfig:
    config = recipes.get("opensora2_stage3")
    return replace(config, parallel=ParallelConfig(**parallel), data=replace(config.data, cache="latents"))


@pytest.mark.parametrize(
    ("work", "fp8", "measured_ms"), [(SIX_CLIPS, "none", 101.9), (ONE_CLIP, "none", 556.1), (SIX_CLIPS, "tensorwise", 83.48)]
)
def test_a_block_takes_what_it_took_on_an_h100(work: PackWork, fp8: str, measured_ms: float) -> None:
    """ms_per_block of benchmarks/results/2026-11-27_gpu_h100.md, 2 double and 4 single blocks, TE's attention: within 6 %."""
    config = replace(run_of(), precision=PrecisionConfig(fp8=fp8))  # type: ignore[arg-type]
    setting = setting_of(config, hardware=H100)
    stack = [(True, 2), (False, 4)]
    costs = [
        (forward_cost(setting, work, double=double) + backward_cost(setting, work, double=double, mode="none")) * count
        for double, count in stack
    ]
    assert sum(cost.total for cost in costs) / 6 * 1e3 == pytest.approx(measured_ms, rel=0.06)


def test_a_blocks_flops_are_24_h2_per_token() -> None:
    assert linear_flops(ModelConfig()) == 24 * 3072**2


def test_tensor_parallel_halves_compute_and_adds_collectives() -> None:
    alone = forward_cost(setting_of(run_of(), hardware=H100), ONE_CLIP, double=False)
    half = replace(ONE_CLIP, share=ONE_CLIP.share // 2)
    shared = forward_cost(setting_of(run_of(tensor_model_parallel_size=2), hardware=H100), half, double=False)
    assert alone.tensor_parallel == 0.0
    assert shared.compute == pytest.approx(alone.compute / 2, rel=0.02)
    payload = ONE_CLIP.share * 3072 * 2  # bytes of the gathered tokens
    by_hand = 2 * payload / 2 / 360e9 + 3 * 3072 * 2 / 2 / 360e9 + 3 * 6e-6  # a gather, a scatter, the modulation's gather
    assert shared.tensor_parallel == pytest.approx(by_hand, rel=1e-6)


def test_ulysses_sends_8_s_h_and_a_ring_hides_behind_attention() -> None:
    share = replace(ONE_CLIP, share=ONE_CLIP.share // 4, text_share=128)
    ulysses = setting_of(run_of(context_parallel_size=4), hardware=H100)
    cost = forward_cost(ulysses, share, double=True) + backward_cost(ulysses, share, double=True, mode="none")
    payload = 8 * ONE_CLIP.share // 4 * 3072 * 2
    assert cost.context_parallel == pytest.approx(payload * 3 / 4 / 360e9 + 4 * 3 * 6e-6, rel=1e-6)
    ring = setting_of(run_of(context_parallel_size=4, context_parallel_backend="ring"), hardware=H100)
    assert forward_cost(ring, share, double=True).context_parallel == 0.0
    slow = replace(H100, links=(Link(bytes_per_s=1e9, latency_s=0.0, ranks=8, source=""),))
    exposed = forward_cost(setting_of(run_of(context_parallel_size=4, context_parallel_backend="ring"), hardware=slow), share, double=True)
    assert exposed.context_parallel > 0


@pytest.mark.parametrize(("mode", "more"), [("none", 0.0), ("full", 1.0)])
def test_full_recomputation_adds_a_forward_pass(mode: str, more: float) -> None:
    setting = setting_of(run_of(), hardware=H100)
    forward = forward_cost(setting, SIX_CLIPS, double=True)
    kept = backward_cost(setting, SIX_CLIPS, double=True, mode="none")
    again = backward_cost(setting, SIX_CLIPS, double=True, mode=mode)
    assert again.total == pytest.approx(kept.total + more * forward.total)


def test_gradients_hide_behind_the_last_backward_pass() -> None:
    """11.9 B parameters over 8 GPUs of a node: 4 x 11.9e9 bytes out and 2 x 11.9e9 back, 7/8 of them at 360 GB/s: 0.116 and 0.058 s."""
    config, topology = run_of(), Topology(dp=8)
    hidden = data_parallel_s(config, 0, Beside(forwards=(1.0,), backwards=(1.0,)), topology=topology, hardware=H100)
    nothing = replace(config, parallel=replace(config.parallel, overlap_grad_reduce=False, overlap_param_gather=False))
    exposed = data_parallel_s(nothing, 0, Beside(forwards=(1.0,), backwards=(1.0,)), topology=topology, hardware=H100)
    assert exposed == pytest.approx(6 * 11_891_390_528 * 7 / 8 / 360e9, rel=0.15)  # and latencies of 297 buckets
    assert hidden < 0.01
    fully = replace(config, parallel=replace(config.parallel, zero_stage=3))
    four = Beside(forwards=(0.001,) * 4, backwards=(0.001,) * 4)
    assert data_parallel_s(fully, 0, four, topology=topology, hardware=H100) > 4 * 0.1


def test_a_steps_parts_add_up_and_the_largest_clips_reach_the_published_order() -> None:
    config = run_of(context_parallel_size=4, recompute="full")
    (packs,) = steps_of(config, planned_clips(config), world_size=192)
    step = forecast_step(config, packs, world_size=192, hardware=load_hardware("h200"))
    assert sum(getattr(step.parts, field.name) for field in fields(StepParts)) == pytest.approx(step.step_time_s)
    assert step.samples == 96
    assert step.flops == 3 * 57 * 96 * (24 * 3072**2 * 76_544 + 4 * 76_544**2 * 3072)
    assert step.mfu == pytest.approx(step.flops / step.step_time_s / 192 / 989e12)
    assert 0.33 < step.mfu < 0.45  # published: 0.3575 with slower kernels


def test_encoding_is_shared_out_and_gone_with_a_cache() -> None:
    config = recipes.get("opensora2_stage3")
    (clip,) = planned_clips(config)
    assert encode_flops(clip, config.encoders) == pytest.approx(1_111e12 + 2 * 4.76e9 * 512, rel=0.005)  # dc_ae.md: 1,111 TFLOP
    (packs,) = steps_of(config, (clip,), world_size=192)
    beside = forecast_step(config, packs, world_size=192, hardware=load_hardware("h200"))
    cached = forecast_step(replace(config, data=replace(config.data, cache="x")), packs, world_size=192, hardware=load_hardware("h200"))
    assert beside.step_time_s - cached.step_time_s == pytest.approx(beside.parts.data)
    assert beside.parts.data == pytest.approx(encode_flops(clip, config.encoders) / 168e12)  # two clips, four ranks: one each


def test_ranks_on_one_computer_slow_each_others_encoders_and_optimizers() -> None:
    """Four ranks that keep half a core each share out a step's clips: two ranks' worth of time."""
    machine = replace(H100, device="cpu", feed_s=1e-6, rates=replace(H100.rates, encoder=0.0))
    shared = replace(machine, compute_loss=((1.0, 1.0), (2.0, 1.0), (4.0, 0.5)))
    config = recipes.get("opensora2_stage3")
    config = replace(config, parallel=replace(config.parallel, context_parallel_size=4), data=replace(config.data, num_microbatches=8))
    (packs,) = steps_of(config, planned_clips(config), world_size=4)
    clips = [clip for pack in packs.computed(0) for clip in pack]
    most = -(-len(clips) // 4) * clips[0].tokens
    apart, together = (forecast_step(config, packs, world_size=4, hardware=one).parts for one in (machine, shared))
    assert apart.data == pytest.approx(1e-6 * most)
    assert together.data == pytest.approx(2 * apart.data)
    assert together.optimizer == pytest.approx(2 * apart.optimizer)


def test_failures_cost_half_an_interval_and_a_restart() -> None:
    step = StepForecast(
        step_time_s=10.0,
        parts=StepParts(compute=10.0),
        stages=(StepParts(compute=10.0),),
        bubble=0.0,
        samples=1,
        tokens=1,
        flops=1.0,
        world_size=1000,
        peak=None,
        peak_memory_bytes=0,
    )
    config = replace(run_of(), checkpoint=replace(run_of().checkpoint, interval_steps=100), train=replace(run_of().train, steps=1000))
    fast = replace(H100, host_bytes_per_s=1e30, dollars_per_gpu_hour=2.0)
    run = forecast_run(config, step, hardware=fast, failures=Failures(gpu_hours_between=10_000, restart_s=300))
    assert run.goodput == pytest.approx(1 - (500 + 300) / (10 * 3600))
    assert run.gpu_hours == pytest.approx(1000 * 10_000 / 3600 / run.goodput)
    assert run.dollars == pytest.approx(2.0 * run.gpu_hours)
    late = forecast_run(config, step, hardware=fast, failures=Failures(gpu_hours_between=10_000, restart_s=300, straggling=0.1))
    assert late.hours / run.hours == pytest.approx(1.1 * run.goodput / late.goodput)


class Calls(TorchDispatchMode):
    """Counts operations that launch a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        name = func.overloadpacket.__name__
        self.count[name] += name not in MOVE_NOTHING
        return func(*args, **(kwargs or {}))


def launches(rank: int, cp: int, grids: list[tuple[int, int, int]]) -> list[tuple[int, int]]:
    """(forward, backward) of stacks of 1 + 1, 2 + 1 and 1 + 2 blocks on one of `cp` ranks of a ring."""
    from megasora.models.mmdit.build import build_chunks
    from megasora.models.mmdit.model import ModelInputs
    from megasora.parallel import groups
    from megasora.parallel.pack import Pack, PackSplit, SampleShape

    parallel = ParallelConfig(context_parallel_size=cp, context_parallel_backend="ring")
    context = groups.initialize(parallel, device=groups.choose_device("cpu"), num_attention_heads=8, seed=0)
    found = []
    for double, single in ((1, 1), (2, 1), (1, 2)):
        model = replace(recipes.get("tiny").model, num_double_blocks=double, num_single_blocks=single)
        (chunk,), _ = build_chunks(model, parallel, PrecisionConfig(dtype="fp32"), context=context)
        for parameter in chunk.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
            parameter.main_grad = torch.zeros_like(parameter)
        pack = Pack([SampleShape(text_tokens=16, grid=grid) for grid in grids], split=PackSplit(cp=cp))
        pack.prepare(context.context.members)
        inputs = ModelInputs(
            img=torch.randn(pack.num_video, model.in_channels),
            txt=torch.randn(pack.num_text, model.text_dim),
            t=torch.rand(len(grids)),
            y_vec=torch.randn(len(grids), model.vec_dim),
            cond=torch.randn(pack.num_video, model.cond_channels),
        )
        for _ in range(2):  # the first pass makes what packs keep
            with Calls() as forward:
                output = chunk(inputs, pack, None)
            with Calls() as backward:
                output.sum().backward()
        found.append((sum(forward.count.values()), sum(backward.count.values())))
    return found


GRIDS = [(3, 4, 4), (5, 4, 4), (2, 4, 6), (4, 4, 4)]


@pytest.mark.parametrize(
    ("cp", "grids"),
    [(1, GRIDS[:1]), (1, GRIDS[:1] * 2), (1, GRIDS[:1] * 3), (1, GRIDS[:2]), (1, GRIDS), (2, GRIDS[:1]), (2, GRIDS[:3]), (4, GRIDS[:2])],
    ids=["one", "two equal", "three equal", "two", "four", "one over two", "three over two", "two over four"],
)
def test_torchs_launches_are_counted(pool: RankPool, cp: int, grids: list[tuple[int, int, int]]) -> None:
    (both, double, single), *_ = pool.run(cp, launches, cp, grids)
    config = replace(run_of(), parallel=ParallelConfig(context_parallel_size=cp, context_parallel_backend="ring"))
    setting = replace(setting_of(config, hardware=H100), kernels="torch")
    work = PackWork(share=64, text_share=16, lengths=tuple(16 + math.prod(grid) for grid in grids))
    for way in (0, 1):
        of_double, of_single = double[way] - both[way], single[way] - both[way]
        forecast = [block_launches(setting, work, double=kind, backward=bool(way)) for kind in (True, False)]
        assert [of_double, of_single] == forecast
        if len(grids) == 2 and cp == 1:
            assert both[way] - of_double - of_single == pytest.approx(2 * END_LAUNCHES[way], abs=1)


def test_rates_fall_where_packs_are_small() -> None:
    assert rate_at(H100.rates.matmul, 1024) < rate_at(H100.rates.matmul, 65_536)
