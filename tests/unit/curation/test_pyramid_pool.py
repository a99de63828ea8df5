"""Rows in killable processes: every way a worker can fail costs its own row; the table does not depend on who did what when."""

from __future__ import annotations

import os
import signal
import socket
import time
from functools import partial
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from megasora.config.errors import UserError
from megasora.curation.pool import LocalPool, Row
from megasora.curation.settings import Limits
from megasora.curation.tables import Stage, metadata_of, run_stage, table_schema

SCHEMA = pa.schema([("id", pa.string()), ("value", pa.int64()), ("hashes", pa.list_(pa.binary(4))), ("error", pa.string())])


def misbehave(row: Row) -> list[Row]:
    what = row["what"]
    if what == "hang":
        time.sleep(60)
    if what == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if what == "grow":
        return [{"big": len(bytearray(3 * 10**9))}]
    if what == "raise":
        raise RuntimeError("a library's own bug")
    if what == "refuse":
        raise UserError("this would fail for every row")
    return [{"id": what}]


def twice(row: Row, *, marks: Path | None = None) -> list[Row]:
    """Two results a row; leaves a mark so that the test can count calls."""
    if marks is not None:
        (marks / f"{row['id']}-{time.monotonic_ns()}").touch()
    time.sleep(0.001 * (7 * int(row["id"]) % 5))
    return [{"id": f"{row['id']}.{n}", "value": 10 * int(row["id"]) + n, "hashes": [b"abcd"] * n, "error": ""} for n in range(2)]


def stop_at_six(row: Row, *, marks: Path) -> list[Row]:
    if row["id"] == "6":
        raise UserError("stopped")
    return twice(row, marks=marks)


def stage(work: object, **settings: object) -> Stage:
    return Stage(name="try", work=work, on_failure=lambda row, reason: {"id": row["id"], "error": reason}, schema=SCHEMA, settings=settings)


def rows(count: int) -> list[Row]:
    return [{"id": str(n)} for n in range(count)]


def test_a_hang_a_crash_and_too_much_memory_cost_their_own_rows() -> None:
    limits = Limits(workers=2, timeout_s=1.5, memory_gb=1.0)
    kinds = ["good 1", "hang", "crash", "grow", "raise", "good 2"]
    with LocalPool(misbehave, limits) as pool:
        found = {outcome.key: outcome for outcome in pool.outcomes((kind, {"what": kind}) for kind in kinds)}
    assert {kind: outcome.reason for kind, outcome in found.items()} == {
        "good 1": "",
        "good 2": "",
        "hang": "took longer than 1.5 s",
        "crash": "ended the worker process (SIGSEGV)",
        "grow": "needed more than 1 GB of memory",
        "raise": "RuntimeError: a library's own bug",
    }
    assert found["good 2"].rows == ({"id": "good 2"},)


def test_a_mistake_that_every_row_would_repeat_ends_the_run() -> None:
    with pytest.raises(UserError, match="this would fail for every row"), LocalPool(misbehave, Limits(workers=1)) as pool:
        list(pool.outcomes([("refuse", {"what": "refuse"})]))


def test_the_table_is_in_input_order_whoever_is_faster(tmp_path: Path) -> None:
    for workers in (1, 3):
        summary = run_stage(stage(twice), iter(rows(20)), total=20, output=tmp_path / f"{workers}.parquet", limits=Limits(workers=workers))
        assert (summary.rows_in, summary.rows_out, summary.failed) == (20, 40, 0)
    one, three = (parquet.read_table(tmp_path / f"{workers}.parquet") for workers in (1, 3))
    assert one.equals(three)
    assert one["value"].to_pylist() == [10 * n + k for n in range(20) for k in range(2)]
    assert one.schema.field("hashes").type == pa.list_(pa.binary(4))
    assert metadata_of(table_schema(tmp_path / "1.parquet"))["stage"] == "try"
    assert not list(tmp_path.glob("*.parts")) and not list(tmp_path.glob(".*"))


def test_an_interrupted_stage_goes_on_and_repeats_nothing(tmp_path: Path) -> None:
    marks, output = tmp_path / "marks", tmp_path / "out.parquet"
    marks.mkdir()
    with pytest.raises(UserError, match="stopped"):
        run_stage(stage(partial(stop_at_six, marks=marks)), rows(12), total=12, output=output, limits=Limits(workers=1))
    done = len(list(marks.iterdir()))
    assert not output.exists() and 0 < done < 12
    summary = run_stage(stage(partial(twice, marks=marks)), rows(12), total=12, output=output, limits=Limits(workers=2))
    assert summary.resumed == 6  # rows 0 to 5 had come back when row 6 stopped the run
    assert summary.rows_out == 24
    whole = tmp_path / "whole.parquet"
    run_stage(stage(twice), rows(12), total=12, output=whole, limits=Limits(workers=2))
    assert parquet.read_table(output).equals(parquet.read_table(whole))


def test_parts_of_other_settings_are_refused(tmp_path: Path) -> None:
    marks = tmp_path / "marks"
    marks.mkdir()
    output = tmp_path / "out.parquet"
    with pytest.raises(UserError, match="stopped"):
        run_stage(stage(partial(stop_at_six, marks=marks), a=1), rows(8), total=8, output=output, limits=Limits(workers=1))
    with pytest.raises(UserError, match="other settings; remove it, or give --overwrite"):
        run_stage(stage(twice, a=2), rows(8), total=8, output=output, limits=Limits(workers=1))
    run_stage(stage(twice, a=2), rows(8), total=8, output=output, limits=Limits(workers=1), overwrite=True)
    with pytest.raises(UserError, match="exists; give --overwrite or another name"):
        run_stage(stage(twice, a=2), rows(8), total=8, output=output, limits=Limits(workers=1))


def test_an_id_that_occurs_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'1' occurs twice"):
        run_stage(stage(twice), [*rows(3), {"id": "1"}], total=4, output=tmp_path / "a.parquet", limits=Limits(workers=1))


def test_an_address_where_nothing_listens_is_refused_at_once(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    started = time.monotonic()
    with pytest.raises(UserError, match=f"--ray {address}: nothing answers there"):
        run_stage(stage(twice), rows(3), total=3, output=tmp_path / "a.parquet", limits=Limits(ray=address))
    assert time.monotonic() - started < 15


@pytest.mark.slow
def test_a_ray_cluster_gives_the_same_table_and_keeps_the_limits(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    for name, ray in (("local", None), ("ray", "local")):
        limits = Limits(workers=2, ray=ray)
        run_stage(stage(twice), rows(30), total=30, output=tmp_path / f"{name}.parquet", limits=limits)
    assert parquet.read_table(tmp_path / "ray.parquet").equals(parquet.read_table(tmp_path / "local.parquet"))
