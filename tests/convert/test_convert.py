"""Conversions: every pair of formats bit for bit, interrupted ones, refused ones, edited ones, and the proof that notices a wrong bit."""

from __future__ import annotations

import importlib.util
import json
import shutil
import threading
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core import dist_checkpointing
from safetensors import safe_open
from safetensors.torch import load_file

from megasora.checkpoint import convert as converting
from megasora.checkpoint.conversion_plan import plan_conversion
from megasora.checkpoint.convert import convert, units_of
from megasora.checkpoint.export import export_weights
from megasora.checkpoint.formats.mapping import compose, read_segments, shapes_in
from megasora.checkpoint.formats.rules import FORMATS, Format
from megasora.checkpoint.outputs import SafetensorsOutput, shards_of
from megasora.checkpoint.safetensors_io import SafetensorsReader, write_safetensors
from megasora.checkpoint.source import open_source
from megasora.checkpoint.tensors import StateDictReader, TensorInfo, as_torch
from megasora.checkpoint.verify import verify
from megasora.config.errors import UserError
from megasora.config.schema import ModelConfig
from tests.convert.models import DC_AE, DEV, SCHNELL, V2, foreign, random_weights, write_weights


def target_of(folder: Path, fmt: Format, name: str = "target") -> Path:
    return folder / (name if fmt in ("megasora", "diffusers") else f"{name}.safetensors")


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize(("model", "start"), [(DEV, "flux"), (SCHNELL, "diffusers"), (V2, "opensora"), (DC_AE, "opensora-fused")])
def test_there_and_back_returns_every_bit(tmp_path: Path, fmt: Format, model: ModelConfig, start: Format) -> None:
    if model.cond_embed and fmt in ("flux", "diffusers"):
        pytest.skip("these formats have no image condition")
    source = tmp_path / "source.safetensors"
    tensors = write_weights(source, start, model)
    there = export_weights(source, target_of(tmp_path, fmt), target_format=fmt, source_format=start, axes_dim=model.axes_dim, prove=True)
    assert there.proof is not None
    assert there.proof.inverted == len(tensors)
    assert there.proof.replayed == 0
    export_weights(
        target_of(tmp_path, fmt), tmp_path / "back.safetensors", target_format=start, source_format=fmt, axes_dim=model.axes_dim, prove=True
    )
    back = load_file(tmp_path / "back.safetensors")
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[key], tensor) for key, tensor in tensors.items())


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 3),
    st.sampled_from([2, 4, 6, 8]),
    st.integers(0, 3),
    st.integers(0, 3),
    st.integers(1, 40),
    st.booleans(),
    st.booleans(),
    st.sampled_from(FORMATS),
    st.sampled_from(FORMATS),
    st.sampled_from([torch.bfloat16, torch.float32, torch.float16, torch.float8_e4m3fn]),
)
def test_formats_compose_for_random_models(
    heads: int,
    head_dim: int,
    double: int,
    single: int,
    ffn: int,
    guidance: bool,
    cond: bool,
    one: Format,
    other: Format,
    dtype: torch.dtype,
) -> None:
    model = replace(
        DEV,
        hidden_size=heads * head_dim,
        num_attention_heads=heads,
        num_double_blocks=double,
        num_single_blocks=single,
        ffn_hidden_size=ffn,
        guidance_embed=guidance,
        cond_embed=cond,
    )
    canonical = random_weights(model, dtype=dtype)
    source = StateDictReader(foreign(canonical, one, model))
    assert {key: info.shape for key, info in source.infos.items()} == shapes_in(one, model)
    expected = foreign(canonical, other, model)
    for key, segments in compose(one, other, model).items():
        rows = read_segments(segments, source, head_dim=head_dim)
        info = replace(source.infos[segments[0].key], shape=tuple(expected[key].shape))
        assert torch.equal(as_torch(rows, info).view(torch.uint8), expected[key].view(torch.uint8))


