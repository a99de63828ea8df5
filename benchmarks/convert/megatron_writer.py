"""What Megatron's own writer reaches beside ours: the same 3 GB of bf16 weights, taking turns with cp and sync, cold cache.

    python benchmarks/convert/megatron_writer.py FOLDER [--repeats 3]

Megatron's writer saves tensors that are in memory already; ours also reads and hashes its source file. Both are called in this process
(Megatron's spawns writer processes), so neither pays for imports. Dropping the page cache needs root.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import torch
from full_size import drop_caches
from make_flux import FLUX_DEV, make
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from megasora.checkpoint.export import export_weights
from megasora.checkpoint.safetensors_io import SafetensorsReader
from megasora.config.schema import ParallelConfig
from megasora.parallel import groups

MODEL = replace(FLUX_DEV, num_double_blocks=3, num_single_blocks=3)


def timed(action: object) -> float:
    """Seconds of a call, with a sync of the disk after it."""
    drop_caches()
    started = time.perf_counter()
    action()  # type: ignore[operator]
    subprocess.run(["sync"], check=True)
    return time.perf_counter() - started


def main() -> None:
    """Make the weights, then take turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    args.folder.mkdir(parents=True)
    source = args.folder / "source.safetensors"
    make(source, MODEL)
    groups.start_world(groups.choose_device("cpu"), timeout_minutes=10)
    groups.initialize(ParallelConfig(), device=torch.device("cpu"), num_attention_heads=24, seed=0)
    reader = SafetensorsReader(source)
    tensors = {key: ShardedTensor.from_rank_offsets(key, reader.read(key), replica_id=0) for key in reader.keys()}
    print(f"{source.stat().st_size / 1e9:.2f} GB in {len(tensors)} tensors")

    def theirs() -> None:
        (args.folder / "theirs").mkdir()
        dist_checkpointing.save(tensors, str(args.folder / "theirs"))

    ratios: dict[str, list[float]] = {"Megatron's writer": [], "ours": []}
    for number in range(args.repeats + 1):  # the first round warms up what Megatron starts once
        plain = timed(lambda: shutil.copyfile(source, args.folder / "copy"))
        megatron = timed(theirs)
        ours = timed(lambda: export_weights(source, args.folder / "ours", target_format="megasora"))
        for name in ("copy", "theirs", "ours"):
            path = args.folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        print(f"  {'warm-up' if number == 0 else number}: cp {plain:.1f} s, Megatron's {megatron:.1f} s, ours {ours:.1f} s", flush=True)
        if number:
            ratios["Megatron's writer"].append(plain / megatron)
            ratios["ours"].append(plain / ours)
    for name, values in ratios.items():
        print(f"{name}: {statistics.median(values):.2f} of cp's rate {[round(value, 2) for value in values]}")


if __name__ == "__main__":
    main()
