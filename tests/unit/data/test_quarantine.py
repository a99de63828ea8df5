"""Clips that fail are tried a few times over a run's life."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from megasora.data.decoding.contract import DecodeError, DecodeRequest
from megasora.data.loader import ClipLoader
from megasora.data.quarantine import Failures, Quarantine, read_failures


class Decoder:
    """Fails at clips called bad, and remembers what it was asked for."""

    identity = "test"

    def __init__(self) -> None:
        self.asked: list[str] = []

    def decode(self, request: DecodeRequest) -> Tensor:
        self.asked.append(request.clip_id)
        if request.clip_id.startswith("bad"):
            raise DecodeError("no frames")
        return torch.zeros(3, 1, 2, 2)

    pixels = decode


def request(clip: str) -> DecodeRequest:
    return DecodeRequest(path="many.mp4", start=0, stride=1, num_frames=1, height=2, width=2, clip_id=clip)


def opened(folder: Path, *, rank: int = 0, limit: int = 2) -> Quarantine:
    return Quarantine(folder, rank=rank, known=read_failures(folder), limit=limit)


def load(folder: Path, steps: list[list[str]], *, limit: int = 2) -> tuple[list[list[str]], list[str]]:
    """(what came of each step's clips, what was decoded)."""
    decoder = Decoder()
    loader = ClipLoader(
        iter([[request(clip) for clip in step] for step in steps]),
        decoder=decoder,
        workers=1,
        ahead=1,
        quarantine=opened(folder, limit=limit),
    )
    came = [[str(clip) if isinstance(clip, DecodeError) else "clip" for clip in step.clips] for step in loader]
    return came, decoder.asked


def test_a_clip_is_not_tried_after_its_last_failure(tmp_path: Path) -> None:
    came, asked = load(tmp_path, [["fine", "bad"]] * 4)
    assert asked == ["fine", "bad", "fine", "bad", "fine", "fine"]
    refused = "many.mp4: in quarantine after 2 failures, the last: no frames"
    assert came == [["clip", "no frames"]] * 2 + [["clip", refused]] * 2


def test_failures_are_remembered_over_restarts_and_other_clips_of_the_file_are_tried(tmp_path: Path) -> None:
    load(tmp_path, [["bad"]])
    load(tmp_path, [["bad", "bad too"]])
    _, asked = load(tmp_path, [["bad", "bad too", "fine"]])
    assert asked == ["bad too", "fine"]


def test_with_a_limit_of_0_everything_is_tried(tmp_path: Path) -> None:
    _, asked = load(tmp_path, [["bad"]] * 5, limit=0)
    assert asked == ["bad"] * 5


def test_lines_that_a_crash_cut_off_are_passed_over(tmp_path: Path) -> None:
    opened(tmp_path).failed("a", "no frames")
    (tmp_path / "failures_00000.jsonl").open("a").write('{"clip": "b", "rea')
    assert read_failures(tmp_path) == {"a": Failures(count=1, last_reason="no frames")}
