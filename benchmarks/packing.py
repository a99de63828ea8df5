"""Packs against the published buckets on a manifest of a million clips: balance, padding, planning time and memory. No GPU needed.

    python benchmarks/packing.py [--samples 1000000] [--steps 200] [--json]

Clips: 2 to 8 s (pyramid limits; log-normal, median 4.5 s, cut at 8), 24, 25, 30 or 60 fps, 16:9 and its friends; 15 % images. A replica is
one GPU at 256px and a context group of 4 at 768px. Balance is the mean over steps of busiest / mean FLOPs; 1.00 wastes nothing. The gain is
the time of the bucket scheme for one epoch over ours, from FLOPs alone, both simulated on the same samples.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import parquet
from rich.console import Console
from rich.table import Table

from megasora import recipes
from megasora.config.schema import RunConfig
from megasora.data.manifest import read_manifest
from megasora.data.pack_stats import PackStats, published_batch, simulate_buckets, simulate_packs
from megasora.data.plan import Mix, PlannedClip, SamplerState, assign_packs, epoch_order, mix_of, next_step, plan_clips
from megasora.parallel.pack import PackSplit, SampleShape

ASPECTS = ((1080, 1920, 0.62), (720, 1280, 0.1), (1920, 1080, 0.12), (1080, 1440, 0.06), (1080, 1080, 0.06), (816, 1920, 0.04))
"""(height, width, share) of sources."""


def write_manifest(path: Path, samples: int) -> None:
    """A parquet manifest of that many clips and images."""
    rng = np.random.default_rng(0)
    fps = rng.choice([24.0, 25.0, 30.0, 60.0], samples, p=[0.35, 0.25, 0.3, 0.1])
    seconds = np.clip(rng.lognormal(np.log(4.5), 0.5, samples), 2.0, 8.0)
    frames = np.where(rng.random(samples) < 0.15, 1, (seconds * fps).astype(np.int64))
    size = rng.choice(len(ASPECTS), samples, p=[share for _, _, share in ASPECTS])
    heights, widths = (np.array([aspect[axis] for aspect in ASPECTS])[size] for axis in (0, 1))
    table = pa.table(
        {
            "path": [f"clips/{number // 1000:04d}/{number:08d}.mp4" for number in range(samples)],
            "text": ["a clip"] * samples,
            "num_frames": frames,
            "height": heights,
            "width": widths,
            "aspect_ratio": heights / widths,
            "resolution": heights * widths,
            "fps": fps,
        }
    )
    parquet.write_table(table, path)


def plan_everything(config: RunConfig, manifest: Path) -> tuple[tuple[PlannedClip, ...], float]:
    """(planned clips, seconds for reading and planning the table)."""
    started = time.perf_counter()
    clips, skipped = plan_clips(read_manifest(manifest).clips, data=config.data, encoders=config.encoders, model=config.model)
    if skipped:
        print(f"{len(skipped)} clips are left out, for example: {skipped[0].reason}")
    return clips, time.perf_counter() - started


def plan_epoch(tokens: list[int], *, data_parallel_size: int, global_tokens: int, hidden_size: int, mix: Mix | None) -> tuple[int, float]:
    """(steps, seconds) of planning every step of an epoch."""
    started, steps, state = time.perf_counter(), 0, SamplerState()
    while state.epoch == 0:
        plan = next_step(tokens, state, seed=0, global_tokens=global_tokens, mix=mix)
        assign_packs([tokens[i] for i in plan.samples], data_parallel_size=data_parallel_size, num_microbatches=1, hidden_size=hidden_size)
        state, steps = plan.state_after, steps + 1
    return steps, time.perf_counter() - started


def rows_of(
    resolution: str,
    clips: tuple[PlannedClip, ...],
    *,
    cp: int,
    budgets: tuple[int, ...],
    replicas: tuple[int, ...],
    steps: int,
    mix: Mix | None,
) -> list[dict[str, Any]]:
    """Ours and the buckets for each number of replicas."""
    shapes = [SampleShape(text_tokens=clip.text_tokens, grid=clip.grid) for clip in clips]
    sizes = [published_batch(clip.resolution, clip.num_frames, context_ranks=cp) for clip in clips]
    hidden = recipes.get("opensora2_stage1").model.hidden_size
    taken = epoch_order(len(clips), seed=0, epoch=0, mix=mix).tolist()
    rows = []
    for dp in replicas:
        bucket = simulate_buckets(shapes, sizes, replicas=dp, hidden_size=hidden, taken=taken)
        rows.append({"resolution": resolution, "replicas": dp, "scheme": "published buckets", **_figures(bucket), "gain": 1.0})
        for budget in budgets:
            ours = simulate_packs(
                shapes,
                data_parallel_size=dp,
                num_microbatches=1,
                global_tokens=budget * dp,
                hidden_size=hidden,
                split=PackSplit(cp=cp),
                steps=steps,
                mix=mix,
            )
            gain = ours.efficiency / bucket.efficiency
            rows.append({"resolution": resolution, "replicas": dp, "scheme": f"packs, {budget:,} tokens", **_figures(ours), "gain": gain})
    return rows


def _figures(stats: PackStats) -> dict[str, Any]:
    return {
        "steps": stats.steps,
        "tokens_per_replica": stats.tokens_per_replica,
        "imbalance_mean": stats.imbalance_mean,
        "imbalance_p99": stats.imbalance_p99,
        "pad_share": stats.pad_share,
        "fullest_pack_tokens": stats.fullest_pack_tokens,
        "efficiency": stats.efficiency,
    }


def main() -> None:
    """Parse, simulate, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--json", action="store_true", help="end with one JSON line")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    planning: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        manifest = Path(folder) / "manifest.parquet"
        write_manifest(manifest, args.samples)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for recipe, resolution, cp, budgets, replicas in (
            ("opensora2_stage1", "256px", 1, (54_000, 27_000), (8, 28, 112, 224)),
            ("opensora2_stage3", "768px", 4, (320_000, 160_000), (2, 7, 28, 56)),
        ):
            config = recipes.get(recipe)
            clips, seconds = plan_everything(config, manifest)
            mix = mix_of(clips, config.data)
            if resolution == "256px":
                tokens = [clip.tokens for clip in clips]
                steps, epoch_s = plan_epoch(tokens, data_parallel_size=224, global_tokens=54_000 * 224, hidden_size=3072, mix=mix)
                peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
                planning = {
                    "samples": len(clips),
                    "table_s": seconds,
                    "epoch_s": epoch_s,
                    "epoch_steps": steps,
                    "peak_memory_gb": peak * 1024 / 1e9,
                    "memory_before_gb": before * 1024 / 1e9,
                }
            rows += rows_of(resolution, clips, cp=cp, budgets=budgets, replicas=replicas, steps=args.steps, mix=mix)
    table = Table("class", "replicas", "scheme", "tokens/replica", "busiest/mean", "p99", "padding", "fullest pack", "gain")
    for row in rows:
        table.add_row(
            row["resolution"],
            str(row["replicas"]),
            row["scheme"],
            f"{row['tokens_per_replica']:,.0f}",
            f"{row['imbalance_mean']:.3f}",
            f"{row['imbalance_p99']:.3f}",
            f"{row['pad_share']:.4%}",
            f"{row['fullest_pack_tokens']:,}",
            f"{row['gain']:.2f}x",
        )
    Console(width=130).print(table)
    print(
        f"planning {planning['samples']:,.0f} samples: table {planning['table_s']:.1f} s, all steps of an epoch {planning['epoch_s']:.1f} s"
    )
    print(f"peak memory {planning['peak_memory_gb']:.2f} GB ({planning['memory_before_gb']:.2f} before)")
    if args.json:
        print(json.dumps({"rows": rows, "planning": planning}))


if __name__ == "__main__":
    main()
