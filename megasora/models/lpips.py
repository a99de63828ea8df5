"""LPIPS (Zhang et al. 2018, arXiv 1801.03924) from weights that the user has: the backbone's and the lin layers'. It never starts random.

As published in richzhang/PerceptualSimilarity (lpips/lpips.py, version 0.1): pixels in [-1, 1] are shifted and scaled, features after five
ReLUs of AlexNet or VGG16 are made unit vectors over channels, squared differences are weighed by the lin layers, averaged and added up.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from megasora.config.errors import UserError

Backbone = Literal["alex", "vgg"]
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)
"""lpips/lpips.py, ScalingLayer."""
EPSILON = 1e-10
"""lpips/__init__.py, normalize_tensor."""
_Conv = tuple[int, int, int, int, int]
ALEX: tuple[_Conv | str, ...] = (
    (3, 64, 11, 4, 2), "tap", "pool 3", (64, 192, 5, 1, 2), "tap", "pool 3", (192, 384, 3, 1, 1), "tap", (384, 256, 3, 1, 1), "tap",
    (256, 256, 3, 1, 1), "tap",
)  # fmt: skip
VGG: tuple[_Conv | str, ...] = (
    (3, 64, 3, 1, 1), "relu", (64, 64, 3, 1, 1), "tap", "pool 2", (64, 128, 3, 1, 1), "relu", (128, 128, 3, 1, 1), "tap", "pool 2",
    (128, 256, 3, 1, 1), "relu", (256, 256, 3, 1, 1), "relu", (256, 256, 3, 1, 1), "tap", "pool 2", (256, 512, 3, 1, 1), "relu",
    (512, 512, 3, 1, 1), "relu", (512, 512, 3, 1, 1), "tap", "pool 2", (512, 512, 3, 1, 1), "relu", (512, 512, 3, 1, 1), "relu",
    (512, 512, 3, 1, 1), "tap",
)  # fmt: skip
"""Layers up to the last feature, numbered as torchvision's `features`: (in, out, kernel, stride, padding) of a convolution, a ReLU, a ReLU
whose output is a feature, a max pooling of stride 2 (torchvision/models/alexnet.py, vgg.py cfg D; lpips/pretrained_networks.py)."""
LAYERS: dict[Backbone, tuple[_Conv | str, ...]] = {"alex": ALEX, "vgg": VGG}
SMALLEST_SIDE: dict[Backbone, int] = {"alex": 31, "vgg": 16}
"""Pixels below which the last pooling has nothing left: AlexNet 31 -> 7 -> 3 -> 1, VGG16 16 -> 8 -> 4 -> 2 -> 1."""


def expected_shapes(backbone: Backbone) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors needed: torchvision's for the backbone, `lin0.model.1.weight` and so on as published."""
    shapes: dict[str, tuple[int, ...]] = {}
    taps: list[int] = []
    channels = 3
    for number, layer in enumerate(LAYERS[backbone]):
        if isinstance(layer, tuple):
            shapes[f"features.{number}.weight"] = (layer[1], layer[0], layer[2], layer[2])
            shapes[f"features.{number}.bias"] = (layer[1],)
            channels = layer[1]
        elif layer == "tap":
            taps.append(channels)
    return {**shapes, **{f"lin{k}.model.1.weight": (1, width, 1, 1) for k, width in enumerate(taps)}}


