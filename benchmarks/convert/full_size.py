"""Converts a full-size model through every format and back, proves the bits, and compares the rate with a plain copy.

    python benchmarks/convert/full_size.py FOLDER [--small] [--repeats 3] [--json]

1. The chain flux -> megasora -> opensora -> megasora -> flux over a random FLUX.1-dev file (23.8 GB). Each link deletes its input, so two
   copies are on disk at most; the end must have every tensor of the start bit for bit, by the hashes taken at the start.
2. Rates: each conversion and `cp --reflink=never` plus sync of as many bytes take turns, cold cache, median of the ratios.
The anonymous memory of the converting process and its children is sampled ten times a second. Dropping the page cache needs root.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from make_flux import FLUX_DEV, SMALL, make

from megasora.checkpoint.convert import sha256_of
from megasora.checkpoint.safetensors_io import SafetensorsReader


@dataclass
class Run:
    """One measured command."""

    seconds: float
    peak_anonymous_bytes: int


def hashes(path: Path) -> dict[str, str]:
    """SHA-256 of every tensor of a safetensors file."""
    reader = SafetensorsReader(path)
    found = {}
    for key in reader.infos:
        found[key] = sha256_of(reader.rows(key))
        reader.release(key)
    return found


def size_of(path: Path) -> int:
    """Bytes of a file or folder."""
    return path.stat().st_size if path.is_file() else sum(file.stat().st_size for file in path.iterdir())


def drop_caches() -> None:
    """Empty the page cache."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3\n")


def _anonymous(pid: int) -> int:
    """RssAnon of a process and its children."""
    total = 0
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon"):
                total += int(line.split()[1]) * 1024
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            total += _anonymous(int(child))
    except (FileNotFoundError, ProcessLookupError):
        pass
    return total


def run(command: list[str]) -> Run:
    """Run a command to the end, then sync; refuse failure."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    peak = 0
    done = threading.Event()

    def sample() -> None:
        nonlocal peak
        while not done.wait(0.1):
            peak = max(peak, _anonymous(process.pid))

    sampler = threading.Thread(target=sample)
    sampler.start()
    code = process.wait()
    done.set()
    sampler.join()
    os.sync()
    if code:
        raise SystemExit(f"{' '.join(command)} ended with {code}")
    return Run(seconds=time.perf_counter() - started, peak_anonymous_bytes=peak)


def convert(source: Path, target: Path, fmt: str) -> Run:
    """`megasora convert` in a process of its own."""
    return run([sys.executable, "-m", "megasora", "convert", str(source), str(target), "--to", fmt])


def remove(path: Path) -> None:
    """Delete a file or folder, and a file's manifest."""
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    path.with_name(f"{path.name}.manifest.json").unlink(missing_ok=True)


def chain(folder: Path, start: Path) -> dict[str, Any]:
    """flux -> megasora -> opensora -> megasora -> flux; the start is deleted on the way."""
    before = hashes(start)
    links = []
    path = start
    for number, (fmt, suffix) in enumerate((("megasora", ""), ("opensora", ".safetensors"), ("megasora", ""), ("flux", ".safetensors"))):
        target = folder / f"link{number}{suffix}"
        drop_caches()
        result = convert(path, target, fmt)
        num_bytes = size_of(target)
        links.append(
            {
                "to": fmt,
                "seconds": result.seconds,
                "gb_per_s": num_bytes / result.seconds / 1e9,
                "anonymous_gb": result.peak_anonymous_bytes / 1e9,
            }
        )
        print(
            f"  -> {fmt}: {result.seconds:.0f} s, {links[-1]['gb_per_s']:.2f} GB/s, anonymous {links[-1]['anonymous_gb']:.2f} GB",
            flush=True,
        )
        remove(path)
        path = target
    after = hashes(path)
    path.rename(start)
    path.with_name(f"{path.name}.manifest.json").unlink()
    return {"links": links, "tensors": len(before), "bit_equal": after == before}


def rates(folder: Path, start: Path, *, repeats: int) -> list[dict[str, Any]]:
    """Each conversion against cp of its input, taking turns."""
    rows = []
    for name, source_format, fmt, suffix in (
        ("flux -> opensora (safetensors target)", "flux", "opensora", ".safetensors"),
        ("flux -> megasora (Megatron target)", "flux", "megasora", ""),
        ("megasora -> opensora (Megatron source)", "megasora", "opensora", ".safetensors"),
    ):
        source = start
        if source_format == "megasora":
            source = folder / "source"
            convert(start, source, "megasora")
            start.unlink()  # two copies at most
        ratios, ours, theirs, memory = [], [], [], 0
        for _ in range(repeats):
            copy, target = folder / "copy", folder / f"target{suffix}"
            drop_caches()
            plain = run(["cp", "-r", "--reflink=never", str(source), str(copy)])
            remove(copy)
            drop_caches()
            result = convert(source, target, fmt)
            remove(target)
            ratios.append(plain.seconds / result.seconds)
            ours.append(result.seconds)
            theirs.append(plain.seconds)
            memory = max(memory, result.peak_anonymous_bytes)
        rows.append(
            {
                "conversion": name,
                "rate_against_cp": statistics.median(ratios),
                "ratios": ratios,
                "seconds": ours,
                "cp_seconds": theirs,
                "anonymous_gb": memory / 1e9,
            }
        )
        print(f"  {name}: {rows[-1]['rate_against_cp']:.2f} of cp's rate, {[round(ratio, 2) for ratio in ratios]}", flush=True)
    return rows


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="an empty folder with 50 GB free (100 MB with --small)")
    parser.add_argument("--small", action="store_true", help="hidden size 128, all blocks")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="end with one JSON line")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    start = args.folder / "start.safetensors"
    count = make(start, SMALL if args.small else FLUX_DEV)
    num_bytes = start.stat().st_size
    print(f"{count:,} parameters, {num_bytes:,} bytes; {os.cpu_count()} cores", flush=True)
    result: dict[str, Any] = {"parameters": count, "bytes": num_bytes, "chain": chain(args.folder, start)}
    print(f"chain: {'every tensor bit for bit' if result['chain']['bit_equal'] else 'TENSORS DIFFER'}", flush=True)
    result["rates"] = rates(args.folder, start, repeats=args.repeats)
    if args.json:
        print(json.dumps(result))
    if not result["chain"]["bit_equal"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
