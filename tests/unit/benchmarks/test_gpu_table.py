"""The GPU table is written whatever happens: sections fail, time runs out, the process dies."""

from __future__ import annotations

import inspect
import json
import math
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from benchmarks.gpu.blocks import NAMES, supervise
from benchmarks.gpu.operations import OPERATIONS, attention_cases, kernel_cases
from benchmarks.gpu.rig import Setup, versions
from benchmarks.gpu.stack import trace_cases
from benchmarks.gpu.table import Case, LeftOutError, Row, Section, Table, run_sections
from benchmarks.gpu.timeline import Interval, summarise
from benchmarks.gpu.worker import sections_of
from megasora.models.mmdit.kernels.contract import Kernels

CPU = Setup(context=Mock(device=torch.device("cpu")), small=True)
"""Of these sections no one asks for more than the device."""


def section(*cases: Case) -> Section:
    """Of cases made by hand."""
    return Section(about="", cases=lambda: cases)


def one(row: Row) -> Section:
    """One case that gives this row."""
    return section(Case(labels={}, measure=lambda: row))


def breaks() -> Row:
    raise RuntimeError("CUDA error: a launch failed")


def rows_of(folder: Path) -> dict[str, list[Row]]:
    """What the JSON file holds."""
    return {name: section["rows"] for name, section in json.loads((folder / "blocks.json").read_text())["sections"].items()}


def test_the_small_table_on_a_cpu_measures_torch_and_leaves_out_what_needs_cuda(tmp_path: Path) -> None:
    table = Table(tmp_path)
    table.describe(versions(CPU.device) | {"command": "python benchmarks/gpu/blocks.py"})
    makers = {"kernels": kernel_cases, "attention": attention_cases, "trace": trace_cases}
    sections = {name: Section(about="", cases=lambda make=make: make(CPU)) for name, make in makers.items()}
    run_sections(table, sections, deadline=time.time() + 60)
    rows = rows_of(tmp_path)
    assert [(row["operation"], row["kernels"]) for row in rows["kernels"]] == [(n, k) for n in OPERATIONS for k in ("torch", "triton")]
    assert {row.get("left_out") for row in rows["kernels"] if row["kernels"] == "triton"} == {"needs CUDA"}
    measured = [row for row in rows["kernels"] if row["kernels"] == "torch"]
    assert all(row["ms"] > 0 and math.isclose(row["tb_per_s"], row["gb_computed"] / row["ms"]) for row in measured)
    assert all(row["worst_gap_to_fp32"] < 2**-6 for row in measured)  # bf16 rounds to 2^-9 of a value; operations round a few times
    assert [row["tflops"] > 0 for row in rows["attention"] if row["kernel"] == "torch"] == [True] * 4  # two sizes, two directions
    assert [row["left_out"] for row in rows["trace"]] == ["needs CUDA"] * 2
    text = next(tmp_path.glob("gpu_????-??-??.md")).read_text()
    assert f"- torch: {torch.__version__}" in text
    assert "left out: needs CUDA" in text
    assert "- command: python benchmarks/gpu/blocks.py" in text


def test_every_operation_of_the_contract_is_measured() -> None:
    methods = {name for name, _ in inspect.getmembers(Kernels, inspect.isfunction) if not name.startswith("_")}
    assert set(OPERATIONS) == methods


def test_the_command_names_the_sections_that_there_are() -> None:
    assert tuple(sections_of(CPU, [])) == NAMES


def test_a_failing_case_or_section_does_not_lose_the_others(tmp_path: Path) -> None:
    def no_cases() -> list[Case]:
        raise ValueError("no such size")

    cases = (Case(labels={"n": 1}, measure=breaks), Case(labels={"n": 2}, measure=lambda: {"ms": 2.0}))
    sections = {"a": section(*cases), "b": Section(about="", cases=no_cases), "c": one({"ms": 3.0})}
    run_sections(Table(tmp_path), sections, deadline=time.time() + 60)
    failed = "RuntimeError: CUDA error: a launch failed"
    assert rows_of(tmp_path) == {
        "a": [{"n": 1, "failed": failed}, {"n": 2, "ms": 2.0}],
        "b": [{"failed": "ValueError: no such size"}],
        "c": [{"ms": 3.0}],
    }
    assert f"| 1 |  | failed: {failed} |" in next(tmp_path.glob("*.md")).read_text()


