"""One command on a CUDA machine: a dated table of speed, kernels, attention, parity and more, within a budget of minutes.

    python benchmarks/gpu/blocks.py --output $OUT [--minutes 9] [--videos clip.mp4 ...] [--only speed,kernels,...]
    python benchmarks/gpu/blocks.py --device cpu --small --output /tmp/check      # the same code on a CPU, to check the benchmark itself

Sections, in order of importance (`worker.sections_of` makes them):
  speed      forward + backward of a block stack of width 3072 at 256px and 768px: bf16 with torch's and Triton's kernels, then FP8
  kernels    each operation of the kernels' contract, torch against Triton: time, bandwidth, distance from fp32
  attention  Transformer Engine's, flash-attn's and torch's kernels, forward and forward + backward
  parity     providers and recipes, forward and gradients against the fp32 local model
  adam       the optimizer's step
  trace      where the GPU's time goes in two steps
  curves     200 steps of training on the same data, bf16 and FP8 side by side
  encoders   VAE and T5-XXL with random weights
  memory     bytes of a step against what validate says, and the time of each way of recomputing
  offload    blocks recomputed in full, their inputs on the GPU or in host memory, and the link alone
  states     the optimizer's step with moments in bf16 and fp16
  autoencoder the video DC-AE with random weights: encode, decode, a step of training
  evaluation one evaluation of the whole model as sampling makes it
  commands   train, restart, sample and encode as a user gives them, losses beside the CPU's
  ring       chunk attention with log-sum-exp merge against whole attention, forward and backward
  decode     DALI on the GPU: frames and means
`blocks.json` and `gpu_<date>.md` are written after every case. The sections run in a process of their own: when it dies or hangs, the case
says so and another process goes on behind it. It needs no PyAV, diffusers or tyro, which such a machine may lack.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.gpu.table import GRACE_S, Table  # noqa: E402

NAMES = (
    "speed",
    "kernels",
    "attention",
    "parity",
    "adam",
    "trace",
    "curves",
    "encoders",
    "memory",
    "offload",
    "states",
    "autoencoder",
    "evaluation",
    "commands",
    "ring",
    "decode",
)


def arguments_of(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for blocks.json and gpu_<date>.md")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--small", action="store_true", help="toy sizes, to check the benchmark")
    parser.add_argument("--minutes", type=float, default=9.0, help="no case starts later than this")
    parser.add_argument("--videos", type=Path, nargs="*", default=[])
    parser.add_argument("--only", default=",".join(NAMES), help="sections, in the order they are to run")
    arguments = parser.parse_args(words)
    if unknown := [name for name in arguments.only.split(",") if name not in NAMES]:
        parser.error(f"--only {','.join(unknown)}: the sections are {','.join(NAMES)}")
    return arguments


def supervise(command: list[str], *, folder: Path, deadline: float) -> int:
    """Run the worker, and again behind the case that ended it, until it is through, gets no further or the time is up; its exit code."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}
    done = 0
    while True:
        try:
            code = subprocess.run(command, env=environment, timeout=max(deadline - time.time(), 0) + GRACE_S, check=False).returncode
        except subprocess.TimeoutExpired:
            code = 124
        if code == 0:
            return 0
        table = Table(folder, resume=True)
        if running := table.content["running"]:
            table.add(running["section"], [running["labels"] | {"failed": f"the process ended with exit code {code}, see its output"}])
        if time.time() >= deadline or (progress := sum(section["done"] for section in table.content["sections"].values())) <= done:
            return code
        done = progress


def main() -> None:
    """Run the sections asked for."""
    arguments = arguments_of()
    deadline = time.time() + 60 * arguments.minutes
    table = Table(arguments.output)
    table.describe({"command": shlex.join(["python", *sys.argv])})
    command = [sys.executable, "-m", "benchmarks.gpu.worker", *sys.argv[1:], "--deadline", str(deadline)]
    code = supervise(command, folder=arguments.output, deadline=deadline)
    table = Table(arguments.output, resume=True)
    for name in arguments.only.split(","):
        if not table.section(name)["complete"]:
            table.add(name, [{"left_out": "no time" if time.time() >= deadline else f"the measuring process ended with exit code {code}"}])
    print(f"written: {table.markdown_file}, {table.json_file}", flush=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
