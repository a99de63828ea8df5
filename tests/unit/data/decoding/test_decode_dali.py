"""DALI: many requests of any shape in one run, agreement with PyAV, refusals; and the choice of a decoder."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megasora.config.errors import UserError
from megasora.data.decoding import choice
from megasora.data.decoding.choice import open_decoder
from megasora.data.decoding.contract import BatchDecoder, DecodeError, DecodeRequest, normalise
from megasora.data.decoding.dali import DaliDecoder, MixedDecoder, gpu_decodes
from megasora.data.decoding.pyav import PyAVDecoder, VideoFacts
from megasora.data.decoding.writer import write_video
from megasora.data.loader import ClipLoader

CPU = torch.device("cpu")


def request(path: Path, **changes: object) -> DecodeRequest:
    facts = {"path": str(path), "start": 0, "stride": 1, "num_frames": 5, "height": 32, "width": 48}
    return DecodeRequest(**{**facts, **changes})  # type: ignore[arg-type]


def waves(num_frames: int, height: int, width: int) -> torch.Tensor:
    """Smooth coloured waves that move."""
    t = torch.arange(num_frames)[:, None, None] / 5
    y, x = torch.meshgrid(torch.arange(height) / 9.0, torch.arange(width) / 7.0, indexing="ij")
    return torch.stack([torch.sin(x + t), torch.sin(y - t), torch.sin(x + y + t)]) * 0.8


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("clips")
    for name, size, codec in (("a.webm", (96, 160), "libvpx-vp9"), ("b.webm", (128, 96), "libvpx-vp9"), ("c.mp4", (96, 160), "libx264")):
        write_video(folder / name, waves(30, *size), fps=25.0, codec=codec)
    return {path.name: path for path in folder.iterdir()}


def test_one_run_of_many_shapes_agrees_with_pyav(clips: dict[str, Path]) -> None:
    wanted = [
        request(clips["a.webm"], num_frames=17, height=48, width=80),
        request(clips["b.webm"], start=5, stride=3, num_frames=8, height=64, width=48),
        request(clips["a.webm"], start=7, num_frames=4, height=32, width=32, crop=(33, 10, 90, 70)),
        request(clips["b.webm"], num_frames=1, height=96, width=96),
        request(clips["a.webm"], start=10, stride=3, num_frames=6, height=48, width=80, span=18),
    ]
    decoder = DaliDecoder(device=CPU, num_threads=4)
    assert isinstance(decoder, BatchDecoder) and decoder.batch_size == 4
    for one, video in zip(wanted, decoder.pixels_many(wanted), strict=True):
        by_pyav = PyAVDecoder().pixels(one)
        assert isinstance(video, torch.Tensor) and video.shape == by_pyav.shape and video.dtype == torch.uint8
        assert float((video.float() - by_pyav.float()).abs().mean()) < 2  # roundings and chroma filters of their own


def test_a_bad_request_of_a_run_costs_only_itself(clips: dict[str, Path], tmp_path: Path) -> None:
    content = bytearray(clips["a.webm"].read_bytes())
    content[len(content) // 3 :] = bytes(len(content) - len(content) // 3)
    (tmp_path / "broken.webm").write_bytes(content)
    wanted = [
        request(clips["a.webm"]),
        request(tmp_path / "broken.webm", num_frames=25),
        request(clips["b.webm"], start=28),
        request(clips["c.mp4"]),
        request(tmp_path / "missing.webm"),
        request(clips["b.webm"], crop=(50, 0, 90, 64)),
        request(clips["b.webm"]),
        request(clips["b.webm"], start=16, stride=3, span=15),
    ]
    results = DaliDecoder(device=CPU, num_threads=4).pixels_many(wanted)
    assert [isinstance(result, torch.Tensor) for result in results] == [True, False, False, False, False, False, True, False]
    for result, reason in zip(results[2:6], ("2 of 5", "does not decode h264", "missing.webm", "outside 96x128"), strict=True):
        assert reason in str(result) and "\n" not in str(result)
    assert "4 of 5" in str(results[7])  # of 30 frames: 16, 19, 23, 26, and no 30


def test_mixed_sends_each_file_to_the_decoder_that_can(clips: dict[str, Path], tmp_path: Path) -> None:
    mixed = open_decoder("mixed", device=CPU)
    assert isinstance(mixed, MixedDecoder)
    assert mixed.identity == f"mixed({mixed.dali.identity}, {mixed.pyav.identity})"
    vp9, h264 = request(clips["a.webm"]), request(clips["c.mp4"])
    first, second, third = mixed.pixels_many([h264, request(tmp_path / "missing.mp4"), vp9])
    assert isinstance(first, torch.Tensor) and torch.equal(first, PyAVDecoder().pixels(h264))
    assert isinstance(second, DecodeError)
    assert isinstance(third, torch.Tensor) and torch.equal(third, DaliDecoder(device=CPU).pixels(vp9))
    for one, expected in ((h264, first), (vp9, third)):
        assert torch.equal(mixed.pixels(one), expected) and torch.equal(mixed.decode(one), normalise(expected))


def test_the_loader_hands_batches_to_a_decoder_that_takes_them(clips: dict[str, Path]) -> None:
    sizes: list[int] = []

    class Counting(DaliDecoder):
        def pixels_many(self, requests):  # type: ignore[no-untyped-def]
            sizes.append(len(requests))
            return super().pixels_many(requests)

    wanted = [[request(clips["a.webm"], start=start) for start in range(8)], [request(clips["b.webm"])]]
    loader = ClipLoader(iter(wanted), decoder=Counting(device=CPU, num_threads=3), workers=1, ahead=2)
    steps = list(loader)
    loader.close()
    assert sum(sizes) == 9 and max(sizes) == 3
    single = DaliDecoder(device=CPU)
    for step, requests in zip(steps, wanted, strict=True):
        for clip, one in zip(step.clips, requests, strict=True):
            assert isinstance(clip, torch.Tensor) and torch.equal(
                clip, single.decode(one)
            )  # the loader gives [-1, 1] unless told otherwise


def facts(codec: str, pixel_format: str = "yuv420p") -> VideoFacts:
    return VideoFacts(codec=codec, pixel_format=pixel_format, height=720, width=1280)


def test_the_gpu_s_decoder_is_asked_only_for_what_it_has() -> None:
    hopper, ada = (9, 0), (8, 9)
    assert gpu_decodes(facts("h264"), capability=hopper) and gpu_decodes(facts("hevc", "yuv420p10le"), capability=hopper)
    assert gpu_decodes(facts("av1"), capability=ada)
    for codec, pixel_format in (("av1", "yuv420p"), ("h264", "yuv420p10le"), ("h264", "yuv422p"), ("png", "rgb24")):
        assert not gpu_decodes(facts(codec, pixel_format), capability=hopper)


def test_copies_are_waited_for_before_the_next_run_may_overwrite_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU a copy out of DALI's buffers is queued, not done."""
    decoder = DaliDecoder(device=CPU)
    seen: list[str] = []

    class Stream:
        def synchronize(self) -> None:
            assert decoder._turn.locked()  # nobody else can have started a run yet
            seen.append("waited")

    class Pipeline:
        def run(self, **_: object) -> tuple[torch.Tensor]:
            seen.append("ran")
            return (torch.zeros(1, 3, 5, 32, 48, dtype=torch.uint8),)

    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: Stream())
    monkeypatch.setattr(decoder, "on_gpu", True)
    monkeypatch.setattr(decoder, "_pipeline", Pipeline())
    sample = SimpleNamespace(request=request(Path("clip.mp4")), arguments=defaultdict(int))
    (video,) = decoder._run([sample])  # type: ignore[list-item]
    assert isinstance(video, torch.Tensor)
    assert seen == ["ran", "waited"]


def test_auto_is_one_decoder_for_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(open_decoder("auto", device=CPU), PyAVDecoder)
    assert isinstance(open_decoder("auto", device=torch.device("cuda", 0)), DaliDecoder)
    assert open_decoder("dali", device=CPU, workers=5).batch_size == 5  # type: ignore[attr-defined]
    assert open_decoder("dali", device=CPU).identity.endswith(" cpu")
    monkeypatch.setattr(choice, "_dali_installed", lambda: False)
    assert isinstance(open_decoder("auto", device=torch.device("cuda", 0)), PyAVDecoder)
    for kind in ("dali", "mixed"):
        with pytest.raises(UserError, match="pip install"):
            open_decoder(kind, device=CPU)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="decode_timeout_s"):
        open_decoder("pyav", device=CPU, timeout_s=0)
