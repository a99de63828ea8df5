"""Simulated packs: figures a reader can check by hand, and the same figures as the plan that training follows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megasora import cli
from megasora.config.errors import UserError
from megasora.data.pack_stats import published_batch, simulate_buckets, simulate_packs
from megasora.parallel.pack import PackSplit, SampleShape


def shape(video: int, text: int = 2) -> SampleShape:
    return SampleShape(text_tokens=text, grid=(1, 1, video))


def test_equal_samples_balance_exactly() -> None:
    stats = simulate_packs(
        [shape(6)] * 24, data_parallel_size=4, num_microbatches=2, global_tokens=64, hidden_size=16, split=PackSplit(), seed=0
    )
    assert (stats.steps, stats.samples, stats.tokens) == (3, 24, 192)
    assert (stats.imbalance_mean, stats.pad_share, stats.fullest_pack_tokens) == (1.0, 0.0, 8)
    assert stats.efficiency == pytest.approx(1.0)


def test_padding_is_counted_per_stream() -> None:
    # one sample of 3 text and 5 video tokens a pack; CP 4 pads them to 4 and 8
    stats = simulate_packs(
        [shape(5, text=3)] * 2, data_parallel_size=2, num_microbatches=1, global_tokens=16, hidden_size=16, split=PackSplit(cp=4), seed=0
    )
    assert stats.fullest_pack_tokens == 12
    assert stats.pad_share == pytest.approx(1 - 16 / 24)


def test_one_sample_on_two_replicas_wastes_half() -> None:
    stats = simulate_packs([shape(6)], data_parallel_size=2, num_microbatches=1, global_tokens=8, hidden_size=16, split=PackSplit())
    assert (stats.imbalance_mean, stats.efficiency) == (2.0, 0.5)


def test_buckets_keep_every_sample() -> None:
    shapes, sizes = [shape(6)] * 7 + [shape(40)] * 5, [3] * 7 + [2] * 5
    stats = simulate_buckets(shapes, sizes, replicas=2, hidden_size=16)
    assert (stats.samples, stats.tokens) == (12, 7 * 8 + 5 * 42)
    assert stats.steps == 3  # 3 batches of images and 3 of clips, two a step
    assert stats.imbalance_mean > 1.0
    drawn = simulate_buckets(shapes, sizes, replicas=2, hidden_size=16, taken=[0, 0, 8])
    assert (drawn.samples, drawn.tokens, drawn.steps) == (3, 2 * 8 + 42, 1)


def test_a_published_batch_is_that_of_the_next_longer_bound() -> None:
    """stage1.py: 12 up to 33 frames, 6 up to 65; stage2_i2v.py, for 4 ranks: 10 and 5 of 768px."""
    found = [published_batch("256px", frames, context_ranks=1) for frames in (1, 5, 33, 37, 65, 129)]
    assert found == [45, 12, 12, 6, 6, 3]
    assert [published_batch("768px", frames, context_ranks=4) for frames in (1, 33, 37)] == [38, 10, 5]
    with pytest.raises(UserError, match="no published batch size for 5 frames of 768px at CP 1"):
        published_batch("768px", 5, context_ranks=1)


def write_table(path: Path, rows: int) -> None:
    header = "path,text,num_frames,height,width,aspect_ratio,resolution,fps\n"
    lines = [f"{number}.mp4,a clip,{129 if number % 3 else 40},720,1280,0.5625,921600,24\n" for number in range(rows)]
    path.write_text(header + "".join(lines) + "broken.mp4,a clip,none,720,1280,0.5625,921600,24\n")


def test_the_command_prints_only_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_table(tmp_path / "m.csv", 2000)
    arguments = ["data", "pack-stats", str(tmp_path / "m.csv"), "--dp", "4", "--buckets", "--json", "--data.global_tokens", "216000"]
    cli.main(arguments)
    facts = json.loads(capsys.readouterr().out)
    assert (facts["clips"], facts["replicas"], facts["packs"]["samples"]) == (2000, 4, 2000)
    assert facts["skipped"] == [{"row": 2000, "reason": "num_frames is not a number: 'none'"}]
    assert facts["packs"]["imbalance_mean"] < facts["buckets"]["imbalance_mean"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["pack-stats"], "needs MANIFEST, --dp"),
        (["pack-stats", "none.csv", "--dp", "4"], "cannot read manifest"),
        (["pack-stats", "m.csv", "--dp", "0"], "positive"),
        (["pack-stats", "m.csv"], "--dp"),
        (["prob", "x"], "did you mean probe"),
        (["prob"], "no command"),
    ],
)
def test_mistakes_end_in_one_line(
    arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_table(tmp_path / "m.csv", 3)
    with pytest.raises(SystemExit) as end:
        cli.main(["data", *arguments])
    error = capsys.readouterr().err.strip()
    assert end.value.code == 2
    assert words in error
    assert len(error.splitlines()) == 1