def test_the_safetensors_library_reads_what_we_write(tmp_path: Path) -> None:
    tensors = write_weights(tmp_path / "w.safetensors", "flux", DEV)
    mixed = {
        **tensors,
        "odd": torch.arange(3, dtype=torch.int8),
        "wide": torch.zeros(2, 0, 3, dtype=torch.float64),
        "scalar": torch.tensor(2.0),
    }
    write_safetensors(tmp_path / "mixed.safetensors", mixed, metadata={"format": "pt"})
    loaded = load_file(tmp_path / "mixed.safetensors")
    assert all(torch.equal(loaded[key], tensor) for key, tensor in mixed.items())
    with safe_open(tmp_path / "mixed.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    reader = SafetensorsReader(tmp_path / "mixed.safetensors")
    assert all(torch.equal(reader.read(key), tensor) for key, tensor in mixed.items())


def test_megatron_loads_the_checkpoint_we_write(tmp_path: Path) -> None:
    from torch.distributed import checkpoint as dcp

    write_weights(tmp_path / "w.safetensors", "flux", DEV)
    export_weights(tmp_path / "w.safetensors", tmp_path / "m", target_format="megasora")
    expected = random_weights(DEV)
    loaded = {f"model.{key}": torch.empty_like(tensor) for key, tensor in expected.items()}
    dcp.load(loaded, checkpoint_id=str(tmp_path / "m"), no_dist=True)
    assert all(torch.equal(loaded[f"model.{key}"], tensor) for key, tensor in expected.items())
    assert dist_checkpointing.load_common_state_dict(str(tmp_path / "m")) == {}
    assert dist_checkpointing.load_tensors_metadata(str(tmp_path / "m")).keys() == loaded.keys()


def test_diffusers_loads_the_folder_we_write(tmp_path: Path) -> None:
    model = replace(DEV, ffn_hidden_size=4 * DEV.hidden_size, axes_dim=(4, 6, 6), time_dim=256)
    write_weights(tmp_path / "w.safetensors", "flux", model, dtype=torch.float32)
    export_weights(tmp_path / "w.safetensors", tmp_path / "d", target_format="diffusers", axes_dim=model.axes_dim, shard_bytes=30_000)
    assert len(list((tmp_path / "d").glob("*.safetensors"))) > 3
    theirs, report = FluxTransformer2DModel.from_pretrained(tmp_path / "d", output_loading_info=True, low_cpu_mem_usage=False)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    expected = foreign(random_weights(model, dtype=torch.float32), "diffusers", model)
    assert all(torch.equal(tensor, expected[key]) for key, tensor in theirs.state_dict().items())
    assert open_source(tmp_path / "d").model == model


@pytest.mark.parametrize(("fmt", "name"), [("opensora", "t.safetensors"), ("diffusers", "d"), ("megasora", "m")])
def test_an_interrupted_conversion_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fmt: Format, name: str) -> None:
    source, target = tmp_path / "source.safetensors", tmp_path / name
    write_weights(source, "flux", DEV)
    monkeypatch.setattr(converting, "SYNC_BYTES", 1)
    plan = plan_conversion(open_source(source, axes_dim=DEV.axes_dim), fmt)
    total = len(units_of(plan))
    finished: list[int] = []

    def stop(num_bytes: int) -> None:
        finished.append(num_bytes)
        if len(finished) == total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(plan, target, options={}, workers=2, shard_bytes=20_000, on_progress=stop)
    assert not target.exists()
    seen: list[int] = []
    again: list[int] = []
    convert(
        plan,
        target,
        options={},
        workers=2,
        shard_bytes=20_000,
        on_start=lambda done, _: seen.append(done),
        on_progress=again.append,
    )
    assert seen[0] > 0
    assert len(again) < total
    expected, made = (open_source(path, axes_dim=DEV.axes_dim).canonical for path in (source, target))
    assert all(torch.equal(made.read(key), expected.read(key)) for key in expected.shapes)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_nothing_is_journaled_that_may_not_be_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(output: SafetensorsOutput, worker: int) -> None:
        raise OSError("the disk is gone")

    write_weights(tmp_path / "w.safetensors", "flux", DEV)
    plan = plan_conversion(open_source(tmp_path / "w.safetensors", axes_dim=DEV.axes_dim), "opensora")
    with monkeypatch.context() as patch:
        patch.setattr(SafetensorsOutput, "sync", fail)
        with pytest.raises(OSError, match="the disk is gone"):
            convert(plan, tmp_path / "t.safetensors", options={})
    journal = (tmp_path / ".t.safetensors.partial" / "journal.jsonl").read_text().splitlines()
    assert [list(json.loads(line)) for line in journal] == [["identity"]]


def test_shards_are_filled_in_order_and_never_too_full() -> None:
    infos = {name: TensorInfo(dtype="U8", shape=(size,)) for name, size in zip("abcdef", (4, 6, 1, 12, 3, 7), strict=True)}
    # at most 10 bytes; d alone is larger
    assert shards_of(infos, shard_bytes=10) == [["a", "b"], ["c"], ["d"], ["e", "f"]]


