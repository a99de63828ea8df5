"""Random reads of encoded samples from shards, against raw reads of the same bytes and against webdataset reading in order.

    python benchmarks/shards.py [--folder /tmp] [--gigabytes 2] [--seconds 1] [--rounds 7] [--threads 1 2] [--drop_caches] [--json]

Two caches of random numbers are written: samples of 64 kB, and samples of 5.3 MB as a 256px clip of 129 frames has (latent 1.1 MB,
T5 4.2 MB). All ways read samples in random order over the whole index, the same order in each round, interleaved; the figure is the median
of the rounds. `megasora` checks every byte and gives tensors; `os.pread` reads the same byte ranges and drops them; `webdataset` reads the
tars in order and gives the members' bytes, unchecked. The page cache is warm unless --drop_caches (needs root) empties it before each way.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset

from megasora import recipes
from megasora.data.cache.identity import FORMAT, CacheFacts, save_facts, settings_of
from megasora.data.cache.reading import Cache, open_cache
from megasora.data.cache.shards import MEMBERS, ShardWriter, safetensors_bytes, shard_name
from megasora.data.manifest import Clip
from megasora.data.plan import PlannedClip, plan_clip

BOTH = slice(0, 2)
SHARD_BYTES = 256_000_000
WEBDATASET = "webdataset, in order"


@dataclass(frozen=True, kw_only=True)
class Kind:
    """Shapes of a sample's tensors, bf16."""

    name: str
    latent: tuple[int, int, int, int]
    t5: tuple[int, int]
    target: str


