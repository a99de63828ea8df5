"""LPIPS against the published formula, built here from the reference's own parts, with the published lin layers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torchmetrics
from safetensors.torch import save_file
from torch import Tensor, nn
from torchmetrics.functional.image.lpips import NetLinLayer, ScalingLayer, _normalize_tensor, _spatial_average

from megasora.config.errors import UserError
from megasora.data.decoding.contract import normalise
from megasora.evaluation.fidelity import compare_pairs, pair_up
from megasora.models.lpips import Backbone, expected_shapes, load_lpips
from tests.unit.evaluation.clips import noise, write_exact

LIN = Path(torchmetrics.__file__).parent / "functional" / "image" / "lpips_models"
"""torchmetrics ships the lin layers of lpips/weights/v0.1."""


def alexnet() -> nn.Sequential:
    """torchvision/models/alexnet.py, `features`."""
    return nn.Sequential(
        nn.Conv2d(3, 64, 11, stride=4, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2), nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(),
        nn.MaxPool2d(3, 2), nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(), nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(),
        nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2),
    )  # fmt: skip


def vgg16() -> nn.Sequential:
    """torchvision/models/vgg.py, configuration D, `features`."""
    layers: list[nn.Module] = []
    channels = 3
    for width in (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0):
        if width:
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            channels = width
        else:
            layers.append(nn.MaxPool2d(2, 2))
    return nn.Sequential(*layers)


SLICES = {"alex": (2, 5, 8, 10, 12), "vgg": (4, 9, 16, 23, 30)}
"""Ends of the slices in lpips/pretrained_networks.py."""
WIDTHS = {"alex": (64, 192, 384, 256, 256), "vgg": (64, 128, 256, 512, 512)}
"""lpips/lpips.py, chns."""


def network(backbone: Backbone) -> nn.Sequential:
    torch.manual_seed(0)
    return alexnet() if backbone == "alex" else vgg16()


def write_weights(folder: Path, backbone: Backbone) -> nn.Sequential:
    """A random backbone as torchvision saves it, classifier included, and the published lin layers."""
    folder.mkdir(parents=True)
    features = network(backbone)
    state = {f"features.{name}": tensor for name, tensor in features.state_dict().items()}
    torch.save({**state, "classifier.1.weight": torch.ones(2, 2)}, folder / "backbone.pth")
    (folder / "lin.pth").write_bytes((LIN / f"{backbone}.pth").read_bytes())
    return features


def reference_maps(backbone: Backbone, features: nn.Sequential, a: Tensor, b: Tensor) -> Iterator[Tensor]:
    """Each layer's map in lpips/lpips.py, LPIPS.forward, with the layers torchmetrics took over from there."""
    lin = torch.load(LIN / f"{backbone}.pth", map_location="cpu", weights_only=True)
    scaling = ScalingLayer()
    x, y = scaling(a), scaling(b)
    start = 0
    for k, (stop, width) in enumerate(zip(SLICES[backbone], WIDTHS[backbone], strict=True)):
        x, y = features[start:stop](x), features[start:stop](y)
        start = stop
        layer = NetLinLayer(width, use_dropout=True).eval()
        layer.load_state_dict({"model.1.weight": lin[f"lin{k}.model.1.weight"]})
        yield layer((_normalize_tensor(x) - _normalize_tensor(y)) ** 2)


def reference(backbone: Backbone, features: nn.Sequential, a: Tensor, b: Tensor) -> Tensor:
    """lpips/lpips.py, LPIPS.forward."""
    return sum(_spatial_average(layer, keep_dim=True) for layer in reference_maps(backbone, features, a, b)).flatten()  # type: ignore


@pytest.mark.parametrize("backbone", ["alex", "vgg"])
@torch.no_grad()
def test_the_distance_is_the_published_one(tmp_path: Path, backbone: Backbone) -> None:
    features = write_weights(tmp_path / "w", backbone)
    a, b = torch.rand(2, 3, 64, 48) * 2 - 1, torch.rand(2, 3, 64, 48) * 2 - 1
    lpips = load_lpips(tmp_path / "w")
    assert lpips.backbone == backbone
    torch.testing.assert_close(lpips(a, b), reference(backbone, features, a, b), rtol=1e-5, atol=1e-7)
    assert torch.equal(lpips(a, a), torch.zeros(2))


