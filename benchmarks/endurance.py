"""A long run with everything on: do memory and open files stay flat?

    python -m benchmarks.endurance [--steps 5000] [--output DIR]

`megasora train tiny` (a smaller model) on one CPU rank with evaluation, sample clips, checkpoints, guard, watchdog and TensorBoard; the
process is looked at from outside every half second. Reported: resident memory and open files against the step, a straight line through the
second half of the run (least squares), and its slope per 1,000 steps. Writes endurance.json and endurance.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

SMALL = [
    "--model.hidden_size",
    "32",
    "--model.num_attention_heads",
    "4",
    "--model.axes_dim",
    "2",
    "2",
    "4",
    "--model.ffn_hidden_size",
    "64",
]
SMALL += ["--model.num_double_blocks", "1", "--model.num_single_blocks", "1", "--data.global_tokens", "150", "--data.num_microbatches", "1"]
OFTEN = ["--evaluation.interval_steps", "250", "--checkpoint.interval_steps", "50", "--evaluation.sample_interval_steps", "1000"]
OFTEN += ["--evaluation.sample_prompts", "A test card", "--train.log_interval_steps", "100", "--sample.steps", "2"]


@dataclass(frozen=True, kw_only=True)
class Look:
    """One look at the process."""

    step: int
    resident_mib: float
    open_files: int
    threads: int


def last_step(file: Path, size: int = 4096) -> int:
    """Of the newest whole line of metrics.jsonl; 0 when there is none."""
    try:
        with file.open("rb") as stream:
            stream.seek(max(0, file.stat().st_size - size))
            lines = stream.read().split(b"\n")[:-1]
    except OSError:
        return 0
    try:
        return int(json.loads(lines[-1])["step"])
    except (IndexError, ValueError, KeyError):
        return 0


def look(pid: int, metrics: Path) -> Look | None:
    """At a process; None when it is gone."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        files, threads = len(os.listdir(f"/proc/{pid}/fd")), len(os.listdir(f"/proc/{pid}/task"))
    except (OSError, IndexError):
        return None
    return Look(step=last_step(metrics), resident_mib=pages * os.sysconf("SC_PAGE_SIZE") / 2**20, open_files=files, threads=threads)


def slope(looks: list[Look], name: str) -> float:
    """Per 1,000 steps, over the second half of the run."""
    late = [one for one in looks if one.step > looks[-1].step / 2]
    fit = statistics.linear_regression([one.step for one in late], [float(getattr(one, name)) for one in late])
    return 1000 * fit.slope


def report(looks: list[Look], *, seconds: float, exit_code: int) -> str:
    """For people."""
    lines = [
        f"# {looks[-1].step} steps of tiny with everything on",
        "",
        f"- {time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores, one rank, {seconds:.0f} s, exit code {exit_code}; {' '.join(SMALL)}",
        f"- {' '.join(OFTEN)}",
        "",
        "| | after 10 % | in the middle | at the end | per 1,000 steps, second half |",
        "|---|---|---|---|---|",
    ]
    at = [looks[len(looks) // 10], looks[len(looks) // 2], looks[-1]]
    for name in ("resident_mib", "open_files", "threads"):
        values = " | ".join(f"{getattr(one, name):.1f}" for one in at)
        lines.append(f"| {name} | {values} | {slope(looks, name):+.2f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--output", type=Path, default=Path("."), help="folder of endurance.json and endurance.md")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    looks: list[Look] = []
    started = time.time()
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        command = [sys.executable, "-m", "megasora", "train", "tiny", "--device", "cpu", "--run_dir", str(run_dir)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        process = subprocess.Popen([*command, "--train.steps", str(arguments.steps), *SMALL, *OFTEN], env=environment)
        while process.poll() is None:
            if (found := look(process.pid, run_dir / "metrics.jsonl")) is not None and found.step:
                looks.append(found)
            time.sleep(0.5)
    looks = [one for one in looks if one.step < looks[-1].step]  # without the end, where things are closed
    (arguments.output / "endurance.json").write_text(json.dumps([asdict(one) for one in looks]))
    text = report(looks, seconds=time.time() - started, exit_code=process.returncode)
    (arguments.output / "endurance.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
