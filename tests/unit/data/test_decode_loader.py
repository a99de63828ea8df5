"""The loader: hanging files cost no capacity and no exit, decode statistics, time limits."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from megasora.data.decoding.contract import DecodeError, DecodeRequest
from megasora.data.decoding.pyav import PyAVDecoder
from megasora.data.decoding.writer import write_video
from megasora.data.loader import ClipLoader


def request(path: str, *, num_frames: int = 4) -> DecodeRequest:
    return DecodeRequest(path=path, start=0, stride=1, num_frames=num_frames, height=32, width=48)


class Hanging:
    """Hangs on paths that start with 'hang' until released; gives zeros for the rest."""

    identity = "test"

    def __init__(self) -> None:
        self.release = threading.Event()

    def decode(self, request: DecodeRequest) -> torch.Tensor:
        if request.path.startswith("hang"):
            self.release.wait(20)
        return torch.zeros(3, request.num_frames, request.height, request.width)


def test_more_hanging_files_than_threads_leave_the_loader_at_full_strength(caplog: pytest.LogCaptureFixture) -> None:
    decoder = Hanging()
    steps = [[request(f"hang{n}") for n in range(4)], [request("fine") for _ in range(6)]]
    loader = ClipLoader(iter(steps), decoder=decoder, workers=2, ahead=2, timeout_s=0.1)
    try:
        with caplog.at_level(logging.WARNING):
            first, second = loader
        assert all(isinstance(clip, DecodeError) and f"hang{n}: decoding took longer" in str(clip) for n, clip in enumerate(first.clips))
        assert all(isinstance(clip, torch.Tensor) for clip in second.clips)
        assert loader.stuck_threads == 4
        assert len(caplog.records) == 1 and "hang" in caplog.text
    finally:
        decoder.release.set()
        loader.close()


def test_threads_that_come_back_late_end_and_change_nothing() -> None:
    decoder = Hanging()
    before = set(threading.enumerate())
    loader = ClipLoader(iter([[request("hang"), request("fine")]]), decoder=decoder, workers=1, ahead=1, timeout_s=0.1)
    (step,) = loader
    decoder.release.set()
    loader.close()
    deadline = time.monotonic() + 10
    while set(threading.enumerate()) - before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not set(threading.enumerate()) - before
    assert [type(clip) for clip in step.clips] == [DecodeError, torch.Tensor]


def test_waiting_for_a_turn_does_not_count_as_hanging() -> None:
    class Slow(Hanging):
        def decode(self, request: DecodeRequest) -> torch.Tensor:
            time.sleep(0.05)
            return super().decode(request)

    loader = ClipLoader(iter([[request("fine") for _ in range(8)]]), decoder=Slow(), workers=1, ahead=1, timeout_s=0.3)
    (step,) = loader
    loader.close()
    assert all(isinstance(clip, torch.Tensor) for clip in step.clips)


def test_a_step_carries_what_was_decoded_and_how_long_it_took() -> None:
    steps = [[request("fine", num_frames=5), request("hang"), request("fine", num_frames=2)]]
    decoder = Hanging()
    loader = ClipLoader(iter(steps), decoder=decoder, workers=2, ahead=1, timeout_s=0.2)
    try:
        (step,) = loader
    finally:
        decoder.release.set()
        loader.close()
    assert step.frames == 7
    assert step.pixel_bytes == 7 * 3 * 32 * 48 * 4
    assert 0.2 <= step.decode_s < 5


def test_a_slow_decode_stops_at_its_time_limit(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    write_video(path, torch.zeros(3, 40, 64, 96), fps=25.0)
    with pytest.raises(DecodeError, match="longer than 1e-06 s"):
        PyAVDecoder(timeout_s=1e-6).decode(request(str(path)))
    assert PyAVDecoder(timeout_s=60).decode(request(str(path))).shape == (3, 4, 32, 48)


def test_a_file_that_hangs_in_the_kernel_neither_stops_the_loader_nor_the_end_of_the_process(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.mp4")  # opening it waits for a writer that never comes
    write_video(tmp_path / "clip.mp4", torch.zeros(3, 8, 64, 96), fps=25.0)
    program = f"""
from megasora.data.decoding.contract import DecodeRequest
from megasora.data.decoding.pyav import PyAVDecoder
from megasora.data.loader import ClipLoader
wanted = [DecodeRequest(path=f"{tmp_path}/{{name}}.mp4", start=0, stride=1, num_frames=4, height=32, width=48) for name in ("pipe", "clip")]
(step,) = ClipLoader(iter([wanted]), decoder=PyAVDecoder(), workers=1, ahead=1, timeout_s=0.3)
print(*(type(clip).__name__ for clip in step.clips))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["DecodeError", "Tensor"]
    assert "took longer than 0.3 s" in done.stderr
