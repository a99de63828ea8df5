"""Decoding: the right frames, the right size, and an error instead of a short or black clip."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megasora.config.errors import UserError
from megasora.data.decoding.contract import DecodeError, DecodeRequest, covering_size
from megasora.data.decoding.dali import DaliDecoder
from megasora.data.decoding.pyav import PyAVDecoder
from megasora.data.decoding.writer import write_video
from megasora.data.loader import ClipLoader
from megasora.data.manifest import read_manifest
from megasora.data.tiny_clips import make_tiny_clips


def request(path: Path, **changes: object) -> DecodeRequest:
    facts = {"path": str(path), "start": 0, "stride": 1, "num_frames": 5, "height": 32, "width": 48}
    return DecodeRequest(**{**facts, **changes})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def stairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """100 frames; the left half's gray level tells the tens of the frame number, the right half's the ones."""
    path = tmp_path_factory.mktemp("clips") / "stairs.mp4"
    number = torch.arange(100)
    halves = torch.stack([number // 10, number % 10], dim=1) * 20.0 + 20
    video = (halves / 127.5 - 1)[None, :, None, :].repeat_interleave(48, dim=3).expand(3, 100, 64, 96)
    write_video(path, video, fps=25.0)
    return path


def frame_numbers(video: torch.Tensor) -> list[int]:
    gray = ((video + 1) * 127.5).mean(dim=(0, 2))
    digits = [((gray[:, columns].mean(dim=1) - 20) / 20).round().int().tolist() for columns in (slice(0, 20), slice(28, 48))]
    return [10 * tens + ones for tens, ones in zip(*digits, strict=True)]


@pytest.mark.parametrize(("start", "stride"), [(0, 1), (3, 4), (70, 5), (95, 1)])
def test_frames_are_the_ones_asked_for(stairs: Path, start: int, stride: int) -> None:
    video = PyAVDecoder().decode(request(stairs, start=start, stride=stride))
    assert video.shape == (3, 5, 32, 48)
    assert frame_numbers(video) == [start + n * stride for n in range(5)]


def test_frames_may_be_spread_over_a_span(stairs: Path) -> None:
    """5 frames over 15 (stride 3): 14 / 4 = 3.5 apart, rounded down."""
    video = PyAVDecoder().decode(request(stairs, start=40, stride=3, span=15))
    assert frame_numbers(video) == [40, 43, 47, 50, 54]
    assert PyAVDecoder().decode(request(stairs, start=85, stride=3, span=15)).shape[1] == 5  # up to the last frame, 99
    with pytest.raises(DecodeError, match="4 of 5"):
        PyAVDecoder().decode(request(stairs, start=86, stride=3, span=15))


def test_a_short_read_is_an_error(stairs: Path) -> None:
    with pytest.raises(DecodeError, match="4 of 5"):
        PyAVDecoder().decode(request(stairs, start=96))


def test_a_truncated_file_and_noise_are_errors(stairs: Path, tmp_path: Path) -> None:
    for name, content in (("cut.mp4", stairs.read_bytes()[:900]), ("noise.mp4", bytes(range(256)) * 20)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DecodeError, match=name):
            PyAVDecoder().decode(request(tmp_path / name))


def test_resizing_covers_then_cuts_the_centre() -> None:
    assert covering_size((100, 200), (32, 32)) == (32, 64)
    assert covering_size((200, 100), (32, 48)) == (96, 48)


def test_dali_agrees_with_pyav_on_vp9(tmp_path: Path) -> None:
    path = tmp_path / "clip.webm"
    ramp = torch.linspace(-0.9, 0.9, 96).expand(3, 12, 64, 96) * torch.linspace(0.5, 1, 12)[None, :, None, None]
    write_video(path, ramp, fps=25.0, codec="libvpx-vp9")
    wanted = request(path, start=1, stride=2, height=64, width=96)
    by_dali, by_pyav = DaliDecoder(device=torch.device("cpu")).decode(wanted), PyAVDecoder().decode(wanted)
    assert by_dali.shape == by_pyav.shape
    assert float((by_dali - by_pyav).abs().mean()) < 6 / 127.5  # another YUV matrix costs some levels


def test_dali_refuses_h264_on_the_cpu_and_short_reads(stairs: Path, tmp_path: Path) -> None:
    decoder = DaliDecoder(device=torch.device("cpu"))
    with pytest.raises(DecodeError, match="pyav"):
        decoder.decode(request(stairs))
    path = tmp_path / "clip.webm"
    write_video(path, torch.zeros(3, 6, 64, 96), fps=25.0, codec="libvpx-vp9")
    with pytest.raises(DecodeError):
        decoder.decode(request(path, start=3))
    assert decoder.decode(request(path)).shape == (3, 5, 32, 48)


def test_the_loader_returns_errors_in_place(stairs: Path, tmp_path: Path) -> None:
    steps = [[request(stairs), request(tmp_path / "missing.mp4")], [request(stairs, start=10)]]
    loader = ClipLoader(iter(steps), decoder=PyAVDecoder(), workers=2, ahead=2)
    loaded = list(loader)
    assert [type(clip) for clip in loaded[0].clips] == [torch.Tensor, DecodeError]
    assert isinstance(loaded[1].clips[0], torch.Tensor)
    loader.close()


def test_tiny_clips_are_usable_and_the_same_every_time(tmp_path: Path) -> None:
    first, _ = make_tiny_clips(tmp_path / "a", num_clips=8, num_eval=2)
    again, _ = make_tiny_clips(tmp_path / "b", num_clips=8, num_eval=2)
    manifest = read_manifest(first)
    assert len(manifest.clips) == 8
    for one, other in zip(manifest.clips, read_manifest(again).clips, strict=True):
        assert Path(one.path).read_bytes() == Path(other.path).read_bytes()


def test_bad_rows_are_skipped_and_a_bad_table_is_refused(tmp_path: Path) -> None:
    table = tmp_path / "m.csv"
    head = "path,text,num_frames,height,width,aspect_ratio,resolution,fps\n"
    table.write_text(head + 'a.mp4,"one, two",20,64,64,1,4096,24\nb.mp4,x,many,64,64,1,4096,24\n,y,20,64,64,1,4096,24\n')
    manifest = read_manifest(table)
    assert [clip.text for clip in manifest.clips] == ["one, two"]
    assert manifest.clips[0].path == str(tmp_path / "a.mp4")
    assert [row.row for row in manifest.skipped] == [1, 2]
    for content, reason in ((head, "no usable row"), ("path,text\na,b\n", "lacks the columns")):
        table.write_text(content)
        with pytest.raises(UserError, match=reason):
            read_manifest(table)
    with pytest.raises(UserError, match="cannot read manifest"):
        read_manifest(tmp_path / "none.csv")
