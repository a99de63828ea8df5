"""PSNR and SSIM of clips whose difference is known, and what is not compared."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest
import torch
from torchmetrics.functional.image import peak_signal_noise_ratio

from megasora import cli
from megasora.config.errors import UserError
from megasora.data.decoding.writer import write_video
from megasora.evaluation.fidelity import MEASURES, ClipFidelity, Fidelity, compare_pairs, pair_up, psnr_of, render
from megasora.evaluation.files import ClipFacts, clip_facts, clips_in, runs_of_frames
from tests.unit.evaluation.clips import noise, write_exact


@pytest.mark.parametrize("ending", [".mp4", ".png"])
@pytest.mark.parametrize("offset", [1, 5, 20])
def test_psnr_of_a_constant_offset(tmp_path: Path, offset: int, ending: str) -> None:
    # every level differs by d, so the mean squared error is d^2 and PSNR is 20 log10(255 / d)
    frames = noise(3, 32, 48)
    write_exact(tmp_path / "a" / f"x{ending}", frames)
    write_exact(tmp_path / "b" / f"x{ending}", frames + offset)
    (clip,) = compare_pairs(*pair_up(tmp_path / "a", tmp_path / "b"), measures=("psnr",)).clips
    assert clip.num_frames == (1 if ending == ".png" else 3)
    assert clip.psnr == pytest.approx(20 * math.log10(255 / offset), abs=1e-9)
    assert clip.ssim is None


def test_psnr_pools_all_frames_as_torchmetrics_does(tmp_path: Path) -> None:
    # an offset of 2 in one frame of four: mean squared error 4 / 4 = 1, so 20 log10(255) = 48.1308
    frames = noise(4, 32, 32)
    other = frames.clone()
    other[2] += 2
    write_exact(tmp_path / "a" / "x.mp4", frames)
    write_exact(tmp_path / "b" / "x.mp4", other)
    (clip,) = compare_pairs(*pair_up(tmp_path / "a", tmp_path / "b"), measures=("psnr",)).clips
    assert clip.psnr == pytest.approx(48.1308, abs=1e-4)
    assert clip.psnr == pytest.approx(float(peak_signal_noise_ratio(frames.float(), other.float(), data_range=255.0)), abs=1e-4)


def test_equal_clips_have_ssim_1_and_infinite_psnr(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        write_exact(tmp_path / folder / "same.mp4", noise(2, 32, 32))
        write_exact(tmp_path / folder / "other.mp4", noise(2, 32, 32) + (10 if folder == "b" else 0))
    found = compare_pairs(*pair_up(tmp_path / "a", tmp_path / "b"), measures=("psnr", "ssim"))
    by_name = {clip.name: clip for clip in found.clips}
    assert by_name["same"].psnr == math.inf
    assert by_name["same"].ssim == pytest.approx(1.0, abs=1e-6)
    assert found.equal == 1
    assert found.summaries()["psnr"].count == 1  # the infinite one is left out
    told = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert [clip["psnr"] for clip in told["clips"] if clip["name"] == "same"] == [None]


def test_ssim_of_flat_pictures_is_its_luminance_term(tmp_path: Path) -> None:
    # without variance SSIM is (2 m n + c1) / (m^2 + n^2 + c1), c1 = (0.01 * 255)^2 = 6.5025 (Wang et al. 2004, eq. 6)
    write_exact(tmp_path / "a" / "x.png", torch.full((1, 32, 32, 3), 100))
    write_exact(tmp_path / "b" / "x.png", torch.full((1, 32, 32, 3), 150))
    (clip,) = compare_pairs(*pair_up(tmp_path / "a", tmp_path / "b"), measures=("ssim",)).clips
    assert clip.ssim == pytest.approx((2 * 100 * 150 + 6.5025) / (100**2 + 150**2 + 6.5025), abs=1e-9)


def test_a_long_clip_is_read_in_runs_and_comes_out_the_same(tmp_path: Path) -> None:
    frames = noise(11, 32, 32)
    path = write_exact(tmp_path / "x.mp4", frames)
    facts = clip_facts(path)
    assert facts == ClipFacts(num_frames=11, height=32, width=32)
    runs = list(runs_of_frames(path, facts, run_bytes=4 * 3 * 32 * 32))
    assert [run.shape[1] for run in runs] == [4, 4, 3]
    assert torch.equal(torch.cat(runs, dim=1).permute(1, 2, 3, 0).int(), frames.int())


def odd_folders(tmp_path: Path) -> tuple[Path, Path]:
    a, b = tmp_path / "a", tmp_path / "b"
    write_exact(a / "good.mp4", noise(2, 32, 32))
    write_exact(b / "good.mp4", noise(2, 32, 32) + 1)
    write_exact(a / "lonely.mp4", noise(2, 32, 32))
    write_exact(b / "new.mp4", noise(2, 32, 32))
    write_exact(a / "size.mp4", noise(2, 32, 32))
    write_exact(b / "size.mp4", noise(2, 32, 48))
    write_exact(a / "count.mp4", noise(2, 32, 32))
    write_exact(b / "count.mp4", noise(3, 32, 32))
    write_exact(a / "small.png", noise(1, 8, 8))
    write_exact(b / "small.png", noise(1, 8, 8))
    write_exact(a / "broken.mp4", noise(2, 32, 32))
    (b / "broken.mp4").write_bytes(b"no video")
    return a, b


def test_what_cannot_be_compared_is_one_line_each_and_exit_code_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = odd_folders(tmp_path)
    with pytest.raises(SystemExit) as end:
        cli.main(["evaluate", "clips", str(a), str(b), "--csv", str(tmp_path / "t" / "table.csv"), "--json"])
    assert end.value.code == 1
    told = json.loads(capsys.readouterr().out)
    assert [clip["name"] for clip in told["clips"]] == ["good"]
    skipped = {line.split(": ")[0]: line for line in told["skipped"]}
    assert skipped.keys() == {"lonely", "new", "size", "count", "small", "broken"}
    assert f"only in {a}" in skipped["lonely"]
    assert f"only in {b}" in skipped["new"]
    assert "sizes differ, 32x32 and 32x48" in skipped["size"]
    assert "frame counts differ, 2 and 3" in skipped["count"]
    assert "needs 11 pixels" in skipped["small"] or "need 11 pixels" in skipped["small"]
    assert all("\n" not in line for line in told["skipped"])
    with (tmp_path / "t" / "table.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert float(row["psnr"]) == pytest.approx(20 * math.log10(255), abs=1e-9)
    assert (row["name"], row["num_frames"], row["lpips"]) == ("good", "2", "")


def test_the_table_on_the_screen_says_mean_and_interval(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(3):
        write_exact(tmp_path / "a" / f"deep/{number} [b].mp4", noise(1, 32, 32, seed=number))
        write_exact(tmp_path / "b" / f"deep/{number} [b].mp4", noise(1, 32, 32, seed=number) + 1 + number)
    cli.main(["evaluate", "clips", str(tmp_path / "a"), str(tmp_path / "b"), "--measures", "psnr"])
    out = capsys.readouterr().out
    for offset in (1, 2, 3):
        assert f"{20 * math.log10(255 / offset):.2f}" in out
    # mean of 48.13, 42.11 and 38.59 dB
    assert f"{sum(20 * math.log10(255 / d) for d in (1, 2, 3)) / 3:.2f}" in out
    assert "deep/0 [b]" in out
    assert "95 % from" in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "share no clip of one name"),
        (["--measures", "psnr", "lpips"], "--measures lpips needs --lpips DIR"),
        (["--lpips", "nowhere"], "--lpips nowhere holds no weights"),
        (["--measures"], "nothing to do"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    write_exact(tmp_path / "a" / "x.png", noise(1, 32, 32))
    write_exact(tmp_path / "b" / "y.png", noise(1, 32, 32))
    with pytest.raises(SystemExit) as end:
        cli.main(["evaluate", "clips", str(tmp_path / "a"), str(tmp_path / "b"), *words])
    assert end.value.code == 2
    printed = capsys.readouterr().err
    assert said in printed
    assert printed.count("\n") == 1


def test_folders_that_are_none_or_ambiguous_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no clip"):
        clips_in(tmp_path / "empty")
    with pytest.raises(UserError, match="no folder of clips"):
        clips_in(tmp_path / "none")
    write_exact(tmp_path / "twice" / "x.png", noise(1, 32, 32))
    write_exact(tmp_path / "twice" / "x.mp4", noise(1, 32, 32))
    with pytest.raises(UserError, match="have one name"):
        clips_in(tmp_path / "twice")


def test_lpips_is_never_computed_without_weights(tmp_path: Path) -> None:
    write_exact(tmp_path / "a" / "x.png", noise(1, 32, 32))
    write_exact(tmp_path / "b" / "x.png", noise(1, 32, 32))
    with pytest.raises(UserError, match="LPIPS needs its weights"):
        compare_pairs(*pair_up(tmp_path / "a", tmp_path / "b"), measures=MEASURES)


def test_clips_as_we_write_them_are_read(tmp_path: Path) -> None:
    video = torch.linspace(-1, 1, 3 * 5 * 32 * 32).reshape(3, 5, 32, 32)
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write_video(tmp_path / folder / "x.mp4", video, fps=24)
    (clip,) = compare_pairs(*pair_up(tmp_path / "a", tmp_path / "b"), measures=("psnr",)).clips
    assert (clip.num_frames, clip.psnr) == (5, math.inf)


def test_psnr_of_one_level_by_hand() -> None:
    # 10 log10(255^2 / 1) = 48.1308036
    assert psnr_of(1.0) == pytest.approx(48.1308036, abs=1e-7)


def test_a_long_table_is_cut_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    clips = tuple(
        ClipFidelity(name=f"clip{k:03d}", num_frames=1, height=32, width=32, psnr=30.0 + k, ssim=None, lpips=None) for k in range(45)
    )
    render(Fidelity(clips=clips, skipped=()))
    out = capsys.readouterr().out
    assert "clip039" in out
    assert "clip040" not in out
    assert "5 more" in out
    assert "52.00" in out  # the mean is of all: 30 + 44 / 2
