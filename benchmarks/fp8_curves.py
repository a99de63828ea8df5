"""200 steps of a small MMDiT in bf16 and in each FP8 recipe: does the loss end where bf16's ends?

    python -m benchmarks.fp8_curves --output /tmp/fp8 [--device emulated | cuda] [--steps 200] [--seeds 11 12 13]

`emulated` needs no GPU: Transformer Engine's Python over the stand-in of its compiled module (tests/gpu_emulated), which rounds to the real
float8 types. `cuda` needs Transformer Engine and a GPU. The same weights, clips, noise and times for every recipe. A recipe holds when the
mean loss of its last 20 steps is within 1 % of bf16's. `delayed` is measured although training refuses it (a checkpoint lacks its scales).

Rows beside them say what 1 % means: fp32 (Megatron's own layers), and `nudged` runs whose first weights differ by about one rounding of
bf16, at random: how far from each other chance takes runs of one precision. With several `--seeds` (of clips, weights, noise and times)
every run is made once a seed, and what is compared is the mean over them, with its standard error. `--anneal` lets the rate fall to 0 over
the last half: at a constant rate runs that differ by rounding end 2 % apart.

Writes fp8_curves.json (every loss) and prints a table and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

BF16 = {"dtype": "bf16", "provider": "te"}
PRECISIONS = {
    "bf16": BF16,
    "fp32": {"dtype": "fp32", "provider": "local"},
    "tensorwise": {**BF16, "fp8": "tensorwise"},
    "blockwise": {**BF16, "fp8": "blockwise"},
    "delayed": {**BF16, "fp8": "delayed"},
}
NUDGED = {"bf16": (1, 2, 3), "tensorwise": (1, 2), "blockwise": (1, 2)}
"""Seeds of changes of the first weights."""
RUNS: dict[str, tuple[dict[str, str], int | None]] = {name: (precision, None) for name, precision in PRECISIONS.items()}
RUNS |= {f"{name} nudged {seed}": (PRECISIONS[name], seed) for name, seeds in NUDGED.items() for seed in seeds}
"""Name -> (precision, seed of a change of the first weights)."""
OFFERED = ("tensorwise", "blockwise")
LAST_STEPS = 20
LIMIT = 0.01


def measure(device_name: str, *, steps: int, names: Sequence[str], seeds: Sequence[int], anneal: bool) -> list[dict[str, Any]]:
    """One row per run and seed, compared with the first run of the seed."""
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
    for seed in seeds:
        reference: float | None = None
        for name in names:
            started = time.perf_counter()
            precision, nudge_seed = RUNS[name]
            layers = PrecisionConfig(**precision)  # type: ignore[arg-type]
            losses = loss_curve(layers, steps=steps, context=context, nudge_seed=nudge_seed, seed=seed, anneal=anneal)
            last = statistics.mean(losses[-LAST_STEPS:])
            reference = last if reference is None else reference
            rows.append({"run": name, "seed": seed, "first": losses[0], "last": last, "gap": last / reference - 1, "losses": losses})
            took = time.perf_counter() - started
            print(f"{name:<20} seed {seed}  first {losses[0]:.4f}  last {last:.5f}  {last / reference - 1:+.2%}  {took:.0f} s", flush=True)
    return rows


def gaps_of(rows: Sequence[dict[str, Any]]) -> dict[str, tuple[float, float | None]]:
    """Run -> (mean over the seeds of its gap to the first run, standard error of that mean; None for one seed)."""
    found: dict[str, list[float]] = {}
    for row in rows:
        found.setdefault(row["run"], []).append(row["gap"])
    return {
        name: (statistics.mean(gaps), statistics.stdev(gaps) / len(gaps) ** 0.5 if len(gaps) > 1 else None) for name, gaps in found.items()
    }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of fp8_curves.json")
    parser.add_argument("--device", choices=("emulated", "cuda"), default="emulated")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument(
        "--runs", nargs="+", choices=tuple(RUNS), default=tuple(RUNS), help="the first is what the others are compared with"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[11], help="of clips, first weights, noise and times")
    parser.add_argument(
        "--anneal", action="store_true", help="the learning rate falls to 0 over the last half, as at the end of a training"
    )
    arguments = parser.parse_args()
    rows = measure(arguments.device, steps=arguments.steps, names=arguments.runs, seeds=arguments.seeds, anneal=arguments.anneal)
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "fp8_curves.json").write_text(json.dumps({"device": arguments.device, "steps": arguments.steps, "rows": rows}))
    gaps = gaps_of(rows)
    worst = max((abs(gaps[name][0]) for name in OFFERED if name in gaps), default=None)
    print(json.dumps({"worst_gap": worst, "within_1_percent": None if worst is None else worst <= LIMIT, "gaps": gaps}))


if __name__ == "__main__":
    main()
