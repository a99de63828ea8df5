"""The sampler resumes from any state, and packing many equal samples stays cheap."""

from __future__ import annotations

import json
import time
from dataclasses import asdict

from hypothesis import given, settings
from hypothesis import strategies as st

from megasora.data.plan import SamplerState, assign_packs, epoch_order, next_step


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(50, 200), st.integers(0, 5), st.integers(0, 10))
@settings(max_examples=25, deadline=None)
def test_a_resume_from_any_state_continues_the_same(tokens: list[int], budget: int, seed: int, stop: int) -> None:
    state, steps = SamplerState(), []
    for _ in range(stop + 4):
        steps.append(next_step(tokens, state, seed=seed, global_tokens=budget))
        state = steps[-1].state_after
    before = steps[stop - 1].state_after if stop else SamplerState()
    state = SamplerState(epoch=before.epoch, consumed=before.consumed)
    for wanted in steps[stop:]:
        epoch_order.cache_clear()
        step = next_step(tokens, state, seed=seed, global_tokens=budget)
        assert step == wanted
        state = step.state_after


def test_a_step_that_is_full_leaves_the_next_sample_to_the_next_step() -> None:
    step = next_step([4, 4, 4], SamplerState(), seed=0, global_tokens=11)
    assert len(step.samples) == 2
    assert step.state_after == SamplerState(epoch=0, consumed=2)
    last = next_step([4, 4, 4], step.state_after, seed=0, global_tokens=11)
    assert len(last.samples) == 1
    assert last.state_after == SamplerState(epoch=1, consumed=0)


def test_the_order_depends_on_seed_and_epoch() -> None:
    orders = {tuple(epoch_order(20, seed=seed, epoch=epoch)) for seed in (0, 1) for epoch in (0, 1)}
    assert len(orders) == 4


def test_fewer_samples_than_packs_leave_packs_empty() -> None:
    packs = assign_packs([5, 7], data_parallel_size=2, num_microbatches=2, hidden_size=64)
    assert sorted(pack for replica in packs for pack in replica) == [(), (), (0,), (1,)]


def test_thousands_of_images_in_one_pack_are_packed_at_once() -> None:
    started = time.perf_counter()
    packs = assign_packs([768] * 4000, data_parallel_size=1, num_microbatches=1, hidden_size=64)
    assert packs == [[tuple(range(4000))]]
    assert time.perf_counter() - started < 2.0  # quadratic in the samples it took tens of seconds with a few thousand


@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=30),
    st.integers(50, 150),
    st.integers(0, 2**32),
    st.lists(st.tuples(st.integers(1, 7), st.integers(1, 3), st.integers(1, 4)), min_size=1, max_size=4),
)
@settings(max_examples=2000, deadline=None)
def test_ranks_may_change_at_every_restart(tokens: list[int], budget: int, seed: int, runs: list[tuple[int, int, int]]) -> None:
    straight, state = [], SamplerState()
    for _ in range(sum(steps for _, _, steps in runs)):
        plan = next_step(tokens, state, seed=seed, global_tokens=budget)
        straight.append(sorted(plan.samples))
        state = plan.state_after
    taken, saved = [], "{}"
    for replicas, microbatches, steps in runs:  # each run is killed after its steps and goes on from what a checkpoint holds
        state = SamplerState(**json.loads(saved))
        for _ in range(steps):
            plan = next_step(tokens, state, seed=seed, global_tokens=budget)
            chosen = [tokens[sample] for sample in plan.samples]
            packs = assign_packs(chosen, data_parallel_size=replicas, num_microbatches=microbatches, hidden_size=64)
            assert [len(replica) for replica in packs] == [microbatches] * replicas
            taken.append(sorted(plan.samples[place] for replica in packs for pack in replica for place in pack))
            state = plan.state_after
        saved = json.dumps(asdict(state))
    assert taken == straight
