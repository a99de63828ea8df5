"""Efficiency, comparison, and the files of a report; expected values by hand."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from megasora import cli
from megasora.config.errors import UserError
from megasora.scaling.study.collect import counted_steps, spread_of
from megasora.scaling.study.compare import change_of, compare_studies
from megasora.scaling.study.efficiency import efficiencies
from megasora.scaling.study.plots import log_ticks, ticks
from megasora.scaling.study.results import read_results, write_results
from tests.unit.scaling.study.made import point, results

PREDICTED = {"step_time_s": 0.9, "peak_memory_bytes": 2.2e9, "communication_bytes": {"tp": 5}, "parts": {"compute": 0.7, "gaps": 0.2}}
TRACE = {"compute": 0.6, "tensor_parallel": 0.3, "data": 0.1}
FAILED = {"status": "out_of_memory", "reason": "CUDA <out> of memory", "metrics": {}}


def test_quartiles_by_hand() -> None:
    spread = spread_of([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (spread.min, spread.q1, spread.median, spread.q3, spread.max, spread.count) == (1, 2, 3, 4, 5, 5)
    assert spread.relative == pytest.approx(2 / 3)


def test_warm_up_and_steps_in_which_more_happened_are_not_counted() -> None:
    steps = [
        {"step": 1},
        {"step": 2, "events": []},
        {"step": 3, "events": [{"event": "eval"}]},
        {"step": 4, "events": [{"event": "unfit"}]},
    ]
    assert [step["step"] for step in counted_steps(steps, warmup_steps=1)] == [2, 4]


def test_efficiency_is_against_the_best_layout_on_the_fewest_ranks() -> None:
    points = [point("dp_1", 1, 100.0), point("dp_2", 2, 150.0), point("tp_2", 2, 100.0), point("dp_4", 4, 0.0, **FAILED)]
    assert {entry.point.id: entry.value for entry in efficiencies(points)} == {"dp_1": 1.0, "dp_2": 0.75, "tp_2": 0.5}


def test_strong_and_weak_series_have_references_of_their_own() -> None:
    points = [point("dp_2", 2, 100.0), point("tp_2", 2, 120.0, scaling=("weak",)), point("dp_4", 4, 120.0, scaling=("weak",))]
    assert [(e.point.id, e.scaling, e.value) for e in efficiencies(points)] == [
        ("dp_2", "strong", 1.0),
        ("tp_2", "weak", 1.0),
        ("dp_4", "weak", 0.5),
    ]


@pytest.mark.parametrize(
    ("before", "after", "verdict"),
    [
        ([1.0, 1.0, 1.0], [1.04, 1.04, 1.04], "same"),  # below the threshold
        ([1.0, 1.0, 1.0], [1.10, 1.10, 1.10], "worse"),
        ([1.0, 1.0, 1.0], [0.90, 0.90, 0.90], "better"),
        ([0.8, 1.0, 1.2], [1.10, 1.10, 1.10], "same"),  # quartiles 0.9 and 1.1: a spread of 20 %
    ],
)
def test_a_change_counts_above_threshold_and_spread(before: list[float], after: list[float], verdict: str) -> None:
    assert change_of("step_time_s", spread_of(before), spread_of(after), threshold=0.05).verdict == verdict


def test_less_throughput_is_worse_and_so_is_a_point_that_fails_now() -> None:
    a = results(point("dp_1", 1, 100.0), point("dp_2", 2, 100.0), point("old_1", 1, 1.0))
    b = results(point("dp_1", 1, 90.0), point("dp_2", 2, 0.0, **FAILED), point("new_1", 1, 1.0), versions={"torch": "2.14.0"})
    found = compare_studies(a, b, threshold=0.05)
    assert [(p.id, p.worse) for p in found.points] == [("dp_1", True), ("dp_2", True)]
    assert [change.verdict for change in found.points[0].changes] == ["same", "worse", "same"]
    assert (found.only_a, found.only_b) == (("old_1",), ("new_1",))
    assert found.differences == {"versions.torch": ("2.13.0", "2.14.0")}


def stored(folder: Path, *points: Any) -> Path:
    folder.mkdir()
    write_results(results(*points), folder)
    return folder


def test_the_gate_ends_with_1_when_something_got_worse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = stored(tmp_path / "a", point("dp_1", 1, 100.0)), stored(tmp_path / "b", point("dp_1", 1, 90.0))
    cli.main(["study", "compare", str(a), str(a)])
    assert "no point is worse" in capsys.readouterr().out
    with pytest.raises(SystemExit) as end:
        cli.main(["study", "compare", str(a), str(b), "--json"])
    assert end.value.code == 1
    assert json.loads(capsys.readouterr().out)["regressed"] is True
    cli.main(["study", "compare", str(b), str(a)])  # better
    cli.main(["study", "compare", str(a), str(b), "--threshold", "0.2"])


def test_results_come_back_as_they_were_written(tmp_path: Path) -> None:
    made = results(point("dp_1", 1, 100.0, predicted=PREDICTED, trace=TRACE), point("tp_2", 2, 0.0, **FAILED))
    write_results(made, tmp_path)
    assert read_results(tmp_path) == made
    (tmp_path / "results.json").write_text('{"format": "other"}')
    with pytest.raises(UserError, match="no study of format|not a study of format"):
        read_results(tmp_path)


def test_a_report_has_every_point_in_every_table(tmp_path: Path) -> None:
    folder = stored(tmp_path / "s", point("dp_1", 1, 100.0), point("dp_2", 2, 150.0), point("tp_2", 2, 0.0, **FAILED))
    cli.main(["study", "report", str(folder)])
    rows = {row["id"]: row for row in csv.DictReader((folder / "results.csv").open())}
    assert (rows["dp_2"]["strong_efficiency"], rows["dp_2"]["tokens_per_s_median"]) == ("0.75", "150.0")
    assert (rows["tp_2"]["status"], rows["tp_2"]["tokens_per_s_median"]) == ("out_of_memory", "")
    text = (folder / "results.md").read_text()
    assert "| dp_2 | 1 1 1 1 2 | 1 (0.995 to 1.005; 0.99 to 1.01) | 3 | 150 | 75% |" in text
    assert "- tp_2: out_of_memory: CUDA <out> of memory" in text
    assert list((folder / "tensorboard").rglob("events.*"))


def test_the_page_needs_no_network_and_escapes_what_it_shows(tmp_path: Path) -> None:
    folder = stored(tmp_path / "s", point("dp_1", 1, 100.0), point("tp_2", 2, 0.0, **FAILED))
    cli.main(["study", "report", str(folder)])
    page = (folder / "report.html").read_text()
    assert "CUDA &lt;out&gt; of memory" in page
    assert "a &lt;CPU&gt;" in page
    assert "http" not in page


def test_the_page_opens_without_complaints_in_light_and_dark(tmp_path: Path, browser: Any) -> None:
    known = {"predicted": PREDICTED, "trace": TRACE}
    folder = stored(tmp_path / "s", point("dp_1", 1, 100.0, **known), point("dp_2", 2, 150.0, **known), point("tp_2", 2, 120.0))
    cli.main(["study", "report", str(folder)])
    for scheme in ("light", "dark"):
        complaints: list[str] = []
        tab = browser.new_context(color_scheme=scheme, viewport={"width": 1000, "height": 800}).new_page()
        tab.on("console", lambda message, into=complaints: into.append(message.text))
        tab.on("pageerror", lambda error, into=complaints: into.append(str(error)))
        tab.goto((folder / "report.html").as_uri())
        assert complaints == []
        headings = tab.eval_on_selector_all("h2", "found => found.map(h => h.textContent)")
        assert headings == [
            "Strong scaling: the same step on more ranks",
            "Where a step's time goes",
            "Predicted and measured",
            "All points",
            "How it was measured",
        ]
        titles = tab.eval_on_selector_all("svg title", "found => found.map(t => t.textContent)")
        assert "dp on 2: 75.0% of dp on 1" in titles
        assert "dp on 2: predicted 0.9, measured 1 (+11%)" in titles
        assert tab.evaluate("document.documentElement.scrollWidth") <= 1000


def test_a_study_without_figures_has_a_page_too(tmp_path: Path) -> None:
    folder = stored(tmp_path / "s", point("tp_2", 2, 0.0, **FAILED))
    cli.main(["study", "report", str(folder)])
    assert "0 of 1" in (folder / "report.html").read_text()


def test_ticks_are_round() -> None:
    assert ticks(1.05) == [0, 0.25, 0.5, 0.75, 1.0]
    assert ticks(1300) == [0, 500, 1000]
    assert log_ticks(0.4, 6) == [0.5, 1, 2, 5]
