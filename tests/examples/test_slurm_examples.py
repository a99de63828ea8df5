"""Job arrays and the sweep, with a stand-in for the cluster."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples" / "slurm"


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """`megasora convert` and `sbatch` that write down what they are asked, and the real `megasora slurm`."""
    folder = tmp_path / "bin"
    folder.mkdir()
    words = f'if [ "$1" = slurm ]; then exec "{sys.executable}" -m megasora "$@"; fi; echo "$@" >> "{tmp_path}/asked"; [ "$2" != broken ]'
    for name in ("megasora", "sbatch"):
        (folder / name).write_text(f"#!/bin/bash\n{words}\n")
        (folder / name).chmod(0o755)
    return {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}


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


def test_a_sweep_gives_each_gpu_the_same_work_and_makes_a_table(tmp_path: Path, environment: dict[str, str]) -> None:
    script = str(EXAMPLES / "scaling_sweep.sh")
    variables = {**environment, "NODES": "1 2", "SWEEP": str(tmp_path / "sweep"), "MANIFEST": "clips.parquet"}
    subprocess.run([script, "submit", "--account", "a"], env=variables, check=True, capture_output=True)
    assert len((tmp_path / "asked").read_text().splitlines()) == 2
    for nodes, tokens in ((1, 215_040), (2, 430_080)):
        text = (tmp_path / "sweep" / f"nodes_{nodes}.sbatch").read_text()
        assert f"--data.global_tokens {tokens}\n" in text and f"#SBATCH --nodes={nodes}\n" in text and "#SBATCH --account=a\n" in text
        run = tmp_path / "sweep" / f"nodes_{nodes}"
        run.mkdir()
        steps = [
            {"step": step, "tokens_per_s": 1e9 if step <= 10 else 1000 * nodes**0.5, "tflops_per_gpu": 500, "data_wait_s": 0, "events": []}
            for step in range(1, 41)
        ]
        (run / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    shown = subprocess.run([script, "table"], env=variables, check=True, capture_output=True, text=True).stdout
    assert shown.splitlines()[2:] == ["| 1 | 1,000 | 500.0 | 0.00 | 100.0% |", "| 2 | 1,414 | 500.0 | 0.00 | 70.7% |"]
