"""A study through a real Slurm: its points are jobs, followed to their ends; a job that an interrupted study left is found again."""

from __future__ import annotations

import stat
import sys
from pathlib import Path

import pytest
import yaml

from megasora.scaling.study.grid import read_grid
from megasora.scaling.study.run import collect_study, open_folder, plan_study, run_study
from megasora.scaling.study.slurm import SlurmLauncher
from tests.slurm.cluster import Cluster
from tests.slurm.conftest import ROOT

pytestmark = pytest.mark.slow
GRID = {
    "recipe": "tiny",
    "gpus": [1, 2],
    "steps": 4,
    "layouts": {"dp": {}, "no_clips": {"data.manifest": "/nowhere.csv"}},
    "overrides": {"device": "cpu", "data.global_tokens": 200, "model.num_single_blocks": 1, "model.num_double_blocks": 1},
    "slurm": {"gpus_per_node": 1, "cpus_per_gpu": 1, "partition": "low", "time": "10:00", "at_once": 2},
}


@pytest.mark.timeout(600)
def test_points_are_jobs_and_an_interrupted_study_finds_them_again(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "bin" / "megasora"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m megasora "$@"\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    path = f"{program.parent}:{Path(sys.executable).parent}:{cluster.environment['PATH']}"
    own = {"PATH": path, "PYTHONPATH": str(ROOT), "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    for name, value in {**cluster.environment, **own}.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(GRID, sort_keys=False))
    study = plan_study(read_grid(tmp_path / "grid.yaml"), tmp_path / "study")
    open_folder(study)
    launcher = SlurmLauncher("tiny", study.grid.slurm)
    launcher.poll_s = 1.0

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("megasora.scaling.study.run.time.sleep", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_study(study, launcher, say=lambda *_: None)
    submitted = {path: path.read_text() for path in study.folder.glob("points/*/*/job")}
    assert len(submitted) == 2
    run_study(study, launcher, say=lambda *_: None)
    assert {path: path.read_text() for path in submitted} == submitted
    points = {point.id: point for point in collect_study(study, launcher, command="it").points}
    assert {name: point.status for name, point in points.items()} == {
        "dp_1_strong": "done",
        "dp_2_strong": "done",
        "no_clips_1_strong": "refused",
        "no_clips_2_strong": "refused",
    }
    assert points["dp_2_strong"].metrics["step_time_s"].count == 2
    assert "/nowhere.csv" in points["no_clips_1_strong"].reason
