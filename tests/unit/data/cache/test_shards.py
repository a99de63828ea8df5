"""A shard that is not as it was written is noticed, whatever changed, and one that is made again counts as finished only at the end."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megasora.data.cache import shards
from megasora.data.cache.reading import Cache
from megasora.data.cache.shards import BadSampleError, BadShardError, ShardWriter, open_shard, safetensors_bytes, safetensors_header
from megasora.data.manifest import Clip
from megasora.data.plan import PlannedClip

CLIP = PlannedClip(
    clip=Clip(id="a", path="a.mp4", text="", num_frames=1, height=64, width=64, fps=1.0),
    num_frames=1, height=64, width=64, stride=1, resolution="64px", grid=(1, 4, 4), text_tokens=2,
)  # fmt: skip


def write(folder: Path, value: float) -> None:
    """Shard 0 of one sample with a latent and a text of one number each."""
    members = {
        "latents.safetensors": safetensors_bytes({"mean": torch.full((64,), value)}),
        "text.safetensors": safetensors_bytes({"clip": torch.full((64,), -value)}),
        "json": b"{}",
    }
    with ShardWriter(folder, 0) as writer:
        writer.add(0, CLIP, members)
        writer.finish()


def flip(path: Path, *, after: bytes) -> None:
    """Change one bit of the first tensor byte after a text."""
    content = bytearray(path.read_bytes())
    content[content.index(after) + len(after) + 200] ^= 1
    path.write_bytes(content)


def test_a_changed_byte_costs_the_member_it_is_in(tmp_path: Path) -> None:
    write(tmp_path, 1.0)
    settings = SimpleNamespace(samples=1, samples_per_shard=1, num_shards=1)
    opened = Cache(tmp_path, facts=SimpleNamespace(settings=settings))  # type: ignore[arg-type]
    assert opened.read(0, slice(0, 2))["mean"].tolist() == [1.0] * 64
    flip(tmp_path / "shard-000000.tar", after=b'"clip"')
    assert opened.read(0, slice(0, 1))["mean"].tolist() == [1.0] * 64
    for members in (slice(1, 2), slice(0, 2)):
        with pytest.raises(BadSampleError, match="row 0 in shard-000000.tar is damaged"):
            opened.read(0, members)


def test_a_shard_that_changed_is_not_opened(tmp_path: Path) -> None:
    write(tmp_path, 1.0)
    tar, index = tmp_path / "shard-000000.tar", tmp_path / "shard-000000.index.npy"
    whole, places = tar.read_bytes(), index.read_bytes()
    flip(tar, after=b'"mean"')
    open_shard(tmp_path, 0)
    with pytest.raises(BadShardError, match="SHA-256"):
        open_shard(tmp_path, 0, verify=True)
    tar.write_bytes(whole[:-1])
    with pytest.raises(BadShardError, match="it was written with"):
        open_shard(tmp_path, 0)
    tar.write_bytes(whole)
    open_shard(tmp_path, 0, verify=True)
    index.write_bytes(places[:-1] + bytes([places[-1] ^ 1]))
    with pytest.raises(BadShardError, match="index.npy is not as it was written"):
        open_shard(tmp_path, 0)


def test_a_shard_that_is_made_again_is_unfinished_until_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 1.0)

    def fail(path: Path, content: bytes) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(shards, "write_whole", fail)
        with pytest.raises(OSError, match="no space"):
            write(tmp_path, 2.0)  # the tar is there already, of the same size
    with pytest.raises(BadShardError, match="shard-000000.json is missing"):
        open_shard(tmp_path, 0)
    write(tmp_path, 2.0)
    open_shard(tmp_path, 0, verify=True)


def test_wide_tensors_come_first_so_that_all_are_aligned() -> None:
    header = safetensors_header({"a": (torch.bfloat16, (3,)), "b": (torch.float32, (1,)), "c": (torch.float64, (1,))})
    table = json.loads(header[8:])
    assert {name: entry["data_offsets"] for name, entry in table.items()} == {"c": [0, 8], "b": [8, 12], "a": [12, 18]}
    assert len(header) % 8 == 0


def test_threads_open_shards_beside_each_other(tmp_path: Path) -> None:
    """As a feed's threads do, each with the first sample of a shard (Python 3.11's ast, with which numpy parses headers, broke there)."""
    write(tmp_path, 1.0)
    with ThreadPoolExecutor(16) as pool:
        opened = list(pool.map(lambda _: len(open_shard(tmp_path, 0)[1]), range(2_000)))
    assert opened == [1] * 2_000
