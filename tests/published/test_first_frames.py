"""Text to image to video on small weights, and what the tables, records and layouts of a sampling run promise."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from megasora.config.schema import ParallelConfig, RunConfig
from megasora.diffusion.patchify import unpatchify
from megasora.diffusion.philox import Stream, key_of, normal_at
from megasora.inference.first_frames import FirstFrames
from megasora.inference.requests import Common
from megasora.inference.sample import Extras, Outcome, Wanted, run_sample
from megasora.inference.search import NoiseSearch
from tests.parallel.test_parity import layout
from tests.pool import RankFailedError, RankPool
from tests.published.small_weights import image_autoencoder, save_mmdit, small_config, transformer
from tests.published.test_sampling import latent_of, texts_of, tokens_of

COMMON = Common(kind=None, negative="", resolution=None, aspect=None, num_samples=1)
STEPS = 3


def draw(rank: int, config: RunConfig, wanted: Wanted, folder: str, output: str, arguments: dict[str, Any]) -> Outcome:
    """`megasora sample` on one rank of a pool."""
    weights = Path(folder) / "mmdit.safetensors"
    return run_sample(config, wanted, weights=weights, output=Path(folder) / output, **{"extras": Extras(save_latents=True), **arguments})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of both models, encoders, a picture and a table of three clips."""
    path = tmp_path_factory.mktemp("first_frames")
    torch.manual_seed(3)
    save_mmdit(transformer(guidance=False), torch.nn.Linear(68, 64), path / "mmdit.safetensors")
    transformer(guidance=True).save_pretrained(path / "flux")
    image_autoencoder().save_pretrained(path / "flux_vae")
    pixels = np.random.default_rng(1).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path / "head.png")
    small_config(path)
    write_table(path / "table.csv", ["head.png", "", "head.png"])
    return path


def write_table(path: Path, images: list[str]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["prompt", "image", "name"])
        writer.writerows([f"rabbit {number}", image, f"clip{number}"] for number, image in enumerate(images))


def settings(folder: Path, *, parallel: ParallelConfig | None = None, **sample: Any) -> RunConfig:
    config = small_config(folder)
    size = {"height": 64, "width": 96, "num_frames": 9, "steps": STEPS}
    encoders = replace(config.encoders, tile_size=32)
    return replace(config, sample=replace(config.sample, **{**size, **sample}), parallel=parallel or config.parallel, encoders=encoders)


def latents(folder: Path, names: list[str]) -> dict[str, torch.Tensor]:
    return {name: load_file(folder / f"{name}.safetensors")["latent"] for name in names}