def test_another_plan_starts_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = tmp_path / "source.safetensors", tmp_path / "t.safetensors"
    write_weights(source, "flux", DEV)
    monkeypatch.setattr(converting, "SYNC_BYTES", 1)
    finished: list[int] = []

    def stop(num_bytes: int) -> None:
        finished.append(num_bytes)
        if len(finished) == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(plan_conversion(open_source(source), "opensora"), target, options={}, on_progress=stop)
    journal = tmp_path / ".t.safetensors.partial" / "journal.jsonl"
    assert len(journal.read_text().splitlines()) > 10
    tensors = write_weights(source, "flux", DEV, seed=1)
    seen: list[int] = []
    convert(plan_conversion(open_source(source), "flux"), target, options={}, on_start=lambda done, _: seen.append(done))
    assert seen == [0]
    assert torch.equal(load_file(target)["img_in.weight"], tensors["img_in.weight"])


def test_two_conversions_to_one_target_are_refused(tmp_path: Path) -> None:
    source, target = tmp_path / "source.safetensors", tmp_path / "t.safetensors"
    write_weights(source, "flux", DEV)
    plan = plan_conversion(open_source(source), "opensora")
    entered, leave = threading.Event(), threading.Event()

    def wait(done: int, total: int) -> None:
        entered.set()
        leave.wait(30)

    first = threading.Thread(target=lambda: convert(plan, target, options={}, on_start=wait))
    first.start()
    entered.wait(30)
    with pytest.raises(UserError, match="another conversion"):
        convert(plan, target, options={})
    leave.set()
    first.join()
    assert target.exists()


def test_a_full_disk_is_noticed_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_weights(tmp_path / "w.safetensors", "flux", DEV)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 9, 1))
    with pytest.raises(UserError, match="GB free; make room"):
        export_weights(tmp_path / "w.safetensors", tmp_path / "o.safetensors", target_format="opensora")
    assert not (tmp_path / "o.safetensors").exists()


def test_an_initialisation_of_open_sora(tmp_path: Path) -> None:
    write_weights(tmp_path / "w.safetensors", "flux", DEV)
    done = export_weights(tmp_path / "w.safetensors", tmp_path / "i.safetensors", target_format="opensora", init="open-sora-v2", prove=True)
    assert any("guidance_in is dropped" in line for line in done.lines)
    assert any("cond_in is added, all zero" in line for line in done.lines)
    made = load_file(tmp_path / "i.safetensors")
    expected = random_weights(DEV)
    assert not made["cond_in.weight"].any()
    assert made["cond_in.weight"].shape == (32, 20)
    assert made.keys() == {key for key in expected if not key.startswith("guidance_in.")} | {"cond_in.weight", "cond_in.bias"}
    assert open_source(tmp_path / "i.safetensors", axes_dim=V2.axes_dim).model == V2
    assert set(done.manifest["dropped"]) == {key for key in foreign(expected, "flux", DEV) if key.startswith("guidance_in.")}
    with pytest.raises(UserError, match="image condition"):
        export_weights(tmp_path / "w.safetensors", tmp_path / "x.safetensors", target_format="flux", init="open-sora-v2")


def test_a_condition_is_folded_only_when_asked(tmp_path: Path) -> None:
    write_weights(tmp_path / "w.safetensors", "opensora", V2)
    with pytest.raises(UserError, match="drop_cond"):
        export_weights(tmp_path / "w.safetensors", tmp_path / "f.safetensors", target_format="flux")
    done = export_weights(tmp_path / "w.safetensors", tmp_path / "f.safetensors", target_format="flux", drop_cond=True, prove=True)
    assert [line for line in done.lines if line.startswith("lossy")] == [
        "lossy: cond_in.weight is dropped",
        "lossy: cond_in.bias is folded into img_in.bias",
    ]
    weights = random_weights(V2)
    folded = (weights["img_in.bias"].float() + weights["cond_in.bias"].float()).bfloat16()
    assert torch.equal(load_file(tmp_path / "f.safetensors")["img_in.bias"], folded)
    with pytest.raises(UserError, match="nothing to drop"):
        export_weights(tmp_path / "f.safetensors", tmp_path / "g.safetensors", target_format="flux", drop_cond=True)


def test_types_change_only_when_asked(tmp_path: Path) -> None:
    weights = foreign(random_weights(DEV, dtype=torch.float32), "diffusers", DEV)
    weights["transformer_blocks.0.attn.to_q.weight"] = weights["transformer_blocks.0.attn.to_q.weight"].bfloat16()
    write_safetensors(tmp_path / "w.safetensors", weights, metadata={})
    with pytest.raises(UserError, match="different types .*--dtype"):
        export_weights(tmp_path / "w.safetensors", tmp_path / "f.safetensors", target_format="flux", axes_dim=DEV.axes_dim)
    done = export_weights(
        tmp_path / "w.safetensors", tmp_path / "f.safetensors", target_format="flux", axes_dim=DEV.axes_dim, dtype="bf16", prove=True
    )
    assert any("lossy: bf16" in line for line in done.lines)
    made = load_file(tmp_path / "f.safetensors")
    assert {tensor.dtype for tensor in made.values()} == {torch.bfloat16}
    expected = foreign({key: tensor.bfloat16() for key, tensor in random_weights(DEV, dtype=torch.float32).items()}, "flux", DEV)
    assert all(torch.equal(made[key], tensor) for key, tensor in expected.items())


