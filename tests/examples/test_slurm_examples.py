"""Job arrays, with a stand-in for the cluster."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples" / "slurm"


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """A `megasora` that writes down what it is asked."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "megasora").write_text(f'#!/bin/bash\necho "$@" >> "{tmp_path}/asked"; [ "$2" != broken ]\n')
    (folder / "megasora").chmod(0o755)
    return {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}


def test_an_array_converts_every_line_once(tmp_path: Path, environment: dict[str, str]) -> None:
    table = tmp_path / "weights.txt"
    table.write_text(f"a {tmp_path}/out/a\n# left out\n\nbroken {tmp_path}/out/b\nc {tmp_path}/out/c\n")
    codes = []
    for task in (3, 5):  # --array=3-5:2
        array = {"SLURM_ARRAY_TASK_ID": str(task), "SLURM_ARRAY_TASK_MIN": "3", "SLURM_ARRAY_TASK_STEP": "2", "SLURM_ARRAY_TASK_COUNT": "2"}
        command = ["bash", str(EXAMPLES / "convert_array.sbatch"), "--to", "opensora"]
        codes.append(subprocess.run(command, env={**environment, **array, "TABLE": str(table)}).returncode)
    assert codes == [0, 1]  # a line that fails fails its task, after the others
    asked = (tmp_path / "asked").read_text().splitlines()
    assert asked == [f"convert {name} {tmp_path}/out/{file} --to opensora" for name, file in (("a", "a"), ("c", "c"), ("broken", "b"))]
    assert (tmp_path / "out").is_dir()
