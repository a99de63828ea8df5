"""A frozen teacher's features: those of transformers' own call, at the aligned grid; and folders that are refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig, Dinov2WithRegistersModel
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from megasora.config.errors import UserError
from megasora.models.autoencoders.teacher import Grid, Teacher, load_teacher_model, make_tiny_teacher, resize

PATCH = 14


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_teacher(tmp_path_factory.mktemp("teacher") / "tiny")


def triangles(size: int, new: int) -> np.ndarray:
    """[new, size]: linear interpolation between pixels' centres, its triangle as wide as the step where the size shrinks."""
    step = size / new
    centres = (np.arange(new) + 0.5) * step
    distances = np.abs(np.arange(size) + 0.5 - centres[:, None]) / max(step, 1.0)
    weights = np.maximum(0, 1 - distances)
    return weights / weights.sum(axis=1, keepdims=True)


@pytest.mark.parametrize(("size", "new"), [((16, 20), (14, 28)), ((20, 12), (7, 3)), ((5, 6), (5, 6))])
def test_resizing_is_bilinear(size: tuple[int, int], new: tuple[int, int]) -> None:
    picture = torch.rand(2, 3, *size, dtype=torch.float64)
    rows, columns = (triangles(a, b) for a, b in zip(size, new, strict=True))
    # edges repeat: torch's weights of places outside fall on none, and the rest is brought to 1, as here
    expected = np.einsum("rh,nchw,sw->ncrs", rows, picture.numpy(), columns)
    np.testing.assert_allclose(resize(picture, new).numpy(), expected, atol=1e-12)


def _expected(model: torch.nn.Module, frames: torch.Tensor, others: int, grid: tuple[int, int]) -> np.ndarray:
    """[n, h, w, D]: transformers' patch tokens of frames [n, 3, H, W] in [-1, 1], one patch for each place."""
    h, w = grid
    levels = (frames.double().numpy() + 1) / 2
    rows, columns = triangles(levels.shape[2], h * PATCH), triangles(levels.shape[3], w * PATCH)
    resized = np.einsum("rh,nchw,sw->ncrs", rows, levels, columns)
    mean, std = (np.array(values)[:, None, None] for values in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    with torch.no_grad():
        tokens = model(torch.from_numpy((resized - mean) / std)).last_hidden_state
    return tokens[:, others:].reshape(len(frames), h, w, -1).numpy()


@pytest.mark.parametrize("frames", ["mean", "first"])
@pytest.mark.parametrize("registers", [0, 4])
def test_features_are_the_patch_tokens_of_the_frames_that_a_place_covers(frames: str, registers: int) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "mlp_ratio": 2, "image_size": 28, "patch_size": PATCH}
    model = (
        Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**sizes, num_register_tokens=registers))
        if registers
        else Dinov2Model(Dinov2Config(**sizes))
    ).double()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(parameter.numel()))  # places differ
    teacher = Teacher(model, frames=frames, normalisation="imagenet")  # type: ignore[arg-type]
    video = torch.rand(3, 34, 10, 15, dtype=torch.float64) * 2 - 1  # more frames than a call takes
    found = teacher.features(video, Grid(17, 2, 3))
    of_frames = _expected(model, video.transpose(0, 1), 1 + registers, (2, 3)).reshape(17, 2, 2, 3, -1)
    wanted = of_frames.mean(axis=1) if frames == "mean" else of_frames[:, 0]
    np.testing.assert_allclose(found.numpy(), wanted.transpose(3, 0, 1, 2), atol=1e-6)  # position embeddings are resized in fp32
    assert not found.requires_grad


def test_another_side_gives_features_resized_to_the_grid(folder: Path) -> None:
    model = load_teacher_model(folder, dtype=torch.float64)
    teacher = Teacher(model, frames="mean", normalisation="imagenet", side_px=4 * PATCH)
    video = torch.rand(3, 1, 16, 24, dtype=torch.float64) * 2 - 1
    assert teacher.patches(Grid(1, 2, 3)) == (4, 6)
    finer = torch.from_numpy(_expected(model, video.transpose(0, 1), 1, (4, 6))).permute(0, 3, 1, 2).numpy()
    expected = np.einsum("rh,nchw,sw->cnrs", triangles(4, 2), finer, triangles(6, 3))
    np.testing.assert_allclose(teacher.features(video, Grid(1, 2, 3)).numpy(), expected, atol=1e-6)
    with pytest.raises(UserError, match="teacher_px 60 is no multiple of the teacher's patch of 14 pixels; use 56"):
        Teacher(model, frames="mean", normalisation="imagenet", side_px=60)


def test_without_normalisation_pixels_go_in_as_they_are(folder: Path) -> None:
    model = load_teacher_model(folder, dtype=torch.float32)
    video = torch.rand(3, 1, 14, 28) * 2 - 1
    with torch.no_grad():
        tokens = model(video.transpose(0, 1)).last_hidden_state[0, 1:]
    found = Teacher(model, frames="mean", normalisation="none").features(video, Grid(1, 1, 2))
    assert torch.allclose(found[:, 0, 0], tokens.T, atol=1e-6)


def test_the_tiny_teacher_is_the_same_each_time(folder: Path, tmp_path: Path) -> None:
    other = make_tiny_teacher(tmp_path / "again")
    assert (other / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_a_folder_that_is_no_teacher_is_refused(folder: Path, tmp_path: Path) -> None:
    def refused(change: dict[str, object] | None = None, *, without: str | None = None, weights: bool = True) -> str:
        made = tmp_path / f"case{len(list(tmp_path.iterdir()))}"
        made.mkdir()
        if change is not None:
            config = json.loads((folder / "config.json").read_text())
            (made / "config.json").write_text(json.dumps({**config, **change}))
        if weights:
            tensors = load_file(folder / "model.safetensors")
            save_file({name: tensor for name, tensor in tensors.items() if name != without}, made / "model.safetensors", {"format": "pt"})
        with pytest.raises(UserError) as error:
            load_teacher_model(made, dtype=torch.float32)
        return str(error.value)

    lost = "encoder.layer.1.norm2.weight"
    assert f"lacks 1 tensors of Dinov2Model, the first {lost}" in refused({}, without=lost)
    assert "does not load as Dinov2Model" in refused({}, weights=False)
    assert "is of model_type clip; give one of dinov2" in refused({"model_type": "clip"})
    assert "is no transformers folder" in refused()
    assert "does not load as Dinov2Model" in refused({"hidden_size": 64})
