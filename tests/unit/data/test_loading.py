"""Loading: threads share a DALI decoder, a hanging file becomes an error, crops stay inside the picture."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from megasora.data.decoding.contract import DecodeError, DecodeRequest
from megasora.data.decoding.dali import DaliDecoder
from megasora.data.decoding.pyav import PyAVDecoder
from megasora.data.decoding.writer import write_video
from megasora.data.loader import ClipLoader


def request(path: Path, *, start: int = 0, crop: tuple[int, int, int, int] | None = None) -> DecodeRequest:
    return DecodeRequest(path=str(path), start=start, stride=1, num_frames=4, height=32, width=48, crop=crop)


@pytest.fixture(scope="module")
def levels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 VP9 frames, each of one gray level that grows with its number."""
    path = tmp_path_factory.mktemp("clips") / "levels.webm"
    gray = torch.linspace(-0.8, 0.8, 24)
    write_video(path, gray[None, :, None, None].expand(3, 24, 64, 96), fps=25.0, codec="libvpx-vp9")
    return path


def test_threads_that_share_a_dali_decoder_get_their_own_frames(levels: Path) -> None:
    starts = [20, 0, 12, 4, 16, 8] * 3
    loader = ClipLoader(
        iter([[request(levels, start=start) for start in starts]]), decoder=DaliDecoder(device=torch.device("cpu")), workers=4, ahead=1
    )
    (step,) = loader
    loader.close()
    for start, clip in zip(starts, step.clips, strict=True):
        assert isinstance(clip, torch.Tensor)
        wanted = torch.linspace(-0.8, 0.8, 24)[start : start + 4]
        assert torch.allclose(clip.mean(dim=(0, 2, 3)), wanted, atol=0.03)


@pytest.mark.parametrize("decoder", [PyAVDecoder(), DaliDecoder(device=torch.device("cpu"))], ids=["pyav", "dali"])
def test_a_crop_outside_the_picture_is_an_error(levels: Path, decoder: PyAVDecoder | DaliDecoder) -> None:
    assert decoder.decode(request(levels, crop=(48, 32, 48, 32))).shape == (3, 4, 32, 48)
    with pytest.raises(DecodeError, match="outside 96x64"):
        decoder.decode(request(levels, crop=(49, 32, 48, 32)))


def test_a_hanging_clip_becomes_an_error_and_the_next_one_still_comes() -> None:
    release = threading.Event()

    class Hanging:
        def decode(self, request: DecodeRequest) -> torch.Tensor:
            if request.path == "hangs":
                release.wait(10)
            return torch.zeros(3, request.num_frames, request.height, request.width)

    steps = [[request(Path("hangs")), request(Path("fine"))]]
    loader = ClipLoader(iter(steps), decoder=Hanging(), workers=2, ahead=1, timeout_s=0.1)
    try:
        (step,) = loader
        assert [type(clip) for clip in step.clips] == [DecodeError, torch.Tensor]
        assert step.wait_s < 5
    finally:
        release.set()
        loader.close()


def test_a_decoders_own_bug_costs_the_clip() -> None:
    class Broken:
        def decode(self, request: DecodeRequest) -> torch.Tensor:
            raise OverflowError("cannot fit")

    (step,) = ClipLoader(iter([[request(Path("odd.mp4"))]]), decoder=Broken(), workers=1, ahead=1)
    (error,) = step.clips
    assert isinstance(error, DecodeError)
    assert str(error) == "odd.mp4: OverflowError: cannot fit"
