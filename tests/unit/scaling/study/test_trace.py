"""Traces: small ones written by hand in torch's format, and real ones of gloo ranks."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megasora import cli
from megasora.config.errors import UserError
from megasora.perf.named_collectives import NamedCollectives
from megasora.perf.ranges import axis_of
from megasora.perf.timeline import Interval, busy, clipped, layered
from megasora.scaling.study.trace.breakdown import COLUMNS, steps_of
from megasora.scaling.study.trace.file import read_trace
from megasora.scaling.study.trace.summary import mean_parts, read_steps
from tests.pool import RankPool


def span(start: float, stop: float, name: str = "") -> Interval:
    return Interval(name=name, start=start, stop=stop)


def event(name: str, start: float, stop: float, *, cat: str = "user_annotation", tid: int = 1, **args: Any) -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "pid": 1, "tid": tid, "ts": start, "dur": stop - start, "args": args}


def written(path: Path, events: list[dict[str, Any]], **more: Any) -> Path:
    """A trace file with an event that is no interval in front, as torch writes it."""
    data = {"schemaVersion": 1, **more, "traceEvents": [{"ph": "M", "name": "process_name", "pid": 1, "tid": 0, "args": {}}, *events]}
    path.write_bytes(gzip.compress(json.dumps(data).encode()))
    return path


def kernel(
    name: str, start: float, stop: float, correlation: int, *, launched: float, stream: int = 7, **args: Any
) -> list[dict[str, Any]]:
    """A kernel and the runtime call that launched it."""
    call = event("cudaLaunchKernel", launched, launched + 1, cat="cuda_runtime", correlation=correlation)
    return [call, event(name, start, stop, cat="kernel", tid=stream, stream=stream, correlation=correlation, **args)]


TP = {"Collective name": "_allgather_base", "Process Group Description": "TENSOR_MODEL_PARALLEL_GROUP", "Process Group Name": "3"}


def test_time_counts_once() -> None:
    assert busy([span(0, 10), span(5, 12), span(20, 21)]) == 13
    assert clipped([span(0, 10), span(20, 30)], start=5, stop=20) == [span(5, 10)]
    assert layered([("a", [span(0, 4)]), ("b", [span(2, 8)]), ("a", [span(7, 9)])]) == {"a": 5, "b": 4}


def test_groups_have_axes() -> None:
    names = ("TENSOR_MODEL_PARALLEL_GROUP", "CONTEXT_ULYSSES", "PIPELINE_MODEL_PARALLEL_GROUP", "DATA_PARALLEL_GROUP_WITH_CP", "default_pg")
    assert [axis_of(name) for name in names] == ["tp", "cp", "pp", "dp", "world"]
    assert [axis_of(name) for name in ("REPLICA", "MODEL_PARALLEL_GROUP", "TENSOR_AND_CONTEXT_PARALLEL_GROUP", "")] == ["world"] * 4


def gpu_events() -> list[dict[str, Any]]:
    """A step of 100 us: data 0-10, forward and backward 10-70, optimizer 70-100."""
    return [
        event("step|5", 0, 100),
        event("place|data", 0, 10),
        event("place|forward_backward", 10, 70),
        event("place|optimizer", 70, 100),
        *kernel("sm90_xmma_gemm", 12, 30, 1, launched=11),
        *kernel("ncclDevKernel_AllGather_RING_LL", 25, 40, 2, launched=12, stream=20, **TP),  # exposed 30 to 40
        *kernel("ncclDevKernel_SendRecv", 40, 44, 3, launched=13, stream=21, **{"Process Group Name": "9"}),  # the journey: 4
        *kernel("ncclDevKernel_SendRecv", 44, 54, 4, launched=14, stream=21, **{"Process Group Name": "9"}),  # 6 of it waiting
        *kernel("vectorized_elementwise_kernel", 54, 60, 5, launched=15),
        *kernel("multi_tensor_apply_kernel", 72, 90, 6, launched=71),
        *kernel("ncclDevKernel_AllReduce", 92, 95, 7, launched=73, stream=22, **{"Process Group Description": "default_pg"}),
        event("aten::mm", 11, 12, cat="cpu_op"),
    ]


def test_a_gpu_trace_by_hand(tmp_path: Path) -> None:
    groups = {"rank": 3, "pg_config": [{"pg_name": "9", "pg_desc": "PIPELINE_MODEL_PARALLEL_GROUP"}]}
    (step,) = steps_of(read_trace(written(tmp_path / "a.json.gz", gpu_events(), distributedInfo=groups)))
    assert (step.rank, step.step, step.seconds) == (3, 5, pytest.approx(100e-6))
    wanted = {"compute": 24, "tensor_parallel": 10, "pipeline": 8, "bubble": 6 + 3, "optimizer": 18, "data": 10, "gaps": 21}
    assert {name: pytest.approx(value * 1e-6) for name, value in wanted.items()} == {k: v for k, v in step.parts.items() if v}
    assert step.communication["tp"] == pytest.approx(15e-6)  # 5 of them under the product


def test_a_cpu_trace_by_hand(tmp_path: Path) -> None:
    """Operators enclose the wait: what is left of them computes."""
    events = [
        event("step|1", 0, 100),
        event("place|data", 0, 20),
        event("place|forward_backward", 20, 90),
        event("place|save", 90, 100),
        event("aten::conv3d", 2, 15, cat="cpu_op"),
        event("GatherBackward", 30, 60, cat="cpu_op"),
        event("comm|tp|all_gather", 35, 36),
        event("comm|tp|all_gather|wait", 36, 50),
        event("aten::mm", 65, 75, cat="cpu_op"),
        event("aten::mul", 66, 67, cat="cpu_op"),
        event("gloo:all_gather", 30, 90, tid=9),  # gloo's own thread
    ]
    (step,) = steps_of(read_trace(written(tmp_path / "a.json.gz", events, megasora={"rank": 0})))
    wanted = {"compute": 25, "tensor_parallel": 15, "data": 20, "gaps": 30, "other": 10}
    assert {name: pytest.approx(value * 1e-6) for name, value in wanted.items()} == {k: v for k, v in step.parts.items() if v}


def test_means_leave_out_the_step_in_which_the_profiler_starts(tmp_path: Path) -> None:
    events = [event("step|1", 0, 100), event("step|2", 100, 110), event("aten::mm", 100, 104, cat="cpu_op")]
    written(tmp_path / "rank_00000.json.gz", events)
    found = mean_parts([tmp_path, tmp_path / "none"])
    assert found is not None
    assert (found["compute"], found["gaps"]) == (pytest.approx(4e-6), pytest.approx(6e-6))
    assert mean_parts([tmp_path / "none"]) is None


def test_what_is_no_trace_is_refused_with_its_cure(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no traces; make some: megasora train"):
        read_steps(tmp_path)
    (tmp_path / "a.json.gz").write_bytes(b"no gzip")
    with pytest.raises(UserError, match="a.json.gz"):
        read_steps(tmp_path)
    written(tmp_path / "a.json.gz", [event("aten::mm", 0, 1, cat="cpu_op")])
    with pytest.raises(UserError, match="names no steps"):
        read_steps(tmp_path)


def traced(rank: int, folder: str) -> None:
    """A blocking collective of two axes, and compute under an asynchronous one."""
    tensor = dist.new_group(list(range(dist.get_world_size())), group_desc="TENSOR_MODEL_PARALLEL_GROUP")
    names = NamedCollectives()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        names.install()
        with torch.profiler.record_function("step|1"), torch.profiler.record_function("place|forward_backward"):
            x = torch.ones(1000)
            dist.all_reduce(x, group=tensor)
            work = dist.all_reduce(x, async_op=True)
            torch.randn(300, 300) @ torch.randn(300, 300)
            work.wait()
        names.remove()
    dist.all_reduce(x)  # unnamed again
    Path(folder).mkdir(exist_ok=True)
    profile.export_chrome_trace(f"{folder}/rank_{rank:05d}.json.gz")


@pytest.mark.parametrize("ranks", [2, 4])
def test_gloo_ranks_name_what_they_wait_for(tmp_path: Path, pool: RankPool, ranks: int) -> None:
    pool.run(ranks, traced, str(tmp_path / "profile"))
    rows = read_steps(tmp_path)
    assert len(rows) == ranks
    for row in rows:
        assert sum(row.parts.values()) == pytest.approx(row.seconds, rel=1e-6)
        assert row.exposed["tp"] > 0
        assert row.exposed["world"] > 0
        assert row.parts["compute"] > 0
    operations = {(c.axis, c.operation) for c in read_trace(tmp_path / "profile" / "rank_00000.json.gz").collectives}
    assert operations == {("tp", "all_reduce"), ("world", "all_reduce")}


def test_the_command_prints_one_object(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written(tmp_path / "rank_00000.json.gz", gpu_events())
    cli.main(["study", "trace", str(tmp_path), "--json"])
    data = json.loads(capsys.readouterr().out)
    assert sorted(data["mean"]) == sorted(COLUMNS)
    assert data["steps"][0]["step"] == 5
    cli.main(["study", "trace", str(tmp_path)])
    assert "bubble" in capsys.readouterr().out