class Lpips(nn.Module):
    """The distance of pairs of pictures.

    Args:
        backbone: whose features.
        tensors: every tensor of `expected_shapes`; others are ignored.
    """

    def __init__(self, backbone: Backbone, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.backbone = backbone
        for name in expected_shapes(backbone):
            self.register_buffer(name.replace(".", "_"), tensors[name].float())
        self.register_buffer("shift", torch.tensor(SHIFT)[:, None, None])
        self.register_buffer("scale", torch.tensor(SCALE)[:, None, None])

    @torch.no_grad()
    def forward(self, a: Float[Tensor, "n 3 h w"], b: Float[Tensor, "n 3 h w"]) -> Float[Tensor, " n"]:
        """Distances of pictures in [-1, 1]; 0 for equal ones. Without a gradient; `distance` has one."""
        return self.distance(a, b)

    @torch.no_grad()
    def spatial_mean(self, a: Float[Tensor, "n 3 h w"], b: Float[Tensor, "n 3 h w"]) -> Float[Tensor, " n"]:
        """The mean over the map of distances that the reference gives with spatial=True: each layer's is brought to the pictures' size
        (bilinear), so that places at the rim weigh otherwise than in `distance`."""
        size = a.shape[2:]
        maps = (F.interpolate(layer, size=size, mode="bilinear", align_corners=False) for layer in self._maps(a, b))
        return torch.stack([layer.mean(dim=(1, 2, 3)) for layer in maps]).sum(dim=0)

    def distance(self, a: Float[Tensor, "n 3 h w"], b: Float[Tensor, "n 3 h w"]) -> Float[Tensor, " n"]:
        """The same as calling it, to be trained with."""
        distance = a.new_zeros(len(a))
        for layer in self._maps(a, b):
            distance = distance + layer.mean(dim=(1, 2, 3))
        return distance

    def _maps(self, a: Tensor, b: Tensor) -> Iterator[Tensor]:
        """Distances [n, 1, y, x] at each layer's places."""
        for k, (of_a, of_b) in enumerate(zip(self._features(a), self._features(b), strict=True)):
            yield F.conv2d((_unit(of_a) - _unit(of_b)) ** 2, self.get_buffer(f"lin{k}_model_1_weight"))

    def _features(self, pictures: Tensor) -> list[Tensor]:
        x = (pictures - self.get_buffer("shift")) / self.get_buffer("scale")
        features = []
        for number, layer in enumerate(LAYERS[self.backbone]):
            if isinstance(layer, tuple):
                weight, bias = self.get_buffer(f"features_{number}_weight"), self.get_buffer(f"features_{number}_bias")
                x = F.conv2d(x, weight, bias, stride=layer[3], padding=layer[4])
            elif layer.startswith("pool"):
                x = F.max_pool2d(x, kernel_size=int(layer[-1]), stride=2)
            else:
                x = F.relu(x)
                if layer == "tap":
                    features.append(x)
        return features


def _unit(features: Tensor) -> Tensor:
    return features / (features.pow(2).sum(dim=1, keepdim=True).sqrt() + EPSILON)


def load_lpips(folder: Path, *, flag: str = "--lpips") -> Lpips:
    """LPIPS from a folder with a backbone (torchvision's alexnet or vgg16) and its lin layers (lpips/weights/v0.1: alex.pth or vgg.pth).

    Args:
        folder: of the weights.
        flag: that named it, for the errors.

    Files end in .pth, .pt or .safetensors; pickles are read as plain tensors only. The classifier's tensors are not needed.

    Raises:
        UserError: no folder, a file that is no table of tensors, two backbones, or a tensor that is missing, unknown or of another shape.
    """
    tensors: dict[str, Tensor] = {}
    files = sorted(path for path in folder.glob("*") if path.suffix in (".pth", ".pt", ".safetensors")) if folder.is_dir() else []
    if not files:
        raise UserError(f"{flag} {folder} holds no weights: put in torchvision's AlexNet or VGG16 and lpips/weights/v0.1's lin layers")
    for path in files:
        for name, tensor in _read(path).items():
            if name in tensors:
                raise UserError(f"{flag} {folder}: {name} stands in two files, {path.name} is one; keep one backbone and its lin layers")
            tensors[name] = tensor
    first = tensors.get("features.0.weight")
    if first is None:
        raise UserError(f"{flag} {folder} has no backbone (features.0.weight): add torchvision's AlexNet or VGG16")
    backbone: Backbone = "alex" if first.shape[-1] == 11 else "vgg"
    wanted = expected_shapes(backbone)
    missing = [name for name in wanted if name not in tensors]
    wrong = [name for name, shape in wanted.items() if name in tensors and tuple(tensors[name].shape) != shape]
    unknown = [name for name in tensors if name not in wanted and not name.startswith("classifier.")]
    for what, names in (("lacks", missing), ("has the wrong shape of", wrong), ("does not know", unknown)):
        if names:
            raise UserError(f"{flag} {folder}, read as {backbone}, {what} {', '.join(names[:3])} ({len(names)} in all)")
    return Lpips(backbone, tensors).eval()


def _read(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        held = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"{path} holds no tensors ({str(error).splitlines()[0][:120]})") from error
    if not isinstance(held, dict) or not all(isinstance(tensor, Tensor) for tensor in held.values()):
        raise UserError(f"{path} is no table of tensors")
    return dict(held)
