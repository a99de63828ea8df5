"""The tiny encoders run the real classes from the real folder formats, and are the same every time."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megasora import recipes
from megasora.config.errors import UserError
from megasora.config.schema import EncodersConfig
from megasora.diffusion.philox import normal_at
from megasora.models.autoencoders.posterior import Posterior
from megasora.models.encoders.bundle import load_encoders
from megasora.models.encoders.tiny import make_tiny_encoders

CAPTIONS = ["A rabbit in a meadow", "Colour bars that turn", "A man in a moving car"]
TINY = recipes.get("tiny")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> EncodersConfig:
    return make_tiny_encoders(tmp_path_factory.mktemp("e") / "enc", captions=CAPTIONS, model=TINY.model, base=TINY.encoders)


def test_shapes_fit_the_model(config: EncodersConfig) -> None:
    encoders = load_encoders(config, model=TINY.model, device=CPU)
    torch.manual_seed(0)
    latent = encoders.vae.encode(torch.rand(3, 9, 48, 64) * 2 - 1)
    assert latent.shape == (16, 3, 6, 8)
    assert encoders.vae.decode(latent).shape == (3, 9, 48, 64)
    text, vec = encoders.encode_text([*CAPTIONS, ""], max_tokens=16)
    assert text.shape == (4, 16, 64)
    assert vec.shape == (4, 32)
    assert len({tuple(row.tolist()) for row in vec}) == 4


def test_a_given_frame_is_encoded_without_looking_ahead(config: EncodersConfig) -> None:
    vae = load_encoders(config, model=TINY.model, device=CPU).vae
    clip = torch.rand(3, 9, 32, 32) * 2 - 1
    other = torch.cat([clip[:, :1], torch.rand(3, 8, 32, 32)], dim=1)
    alone = vae.encode(clip[:, :1])
    assert torch.equal(alone, vae.encode(other[:, :1]))
    assert alone.shape == (16, 1, 4, 4)


def test_latents_are_multiplied_at_encoding_and_divided_at_decoding(config: EncodersConfig) -> None:
    # diffusers' convention: scaled = raw x scaling_factor, decode(scaled / scaling_factor)
    vae = load_encoders(config, model=TINY.model, device=CPU).vae
    clip = torch.rand(3, 5, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    raw = vae.posterior(clip).mean
    assert abs(vae.scaling_factor - 1) > 0.1
    assert torch.equal(vae.encode(clip), raw * vae.scaling_factor)
    with torch.no_grad():
        decoded = vae.module.decode(raw[None]).sample[0]
    torch.testing.assert_close(vae.decode(raw * vae.scaling_factor), decoded)


def test_a_posterior_is_mean_plus_width_times_the_next_elements_of_its_draw() -> None:
    posterior = Posterior(mean=torch.tensor([1.0, 2.0]).view(2, 1, 1, 1), std=torch.tensor([10.0, 100.0]).view(2, 1, 1, 1))
    noise = torch.tensor([0.5, -1.0]).view(2, 1, 1, 1)
    assert posterior.with_noise(noise).flatten().tolist() == [6.0, -98.0]
    third, fourth = normal_at(torch.tensor([3, 4]), key=7).tolist()
    assert posterior.sample(key=7, first_element=3).flatten().tolist() == pytest.approx([1 + 10 * third, 2 + 100 * fourth])


def test_they_are_the_same_every_time(config: EncodersConfig, tmp_path: Path) -> None:
    again = make_tiny_encoders(tmp_path / "enc", captions=CAPTIONS, model=TINY.model, base=TINY.encoders)
    for name in ("vae", "t5", "clip"):
        first, second = Path(str(getattr(config, name))), Path(str(getattr(again, name)))
        files = sorted(path.name for path in first.iterdir())
        assert files == sorted(path.name for path in second.iterdir())
        assert all(
            (first / file).read_bytes() == (second / file).read_bytes() for file in files if file.endswith((".safetensors", ".model"))
        )


def test_wrong_folders_and_sizes_are_refused(config: EncodersConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no folder given for --encoders.vae"):
        load_encoders(replace(config, vae=None), model=TINY.model, device=CPU)
    with pytest.raises(UserError, match="no autoencoder's folder"):
        load_encoders(replace(config, vae=str(tmp_path)), model=TINY.model, device=CPU)
    with pytest.raises(UserError, match="t5 channels are 64"):
        load_encoders(config, model=replace(TINY.model, text_dim=128), device=CPU)


@pytest.mark.parametrize("name", ["vae", "t5", "clip"])
def test_weights_that_lack_a_tensor_are_refused(config: EncodersConfig, tmp_path: Path, name: str) -> None:
    # the libraries would fill the gap with random numbers and say so in a warning
    folder = tmp_path / name
    shutil.copytree(str(getattr(config, name)), folder)
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(str(file))
    lost = sorted(tensors)[len(tensors) // 2]
    save_file({key: tensor for key, tensor in tensors.items() if key != lost}, str(file), metadata={"format": "pt"})
    with pytest.raises(
        UserError, match=rf"encoders.{name} .* lacks 1 tensors of \w+, the first {lost.split('.')[-1]}|the first .*{lost[-12:]}"
    ):
        load_encoders(replace(config, **{name: str(folder)}), model=TINY.model, device=CPU)
