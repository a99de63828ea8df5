"""A real study of three small points, one of them traced in all of its ranks, from the grid to the page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from megasora import cli
from megasora.scaling.study.results import read_results

GRID = {
    "recipe": "tiny",
    "gpus": [1, 2],
    "steps": 4,
    "warmup_steps": 1,
    "profile_steps": "3:4",
    "timeout_s": 240,
    "layouts": {"dp": {}, "tp2": {"tp": 2}, "pp2": {"pp": 2, "train.steps": 0}},
    "overrides": {"device": "cpu", "data.global_tokens": 200, "model.num_single_blocks": 1, "model.num_double_blocks": 1},
}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_study_from_its_grid_to_its_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(GRID, sort_keys=False))
    folder = tmp_path / "study"
    command = ["study", "run", str(tmp_path / "grid.yaml"), "--output", str(folder)]
    cli.main([*command, "--json"])
    said = json.loads(capsys.readouterr().out)
    assert {point["id"]: point["status"] for point in said["points"]} == {
        "dp_1_strong": "done",
        "dp_2_strong": "done",
        "tp2_1_strong": "refused",
        "tp2_2_strong": "done",
        "pp2_1_strong": "refused",
        "pp2_2_strong": "refused",
    }
    results = read_results(folder)
    by_id = {point.id: point for point in results.points}
    point = by_id["tp2_2_strong"]
    assert point.metrics["step_time_s"].count == 1  # step 2: 1 warms up, 3 and 4 are traced
    assert point.trace is not None
    assert point.trace["tensor_parallel"] > 0
    assert by_id["dp_1_strong"].trace is not None
    assert by_id["dp_1_strong"].trace["tensor_parallel"] == 0
    assert not list(folder.glob("points/*/*/run/checkpoints/step_*"))
    outcomes = {path: path.stat().st_mtime_ns for path in folder.glob("points/*/*/outcome.json")}
    cli.main(command)  # nothing is left to do
    assert {path: path.stat().st_mtime_ns for path in folder.glob("points/*/*/outcome.json")} == outcomes
    cli.main(["study", "report", str(folder)])
    assert "Where a step's time goes" in (folder / "report.html").read_text().replace("&#x27;", "'")
    cli.main(["study", "compare", str(folder), str(folder)])
    cli.main(["study", "trace", str(folder / "points" / "tp2_2_strong" / "repeat_1")])
    assert "milliseconds of a step by rank" in capsys.readouterr().out