def test_the_proof_notices_one_wrong_bit(tmp_path: Path) -> None:
    write_weights(tmp_path / "w.safetensors", "flux", DEV)
    target = tmp_path / "o.safetensors"
    export_weights(tmp_path / "w.safetensors", target, target_format="opensora")
    export_weights(tmp_path / "w.safetensors", target, target_format="opensora", prove=True)
    content = bytearray(target.read_bytes())
    content[-3] ^= 1
    target.write_bytes(content)
    with pytest.raises(UserError, match="not the ones that were written"):
        export_weights(tmp_path / "w.safetensors", target, target_format="opensora", prove=True)
    # a consistent lie in the manifest is found by the inverse
    manifest = tmp_path / "o.safetensors.manifest.json"
    facts: dict[str, Any] = json.loads(manifest.read_text())
    made = SafetensorsReader(target)
    for key, entry in facts["tensors"].items():
        entry["sha256"] = converting.sha256_of(made.rows(key))
    manifest.write_text(json.dumps(facts))
    with pytest.raises(UserError, match="come back bit for bit"):
        export_weights(tmp_path / "w.safetensors", target, target_format="opensora", prove=True)
    with pytest.raises(UserError, match="come back bit for bit"):
        verify(target, plan=None)  # also by the manifest's hashes alone


def test_the_proof_needs_the_same_source_and_flags(tmp_path: Path) -> None:
    source, target = tmp_path / "w.safetensors", tmp_path / "o.safetensors"
    write_weights(source, "flux", DEV)
    convert(plan_conversion(open_source(source, axes_dim=DEV.axes_dim), "opensora"), target, options={"dtype": None})
    with pytest.raises(UserError, match="was made with {'dtype': None}, not {'dtype': 'bf16'}"):
        verify(target, plan=None, options={"dtype": "bf16"})
    write_weights(source, "flux", DEV, seed=1)
    plan = plan_conversion(open_source(source, axes_dim=DEV.axes_dim), "opensora")
    with pytest.raises(UserError, match="come back bit for bit"):
        verify(target, plan=plan, options={"dtype": None})


def test_the_proof_needs_only_the_manifest_when_the_source_is_gone(tmp_path: Path) -> None:
    source = tmp_path / "w.safetensors"
    tensors = write_weights(source, "flux", DEV)
    export_weights(source, tmp_path / "m", target_format="megasora")
    source.unlink()
    proof = export_weights(source, tmp_path / "m", target_format="megasora", prove=True).proof
    assert proof is not None
    assert proof.inverted == len(tensors)


def test_refusals_leave_nothing_behind(tmp_path: Path) -> None:
    write_weights(tmp_path / "w.safetensors", "flux", DEV)
    for target, fmt, words in (("w.safetensors", "opensora", "exists"), ("m.safetensors", "megasora", "is a folder")):
        with pytest.raises(UserError, match=words):
            export_weights(tmp_path / "w.safetensors", tmp_path / target, target_format=fmt)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="no training checkpoint"):
        export_weights(tmp_path / "w.safetensors", tmp_path / "o.safetensors", target_format="opensora", select="ema")
    with pytest.raises(UserError, match="no weights at"):
        export_weights(tmp_path / "nothing", tmp_path / "o.safetensors", target_format="opensora")
    assert [path.name for path in tmp_path.iterdir()] == ["w.safetensors"]


def test_all_names_of_flux_dev_survive_the_whole_chain(tmp_path: Path) -> None:
    specification = importlib.util.spec_from_file_location(
        "make_flux", Path(__file__).parents[2] / "benchmarks" / "convert" / "make_flux.py"
    )
    assert specification is not None
    assert specification.loader is not None
    make_flux = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(make_flux)
    start = tmp_path / "start.safetensors"
    make_flux.make(start, make_flux.SMALL)
    before = SafetensorsReader(start)
    hashes = {key: converting.sha256_of(before.rows(key)) for key in before.infos}
    assert len(hashes) == 780
    path = start
    for fmt, name in (("megasora", "a"), ("opensora", "b.safetensors"), ("megasora", "c"), ("diffusers", "d"), ("flux", "e.safetensors")):
        export_weights(path, tmp_path / name, target_format=fmt, axes_dim=make_flux.SMALL.axes_dim)  # type: ignore[arg-type]
        path = tmp_path / name
    after = SafetensorsReader(path)
    assert {key: converting.sha256_of(after.rows(key)) for key in after.infos} == hashes
