"""Job files on a real Slurm: whatever ends an attempt, the run goes on where it stopped, on the same curve, or ends for a reason."""

from __future__ import annotations

import os
import re

import pytest

from tests.slurm.jobs import STEPS, Jobs

pytestmark = pytest.mark.slow
SAVES = ("--checkpoint.interval_steps", "8", "--checkpoint.no_asynchronous")
"""At step 8, before step 9: in a run of seconds the thread that writes beside it may come to its end too late to be killed after."""


def test_a_warned_run_goes_on_with_other_nodes_on_the_same_curve(jobs: Jobs) -> None:
    """What --signal=USR1 does before the time limit, twice: on one node, then on two, then on one."""
    number = jobs.start(nodes=1)
    for step, nodes in ((2, 2), (8, 1)):
        jobs.wait_for_step(step)
        jobs.cluster.ask("scancel", "--signal=USR1", str(number))
        jobs.wait_for_state(number, "PENDING")
        jobs.cluster.ask("scontrol", "update", f"JobId={number}", f"NumTasks={nodes}", f"NumCPUs={nodes}", f"NumNodes={nodes}-{nodes}")
    job = jobs.wait_for_state(number, "COMPLETED")
    assert job["Restarts"] == "2"
    assert re.findall(r"x (DP \d) on", jobs.log(number)) == ["DP 1", "DP 2", "DP 1"]
    assert len(jobs.restarts_from()) == 2
    jobs.assert_straight()


def test_a_preempted_run_saves_and_is_requeued(jobs: Jobs) -> None:
    number = jobs.start()
    jobs.wait_for_step(2)
    urgent = jobs.folder / "urgent.sbatch"
    urgent.write_text("#!/bin/bash\nsleep 1\n")
    jobs.numbers.append(jobs.cluster.submit(urgent, options=("--partition=high", "--nodes=3", "--exclusive")))
    jobs.wait_for_state(number, "PENDING")
    reached = jobs.metrics()[-1]["step"]
    assert 0 < reached < STEPS
    assert jobs.wait_for_state(number, "COMPLETED")["Restarts"] == "1"
    assert jobs.restarts_from() == [reached]
    assert "stopped as asked" in jobs.log(number)
    jobs.assert_straight()


def test_a_rank_that_is_killed_costs_one_restart(jobs: Jobs) -> None:
    number = jobs.start(*SAVES, nodes=2)
    jobs.wait_for_checkpoint()
    jobs.kill_a_rank()
    assert jobs.wait_for_state(number, "COMPLETED", "FAILED")["JobState"] == "COMPLETED"
    assert "requeued" in jobs.log(number) and "crash (exit code 137)" in jobs.log(number)
    assert len(restarts := jobs.restarts_from()) == 1 and restarts[0] in range(8, STEPS, 8)
    jobs.assert_straight()


def test_a_mistake_is_not_repeated(jobs: Jobs) -> None:
    number = jobs.start("--parallel.tensor_model_parallel_size", "4", nodes=2)
    job = jobs.wait_for_state(number, "FAILED")
    assert (job["ExitCode"], job["Restarts"]) == ("2:0", "0")
    assert "not requeued: a mistake" in jobs.log(number)
    assert "megasora: error: parallel" in jobs.log(number)


def test_a_cancelled_job_stays_cancelled(jobs: Jobs) -> None:
    number = jobs.start(nodes=1)
    jobs.wait(lambda: "RUNNING" in jobs.cluster.job(number)["JobState"], "the start")
    jobs.wait(lambda: (jobs.run_dir / ".mistake").parent.exists() and jobs.cluster.ask("squeue", "-h", "-s"), "its step")
    jobs.cluster.ask("scancel", str(number))
    assert jobs.wait_for_state(number, "CANCELLED")["Restarts"] == "0"


def test_a_failed_node_is_left_behind(jobs: Jobs) -> None:
    """Slurm requeues the job; the next attempt trains within a minute of the node being down."""
    number = jobs.start(*SAVES, nodes=2)
    jobs.wait_for_checkpoint()
    nodes = jobs.cluster.job(number)["NodeList"]
    failed = "n2" if nodes == "n[1-2]" else "n3"
    jobs.cluster.fail_node(failed)
    try:
        jobs.wait(lambda: "DOWN" in jobs.cluster.ask("sinfo", "-h", "-N", "-n", failed, "-o", "%T").upper(), f"{failed} down")
        took = jobs.wait(lambda: jobs.restarts_from(), "the next attempt's first step")
        print(f"training again {took:.1f} s after the node was down")
        assert took < 60 * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))  # on a machine that has nothing else to do
        assert failed not in jobs.cluster.job(number)["NodeList"].replace("[1,3]", "1,n3")
        assert jobs.wait_for_state(number, "COMPLETED")["Restarts"] == "1"
        jobs.assert_straight()
    finally:
        jobs.cluster.start_node(failed)


def test_torchrun_starts_a_killed_rank_again_in_place(jobs: Jobs) -> None:
    number = jobs.start(*SAVES, ranks_per_node=2, render=("--launcher", "torchrun"))
    jobs.wait_for_checkpoint()
    jobs.kill_a_rank()
    job = jobs.wait_for_state(number, "COMPLETED", "FAILED")
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "0")
    assert len(restarts := jobs.restarts_from()) == 1 and restarts[0] in range(8, STEPS, 8)
    jobs.assert_straight()


def test_crashes_without_a_new_step_end_the_job(jobs: Jobs) -> None:
    """A program that always crashes: no mistake of the user's, and nothing that another try would mend."""
    (jobs.folder / "bin" / "megasora").write_text("#!/bin/sh\nexit 139\n")
    number = jobs.start(MAX_CRASHES="2")
    job = jobs.wait_for_state(number, "FAILED")
    assert job["Restarts"] == "1"
    assert "not requeued: crash 2 in a row without a new step (exit code 139)" in jobs.log(number)
