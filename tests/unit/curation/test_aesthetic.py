"""The aesthetic plug-in's plumbing, with a small random CLIP that says it is random."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from pyarrow import parquet
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from megasora.config.errors import UserError
from megasora.curation.aesthetic import AestheticModel
from megasora.curation.planted import scene, write_clip
from megasora.curation.probe import run_probe
from megasora.curation.score import run_score
from megasora.curation.settings import Limits, ProbeSettings, ScoreSettings
from megasora.curation.tables import metadata_of, table_schema


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("aesthetic")
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8, projection_dim=24
    )
    CLIPVisionModelWithProjection(config).save_pretrained(str(folder / "clip"))
    # LAION's head numbers its layers 0, 2, 4, ... for the dropouts between them
    head = {
        f"layers.{n}.{part}": torch.randn(shape)
        for n, a, b in ((0, 24, 8), (2, 8, 1))
        for part, shape in (("weight", (b, a)), ("bias", (b,)))
    }
    save_file(head, str(folder / "head.safetensors"))
    (folder / "aesthetic.json").write_text(json.dumps({"trained": False, "source": "random weights of a test"}))
    return folder


def test_a_score_is_the_head_on_the_normalised_embedding(weights: Path) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8)
    clip = CLIPVisionModelWithProjection.from_pretrained(str(weights / "clip")).eval()
    mean, std = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])
    rgb = torch.from_numpy(picture[:, :, ::-1].copy()).float() / 255
    with torch.inference_mode():
        embedding = clip(pixel_values=((rgb - mean) / std).permute(2, 0, 1)[None]).image_embeds[0]
    embedding = embedding / embedding.norm()
    head = load_file(str(weights / "head.safetensors"))
    expected = head["layers.2.weight"] @ (head["layers.0.weight"] @ embedding + head["layers.0.bias"]) + head["layers.2.bias"]
    model = AestheticModel(weights)
    assert model.score([picture]) == pytest.approx(float(expected), rel=1e-5)
    wide = np.concatenate([np.zeros((32, 32, 3), np.uint8), picture, np.zeros((32, 32, 3), np.uint8)], axis=1)
    assert model.score([wide]) == pytest.approx(model.score([picture]), rel=1e-6)  # the centre is looked at


def test_scores_of_random_weights_say_so_in_the_table(weights: Path, tmp_path: Path) -> None:
    (tmp_path / "clips").mkdir()
    write_clip(tmp_path / "clips" / "a.mp4", scene(0, count=10, height=64, width=64))
    run_probe(tmp_path / "clips", ProbeSettings(output=tmp_path / "p.parquet"), limits=Limits(workers=1))
    settings = ScoreSettings(output=tmp_path / "s.parquet", scores=("aesthetic",), aesthetic=weights)
    run_score(tmp_path / "p.parquet", settings, limits=Limits(workers=1))
    (row,) = parquet.read_table(tmp_path / "s.parquet").to_pylist()
    assert row["score_error"] == "" and np.isfinite(row["aesthetic"])
    said = metadata_of(table_schema(tmp_path / "s.parquet"))["settings"]["aesthetic"]
    assert said == {"trained": False, "source": "random weights of a test"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"aesthetic.json": "{}"}, "must say"),
        ({"head.safetensors": None}, "head.safetensors"),
        ({"clip/config.json": None}, "does not load as a CLIP vision model"),
    ],
)
def test_a_folder_that_lacks_something_is_refused(weights: Path, tmp_path: Path, change: dict[str, str | None], words: str) -> None:
    import shutil

    folder = tmp_path / "broken"
    shutil.copytree(weights, folder)
    for name, content in change.items():
        (folder / name).unlink()
        if content is not None:
            (folder / name).write_text(content)
    with pytest.raises(UserError, match=words):
        AestheticModel(folder)


def test_a_head_that_does_not_fit_is_refused(weights: Path, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "wrong"
    shutil.copytree(weights, folder)
    save_file({"layers.0.weight": torch.zeros(1, 7), "layers.0.bias": torch.zeros(1)}, str(folder / "head.safetensors"))
    with pytest.raises(UserError, match="the head takes 7 channels, clip/ gives 24"):
        AestheticModel(folder)
    save_file({"layers.0.weight": torch.zeros(3, 24), "layers.0.bias": torch.zeros(3)}, str(folder / "head.safetensors"))
    with pytest.raises(UserError, match="do not chain to one score"):
        AestheticModel(folder)
