"""A frozen DINOv2 whose features an autoencoder's are aligned with (`config.distillation`).

It sees frames one at a time. Its features are its last layer's patch tokens after the last norm, without the class token and registers, as
VA-VAE (hustvl/LightningDiT) and REPA (sihyun-yu/REPA) take them. Shape letters: T H W frames and pixels of a clip, t h w places of the
aligned layer, D the teacher's channels.
"""

from __future__ import annotations

import json
import shutil
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformers import Dinov2Config, Dinov2Model, Dinov2WithRegistersModel

from megasora.config.errors import UserError
from megasora.config.files import written_whole

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
"""Of levels in [0, 1]; transformers.image_utils, IMAGENET_DEFAULT_MEAN and IMAGENET_DEFAULT_STD, which DINOv2's processor takes."""
CLASSES: dict[str, type] = {"dinov2": Dinov2Model, "dinov2_with_registers": Dinov2WithRegistersModel}
"""By model_type of config.json."""
TINY = Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, image_size=56, patch_size=14)
"""Of the teacher that teaches nothing."""
FRAMES_AT_ONCE = 16
"""Frames of a call, which bounds its memory; frames do not see each other."""
Frames = Literal["mean", "first"]
Normalisation = Literal["imagenet", "none"]


class Grid(NamedTuple):
    """Places of the aligned layer."""

    t: int
    h: int
    w: int


class Teacher:
    """Features of clips.

    Args:
        model: a DINOv2; it is frozen here.
        frames: which of the frames that a place covers.
        normalisation: of its input.
        side_px: of its frames, the shorter one; None: one patch a place.

    Raises:
        UserError: side_px is no multiple of its patch.
    """

    def __init__(self, model: nn.Module, *, frames: Frames, normalisation: Normalisation, side_px: int | None = None) -> None:
        self.model = model.eval().requires_grad_(False)
        config: Any = model.config
        self.patch, self.channels = int(config.patch_size), int(config.hidden_size)
        self.frames, self.normalisation, self.side_px = frames, normalisation, side_px
        self._others = 1 + int(getattr(config, "num_register_tokens", 0))
        if side_px is not None and (side_px < self.patch or side_px % self.patch):
            near = max(1, round(side_px / self.patch)) * self.patch
            raise UserError(f"distillation.teacher_px {side_px} is no multiple of the teacher's patch of {self.patch} pixels; use {near}")

    @torch.no_grad()
    def features(self, video: Float[Tensor, "3 T H W"], grid: Grid) -> Float[Tensor, "D t h w"]:
        """Of a clip in [-1, 1], at the places of a grid, each of which covers T / t frames, in the teacher's type."""
        count = video.shape[1] // grid.t
        assert count * grid.t == video.shape[1], f"{video.shape[1]} frames are no multiple of {grid.t}"
        frames = video.transpose(0, 1)
        if self.frames == "first":
            frames, count = frames[::count], 1
        of_frames = torch.cat([self._of_frames(part, grid) for part in frames.split(FRAMES_AT_ONCE)])
        return of_frames.unflatten(0, (grid.t, count)).mean(dim=1).transpose(0, 1)

    def _of_frames(self, frames: Float[Tensor, "n 3 H W"], grid: Grid) -> Float[Tensor, "n D h w"]:
        weight = next(self.model.parameters())
        rows, columns = self.patches(grid)
        given = self.prepare(frames, (rows * self.patch, columns * self.patch))
        tokens: Tensor = self.model(given.to(weight.device, weight.dtype)).last_hidden_state[:, self._others :]
        found = tokens.transpose(1, 2).unflatten(2, (rows, columns))
        return found if (rows, columns) == (grid.h, grid.w) else resize(found, (grid.h, grid.w))

    def patches(self, grid: Grid) -> tuple[int, int]:
        """(rows, columns) of the teacher's patches for a grid; with side_px the longer side keeps the ratio, rounded to patches."""
        if self.side_px is None:
            return grid.h, grid.w
        shorter = self.side_px // self.patch
        least = min(grid.h, grid.w)
        return round(grid.h * shorter / least), round(grid.w * shorter / least)

    def prepare(self, frames: Float[Tensor, "n 3 H W"], size: tuple[int, int]) -> Float[Tensor, "n 3 h w"]:
        """The teacher's input of frames in [-1, 1]: resized to a size in pixels, normalised."""
        resized = resize(frames, size)
        if self.normalisation == "none":
            return resized
        mean, std = _imagenet(resized.device, resized.dtype)
        return ((resized + 1) / 2 - mean) / std


