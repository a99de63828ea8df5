"""The video DC-AE between its published file, our folder and diffusers' network of pictures, with manifest and proof."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderDC
from safetensors.torch import load_file, save_file

from megasora import cli
from megasora.checkpoint.autoencoder_export import export_autoencoder
from megasora.checkpoint.formats.dc_ae import clip_config, config_of_shapes, image_config, image_names, tensor_shapes
from megasora.checkpoint.inspect import describe
from megasora.config.dc_ae import TINY, DCAEConfig
from megasora.config.errors import UserError
from megasora.models.autoencoders.dc_ae.model import VideoDCAE
from megasora.models.autoencoders.dc_ae.network import DCAENetwork

KEYS = Path(__file__).parents[1] / "unit" / "models" / "autoencoders" / "dc_ae_keys.txt"


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A DC-AE of pictures with weights that matter."""
    torch.manual_seed(0)
    network = AutoencoderDC.from_config(image_config(TINY))
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    network.save_pretrained(tmp_path / "images")
    return tmp_path / "images"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file like the published one: tensors and nothing else."""
    torch.manual_seed(1)
    save_file(VideoDCAE(TINY).state_dict(), tmp_path / "f32t4.safetensors")
    return tmp_path / "f32t4.safetensors"


def test_shapes_are_the_released_ones() -> None:
    assert [f"{key} {list(shape)}" for key, shape in tensor_shapes(DCAEConfig()).items()] == KEYS.read_text().splitlines()
    assert config_of_shapes(tensor_shapes(DCAEConfig())) == DCAEConfig()


@pytest.mark.parametrize("config", [TINY, replace(DCAEConfig(), latent_channels=32)], ids=["tiny", "sana"])
def test_names_in_diffusers_are_all_used_and_none_is_invented(config: DCAEConfig) -> None:
    with torch.device("meta"):
        theirs = AutoencoderDC.from_config(image_config(config)).state_dict()
    names = [name for key in tensor_shapes(config) for name in image_names(key)]
    assert len(names) == len(set(names)) and set(names) == set(theirs)
    assert clip_config(image_config(config), where="config.json") == config


@pytest.mark.parametrize("side", [32, 96])
def test_a_network_of_pictures_becomes_one_of_clips_that_is_it_on_pictures(images: Path, tmp_path: Path, side: int) -> None:
    made = export_autoencoder(images, tmp_path / "clips", target_format="dc-ae", prove=True)
    assert made.proof is not None and (made.proof.inverted, made.proof.replayed) == (150, 0)
    ours, theirs = DCAENetwork.load(tmp_path / "clips", dtype=torch.float32).module, AutoencoderDC.from_pretrained(images)
    picture = torch.rand(2, 3, side, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        latent = theirs.encode(picture).latent
        restored = theirs.decode(latent).sample
        found, back = ours.encoder(picture[:, :, None]), ours.decoder(latent[:, :, None])
    assert float((found[:, :, 0] - latent).norm() / latent.norm()) < 1e-5
    assert float((back[:, :, 0] - restored).norm() / restored.norm()) < 1e-5
    # and it is a network of clips
    assert ours.encoder(torch.zeros(1, 3, 8, 32, 32)).shape == (1, 16, 2, 1, 1)


def test_and_back_bit_for_bit(images: Path, tmp_path: Path) -> None:
    export_autoencoder(images, tmp_path / "clips", target_format="dc-ae")
    export_autoencoder(tmp_path / "clips", tmp_path / "back", target_format="diffusers-dc-ae", prove=True)
    back, first = (AutoencoderDC.from_pretrained(folder).state_dict() for folder in (tmp_path / "back", images))
    assert back.keys() == first.keys() and all(torch.equal(back[key], tensor) for key, tensor in first.items())


def test_pictures_of_a_trained_network_need_the_middle_frames_only(file: Path, tmp_path: Path) -> None:
    made = export_autoencoder(file, tmp_path / "images", target_format="diffusers-dc-ae", prove=True)
    assert "only the middle frame of the kernel" in "\n".join(made.lines)
    network = VideoDCAE(TINY)
    network.load_state_dict(load_file(file))
    picture = torch.rand(1, 3, 64, 32) * 2 - 1
    with torch.no_grad():
        latent = network.encoder(picture[:, :, None])[:, :, 0]
        theirs = AutoencoderDC.from_pretrained(tmp_path / "images").encode(picture).latent
    torch.testing.assert_close(theirs, latent, rtol=1e-5, atol=1e-6)


def test_other_latent_channels_start_anew(images: Path, tmp_path: Path) -> None:
    made = export_autoencoder(images, tmp_path / "clips", target_format="dc-ae", latent_channels=8, prove=True)
    assert "3 tensors: new" in "\n".join(made.lines)
    tensors = load_file(tmp_path / "clips" / "model.safetensors")
    fresh = tensors["encoder.project_out.main.op_list.0.conv.weight"]
    assert fresh.shape == (8, 16, 3, 3, 3) and float(fresh.std()) == pytest.approx(0.02, rel=0.1)
    assert not tensors["encoder.project_out.main.op_list.0.conv.bias"].any()
    assert DCAENetwork.load(tmp_path / "clips", dtype=torch.float32).facts.latent_channels == 8
    with pytest.raises(UserError, match="--latent_channels 7: .*must divide"):
        export_autoencoder(images, tmp_path / "other", target_format="dc-ae", latent_channels=7)


def test_the_published_file_goes_to_our_folder_and_back(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["convert", str(file), str(tmp_path / "folder"), "--to", "dc-ae", "--verify", "--json"])
    assert json.loads(capsys.readouterr().out)["proof"]["inverted"] == 138
    facts = json.loads((tmp_path / "folder" / "manifest.json").read_text())
    assert (facts["source"]["format"], facts["target"]["format"], len(facts["tensors"])) == ("hcae", "dc-ae", 138)
    assert describe(tmp_path / "folder")["problems"] == []
    assert describe(tmp_path / "folder")["kind"] == "video DC-AE"
    cli.main(["convert", str(tmp_path / "folder"), str(tmp_path / "again.safetensors"), "--to", "hcae", "--verify"])
    first, again = load_file(file), load_file(tmp_path / "again.safetensors")
    assert first.keys() == again.keys() and all(torch.equal(again[key], tensor) for key, tensor in first.items())
    # a complete target is only verified, and a changed one is noticed
    cli.main(["convert", str(file), str(tmp_path / "folder"), "--to", "dc-ae", "--verify"])
    tensors = load_file(tmp_path / "folder" / "model.safetensors")
    tensors["decoder.project_out.op_list.0.weight"] += 1
    save_file(tensors, tmp_path / "folder" / "model.safetensors")
    with pytest.raises(UserError, match="1 tensors are not the ones that were written"):
        export_autoencoder(file, tmp_path / "folder", target_format="dc-ae", prove=True)


def test_a_type_is_cast_and_said(file: Path, tmp_path: Path) -> None:
    made = export_autoencoder(file, tmp_path / "bf16", target_format="dc-ae", dtype="bf16", prove=True)
    assert "138 tensors: cast F32 to BF16" in made.lines
    assert made.proof is not None and (made.proof.inverted, made.proof.replayed) == (0, 138)
    assert all(tensor.dtype == torch.bfloat16 for tensor in load_file(tmp_path / "bf16" / "model.safetensors").values())


def test_what_cannot_be_is_refused(file: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="end it in .safetensors"):
        export_autoencoder(file, tmp_path / "x", target_format="hcae")
    with pytest.raises(UserError, match="is a video DC-AE: --to hunyuan-vae cannot hold it"):
        export_autoencoder(file, tmp_path / "x.safetensors", target_format="hunyuan-vae")
    tensors = load_file(file)
    lost = "encoder.stages.3.op_list.0.context_module.main.proj.norm.weight"
    save_file({key: tensor for key, tensor in tensors.items() if key != lost}, file)
    with pytest.raises(UserError, match=f"1 tensors do not fit a video DC-AE, the first: {lost} is missing"):
        export_autoencoder(file, tmp_path / "x", target_format="dc-ae")
    facts = json.loads((images / "config.json").read_text())
    (images / "config.json").write_text(json.dumps({**facts, "upsample_block_type": "pixel_shuffle"}))
    with pytest.raises(UserError, match="upsample_block_type is pixel_shuffle and must be interpolate"):
        export_autoencoder(images, tmp_path / "x", target_format="dc-ae")
    mistakes = {
        ("--init", "open-sora-v2"): "--init is not for autoencoders: leave it out with --to dc-ae",
        ("--select", "ema"): f"--select ema: {file} is no checkpoint of megasora train-ae, it holds one set of weights",
    }
    for flags, answer in mistakes.items():
        with pytest.raises(SystemExit):
            cli.main(["convert", str(file), str(tmp_path / "x"), "--to", "dc-ae", *flags])
        assert answer in capsys.readouterr().err
