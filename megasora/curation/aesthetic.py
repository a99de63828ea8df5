"""The aesthetic score: a CLIP image encoder and the small head trained on its embeddings, both from a folder that the user gives.

Folder: `clip/` (a transformers CLIP vision model with projection: config.json, model.safetensors), `head.safetensors` (or `head.pth`) and
`aesthetic.json` with {"trained": true, "source": "where the weights are from"}. The head is LAION's improved-aesthetic-predictor: linear
layers 768 -> 1024 -> 128 -> 64 -> 16 -> 1 without activations, on the normalised embedding (christophschuhmann/improved-aesthetic-predictor
simple_inference.py); any chain of linear layers named layers.<n>.{weight,bias} is taken. Scores of weights that are not said to be trained
are written, and `filter` refuses them as a rule.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megasora.config.errors import UserError

_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
_STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
"""CLIP's pixel statistics. openai/CLIP clip/clip.py _transform."""


def read_note(folder: Path) -> dict[str, Any]:
    """What aesthetic.json says: `trained` and `source`.

    Raises:
        UserError: it is missing or says nothing.
    """
    try:
        note = json.loads((folder / "aesthetic.json").read_text())
        return {"trained": bool(note["trained"]), "source": str(note["source"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f'{folder}/aesthetic.json must say {{"trained": true or false, "source": "..."}}: {error}') from error


class AestheticModel:
    """Scores pictures."""

    def __init__(self, folder: Path) -> None:
        """Load the weights.

        Raises:
            UserError: something is missing or does not fit.
        """
        import torch
        from transformers import CLIPVisionModelWithProjection

        read_note(folder)
        torch.set_num_threads(1)
        if not (folder / "clip" / "config.json").is_file():  # without it transformers builds its default model, with random weights
            raise UserError(f"--aesthetic {folder}: clip/ does not load as a CLIP vision model: no config.json")
        try:
            model, loading = CLIPVisionModelWithProjection.from_pretrained(
                str(folder / "clip"), local_files_only=True, output_loading_info=True
            )
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise UserError(f"--aesthetic {folder}: clip/ does not load as a CLIP vision model: {str(error).splitlines()[0]}") from error
        if lacking := sorted(loading["missing_keys"]):
            raise UserError(f"--aesthetic {folder}: clip/ lacks {len(lacking)} tensors, the first {lacking[0]}")
        self._clip = model.eval()
        layers = _head_layers(folder)
        self._weights = [(torch.from_numpy(weight), torch.from_numpy(bias)) for weight, bias in layers]
        has, wants = int(self._clip.config.projection_dim), layers[0][0].shape[1]
        if has != wants:
            raise UserError(f"--aesthetic {folder}: the head takes {wants} channels, clip/ gives {has}")
        self._size = int(self._clip.config.image_size)

    def score(self, pictures: list[NDArray[np.uint8]]) -> float:
        """Mean score of BGR pictures."""
        import torch

        pixels = torch.from_numpy(np.stack([self._prepared(picture) for picture in pictures]))
        with torch.inference_mode():
            hidden = torch.nn.functional.normalize(self._clip(pixel_values=pixels).image_embeds.float(), dim=-1)
            for weight, bias in self._weights:
                hidden = torch.nn.functional.linear(hidden, weight, bias)
        return float(hidden.mean())

    def _prepared(self, picture: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Short side to the model's size (bicubic), centre cut, normalised, channels first."""
        import cv2

        scale = self._size / min(picture.shape[:2])
        height, width = (max(self._size, round(edge * scale)) for edge in picture.shape[:2])
        resized = cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
        top, left = (height - self._size) // 2, (width - self._size) // 2
        rgb = resized[top : top + self._size, left : left + self._size, ::-1].astype(np.float32) / 255
        return np.ascontiguousarray(((rgb - _MEAN) / _STD).transpose(2, 0, 1))


def _head_layers(folder: Path) -> list[tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """(weight, bias) of the head's linear layers, in order."""
    import torch
    from safetensors.torch import load_file

    try:
        if (folder / "head.safetensors").is_file():
            state = load_file(str(folder / "head.safetensors"))
        else:
            state = torch.load(folder / "head.pth", map_location="cpu", weights_only=True)
        numbers = sorted({int(name.split(".")[1]) for name in state})
        layers = [(state[f"layers.{n}.weight"].float().numpy(), state[f"layers.{n}.bias"].float().numpy()) for n in numbers]
    except (OSError, ValueError, KeyError, IndexError, RuntimeError) as error:
        raise UserError(f"--aesthetic {folder}: head.safetensors (or head.pth) with layers.<n>.weight and .bias: {error}") from error
    sizes = [(weight.shape[1], weight.shape[0]) for weight, _ in layers]
    if not layers or layers[-1][0].shape[0] != 1 or any(a[1] != b[0] for a, b in zip(sizes, sizes[1:], strict=False)):
        raise UserError(f"--aesthetic {folder}: the head's layers {sizes} do not chain to one score")
    return layers
