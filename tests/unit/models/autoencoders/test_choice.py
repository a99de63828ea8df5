"""A folder says which autoencoder it holds; wrong folders and clips are refused in one line that says what to do."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from megasora.config.dc_ae import TINY, WEIGHTS_FILE, DCAEConfig, parse_config
from megasora.config.errors import UserError
from megasora.config.schema import EncodersConfig, ModelConfig
from megasora.models.autoencoders.choice import blank_autoencoder, load_autoencoder
from megasora.models.autoencoders.image import load_image_autoencoder
from megasora.models.autoencoders.tiny import make_tiny_autoencoder
from megasora.models.encoders.bundle import load_encoders
from tests.unit.models.autoencoders.test_dc_ae import noise

CPU = torch.device("cpu")
HUNYUAN = EncodersConfig(dtype="fp32")
DC_AE = EncodersConfig(dtype="fp32", spatial_compression=32, causal=False)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, EncodersConfig]:
    """Settings with a folder each."""
    root = tmp_path_factory.mktemp("autoencoders")
    made = {}
    for name, config in {"hunyuan": HUNYUAN, "dc_ae": DC_AE}.items():
        torch.manual_seed(0)
        make_tiny_autoencoder(root / name, latent_channels=16, config=config)
        made[name] = replace(config, vae=str(root / name))
    return made


@pytest.mark.parametrize(
    ("name", "frames", "shape", "refused"), [("hunyuan", 9, (16, 3, 8, 8), (8, 5)), ("dc_ae", 8, (16, 2, 2, 2), (9, 8))]
)
def test_the_same_calls_whichever_it_is(
    folders: dict[str, EncodersConfig], name: str, frames: int, shape: tuple[int, ...], refused: tuple[int, int]
) -> None:
    autoencoder = load_autoencoder(folders[name], device=CPU, dtype=torch.float32)
    facts = autoencoder.facts
    clip = noise(3, frames, 64, 64)
    latent = autoencoder.encode(clip)
    assert tuple(latent.shape) == shape == facts.latent_shape(frames, 64, 64)
    assert 0.3 < float(latent.std()) < 3
    torch.testing.assert_close(latent, autoencoder.posterior(clip).mean * facts.scaling_factor)
    video = autoencoder.decode(latent)
    assert video is not None and video.shape == clip.shape
    picture = autoencoder.decode(autoencoder.encode(clip[:, :1]))
    assert picture is not None and picture.shape == (3, 1, 64, 64)
    wrong, near = refused
    with pytest.raises(UserError, match=rf"takes clips of .* frames, not {wrong}; use {near}"):
        autoencoder.encode(noise(3, wrong, 64, 64))
    with pytest.raises(UserError, match=r"divide by \d+, not 100 x 64; use \d+ x 64"):
        autoencoder.encode(noise(3, frames, 100, 64))
    assert facts.name in autoencoder.identity and "16 channels" in autoencoder.identity
    blank = blank_autoencoder(folders[name], dtype=torch.float32)
    assert blank is not None and blank.facts == facts


def test_four_frames_are_no_clip_of_one_that_is_not_causal(folders: dict[str, EncodersConfig]) -> None:
    # their one latent frame would come back as one frame
    autoencoder = load_autoencoder(folders["dc_ae"], device=CPU, dtype=torch.float32)
    with pytest.raises(UserError, match="VideoDCAE takes clips of 1 or 4k from 8 on frames, not 4; use 8"):
        autoencoder.posterior(noise(3, 4, 32, 32))


def test_a_run_may_have_its_own_scaling_factor(folders: dict[str, EncodersConfig]) -> None:
    # Open-Sora's configuration divides by 0.493
    config = replace(folders["dc_ae"], scaling_factor=1 / 0.493)
    autoencoder = load_autoencoder(config, device=CPU, dtype=torch.float32)
    clip = noise(3, 8, 32, 32)
    latent = autoencoder.encode(clip)
    torch.testing.assert_close(latent, autoencoder.posterior(clip).mean / 0.493)
    whole = autoencoder.network.pixels((latent * 0.493)[None])[0]
    torch.testing.assert_close(autoencoder.decode(latent), whole, rtol=1e-5, atol=1e-5)
    assert DCAEConfig().scaling_factor == 1.0  # the released DiT lives on raw latents


def test_without_a_folder_the_published_one_that_fits_is_meant() -> None:
    hunyuan, dc_ae = (blank_autoencoder(config, dtype=torch.bfloat16) for config in (HUNYUAN, DC_AE))
    assert hunyuan is not None and dc_ae is not None
    assert (hunyuan.facts.latent_channels, dc_ae.facts.latent_channels) == (16, 128)
    assert blank_autoencoder(replace(DC_AE, spatial_compression=16), dtype=torch.bfloat16) is None


def test_settings_of_another_autoencoder_are_refused(folders: dict[str, EncodersConfig]) -> None:
    config = replace(folders["hunyuan"], spatial_compression=32, causal=False)
    with pytest.raises(
        UserError, match="encoders.spatial_compression is 32 and AutoencoderKLHunyuanVideo's is 8.*encoders.causal is False"
    ):
        load_encoders(config, model=ModelConfig(), device=CPU, parts=("vae",))
    with pytest.raises(UserError, match="vae latent channels are 16, the model takes 128"):
        load_encoders(folders["dc_ae"], model=ModelConfig(in_channels=128, patch_size=1), device=CPU, parts=("vae",))


def test_wrong_folders_are_refused(folders: dict[str, EncodersConfig], tmp_path: Path) -> None:
    def load(folder: Path) -> None:
        load_autoencoder(replace(DC_AE, vae=str(folder)), device=CPU, dtype=torch.float32)

    with pytest.raises(UserError, match="no config.json"):
        load(tmp_path)
    for name, cure in (("AutoencoderDC", "--to dc-ae"), ("AutoencoderKL", "--t2i_vae"), ("Other", "give the folder of")):
        (tmp_path / "config.json").write_text(json.dumps({"_class_name": name}))
        with pytest.raises(UserError, match=f"of class {name}; .*{cure}"):
            load(tmp_path)
    good = Path(str(folders["dc_ae"].vae))
    (tmp_path / "config.json").write_text((good / "config.json").read_text())
    with pytest.raises(UserError, match="does not load as VideoDCAE"):
        load(tmp_path)
    tensors = load_file(good / WEIGHTS_FILE)
    lost = "decoder.project_out.op_list.0.weight"
    save_file({key: tensor for key, tensor in tensors.items() if key != lost}, tmp_path / WEIGHTS_FILE)
    with pytest.raises(UserError, match=f"lacks 1 tensors of VideoDCAE, the first {lost}"):
        load(tmp_path)
    save_file({**tensors, lost: torch.zeros(5)}, tmp_path / WEIGHTS_FILE)
    with pytest.raises(UserError, match=rf"has 1 tensors that its config.json does not, the first {lost} \[5\]"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"widthz": [4]}, "unknown key; did you mean widths"),
        ({"temporal_stages": [5]}, "must name stages before the last"),
        ({"latent_channels": 12}, "latent_channels 12 must divide the last width 16"),
        ({"head_dim": 3}, "does not divide by head_dim"),
        ({"widths": [4, 4, 8]}, "6 entries for 3 widths"),
        ({"_class_name": "AutoencoderDC"}, "is for AutoencoderDC, not VideoDCAE"),
    ],
)
def test_sizes_that_cannot_be_are_refused(change: dict[str, object], message: str) -> None:
    facts = {"_class_name": "VideoDCAE", **vars(TINY), **change}
    with pytest.raises(UserError, match=message):
        parse_config(facts, where="config.json")


def test_pictures_of_flux_go_through_the_same_interface(tmp_path: Path) -> None:
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    module = AutoencoderKL(
        block_out_channels=(8, 8), **blocks, norm_num_groups=4, latent_channels=4, scaling_factor=0.5, shift_factor=0.25
    ).eval()
    module.save_pretrained(tmp_path / "flux")
    autoencoder = load_image_autoencoder(tmp_path / "flux", device=CPU, dtype=torch.float32)
    pictures = noise(3, 2, 32, 48)
    with torch.no_grad():
        mean = module.encode(pictures.movedim(1, 0)).latent_dist.mean.movedim(0, 1)
        decoded = module.decode(mean.movedim(1, 0)).sample.movedim(0, 1)
    torch.testing.assert_close(autoencoder.encode(pictures), (mean - 0.25) * 0.5)
    torch.testing.assert_close(autoencoder.decode((mean - 0.25) * 0.5), decoded, rtol=1e-4, atol=1e-5)