def test_a_clip_has_the_mean_over_its_frames(tmp_path: Path) -> None:
    features = write_weights(tmp_path / "w", "alex")
    one, other = noise(10, 48, 48), noise(10, 48, 48, seed=1)
    write_exact(tmp_path / "a" / "x.mp4", one)
    write_exact(tmp_path / "b" / "x.mp4", other)
    (clip,) = compare_pairs(*pair_up(tmp_path / "a", tmp_path / "b"), measures=("lpips",), lpips=load_lpips(tmp_path / "w")).clips
    with torch.no_grad():
        pictures = (normalise(clip.permute(0, 3, 1, 2).to(torch.uint8)) for clip in (one, other))
        expected = float(reference("alex", features, *pictures).mean())
    assert clip.lpips == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("backbone", ["alex", "vgg"])
def test_every_tensor_is_asked_for_by_its_published_name_and_shape(backbone: Backbone) -> None:
    shapes = {f"features.{name}": tuple(tensor.shape) for name, tensor in network(backbone).state_dict().items()}
    lin = {name: tuple(tensor.shape) for name, tensor in torch.load(LIN / f"{backbone}.pth", map_location="cpu", weights_only=True).items()}
    assert expected_shapes(backbone) == {**shapes, **lin}


def test_missing_and_strange_tensors_are_refused(tmp_path: Path) -> None:
    write_weights(tmp_path / "w", "alex")
    state = torch.load(tmp_path / "w" / "backbone.pth", map_location="cpu", weights_only=True)
    cases = (
        ({key: tensor for key, tensor in state.items() if key != "features.8.bias"}, "lacks features.8.bias"),
        ({**state, "features.3.bias": torch.ones(3)}, "wrong shape of features.3.bias"),
        ({**state, "features.99.weight": torch.ones(3)}, "does not know features.99.weight"),
        ({"x": torch.ones(1)}, "has no backbone"),
    )
    (tmp_path / "w" / "backbone.pth").unlink()
    for changed, said in cases:
        save_file(changed, tmp_path / "w" / "backbone.safetensors")
        with pytest.raises(UserError, match=said):
            load_lpips(tmp_path / "w")
    save_file(state, tmp_path / "w" / "backbone.safetensors")
    (tmp_path / "w" / "lin.pth").rename(tmp_path / "lin.pth")
    with pytest.raises(UserError, match="lacks lin0.model.1.weight"):
        load_lpips(tmp_path / "w")
    (tmp_path / "w" / "second.pth").write_bytes((tmp_path / "lin.pth").read_bytes())
    (tmp_path / "w" / "third.pth").write_bytes((tmp_path / "lin.pth").read_bytes())
    with pytest.raises(UserError, match="stands in two files"):
        load_lpips(tmp_path / "w")
    (tmp_path / "w" / "third.pth").write_bytes(b"nothing")
    with pytest.raises(UserError, match="holds no tensors"):
        load_lpips(tmp_path / "w")


@pytest.mark.parametrize("backbone", ["alex", "vgg"])
@torch.no_grad()
def test_the_spatial_mean_is_that_of_the_references_map(tmp_path: Path, backbone: Backbone) -> None:
    # lpips/lpips.py with spatial=True: every layer's map through nn.Upsample(out_HW, mode="bilinear", align_corners=False), summed
    features = write_weights(tmp_path / "w", backbone)
    a, b = torch.rand(2, 3, 61, 45) * 2 - 1, torch.rand(2, 3, 61, 45) * 2 - 1
    b[:, :, :32] = a[:, :, :32]  # equal in part, and no multiple of the layers' strides, so that the rims weigh
    grow = nn.Upsample(size=(61, 45), mode="bilinear", align_corners=False)
    expected = sum(grow(layer) for layer in reference_maps(backbone, features, a, b)).mean(dim=(1, 2, 3))  # type: ignore[attr-defined]
    lpips = load_lpips(tmp_path / "w")
    torch.testing.assert_close(lpips.spatial_mean(a, b), expected, rtol=1e-5, atol=1e-7)
    if backbone == "alex":  # its strides are wide enough for the two to differ visibly
        assert not torch.allclose(lpips(a, b), expected, rtol=1e-4)
