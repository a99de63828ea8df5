"""When a run is started again, and how supervisors agree on it."""

from __future__ import annotations

import threading

import pytest
from torch.distributed import HashStore

from megasora.recovery.agreement import Agreement, PeerLostError, Place
from megasora.recovery.restarts import Decision, Life, RestartBudget, RestartPolicy, decide


def life(rank: int, code: int, *, by_supervisor: bool = False, stopping: bool = False) -> Life:
    return Life(rank=rank, code=code, by_supervisor=by_supervisor, stopping=stopping)


def budget(**policy: float) -> RestartBudget:
    return RestartBudget(RestartPolicy(**policy))  # type: ignore[arg-type]


def test_waits_double_until_a_step_is_made() -> None:
    of_run = budget(max_restarts=4, backoff_s=5.0, max_backoff_s=30.0)
    assert [of_run.after_death(10) for _ in range(5)] == [5.0, 10.0, 20.0, 30.0, None]


def test_a_death_further_on_refills_the_budget() -> None:
    of_run = budget(max_restarts=2, backoff_s=1.0)
    assert [of_run.after_death(step) for step in (10, 10, 11, 9, 11)] == [1.0, 2.0, 1.0, 2.0, None]


def test_a_dead_rank_restarts_all() -> None:
    decision = decide([life(0, 1), life(1, -9), life(2, -9, by_supervisor=True)], budget=budget(), step=3)
    assert decision == Decision(restart=True, reason="rank 1 ended with signal 9", wait_s=5.0)


def test_a_users_mistake_is_never_restarted() -> None:
    decision = decide([life(0, 1), life(1, 2)], budget=budget(), step=3)
    assert (decision.restart, decision.code) == (False, 2)


def test_a_run_that_was_asked_to_stop_is_not_restarted() -> None:
    assert decide([life(0, 0, stopping=True), life(1, 0)], budget=budget(), step=3).code == 0
    assert decide([life(0, -15, stopping=True), life(1, 1)], budget=budget(), step=3) == Decision(
        restart=False, reason="asked to stop", code=143
    )


def test_without_budget_the_code_of_the_dead_is_passed_on() -> None:
    decision = decide([life(0, 75), life(1, -9, by_supervisor=True)], budget=budget(max_restarts=0), step=3)
    assert (decision.restart, decision.code) == (False, 75)
    assert decision.reason == "rank 0 ended with exit code 75; no restart is left without a new step"


def test_all_supervisors_read_one_decision() -> None:
    store = HashStore()
    sides = [Agreement(store, Place(rank=rank, world_size=3), timeout_s=20) for rank in range(3)]
    read: list[Decision] = []

    def follow(rank: int) -> None:
        sides[rank].tell_end(0, life(rank, 1))
        read.append(sides[rank].decision(0))

    followers = [threading.Thread(target=follow, args=(rank,)) for rank in (1, 2)]
    for follower in followers:
        follower.start()
    sides[0].tell_end(0, life(0, -9))
    decision = decide(sides[0].ends(0), budget=budget(), step=0)
    sides[0].tell_decision(0, decision)
    for follower in followers:
        follower.join()
    assert read == [decision, decision]


def test_a_supervisor_that_does_not_answer_is_named() -> None:
    leader = Agreement(HashStore(), Place(rank=0, world_size=2), timeout_s=0.0, sleep=lambda seconds: None)
    leader.tell_end(4, life(0, 1))
    with pytest.raises(PeerLostError, match="the supervisor of rank 1 did not say how its rank ended within 0 s; its node may be gone"):
        leader.ends(4)


def test_generations_take_other_ports_than_the_last() -> None:
    place = Place(rank=0, world_size=2, master_port=29500)
    ports = [place.rank_port(generation) for generation in range(60)]
    assert place.store_port not in ports
    assert all(port != next_one for port, next_one in zip(ports, ports[1:], strict=False))
    assert max(ports) == 29551
