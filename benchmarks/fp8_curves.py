"""200 steps of a small MMDiT in bf16 and in each FP8 recipe: does the loss end where bf16's ends?

    python -m benchmarks.fp8_curves --output /tmp/fp8 [--device emulated | cuda] [--steps 200]

`emulated` needs no GPU: Transformer Engine's Python over the stand-in of its compiled module (tests/gpu_emulated), which rounds to the real
float8 types. `cuda` needs Transformer Engine and a GPU. The same weights, clips, noise and times for every recipe. A recipe holds when the
mean loss of its last 20 steps is within 1 % of bf16's. `delayed` is measured although training refuses it (a checkpoint lacks its scales).

Writes fp8_curves.json (every loss) and prints a table and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

RECIPES = ("none", "tensorwise", "blockwise", "delayed")
LAST_STEPS = 20
LIMIT = 0.01


def measure(device_name: str, *, steps: int) -> list[dict[str, Any]]:
    """One row per recipe; bf16 first."""
    if device_name == "emulated":
        from tests.gpu_emulated.emulation import emulate  # before Megatron is imported, which looks for Transformer Engine then

        emulate()
    from benchmarks.curve import MODEL, loss_curve
    from megasora.config.schema import ParallelConfig, PrecisionConfig
    from megasora.parallel import groups

    device = groups.choose_device("cuda")
    groups.start_world(device, timeout_minutes=1)
    context = groups.initialize(ParallelConfig(), device=device, num_attention_heads=MODEL.num_attention_heads, seed=0)
    rows: list[dict[str, Any]] = []
    for fp8 in RECIPES:
        started = time.perf_counter()
        losses = loss_curve(PrecisionConfig(dtype="bf16", fp8=fp8, provider="te"), steps=steps, context=context)  # type: ignore[arg-type]
        last = statistics.mean(losses[-LAST_STEPS:])
        base = rows[0]["last"] if rows else last
        row = {"fp8": fp8, "first": losses[0], "last": last, "gap": last / base - 1, "seconds": time.perf_counter() - started}
        rows.append({**row, "losses": losses})
        print(f"{fp8:<11} first {losses[0]:.4f}  last {last:.5f}  {row['gap']:+.3%}  {row['seconds']:.0f} s", flush=True)
    return rows


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of fp8_curves.json")
    parser.add_argument("--device", choices=("emulated", "cuda"), default="emulated")
    parser.add_argument("--steps", type=int, default=200)
    arguments = parser.parse_args()
    rows = measure(arguments.device, steps=arguments.steps)
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "fp8_curves.json").write_text(json.dumps({"device": arguments.device, "steps": arguments.steps, "rows": rows}))
    offered = [row for row in rows if row["fp8"] in ("tensorwise", "blockwise")]
    worst = max(abs(row["gap"]) for row in offered)
    print(json.dumps({"worst_gap": worst, "within_1_percent": worst <= LIMIT, "gaps": {row["fp8"]: row["gap"] for row in rows}}))


if __name__ == "__main__":
    main()
