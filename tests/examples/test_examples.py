"""The examples run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megasora.curation.planted import scene, write_clip

EXAMPLES = Path(__file__).parents[2] / "examples"
ROOT = EXAMPLES.parent
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))
SCRIPTS = sorted([*EXAMPLES.glob("*.sh"), *EXAMPLES.glob("slurm/*.sbatch"), *EXAMPLES.glob("slurm/*.sh")])


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_every_script_is_sound_and_listed(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert script.name in (EXAMPLES / "README.md").read_text()


def test_the_conversion_walk_through(tmp_path: Path) -> None:
    environment = {**os.environ, "OUT": str(tmp_path), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    shown = subprocess.run([str(EXAMPLES / "convert_flux.sh")], check=True, capture_output=True, text=True, env=environment).stdout
    assert "guidance_in is dropped" in shown
    assert "cond_in is left out: it is all zero" in shown
    assert shown.count("verified:") == 7  # three hashes, three inverses, and the two added zeros made again
    assert (tmp_path / "transformer" / "config.json").is_file()


@pytest.mark.slow
def test_the_data_walk_through(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    for seed in range(3):
        write_clip(tmp_path / "raw" / f"{seed}.mp4", scene(seed, count=60, height=96, width=128))
    (tmp_path / "raw" / "broken.mp4").write_bytes(b"nothing")
    environment = {**os.environ, "OUT": str(tmp_path), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    script = [str(EXAMPLES / "prepare_data.sh"), str(tmp_path / "raw")]
    shown = subprocess.run(script, check=True, capture_output=True, text=True, env=environment)
    assert "1  cannot be read" in shown.stdout and "3  kept of 4" in shown.stdout
    assert "step      3" in shown.stdout + shown.stderr
    assert (tmp_path / "report.html").stat().st_size > 10_000


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_is_kept_without_outputs_and_listed(notebook: Path) -> None:
    cells = [cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"]
    assert cells
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)
    assert notebook.name in (EXAMPLES / "README.md").read_text()


@pytest.mark.slow
def test_the_notebook_of_sampling(tmp_path: Path) -> None:
    """By exec of its code cells in a process of its own; Jupyter is no dependency."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-m", "tests.examples.notebook", str(EXAMPLES / "sample.ipynb")]
    shown = subprocess.run(command, check=True, capture_output=True, text=True, env=environment, cwd=tmp_path).stdout
    assert "torch.Size([3, 9, 64, 64])" in shown
    sheets = re.findall(r"Image (\d+)", shown)
    assert len(sheets) == 2 and all(int(size) > 1000 for size in sheets)
    assert "'kind': 'i2v_head', 'seed': 7" in shown
    (clip,) = tmp_path.glob("megasora_*/clips/moving.mp4")
    assert clip.stat().st_size > 1000