@lru_cache(maxsize=8)
def _imagenet(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(mean, std) [3, 1, 1], made once: a copy to a GPU waits for it."""
    mean, std = (torch.tensor(values, device=device, dtype=dtype)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    return mean, std


def resize(pictures: Float[Tensor, "n c h w"], size: tuple[int, int]) -> Float[Tensor, "n c h2 w2"]:
    """Bilinear (VA-VAE), over as many pixels as become one where it shrinks: VA-VAE's 256 to 224 loses nothing by it, and 256 to 112, for
    the latent's 8 x 8, would skip pixels."""
    if tuple(pictures.shape[-2:]) == size:
        return pictures
    wide = pictures if pictures.dtype == torch.float64 else pictures.float()
    return F.interpolate(wide, size=size, mode="bilinear", align_corners=False, antialias=True).to(pictures.dtype)


def blank_teacher_model(folder: Path | None) -> nn.Module:
    """A folder's DINOv2 by its config.json alone, or without a folder the small one of `make_tiny_teacher`; on the meta device.

    Raises:
        UserError: it is none.
    """
    kind = "dinov2" if folder is None else _kind_of(folder)
    config = TINY if folder is None else CLASSES[kind].config_class.from_pretrained(str(folder))  # type: ignore[attr-defined]
    with torch.device("meta"):
        model: nn.Module = CLASSES[kind](config)
    return model


def _kind_of(folder: Path) -> str:
    """The model_type of a folder's config.json.

    Raises:
        UserError: it is none of a DINOv2.
    """
    where = f"distillation.teacher {folder}"
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{where} is no transformers folder (config.json: {type(error).__name__}); give one of a Dinov2Model") from error
    if kind not in CLASSES:
        raise UserError(f"{where} is of model_type {kind}; give one of {' or '.join(CLASSES)}")
    return str(kind)


def load_teacher_model(folder: Path, *, dtype: torch.dtype) -> nn.Module:
    """A DINOv2 of a transformers folder; a classifier's head beside it is not needed.

    Raises:
        UserError: it is none, does not load, or lacks a tensor, which transformers would fill with random numbers.
    """
    where, kind = f"distillation.teacher {folder}", _kind_of(folder)
    try:
        model, loading = CLASSES[kind].from_pretrained(str(folder), dtype=dtype, local_files_only=True, output_loading_info=True)  # type: ignore[attr-defined]
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"{where} does not load as {CLASSES[kind].__name__}: {str(error).splitlines()[0]}") from error
    if lacking := sorted(loading["missing_keys"]):
        raise UserError(f"{where} lacks {len(lacking)} tensors of {CLASSES[kind].__name__}, the first {lacking[0]}")
    loaded: nn.Module = model
    return loaded


def make_tiny_teacher(folder: Path, *, seed: int = 0) -> Path:
    """A small random DINOv2 in the real folder format, made once, the same for the same seed: it teaches nothing, it runs the real code."""
    if (folder / "done.json").exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(folder) as temporary:
        temporary.mkdir()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            Dinov2Model(TINY).save_pretrained(str(temporary))
        (temporary / "done.json").write_text(json.dumps({"seed": seed}))
        if folder.exists():
            shutil.rmtree(folder)
    return folder
