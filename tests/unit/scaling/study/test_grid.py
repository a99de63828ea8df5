"""A grid's file and the points it stands for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from megasora import cli
from megasora.config.errors import UserError
from megasora.scaling.study.grid import Grid, points_of, read_grid, refusal

PLAIN: dict[str, Any] = {
    "recipe": "tiny",
    "gpus": [1, 2, 4],
    "layouts": {"dp": {}, "tp2": {"tp": 2}},
    "steps": 4,
    "overrides": {"device": "cpu"},
}


def written(tmp_path: Path, **changes: Any) -> Path:
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump({**PLAIN, **changes}, sort_keys=False))
    return path


def test_strong_scaling_keeps_the_step_and_weak_scaling_lets_it_grow(tmp_path: Path) -> None:
    grid = read_grid(written(tmp_path, scaling=["strong", "weak"], layouts={"dp": {}}, overrides={"data.global_tokens": 600}))
    found = {point.id: (point.gpus, point.scaling, point.config.data.global_tokens) for point in points_of(grid)}
    assert found == {
        "dp_1_strong": (1, ("strong", "weak"), 600),  # nothing has grown yet: one point of both series
        "dp_2_strong": (2, ("strong",), 600),
        "dp_2_weak": (2, ("weak",), 1200),
        "dp_4_strong": (4, ("strong",), 600),
        "dp_4_weak": (4, ("weak",), 2400),
    }


def test_a_layout_that_validate_refuses_is_a_point_with_its_reason(tmp_path: Path) -> None:
    points = {point.id: point for point in points_of(read_grid(written(tmp_path)))}
    assert len(points) == 6
    assert points["tp2_4_strong"].axes == {"tp": 2, "pp": 1, "vp": 1, "cp": 1, "dp": 2}
    assert refusal(points["tp2_2_strong"]) is None
    assert "not a multiple of TP x PP x CP = 2" in str(refusal(points["tp2_1_strong"]))


def test_points_measure_steps_and_nothing_else(tmp_path: Path) -> None:
    config = points_of(read_grid(written(tmp_path)))[0].config
    assert (config.train.steps, config.checkpoint.interval_steps, config.checkpoint.save_last) == (4, 0, False)
    assert (config.evaluation.interval_steps, config.train.tensorboard) == (0, False)


def test_sizes_are_part_of_the_name_where_there_are_several(tmp_path: Path) -> None:
    sizes = {"s": {"model.num_single_blocks": 1}, "m": {}}
    points = points_of(read_grid(written(tmp_path, sizes=sizes, gpus=[1], layouts={"dp": {}})))
    assert [(point.id, point.config.model.num_single_blocks) for point in points] == [("s_dp_1_strong", 1), ("m_dp_1_strong", 5)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stepz": 3}, "unknown key; did you mean steps"),
        ({"layouts": {"dp": {"parallel.tensor_model_paralel_size": 2}}}, "did you mean tensor_model_parallel_size"),
        ({"layouts": {"dp": {"paralel.x": 2}}}, "no section 'paralel'"),
        ({"layouts": {"a/b": {}}}, "needs a name of letters"),
        ({"gpus": [2, 2]}, "different numbers"),
        ({"steps": 2, "warmup_steps": 2}, "measure nothing"),
        ({"weak_grows": ["data.resolution"], "scaling": ["weak"]}, "only a number can grow"),
        ({"recipe": "tinyy"}, "tinyy"),
    ],
)
def test_mistakes_name_their_cure(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        points_of(read_grid(written(tmp_path, **changes)))


def test_the_command_ends_a_mistake_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["study", "run", str(tmp_path / "none.yaml"), "--output", str(tmp_path / "out")])
    assert end.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_dry_lists_points_and_runs_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["study", "run", str(written(tmp_path)), "--output", str(tmp_path / "out"), "--dry"])
    said = capsys.readouterr().out
    assert "6 points, 5 runs of 4 steps" in said
    assert "tp2_1_strong: parallel: world size 1" in said
    assert not (tmp_path / "out").exists()


def test_the_examples_are_grids() -> None:
    folder = Path(__file__).parents[4] / "examples" / "scaling"
    grids: list[Grid] = [read_grid(path) for path in sorted(folder.glob("*.yaml"))]
    assert len(grids) >= 2
    for grid in grids:
        assert any(refusal(point) is None for point in points_of(grid))
