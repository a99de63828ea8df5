"""Shards are plain WebDataset tars, whole or not there, the same bytes from any number of tasks; what is damaged is noticed."""

from __future__ import annotations

import io
import json
import resource
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from megasora import recipes
from megasora.config.array_task import task_of
from megasora.config.errors import UserError
from megasora.config.schema import ConditionConfig, RunConfig
from megasora.data.cache.identity import CacheSettings, differences, encoder_facts, layout_of_run, settings_of
from megasora.data.cache.layout import CacheLayout, facts_json, stored_runs
from megasora.data.cache.reading import open_cache
from megasora.data.cache.shards import (
    MEMBERS,
    BadSampleError,
    checksum,
    open_shard,
    remove_leftovers,
    safetensors_bytes,
    safetensors_size,
    shard_name,
    tensors_in,
)
from megasora.data.manifest import read_manifest
from megasora.data.plan import PlannedClip, plan_clips
from megasora.data.tiny_clips import make_tiny_clips
from megasora.models.encoders.tiny import make_tiny_encoders
from megasora.training.encode.plan import plan_encode
from megasora.training.encode.run import run_encode
from megasora.training.encode.settings import EncodeResult, EncodeSettings

BROKEN = 1


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Eight tiny clips, one broken; one manifest row that fits no shape and one without a path."""
    folder = tmp_path_factory.mktemp("encode")
    manifest, _ = make_tiny_clips(folder / "clips", num_clips=8, num_eval=1)
    broken = folder / "clips" / f"clip{BROKEN:03d}.mp4"
    broken.write_bytes(broken.read_bytes()[:600])
    with manifest.open("a") as file:
        file.write("clip000.mp4,too large a caption to matter,0,96,96,1.0,9216,12.0\n,nothing,1,96,96,1.0,9216,12.0\n")
    tiny = recipes.get("tiny")
    captions = [clip.text for clip in read_manifest(manifest).clips]
    encoders = make_tiny_encoders(folder / "encoders", captions=captions, model=tiny.model, base=tiny.encoders)
    return replace(tiny, device="cpu", encoders=encoders, data=replace(tiny.data, manifest=str(manifest)))


def encode(config: RunConfig, folder: Path, **changes: Any) -> EncodeResult:
    return run_encode(config, EncodeSettings(**{"output": folder, "samples_per_shard": 3, "store": "text", **changes}))


@pytest.fixture(scope="module")
def cache(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Latents and text of everything, in three shards."""
    folder = tmp_path_factory.mktemp("cache") / "both"
    result = encode(config, folder, store="both", conditions="all")
    assert (result.made, result.kept, result.missing, result.samples, result.failed, result.unplanned) == ((0, 1, 2), (), (), 8, 1, 2)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def test_webdataset_and_safetensors_read_a_shard(cache: Path) -> None:
    shards = [str(cache / f"{shard_name(number)}.tar") for number in range(3)]
    samples = list(webdataset.WebDataset(shards, shardshuffle=False))
    assert [sample["__key__"][:9] for sample in samples] == [f"{row:09d}" for row in range(8) if row != BROKEN]
    for sample in samples:
        latents = safetensors.torch.load(sample[MEMBERS[0]])
        assert {"mean", "std"} <= set(latents)
        assert safetensors.torch.load(sample[MEMBERS[1]])["t5"].shape == (16, 64)
        facts = json.loads(sample["json"])
        assert facts["key"] == sample["__key__"]
        frames = (facts["num_frames"] - 1) // 4 + 1
        assert latents["mean"].shape == (16, frames, facts["height"] // 8, facts["width"] // 8)
        assert ("given.0.1.mean" in latents) == (facts["num_frames"] > 1)
    with tarfile.open(shards[0]) as tar:
        names = tar.getnames()
    assert [name.split(".", 1)[1] for name in names] == [*MEMBERS] * 2
    failed = [json.loads(line) for line in (cache / "shard-000000.failed.jsonl").read_text().splitlines()]
    assert [(record["row"], "clip001.mp4" in record["reason"]) for record in failed] == [(BROKEN, True)]
    unplanned = [json.loads(line) for line in (cache / "unplanned.jsonl").read_text().splitlines()]
    assert [record["row"] for record in unplanned] == [8, 9]
    assert "path is empty" in unplanned[1]["reason"]


def test_reads_at_random_give_what_the_tar_holds(cache: Path, config: RunConfig) -> None:
    opened = open_cache(cache)
    clips, _ = plan_clips(read_manifest(str(config.data.manifest)).clips, data=config.data, encoders=config.encoders, model=config.model)
    backwards = clips[::-1]
    places = opened.places_of(backwards)
    assert places.tolist() == list(range(8))[::-1]
    tar = {}
    for number in range(3):
        with tarfile.open(cache / f"{shard_name(number)}.tar") as file:
            tar |= {member.name: file.extractfile(member).read() for member in file.getmembers()}  # type: ignore[union-attr]
    for clip, place in zip(backwards, places.tolist(), strict=True):
        if clip.clip.row == BROKEN:
            with pytest.raises(BadSampleError, match=r"failed when it was encoded: .*clip001.mp4"):
                opened.read(place, slice(0, 2))
            continue
        tensors = opened.read(place, slice(0, 2))
        (key,) = (name.split(".")[0] for name in tar if name.startswith(f"{clip.clip.row:09d}") and name.endswith(".json"))
        expected = {name: value for part in MEMBERS[:2] for name, value in safetensors.torch.load(tar[f"{key}.{part}"]).items()}
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensors[name], expected[name]) for name in expected)
        assert opened.read(place, slice(1, 2)).keys() == {"t5", "clip"}
    with pytest.raises(UserError, match=r"1 of 1 planned clips are not in the cache .*, the first row 0 at 9 x 64 x 64"):
        opened.places_of([replace(clips[0], num_frames=9)])