KINDS = (
    Kind(name="64 kB", latent=(16, 1, 28, 56), t5=(6, 1024), target="3,000 samples/s"),
    Kind(name="5.3 MB", latent=(16, 33, 24, 42), t5=(512, 4096), target="50 % of os.pread"),
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """Median rates of one way to read."""

    sample: str
    way: str
    threads: int
    samples_per_s: float
    bytes_per_s: float
    lowest: float
    highest: float
    """Samples per second of the slowest and the fastest round."""
    of_pread: float
    """Median over rounds of this way's rate by that of os.pread in the same round."""


def write_cache(folder: Path, kind: Kind, *, total_bytes: int) -> int:
    """Write a cache of random numbers; returns bytes per sample."""
    config = recipes.get("opensora2_stage1")
    generator = np.random.default_rng(0)

    def numbers(shape: tuple[int, ...]) -> torch.Tensor:
        raw = generator.integers(0, 2**16, shape, dtype=np.uint16)
        return torch.from_numpy(raw.view(np.int16)).view(torch.bfloat16)

    first = {"mean": numbers(kind.latent)}, {"t5": numbers(kind.t5), "clip": numbers((768,))}
    sample_bytes = sum(len(safetensors_bytes(part)) for part in first)
    count, per_shard = max(64, total_bytes // sample_bytes), max(16, SHARD_BYTES // sample_bytes)
    for shard, start in enumerate(range(0, count, per_shard)):
        with ShardWriter(folder, shard) as writer:
            for sample in range(start, min(start + per_shard, count)):
                members = {MEMBERS[0]: safetensors_bytes({"mean": numbers(kind.latent)}), MEMBERS[2]: b"{}"}
                members[MEMBERS[1]] = safetensors_bytes({"t5": numbers(kind.t5), "clip": numbers((768,))})
                writer.add(sample, _clip(sample), members)
            writer.finish()
    settings = settings_of(
        config, store="both", latents="mean_std", kinds=(), samples_per_shard=per_shard, samples=count, manifest_sha256="none"
    )
    facts = CacheFacts(
        format=FORMAT, settings=settings, vae=None, t5=None, clip=None, scaling_factor=1.0, decoder=None, versions=(), null_sha256=None
    )
    save_facts(folder, facts)
    return sample_bytes


def _clip(row: int) -> PlannedClip:
    config = recipes.get("opensora2_stage1")
    clip = Clip(id=str(row), path="", text="", num_frames=129, height=720, width=1280, fps=24.0, row=row)
    return plan_clip(clip, data=config.data, encoders=config.encoders, patch_size=config.model.patch_size, resolution="256px")


def raw_ranges(folder: Path, cache: Cache) -> list[tuple[int, int, int]]:
    """(descriptor, offset, bytes) that a read of each sample takes."""
    ranges: list[tuple[int, int, int]] = []
    for shard in range(cache.facts.settings.num_shards):
        index = np.load(folder / f"{shard_name(shard)}.index.npy")
        descriptor = os.open(folder / f"{shard_name(shard)}.tar", os.O_RDONLY)
        first, last = index["offset"][:, 0], index["offset"][:, 1] + index["bytes"][:, 1]
        ranges += [(descriptor, int(start), int(stop - start)) for start, stop in zip(first, last, strict=True)]
    return ranges


def timed(read: Callable[[int], int], order: list[int], *, seconds: float, threads: int) -> tuple[float, float]:
    """(samples, bytes) per second of reading in an order, again and again, for so long."""
    deadline = time.perf_counter() + seconds

    def work(own: list[int]) -> tuple[int, int]:
        total = 0
        for samples, place in enumerate(itertools.cycle(own), start=1):
            total += read(place)
            if time.perf_counter() > deadline:
                return samples, total
        raise AssertionError("a cycle has no end")

    started = time.perf_counter()
    if threads == 1:
        counts = [work(order)]
    else:
        with ThreadPoolExecutor(threads) as pool:
            counts = list(pool.map(work, [order[thread::threads] for thread in range(threads)]))
    elapsed = time.perf_counter() - started
    return sum(samples for samples, _ in counts) / elapsed, sum(total for _, total in counts) / elapsed


def timed_webdataset(folder: Path, *, seconds: float) -> tuple[float, float]:
    """(samples, bytes) per second of webdataset reading the tars in order."""
    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    samples = total = 0
    started = time.perf_counter()
    for sample in webdataset.WebDataset(urls, shardshuffle=False):
        total += sum(len(sample[name]) for name in MEMBERS[:2])
        samples += 1
        if time.perf_counter() - started > seconds:
            break
    elapsed = time.perf_counter() - started
    return samples / elapsed, total / elapsed


def drop_caches() -> None:
    """Empty the page cache (Linux, root)."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("1\n")


def rows_of(kind: Kind, folder: Path, args: argparse.Namespace) -> list[Row]:
    """Rates of every way on one kind of sample."""
    write_cache(folder, kind, total_bytes=int(args.gigabytes * 1e9))
    cache = open_cache(folder)
    ranges = raw_ranges(folder, cache)
    readers: dict[str, Callable[[int], int]] = {
        "megasora": lambda place: sum(tensor.nbytes for tensor in cache.read(place, BOTH).values()),
        "os.pread": lambda place: len(os.pread(ranges[place][0], ranges[place][2], ranges[place][1])),
    }
    ways = [(name, threads) for threads in args.threads for name in readers] + [(WEBDATASET, 1)]
    rates: dict[tuple[str, int], list[tuple[float, float]]] = {way: [] for way in ways}
    for number in range(args.rounds + 1):
        order = np.random.default_rng(number).permutation(len(cache)).tolist()
        for name, threads in ways:
            if args.drop_caches:
                drop_caches()
            if name == WEBDATASET:
                found = timed_webdataset(folder, seconds=args.seconds)
            else:
                found = timed(readers[name], order, seconds=args.seconds, threads=threads)
            if number:  # the first round warms up
                rates[name, threads].append(found)
    for descriptor in {descriptor for descriptor, _, _ in ranges}:
        os.close(descriptor)
    return [_row(kind, way, threads, rates) for way, threads in rates]


def _row(kind: Kind, way: str, threads: int, rates: dict[tuple[str, int], list[tuple[float, float]]]) -> Row:
    samples = [rate for rate, _ in rates[way, threads]]
    of_pread = [ours / raw for (_, ours), (_, raw) in zip(rates[way, threads], rates["os.pread", threads], strict=True)]
    return Row(
        sample=kind.name,
        way=way,
        threads=threads,
        samples_per_s=statistics.median(samples),
        bytes_per_s=statistics.median(rate for _, rate in rates[way, threads]),
        lowest=min(samples),
        highest=max(samples),
        of_pread=statistics.median(of_pread),
    )


def machine() -> str:
    """The processor, its cores and the load."""
    models = [line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    load = os.getloadavg()
    return f"{models[0] if models else platform.processor()}, {os.cpu_count()} cores, load {load[0]:.1f} at the end"


def main() -> None:
    """Parse, write, read, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--gigabytes", type=float, default=2.0, help="of each cache")
    parser.add_argument("--seconds", type=float, default=1.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--drop_caches", action="store_true")
    parser.add_argument("--json", action="store_true", help="end with one JSON line")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[Row] = []
    for kind in KINDS:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            rows += rows_of(kind, Path(folder), args)
    print(f"`python {' '.join(sys.argv)}`; {machine()}; page cache {'dropped before each measurement' if args.drop_caches else 'warm'};")
    print(f"median of {args.rounds} rounds, in brackets the slowest and the fastest; Python {platform.python_version()}\n")
    print("| sample | reader | threads | samples/s | GB/s | of os.pread |\n|---|---|---|---|---|---|")
    for row in rows:
        spread = f"{row.samples_per_s:,.0f} ({row.lowest:,.0f} to {row.highest:,.0f})"
        print(f"| {row.sample} | {row.way} | {row.threads} | {spread} | {row.bytes_per_s / 1e9:.2f} | {row.of_pread:.0%} |")
    print(f"\ntargets: {'; '.join(f'{kind.name}: {kind.target}' for kind in KINDS)}")
    if args.json:
        facts: list[dict[str, Any]] = [asdict(row) for row in rows]
        print(json.dumps({"machine": machine(), "warm": not args.drop_caches, "rows": facts}))


if __name__ == "__main__":
    main()
