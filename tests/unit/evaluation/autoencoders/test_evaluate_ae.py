"""`megasora evaluate ae`: what it writes, what it goes on with, what it keeps in config.json, and what it refuses."""

from __future__ import annotations

import csv
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torchmetrics.functional.image import peak_signal_noise_ratio

from megasora.checkpoint.autoencoder import open_autoencoder
from megasora.checkpoint.autoencoder_export import export_autoencoder
from megasora.config.dc_ae import read_config
from megasora.config.latent_statistics import KEY, kept_statistics
from megasora.config.schema import EncodersConfig
from megasora.data.cache.identity import encoder_facts
from megasora.data.decoding.contract import DecodeRequest, normalise
from megasora.data.decoding.pyav import PyAVDecoder
from megasora.data.tiny_clips import manifest_row, write_manifest
from megasora.evaluation.autoencoders import run as run_module
from megasora.evaluation.autoencoders.measure import levels_of, measure_clip
from megasora.evaluation.autoencoders.published import TABLE, published_for
from megasora.evaluation.autoencoders.settings import Cutting, Shape, cutting_of, shapes_of
from megasora.evaluation.autoencoders.subjects import open_subjects, shapes_for
from megasora.models.autoencoders.autoencoder import Autoencoder
from megasora.models.autoencoders.choice import load_autoencoder
from megasora.models.autoencoders.dc_ae.network import DCAENetwork
from tests.unit.evaluation.autoencoders.known import evaluate, shifting, tiny
from tests.unit.evaluation.clips import write_exact

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def results(made: Path) -> dict[str, Any]:
    return json.loads((made / "out" / "results.json").read_text())


def autoencoder_in(folder: Path, **changes: Any) -> Autoencoder:
    config = EncodersConfig(vae=str(folder), dtype="fp32", tile_size=0, **changes)
    return load_autoencoder(config, device=CPU, dtype=torch.float32)


def test_figures_are_those_of_the_loaded_autoencoder(made: Path, results: dict[str, Any]) -> None:
    autoencoder = autoencoder_in(made / "two")
    request = DecodeRequest(path=str(made / "clips" / "clip1.mp4"), start=0, stride=1, num_frames=8, height=32, width=32)
    levels = PyAVDecoder().pixels(request)
    video = autoencoder.decode(autoencoder.encode(normalise(levels)))
    assert video is not None
    back = levels_of(video)
    expected = [float(peak_signal_noise_ratio(back[:, k].double(), levels[:, k].double(), data_range=255.0)) for k in range(8)]
    (found,) = [clip for clip in results["clips"] if (clip["autoencoder"], clip["shape"], clip["clip"]) == ("two", "8x32x32", "clip1")]
    assert found["psnr_frames"] == pytest.approx(expected, abs=1e-4)
    assert found["psnr"] == pytest.approx(sum(expected) / 8, abs=1e-4)
    latents = autoencoder.posterior(normalise(levels)).mean
    cell = np.load(made / "out" / "clips" / found["cell"] / "arrays.npz")
    np.testing.assert_allclose(cell["latent_mean"], latents.mean(dim=(1, 2, 3)).numpy(), atol=1e-6)
    assert cell["fvd_a"].shape == (1, 3)
    assert cell["fid_b"].shape == (8, 3)


def test_rows_are_means_with_their_standard_errors(results: dict[str, Any]) -> None:
    assert [(row["subject"], row["shape"], row["clips"], row["skipped"]) for row in results["rows"]] == [
        ("one", "1x32x32", 4, 1), ("one", "8x32x32", 3, 2), ("two", "1x32x32", 4, 1), ("two", "8x32x32", 3, 2),
    ]  # fmt: skip
    row = results["rows"][1]
    values = [clip["ssim"] for clip in results["clips"] if (clip["autoencoder"], clip["shape"]) == ("one", "8x32x32")]
    assert row["ssim"]["mean"] == pytest.approx(np.mean(values))
    assert row["ssim"]["std"] == pytest.approx(np.std(values, ddof=1))
    assert (row["fid"]["samples"], row["fid"]["dims"], row["fvd"]["samples"]) == (24, 3, 3)
    assert results["rows"][0]["fvd"] is None  # a picture is no clip
    assert results["lpips_backbone"] == "alex"
    assert row["encode"]["flops"] > results["rows"][0]["encode"]["flops"] > 0
    assert row["decode"]["counted_bytes"] > 0 and row["decode"]["measured_bytes"] is None