def planned(config: RunConfig, **data: Any) -> tuple[PlannedClip, ...]:
    clips = read_manifest(str(config.data.manifest)).clips
    return plan_clips(clips, data=replace(config.data, **data), encoders=config.encoders, model=config.model)[0]


def count_opened(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Shards whose index is opened from now on."""
    opened: list[int] = []

    def noted(folder: Path, number: int, *, verify: bool = False) -> Any:
        opened.append(number)
        return open_shard(folder, number, verify=verify)

    monkeypatch.setattr("megasora.data.cache.reading.open_shard", noted)
    return opened


def test_reading_a_sample_opens_the_index_of_its_shard_alone(cache: Path, config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = count_opened(monkeypatch)
    reader = open_cache(cache)
    places = reader.places_of(planned(config))
    assert places.tolist() == list(range(8))
    assert opened == []
    for _ in range(2):
        reader.read(4, slice(0, 2))
    assert opened == [1]


def test_a_run_that_plans_fewer_clips_finds_them_where_they_are(cache: Path, config: RunConfig) -> None:
    longest = max(clip.tokens for clip in planned(config))
    fewer = planned(config, max_pack_tokens=longest - 1)
    rows = [clip.clip.row for clip in fewer]
    assert 0 < len(rows) < 8
    assert open_cache(cache).places_of(fewer).tolist() == rows
    with pytest.raises(UserError, match=r"1 of 9 planned clips are not in the cache .*, the first row 7 at 1 x 8 x 8"):
        open_cache(cache).places_of((*planned(config), replace(planned(config)[7], height=8, width=8)))


def test_a_shard_of_other_shapes_than_planned_is_noticed_when_it_is_opened(cache: Path, config: RunConfig) -> None:
    clips = list(planned(config))
    clips[4] = replace(clips[4], num_frames=1)
    reader = open_cache(cache)
    reader.places_of(clips)
    reader.read(0, slice(0, 2))
    with pytest.raises(BadSampleError, match=r"shard-000001 holds other clips, or other shapes of them, .*encode that shard again"):
        reader.read(3, slice(0, 2))


def test_an_incomplete_cache_is_refused_without_opening_an_index(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = count_opened(monkeypatch)
    for name, message in (("tar", "shard-000001.tar is missing"), ("index.npy", "index.npy is missing"), ("json", "json is missing")):
        shutil.copytree(cache, tmp_path / name)
        (tmp_path / name / f"shard-000001.{name}").unlink()
        with pytest.raises(UserError, match=rf"lacks 1 of its 3 shards \(1; .*{message}\)"):
            open_cache(tmp_path / name)
    assert opened == []


def test_a_damaged_index_costs_the_samples_of_its_shard(cache: Path, tmp_path: Path) -> None:
    shutil.copytree(cache, tmp_path / "cache")
    index = tmp_path / "cache" / "shard-000002.index.npy"
    content = bytearray(index.read_bytes())
    content[-1] ^= 1
    index.write_bytes(content)
    reader = open_cache(tmp_path / "cache")
    reader.read(0, slice(0, 2))
    with pytest.raises(BadSampleError, match=r"shard-000002.index.npy is not as it was written; encode that shard again"):
        reader.read(6, slice(0, 2))


@pytest.mark.parametrize(("dtype", "store"), [("bf16", "both"), ("fp32", "latents")])
def test_the_size_is_known_to_the_byte_before_a_clip_is_opened(config: RunConfig, tmp_path: Path, dtype: str, store: str) -> None:
    broken_left_out = [line for number, line in enumerate(Path(str(config.data.manifest)).read_text().splitlines()) if number != BROKEN + 1]
    manifest = Path(str(config.data.manifest)).with_name(f"good_{dtype}.csv")
    manifest.write_text("\n".join(broken_left_out[:5]) + "\n")
    config = replace(
        config,
        data=replace(config.data, manifest=str(manifest)),
        encoders=replace(config.encoders, dtype=dtype),  # type: ignore[arg-type]
        condition=ConditionConfig(i2v_loop=1.0),
    )
    wanted = EncodeSettings(output=tmp_path, store=store, samples_per_shard=3)  # type: ignore[arg-type]
    size = plan_encode(config, wanted).size
    result = run_encode(config, wanted)
    tars = [path.stat().st_size for path in sorted(tmp_path.glob("*.tar"))]
    assert tuple(tars) == size.shard_bytes == result.size.shard_bytes
    assert sum(tars) == size.total_bytes == result.bytes_written
    assert f"{size.samples} samples in {size.shards} shards of 3" in size.line


def test_the_number_of_tasks_does_not_change_a_byte(config: RunConfig, tmp_path: Path) -> None:
    results = [encode(config, tmp_path / "many", shard=f"{task}/4") for task in range(4)]
    assert [result.made for result in results] == [(0,), (1,), (2,), ()]
    assert [result.missing for result in results] == [(1, 2), (2,), (), ()]
    encode(config, tmp_path / "one")
    assert contents(tmp_path / "many") == contents(tmp_path / "one")


def test_an_encode_goes_on_and_mends_what_is_damaged(config: RunConfig, tmp_path: Path) -> None:
    encode(config, tmp_path)
    before = contents(tmp_path)
    assert encode(config, tmp_path).kept == (0, 1, 2)
    (tmp_path / "shard-000001.json").unlink()
    with (tmp_path / "shard-000002.tar").open("r+b") as tar:
        tar.seek(1000)
        tar.write(b"\xff")
    assert encode(config, tmp_path).made == (1,)
    assert encode(config, tmp_path, verify=True).made == (2,)
    assert contents(tmp_path) == before


def test_an_interruption_leaves_only_whole_shards(config: RunConfig, tmp_path: Path) -> None:
    def interrupt(done: int, total: int, num_bytes: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    wanted = EncodeSettings(output=tmp_path, store="text", samples_per_shard=3)
    with pytest.raises(KeyboardInterrupt):
        run_encode(config, wanted, on_progress=interrupt)
    assert sorted(path.name for path in tmp_path.glob("*.tar")) == ["shard-000000.tar"]
    assert not list(tmp_path.glob(".*"))
    with pytest.raises(UserError, match=r"lacks 2 of its 3 shards \(1-2; "):
        open_cache(tmp_path)
    assert run_encode(config, wanted).made == (1, 2)
    assert len(open_cache(tmp_path)) == 8


def test_files_of_a_killed_writer_are_removed_and_of_a_living_one_kept(tmp_path: Path) -> None:
    import fcntl

    dead, alive, foreign = (tmp_path / f".shard-00000{number}.host.1.tmp.tar" for number in range(3))
    for path in (dead, alive, foreign):
        path.write_bytes(b"half")
    with alive.open("r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert remove_leftovers(tmp_path, [0, 1]) == 1
    assert not dead.exists()
    assert alive.exists() and foreign.exists()


def test_what_the_system_refuses_is_one_line_and_leaves_nothing(config: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write the cache \(.*file/cache: Not a directory\)"):
        encode(config, tmp_path / "file" / "cache")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9000, limits[1]))  # a shard of three texts has 16 kB
    try:
        with pytest.raises(UserError, match=r"cannot write the cache \(.*File too large\); finished shards are kept"):
            encode(config, tmp_path / "full")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name for path in (tmp_path / "full").iterdir()} == {"cache.json", "null.safetensors", "unplanned.jsonl"}
    assert encode(config, tmp_path / "full").made == (0, 1, 2)


def test_a_full_disk_is_refused_before_a_clip_is_opened(config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match=r"the shards to write need 52.22 kB, .* has 1.00 kB free; give another --output"):
        encode(config, tmp_path)


def test_a_folder_with_another_cache_is_refused(config: RunConfig, tmp_path: Path) -> None:
    encode(config, tmp_path)
    for changed, changes, message in (
        (config, {"samples_per_shard": 4}, "samples_per_shard is 3 in the cache and 4 in this run"),
        (config, {"store": "both"}, "store is text in the cache and both in this run"),
        (replace(config, data=replace(config.data, text_tokens=8)), {}, "text_tokens is 16 in the cache and 8"),
    ):
        with pytest.raises(UserError, match=f"holds a cache made otherwise: .*{message}.*another --output"):
            encode(changed, tmp_path, **changes)


def test_tasks_come_from_the_flag_or_the_job_array() -> None:
    array = {"SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_STEP": "2", "SLURM_ARRAY_TASK_COUNT": "4"}
    assert task_of("2/5", array) == (2, 5)
    assert task_of(None, array) == (3, 4)
    assert task_of(None, {}) == (0, 1)
    for wrong in ("5/5", "1", "a/b", "-1/2", "1/0"):
        with pytest.raises(UserError, match="--shard"):
            task_of(wrong, {})


def test_conditions_that_give_the_same_frames_share_them() -> None:
    kinds = ("i2v_head", "i2v_loop", "i2v_tail", "v2v_head", "v2v_tail", "v2v_head_easy", "v2v_tail_easy")
    runs = [
        (run.start, run.count, run.latent_start, run.latent_count) for run in stored_runs(kinds, num_frames=129, temporal_compression=4)
    ]
    assert runs == [(0, 1, 0, 1), (0, 33, 0, 9), (0, 65, 0, 17), (64, 65, 16, 17), (96, 33, 24, 9), (128, 1, 32, 1)]
    assert [(run.start, run.count) for run in stored_runs(kinds, num_frames=33, temporal_compression=4)] == [(0, 1), (32, 1)]
    assert stored_runs(kinds, num_frames=1, temporal_compression=4) == ()
    assert stored_runs((), num_frames=129, temporal_compression=4) == ()


def test_a_full_size_sample_has_the_bytes_the_sizes_say(config: RunConfig) -> None:
    stage = recipes.get("opensora2_stage1")
    clips, _ = plan_clips(read_manifest(str(config.data.manifest)).clips, data=config.data, encoders=config.encoders, model=config.model)
    clip = replace(clips[0], num_frames=129, height=192, width=336, text_tokens=512)
    layout = CacheLayout(
        store="both", latents="mean_std", kinds=("i2v_head",), latent_channels=stage.model.latent_channels, temporal_compression=4,
        causal=True, spatial_compression=8, text_dim=4096, vec_dim=768, dtype="bf16",
    )  # fmt: skip
    sizes = layout.member_sizes(clip)
    values = 16 * 24 * 42 * 2
    assert sizes[MEMBERS[0]] == safetensors_size(layout.latents_of(clip)) == 2 * (33 + 1) * values + len_of_header(layout.latents_of(clip))
    assert sizes[MEMBERS[1]] == 2 * (512 * 4096 + 768) + len_of_header(layout.text_of(clip))


def test_a_non_causal_autoencoder_stores_a_quarter_of_the_frames(config: RunConfig) -> None:
    """128 frames at 768 x 768 are 32 latent frames of 24 x 24 with 128 channels, 32 given ones 8; an image is one."""
    dc_ae = recipes.get("opensora2_dc_ae")
    clips, _ = plan_clips(read_manifest(str(config.data.manifest)).clips, data=config.data, encoders=config.encoders, model=config.model)
    layout = layout_of_run(dc_ae, store="latents", latents="sampled", kinds=("i2v_tail", "v2v_head"))
    shapes = layout.latents_of(replace(clips[0], num_frames=128, height=768, width=768))
    frames = {"sample": 32, "given.0.32.sample": 8, "given.127.1.sample": 1}
    assert {name: shape for name, (_, shape) in shapes.items()} == {name: (128, count, 24, 24) for name, count in frames.items()}
    assert layout.latents_of(replace(clips[0], num_frames=1, height=768, width=768))["sample"][1] == (128, 1, 24, 24)


def test_what_decides_the_shapes_and_starts_is_part_of_a_cache(config: RunConfig) -> None:
    """Probabilities are not, unless they become certain; text does not depend on where a clip starts."""

    def settings(probability: float, *, start: str = "first", store: str = "both") -> CacheSettings:
        data = replace(config.data, bucket_mix=(("64px", 9, probability, 0.0),), temporal_start=start)  # type: ignore[arg-type]
        common = {"latents": "mean_std", "kinds": (), "samples_per_shard": 4, "samples": 1, "manifest_sha256": ""}
        return settings_of(replace(config, data=data), store=store, **common)  # type: ignore[arg-type]

    assert settings(0.5) == settings(0.4)
    assert differences(settings(0.5), settings(1.0)) == [
        "bucket_decisions is ['64px 9 always never'] in the cache and ['64px 9 sometimes never'] in this run"
    ]
    assert {line.split()[0] for line in differences(settings(0.5), settings(0.5, start="random"))} == {"temporal_start", "seed"}
    assert settings(0.5, store="text") == settings(0.5, start="random", store="text")


def test_the_facts_of_a_sample_are_as_long_wherever_it_starts(config: RunConfig) -> None:
    clips, _ = plan_clips(read_manifest(str(config.data.manifest)).clips, data=config.data, encoders=config.encoders, model=config.model)
    clip = next(replace(clip, num_starts=120) for clip in clips if clip.num_frames > 1)
    facts = [facts_json(clip, offset=offset) for offset in (0, 9, 10, 119)]
    assert len({len(one) for one in facts}) == 1
    assert [json.loads(one)["start_frame"] for one in facts] == [0, 9, 10, 119]


def len_of_header(layout: Any) -> int:
    return len(safetensors.torch.save({name: torch.empty(shape, dtype=dtype) for name, (dtype, shape) in layout.items()})) - sum(
        torch.Size(shape).numel() * dtype.itemsize for dtype, shape in layout.values()
    )


@given(st.integers(0, 600_000), st.data())
@settings(max_examples=60, deadline=None)
def test_a_checksum_sees_any_changed_byte(size: int, data: st.DataObject) -> None:
    content = np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8)
    before = checksum(content)
    assert checksum(content.tobytes()) == before
    if size:
        place, value = data.draw(st.integers(0, size - 1)), data.draw(st.integers(1, 255))
        content[place] ^= value
        assert checksum(content) != before


def test_a_checksum_sees_what_storage_does() -> None:
    page, group = 4096, 64 * 4096
    content = np.random.default_rng(0).integers(0, 256, 2 * group + 3 * page + 100, dtype=np.uint8)
    before = checksum(content)
    zeroed, repeated, exchanged, shifted, reordered, dropped = (content.copy() for _ in range(6))
    zeroed[page : 2 * page] = 0
    repeated[:page] = content[page : 2 * page]
    exchanged[:group], exchanged[group : 2 * group] = content[group : 2 * group], content[:group]
    shifted[8:] = content[:-8]
    reordered[:16] = content[:16].reshape(2, 8)[::-1].reshape(-1)
    dropped[-100 - page :] = 0
    damaged = (zeroed, repeated, exchanged, shifted, reordered, dropped, content[:-1])
    assert len({before, *map(checksum, damaged)}) == 1 + len(damaged)


def test_tensors_come_back_with_their_bits_and_bad_members_do_not() -> None:
    tensors = {"b": torch.randn(3, 5).bfloat16(), "a": torch.randn(2, 2), "c": torch.randn(7).half()}
    content = safetensors_bytes(tensors)
    assert content == safetensors.torch.save(tensors)
    buffer = np.frombuffer(io.BytesIO(b"12345678" + content + b"more").getvalue(), np.uint8).copy()
    found = tensors_in(buffer, 8, len(content))
    assert all(torch.equal(found[name], tensors[name]) and found[name].dtype == tensors[name].dtype for name in tensors)
    with pytest.raises(BadSampleError, match="reaches over the end"):
        tensors_in(buffer, 8, len(content) - 1)
    with pytest.raises(BadSampleError, match="shorter than its safetensors header"):
        tensors_in(buffer, 0, len(content))
    buffer[16] = ord("x")
    with pytest.raises(BadSampleError, match="no safetensors header"):
        tensors_in(buffer, 8, len(content))


def test_weights_are_known_by_content_not_by_time(config: RunConfig, tmp_path: Path) -> None:
    folder = Path(str(config.encoders.clip))
    known = encoder_facts(str(folder))
    copy = tmp_path / "clip"
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    (copy / "README.md").write_text("not part of it")
    assert encoder_facts(str(copy), known=known).sha256 == known.sha256
    (copy / "merges.txt").write_text("#version: 0.3\n")
    assert encoder_facts(str(copy), known=known).sha256 != known.sha256
    with pytest.raises(UserError, match="holds no weights"):
        encoder_facts(str(tmp_path))