@pytest.mark.slow
def test_flux_draws_the_first_frame_and_the_clip_starts_with_it(pool: RankPool, folder: Path) -> None:
    frames = FirstFrames(weights=folder / "flux", vae=folder / "flux_vae", resolution="64px")
    wanted = Wanted(prompt=("A rabbit",), common=replace(COMMON, resolution="64px", aspect="4:3"))
    (outcome,) = pool.run(1, draw, settings(folder), wanted, str(folder), "t2i2v", {"first_frames": frames, "offload": "model"})
    assert [path.name for path in outcome.made] == ["sample_000.mp4"]
    record = json.loads((folder / "t2i2v" / "sample_000.json").read_text())
    # 64px 4:3: int(sqrt(4096 x 4/3) / 16) x 16 = 64, 4096 / 64 = 64
    assert record["kind"] == "i2v_head" and record["size"] == {"num_frames": 9, "height": 64, "width": 64}

    # FLUX's loop: one branch, guidance 4 told to the model
    height, width = record["size"]["height"], record["size"]["width"]
    config = settings(folder)
    model = transformer(guidance=True)
    texts, vecs = texts_of(config, ["A rabbit"])
    h, w = height // 8, width // 8
    count = h * w // 4
    noise = normal_at(torch.arange(count * 64).view(-1, 64), key=key_of(seed=config.sample.seed, stream=Stream.SAMPLE))
    x = tokens_of(unpatchify(noise, grid=(1, h // 2, w // 2), patch=2))
    alpha = 1 + 2 * (count - 256) / 3840
    times = [alpha * u / (1 + (alpha - 1) * u) for u in (1 - i / STEPS for i in range(STEPS + 1))]
    ids = torch.cartesian_prod(torch.arange(1), torch.arange(h // 2), torch.arange(w // 2)).float()
    with torch.no_grad():
        for now, following in zip(times[:-1], times[1:], strict=True):
            v = model(
                hidden_states=x[None],
                encoder_hidden_states=texts,
                pooled_projections=vecs,
                timestep=torch.tensor([now]),
                guidance=torch.tensor([4.0]),
                img_ids=ids,
                txt_ids=torch.zeros(16, 3),
            ).sample[0]
            x = x + (following - now) * v
        latent = latent_of(x, 1, h, w)[:, 0]
        pixels = image_autoencoder().decode((latent / 0.4 + 0.1)[None]).sample[0]
    expected = pixels.clamp(-1, 1).add(1).mul(127.5).round()
    made = torch.from_numpy(np.asarray(Image.open(folder / "t2i2v" / "first_frames" / "sample_000.png")).copy()).permute(2, 0, 1)
    assert float((made.float() - expected).abs().max()) <= 1  # a rounding

    again = pool.run(1, draw, settings(folder), wanted, str(folder), "t2i2v", {"first_frames": frames, "offload": "model"})
    assert again[0].made == () and [path.name for path in again[0].kept] == ["sample_000.mp4"]


@pytest.mark.slow
def test_an_interrupted_table_makes_each_clip_once_and_a_record_makes_its_clip_again(pool: RankPool, folder: Path) -> None:
    config, wanted = settings(folder), Wanted(table=folder / "table.csv", common=COMMON)
    (first,) = pool.run(1, draw, config, wanted, str(folder), "batch", {})
    assert [path.name for path in first.made] == ["clip0.mp4", "clip1.mp4", "clip2.mp4"]
    seeds = [json.loads((folder / "batch" / f"clip{number}.json").read_text())["seed"] for number in range(3)]
    assert seeds == [config.sample.seed, config.sample.seed + 1, config.sample.seed + 2]
    before = {path: path.stat().st_mtime_ns for path in (folder / "batch").glob("*.mp4")}
    (folder / "batch" / "clip1.json").unlink()  # as if killed between the clip and its record
    (second,) = pool.run(1, draw, config, wanted, str(folder), "batch", {})
    assert ([path.name for path in second.made], [path.name for path in second.kept]) == (["clip1.mp4"], ["clip0.mp4", "clip2.mp4"])
    after = {path: path.stat().st_mtime_ns for path in (folder / "batch").glob("*.mp4")}
    assert {path.name for path in before if before[path] != after[path]} == {"clip1.mp4"}

    for number in (0, 1):
        record = folder / "batch" / f"clip{number}.json"
        pool.run(1, draw, settings(folder, guidance=1.5, steps=2), Wanted(again=record, common=COMMON), str(folder), "again", {})
        for ending in ("mp4", "safetensors"):
            one, two = (folder / name / f"clip{number}.{ending}" for name in ("batch", "again"))
            assert one.read_bytes() == two.read_bytes()


@pytest.mark.slow
def test_a_clip_is_not_replaced_by_another_nor_made_again_from_something_else(pool: RankPool, folder: Path, tmp_path: Path) -> None:
    for name in ("encoders", "mmdit.safetensors", "head.png"):
        (tmp_path / name).symlink_to(folder / name)
    write_table(tmp_path / "table.csv", ["head.png"])
    wanted = Wanted(table=tmp_path / "table.csv", common=COMMON)
    pool.run(1, draw, settings(tmp_path), wanted, str(tmp_path), "out", {})
    with pytest.raises(RankFailedError, match=r"clip0.mp4 was made from something else \(sample.guidance was 3.0 and is 1.5\)"):
        pool.run(1, draw, settings(tmp_path, guidance=1.5), wanted, str(tmp_path), "out", {})
    (tmp_path / "head.png").unlink()
    Image.fromarray(np.zeros((64, 96, 3), np.uint8)).save(tmp_path / "head.png")
    with pytest.raises(RankFailedError, match="cannot be made again from this: given.image was"):
        pool.run(1, draw, settings(tmp_path), Wanted(again=tmp_path / "out" / "clip0.json", common=COMMON), str(tmp_path), "again", {})


LAYOUTS = {
    "tp2": (2, layout(tp=2), {}),
    "cp2 ring": (2, layout(cp=2, context_parallel_backend="ring"), {}),
    "pp2": (2, layout(pp=2), {}),
    "guidance 3": (3, layout(), {"guidance_parallel": 3}),
    "guidance 2 x tp2": (4, layout(tp=2), {"guidance_parallel": 2}),
    "guidance 3 x pp2": (6, layout(pp=2), {"guidance_parallel": 3}),
    "three clips at once": (3, layout(), {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_seed_gives_the_same_latents_in_every_layout(pool: RankPool, folder: Path, name: str) -> None:
    ranks, parallel, sample = LAYOUTS[name]
    wanted = Wanted(table=folder / "table.csv", common=COMMON)
    names = ["clip0", "clip1", "clip2"]
    pool.run(1, draw, settings(folder), wanted, str(folder), "alone", {})  # made once, kept after
    outcomes = pool.run(ranks, draw, settings(folder, parallel=parallel, **sample), wanted, str(folder), name, {})
    assert all([path.name for path in outcome.made] == [f"{name}.mp4" for name in names] for outcome in outcomes)
    alone, shared = latents(folder / "alone", names), latents(folder / name, names)
    for clip in names:
        assert float((shared[clip] - alone[clip]).norm() / alone[clip].norm()) < 1e-5
    shutil.rmtree(folder / name)


def test_rows_that_cannot_be_drawn_are_listed_and_the_others_drawn(pool: RankPool, folder: Path) -> None:
    write_table(folder / "bad.csv", ["", "nowhere.png", "table.csv"])
    wanted = Wanted(table=folder / "bad.csv", common=replace(COMMON, negative="bars"))
    (share,) = pool.run(1, draw, settings(folder), replace(wanted, share=(1, 2)), str(folder), "bad", {})
    assert share.made == () and [one.row for one in share.failed] == [1]
    (outcome,) = pool.run(1, draw, settings(folder), wanted, str(folder), "bad", {})
    assert [path.name for path in outcome.made] == ["clip0.mp4"]
    reasons = {one.row: one.reason for one in outcome.failed}
    assert "image" in reasons[1] and "nowhere.png is missing" in reasons[1]
    assert "table.csv" in reasons[2] and "give a picture or a clip" in reasons[2]


def test_a_picture_is_a_png_without_rate_or_motion(pool: RankPool, folder: Path) -> None:
    wanted = Wanted(prompt=("A rabbit",), common=COMMON)
    pool.run(1, draw, settings(folder, num_frames=1), wanted, str(folder), "picture", {"offload": "encoders"})
    record = json.loads((folder / "picture" / "sample_000.json").read_text())
    assert record["caption"] == "A rabbit"
    assert Image.open(folder / "picture" / "sample_000.png").size == (96, 64)


def test_weights_that_do_not_fit_are_refused(pool: RankPool, folder: Path) -> None:
    frames = FirstFrames(weights=folder / "mmdit.safetensors", vae=folder / "flux_vae", resolution="64px")
    wanted = Wanted(prompt=("A rabbit",), common=COMMON)
    with pytest.raises(RankFailedError, match="another model|no guidance-distilled weights"):
        pool.run(1, draw, settings(folder), wanted, str(folder), "refused", {"first_frames": frames})


def brightness(clip: torch.Tensor, prompt: str) -> float:
    """A scorer: the brighter, the better."""
    assert prompt == "A rabbit" and clip.shape == (3, 9, 64, 96)
    return float(clip.mean())


@pytest.mark.slow
def test_the_best_of_several_seeds_is_kept_and_can_be_made_again(pool: RankPool, folder: Path) -> None:
    config, wanted = settings(folder), Wanted(prompt=("A rabbit",), common=COMMON)
    search = NoiseSearch(best_of=3, scorer="tests.published.test_first_frames:brightness")
    arguments = {"extras": Extras(save_latents=True, preview=True, search=search)}
    pool.run(1, draw, config, wanted, str(folder), "best", arguments)
    record = json.loads((folder / "best" / "sample_000.json").read_text())
    scores = record["search"]["scores"]
    assert len(set(scores)) == 3 and record["search"]["first_seed"] == config.sample.seed
    assert record["seed"] == config.sample.seed + scores.index(max(scores))
    assert Image.open(folder / "best" / "sample_000.preview.png").size == (8 * 96, 64)
    (again,) = pool.run(1, draw, config, wanted, str(folder), "best", arguments)
    assert again.made == ()
    pool.run(1, draw, config, Wanted(again=folder / "best" / "sample_000.json", common=COMMON), str(folder), "best_again", {})
    one, two = (folder / name / "sample_000.mp4" for name in ("best", "best_again"))
    assert one.read_bytes() == two.read_bytes()
    with pytest.raises(RankFailedError, match="belong together"):
        pool.run(1, draw, config, wanted, str(folder), "none", {"extras": Extras(search=NoiseSearch(best_of=2))})
    nowhere = NoiseSearch(best_of=2, scorer="tests.published:nothing")
    with pytest.raises(RankFailedError, match="cannot be imported"):
        pool.run(1, draw, config, wanted, str(folder), "none", {"extras": Extras(search=nowhere)})


@pytest.mark.slow
def test_reuse_saves_evaluations_in_every_layout_and_says_what_it_cost(pool: RankPool, folder: Path) -> None:
    sample = {"steps": 20, "reuse_threshold": 0.6, "reuse_check": True}  # random weights: a velocity that changes fast
    wanted = Wanted(prompt=("A rabbit",), common=COMMON)
    pool.run(1, draw, settings(folder, **sample), wanted, str(folder), "reuse", {})
    pool.run(2, draw, settings(folder, parallel=layout(cp=2), **sample), wanted, str(folder), "reuse_cp2", {})
    pool.run(1, draw, settings(folder, steps=20), wanted, str(folder), "exact", {})
    made = json.loads((folder / "reuse" / "sample_000.json").read_text())["made"]
    assert 2 * 3 < made["evaluations"] < 2 * 20
    one, two, exact = (latents(folder / name, ["sample_000"])["sample_000"] for name in ("reuse", "reuse_cp2", "exact"))
    assert made["reuse_error"] == pytest.approx(float((one - exact).norm() / exact.norm()), rel=1e-6)
    assert 0 < made["reuse_error"] < 1
    assert float((one - two).norm() / one.norm()) < 1e-5