def test_broken_and_short_clips_are_listed(made: Path, results: dict[str, Any]) -> None:
    assert len(results["skipped"]) == 6
    assert all("\n" not in line for line in results["skipped"])
    broken, short = results["skipped"][0], results["skipped"][2]
    assert "one, 32x32, 1 frame, broken: " in broken and "broken.mp4" in broken
    assert "one, 32x32, 8 frames, short <b>: " in short and "1 of 8 frames" in short
    with (made / "out" / "results.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 14


def finished(out: Path) -> dict[str, int]:
    return {path.parent.name: path.stat().st_mtime_ns for path in sorted((out / "clips").glob("*/cell.json"))}


def test_an_interrupted_command_goes_on(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    words = [made / "one", "--clips", made / "clips" / "clip0.mp4", "--sizes", "32", "--frames", "1,8", "--out", tmp_path / "out"]
    real, calls = run_module.measure_clip, []

    def cut_off(*args: Any, **kwargs: Any) -> Any:
        if calls:
            raise KeyboardInterrupt
        calls.append(1)
        return real(*args, **kwargs)

    monkeypatch.setattr(run_module, "measure_clip", cut_off)
    evaluate(*words, code=130)
    assert f"{tmp_path / 'out'} goes on" in capsys.readouterr().err
    first = finished(tmp_path / "out")
    assert len(first) == 1 and not (tmp_path / "out" / "report.html").exists()
    monkeypatch.setattr(run_module, "measure_clip", real)
    evaluate(*words)
    second = finished(tmp_path / "out")
    assert len(second) == 2 and first.items() <= second.items()
    capsys.readouterr()
    monkeypatch.setenv("COLUMNS", "70")
    evaluate(*words)
    assert finished(tmp_path / "out") == second
    quality, cost = (line for line in capsys.readouterr().out.splitlines() if "TxHxW" in line)  # two tables, for one would be broken
    assert "PSNR, dB" in quality and "SSIM" in quality and "encode" in cost and "FLOPs" in cost
    damaged = next((tmp_path / "out" / "clips").iterdir())
    (damaged / "arrays.npz").write_bytes(b"PK")
    evaluate(*words, code=2)
    assert f"{damaged} is damaged" in capsys.readouterr().err


def test_other_settings_or_weights_are_never_mixed_in(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "one", tmp_path / "ae")
    words = ["--clips", made / "clips" / "clip0.mp4", "--sizes", "32", "--frames", "1", "--out", tmp_path / "out"]
    evaluate(tmp_path / "ae", *words)
    evaluate(tmp_path / "ae" / "model.safetensors", *words)  # the same weights as a bare file
    assert len(finished(tmp_path / "out")) == 1
    evaluate(tmp_path / "ae", *words, "--dtype", "bf16")
    assert len(finished(tmp_path / "out")) == 2
    shutil.copy(made / "two" / "model.safetensors", tmp_path / "ae" / "model.safetensors")
    evaluate(tmp_path / "ae", *words)
    assert len(finished(tmp_path / "out")) == 3


@pytest.mark.parametrize("kind", ["dc-ae", "hunyuan"])
def test_the_scale_goes_into_the_folder_and_from_there_into_training(made: Path, tmp_path: Path, kind: str) -> None:
    folder = tiny(tmp_path / "ae", kind=kind)
    before = json.loads((folder / "config.json").read_text())
    identity = encoder_facts(str(folder)).sha256
    words = ["--clips", made / "clips", "--sizes", "32", "--frames", "8" if kind == "dc-ae" else "5", "--out", tmp_path / "out"]
    evaluate(folder, *words, "--write_config", code=1)
    facts = json.loads((folder / "config.json").read_text())
    kept = kept_statistics(facts, where="config.json")
    assert kept is not None
    assert facts["scaling_factor"] == pytest.approx(1 / kept.std) != before["scaling_factor"]
    rest = ("scaling_factor", KEY)
    assert {key: value for key, value in facts.items() if key not in rest} == {k: v for k, v in before.items() if k not in rest}
    settings = {} if kind == "hunyuan" else {"spatial_compression": 32, "causal": False}
    autoencoder = autoencoder_in(folder, **settings)
    assert autoencoder.scaling_factor == facts["scaling_factor"]
    request = {"start": 0, "stride": 1, "num_frames": 8 if kind == "dc-ae" else 5, "height": 32, "width": 32}
    posteriors = []
    for number in range(3):
        pixels = PyAVDecoder().pixels(DecodeRequest(path=str(made / "clips" / f"clip{number}.mp4"), **request))
        posteriors.append(autoencoder.posterior(normalise(pixels)))
    values = torch.cat([posterior.mean.double().flatten(1) for posterior in posteriors], dim=1)
    spread = torch.cat([posterior.std.double().flatten(1) for posterior in posteriors], dim=1).pow(2).mean(dim=1)
    np.testing.assert_allclose(kept.latents_mean, values.mean(dim=1).numpy(), atol=1e-6)
    np.testing.assert_allclose(kept.latents_std, (values.var(dim=1, correction=0) + spread).sqrt().numpy(), rtol=1e-5)
    assert kept.std == pytest.approx(float((values.var(correction=0) + spread.mean()).sqrt()), rel=1e-5)
    assert (kept.clips, kept.values) == (3, values.shape[1])
    assert encoder_facts(str(folder)).sha256 != identity  # a cache of latents at the old scale is not taken for the new one
    if kind == "dc-ae":
        assert read_config(folder).scaling_factor == facts["scaling_factor"]


def test_a_conversion_of_the_folder_keeps_what_was_measured(made: Path, tmp_path: Path) -> None:
    folder = tiny(tmp_path / "ae")
    words = ["--clips", made / "clips" / "clip0.mp4", "--sizes", "32", "--frames", "8", "--out", tmp_path / "out"]
    evaluate(folder, *words, "--write_config")
    export_autoencoder(open_autoencoder(folder), tmp_path / "half", target_format="dc-ae", dtype="bf16")
    one, other = (json.loads((path / "config.json").read_text()) for path in (folder, tmp_path / "half"))
    assert one == other and KEY in other


def test_a_constant_latent_has_no_scale(tmp_path: Path, capsys: Any) -> None:
    folder = tiny(tmp_path / "ae")
    weights = {name: tensor * 0 for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors")
    write_exact(tmp_path / "clips" / "grey.png", torch.full((1, 32, 32, 3), 0))
    before = (folder / "config.json").read_text()
    words = [folder, "--clips", tmp_path / "clips", "--sizes", "32", "--frames", "1", "--out", tmp_path / "out"]
    evaluate(*words)
    assert "there is no scaling factor" in capsys.readouterr().out
    evaluate(*words, "--write_config", code=2)
    assert "all latents are equal, there is no scaling factor; give clips that differ" in capsys.readouterr().err
    assert (folder / "config.json").read_text() == before


MISTAKES = {
    ("--frames", "7"): "VideoDCAE takes clips of 1 or 4k from 8 on frames, not 7; use 8",
    ("--frames", "1,4"): "VideoDCAE takes clips of 1 or 4k from 8 on frames, not 4; use 8",
    ("--sizes", "48x32"): "takes heights and widths that divide by 32, not 48 x 32; use 64 x 32",
    ("--sizes", "32x32x32"): "--sizes '32x32x32' is no size: write HEIGHTxWIDTH",
    ("--frames", "many"): "--frames 'many' is no number of frames",
    ("--tiling", "48x32"): "--tiling: 48 pixels do not cut into whole latents of one with an overlap of a quarter; use SIZE 128",
    ("--tiling", "128x12"): "--tiling: 12 frames do not cut into whole latents of one with an overlap of a quarter; use FRAMES 16",
    ("--tiling", "half"): "--tiling 'half': write whole, SIZE in pixels, or SIZExFRAMES",
    ("--select", "ema"): "--select ema is for checkpoints of megasora train-ae, and none of WEIGHTS is one; leave it out",
    ("--limit", "0"): "--limit 0 leaves no clip",
    ("--clips", "nowhere"): "--clips nowhere is no manifest (csv, parquet), no folder and no clip",
    ("--lpips", "nowhere"): "--lpips nowhere holds no weights",
    ("--fid", "nowhere"): "--fid nowhere is no TorchScript file",
    ("--fps", "0"): "--fps above 0",
}


@pytest.mark.parametrize("words", MISTAKES, ids=" ".join)
def test_mistakes_are_one_line_with_the_cure(made: Path, tmp_path: Path, words: tuple[str, str], capsys: Any) -> None:
    given = {"--clips": str(made / "clips"), "--out": str(tmp_path / "out"), "--sizes": "32", "--frames": "1", **dict([words])}
    evaluate(made / "one", *[word for pair in given.items() for word in pair], code=2)
    printed = capsys.readouterr().err
    assert MISTAKES[words] in printed
    assert printed.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_bare_file_has_no_config_to_write_into(made: Path, tmp_path: Path, capsys: Any) -> None:
    words = ["--clips", made / "clips", "--out", tmp_path / "out", "--write_config"]
    evaluate(made / "one" / "model.safetensors", *words, code=2)
    printed = capsys.readouterr().err
    assert "--write_config needs an autoencoder's folder with its config.json" in printed
    assert "megasora convert" in printed and "--to dc-ae" in printed
    assert not (tmp_path / "out").exists()


def test_nothing_measured_is_a_mistake(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    evaluate(tiny(tmp_path / "ae"), "--clips", tmp_path / "bad.mp4", "--sizes", "32", "--frames", "1", "--out", tmp_path / "o", code=2)
    assert "no clip could be measured; the first: " in capsys.readouterr().err


def test_a_manifest_gives_starts_rates_and_its_own_bad_rows(made: Path, tmp_path: Path) -> None:
    rows = [manifest_row(str(made / "clips" / f"clip{k}.mp4"), "", num_frames=8, height=32, width=32, fps=16.0) for k in (0, 1)]
    write_manifest(tmp_path / "clips.csv", [*rows, {**rows[0], "num_frames": 0}])
    words = ["--clips", tmp_path / "clips.csv", "--sizes", "32", "--frames", "1,8", "--out", tmp_path / "out", "--fps", "8"]
    evaluate(made / "one", *words, code=1)
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    # 8 frames at stride 2 need 15, and there are 8
    assert sum("8 frames, 15 are needed for 8 at stride 2" in line for line in found["skipped"]) == 2
    assert sum(line.startswith("row 2: ") for line in found["skipped"]) == 1
    assert [row["shape"] for row in found["rows"]] == ["1x32x32"]


def test_two_kinds_are_compared_at_the_frames_each_takes(tmp_path: Path) -> None:
    folders = [tiny(tmp_path / "dc"), tiny(tmp_path / "hunyuan", kind="hunyuan")]
    subjects = open_subjects(folders, select="model", dtype="fp32", cutting=Cutting())
    taken = shapes_for(subjects, shapes_of("32", "1,8,9"))
    assert [[shape.num_frames for shape in taken[name]] for name in ("dc", "hunyuan")] == [[1, 8], [1, 9]]
    for subject, folder, shape in zip(subjects, folders, ((8, 32, 32), (9, 32, 32)), strict=True):
        clip = torch.rand(3, *shape) * 2 - 1
        settings = {"spatial_compression": 32, "causal": False} if subject.name == "dc" else {}
        expected = autoencoder_in(folder, **settings).posterior(clip)
        assert torch.equal(subject.load(CPU).posterior(clip).mean, expected.mean)


def test_words_for_sizes_and_tiles() -> None:
    assert shapes_of("32, 64x96", "1,8")[-1] == Shape(num_frames=8, height=64, width=96)
    assert [str(cutting_of(word)) for word in ("whole", "256", "256x32")] == [
        "whole", "256 px, all frames, overlap 0.25", "256 px, 32 frames, overlap 0.25",
    ]  # fmt: skip


def test_published_figures_stand_beside_their_own_sizes_only(made: Path) -> None:
    (subject,) = open_subjects([made / "one"], select="model", dtype="fp32", cutting=Cutting())
    assert published_for(subject.facts, parameters=459_462_147) is None  # 16 channels
    with torch.device("meta"):
        network = DCAENetwork.blank({})
    parameters = sum(parameter.numel() for parameter in network.module.parameters())
    found = published_for(network.facts, parameters=parameters)
    assert found is TABLE[3]
    # arXiv 2503.09642, table 1
    assert (found.psnr, found.ssim, found.lpips) == (30.538, 0.863, 0.051)


def test_equal_clips_are_null_in_json_and_said_on_the_page(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(run_module, "measure_clip", lambda _, levels, **more: measure_clip(shifting(), levels, **more))
    words = ["--clips", made / "clips" / "clip2.mp4", "--sizes", "32", "--frames", "8", "--out", tmp_path / "out"]
    evaluate(made / "one", *words)
    assert "1 reconstructions equal in every frame" in capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["rows"][0]["psnr"] is None and found["rows"][0]["equal_clips"] == 1
    assert found["clips"][0]["psnr"] is None and found["clips"][0]["psnr_frames"] == [None] * 8
    assert math.isclose(found["clips"][0]["ssim"], 1.0)
    assert "equal (infinite PSNR)" in (tmp_path / "out" / "report.html").read_text()