def test_what_would_start_after_the_budget_is_left_out(tmp_path: Path) -> None:
    deadline = time.time() + 0.3

    def slow() -> Row:
        time.sleep(max(0.0, deadline + 0.01 - time.time()))
        return {"ms": 1.0}

    cases = (Case(labels={"n": 1}, measure=slow), Case(labels={"n": 2}, measure=slow))
    run_sections(Table(tmp_path), {"a": section(*cases), "b": one({"ms": 2.0})}, deadline=deadline)
    assert rows_of(tmp_path) == {"a": [{"n": 1, "ms": 1.0}, {"n": 2, "left_out": "no time"}], "b": [{"left_out": "no time"}]}


def test_results_are_on_disk_before_the_next_case_starts(tmp_path: Path) -> None:
    seen = []

    def look() -> Row:
        seen.append(rows_of(tmp_path)["a"])
        return {}

    run_sections(Table(tmp_path), {"a": one({"ms": 1.0}), "b": section(Case(labels={}, measure=look))}, deadline=time.time() + 60)
    assert seen == [[{"ms": 1.0}]]


WORKER = """
import os, sys, time
from pathlib import Path
from benchmarks.gpu.table import Case, Section, Table, run_sections
cases = [Case(labels={"n": 1}, measure=lambda: {"ms": 1.0}), Case(labels={"n": 2}, measure=lambda: os._exit(7)),
         Case(labels={"n": 3}, measure=lambda: {"ms": 3.0})]
run_sections(Table(Path(sys.argv[1]), resume=True), {"a": Section(about="", cases=lambda: cases)}, deadline=time.time() + 60)
"""


def test_another_process_goes_on_behind_the_case_that_ended_one(tmp_path: Path) -> None:
    Table(tmp_path).write()
    code = supervise([sys.executable, "-c", WORKER, str(tmp_path)], folder=tmp_path, deadline=time.time() + 60)
    assert code == 0
    died = {"n": 2, "failed": "the process ended with exit code 7, see its output"}
    assert rows_of(tmp_path) == {"a": [{"n": 1, "ms": 1.0}, died, {"n": 3, "ms": 3.0}]}


def test_a_process_that_measures_nothing_is_not_started_for_ever(tmp_path: Path) -> None:
    Table(tmp_path).write()
    assert supervise([sys.executable, "-c", "raise SystemExit(5)"], folder=tmp_path, deadline=time.time() + 60) == 5


def test_a_timeline_is_summed_by_kind_and_its_idle_time_counted() -> None:
    """Two steps over 100 us: products run 40, attention 20 of which 10 beside them, a copy 10; so 60 are busy and 40 idle."""
    intervals = [
        Interval(name="nvjet_tst_128x256", start=0, stop=40),
        Interval(name="cudnn_generated_fort_native_sdpa_sm90_flash_fprop", start=30, stop=50),
        Interval(name="Memcpy DtoD (Device -> Device)", start=90, stop=100),
    ]
    rows = {row["what"]: row for row in summarise(intervals, steps=2)}
    shares = {"GEMM": 0.4, "attention": 0.2, "memory-bound": 0.1, "communication": 0.0, "idle between kernels": 0.4}
    assert {what: rows[what]["share"] for what in shares} == pytest.approx(shares)
    assert rows["GEMM"]["ms_per_step"] == pytest.approx(0.020)
    assert rows["first start to last stop"]["ms_per_step"] == pytest.approx(0.050)


def test_a_timeline_without_kernels_is_left_out() -> None:
    with pytest.raises(LeftOutError, match="no kernels"):
        summarise([], steps=1)
