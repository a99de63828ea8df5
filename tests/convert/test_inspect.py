"""Looking into files and comparing them: what is said, and the exit codes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLHunyuanVideo
from safetensors.torch import load_file

from megasora import cli
from megasora.checkpoint.compare import compare
from megasora.checkpoint.export import export_weights
from megasora.checkpoint.inspect import describe
from megasora.checkpoint.safetensors_io import write_safetensors
from megasora.config.errors import UserError
from tests.convert.models import DEV, V2, write_weights
from tests.convert.test_lora import kohya_adapter

SMALL_VAE = {"block_out_channels": (16, 16, 32, 32), "layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 4}


def test_weights_are_described(tmp_path: Path) -> None:
    tensors = write_weights(tmp_path / "w.safetensors", "opensora", V2)
    facts = describe(tmp_path / "w.safetensors", tensors=True)
    assert (facts["kind"], facts["format"], facts["tensors"]) == ("MMDiT weights", "opensora", len(tensors))
    assert facts["dtypes"] == {"BF16": facts["parameters"]}
    assert facts["model"]["num_single_blocks"] == 3
    assert facts["tensor_list"]["img_in.weight"] == {"dtype": "BF16", "shape": [32, 16]}
    export_weights(tmp_path / "w.safetensors", tmp_path / "m", target_format="megasora")
    made = describe(tmp_path / "m")
    assert (made["kind"], made["parameters"], made["checkpoint"]) == ("distributed weights", facts["parameters"], None)
    json.dumps(made)


def test_adapters_and_autoencoders_are_described_and_checked(tmp_path: Path) -> None:
    kohya_adapter(tmp_path / "k.safetensors")
    assert describe(tmp_path / "k.safetensors")["ranks"] == [3]
    AutoencoderKLHunyuanVideo(**SMALL_VAE).save_pretrained(tmp_path / "vae")  # type: ignore[arg-type]
    assert describe(tmp_path / "vae")["problems"] == []
    tensors = load_file(tmp_path / "vae" / "diffusion_pytorch_model.safetensors")
    del tensors["encoder.conv_in.conv.bias"]
    write_safetensors(tmp_path / "vae" / "diffusion_pytorch_model.safetensors", tensors, metadata={})
    assert describe(tmp_path / "vae")["problems"] == ["encoder.conv_in.conv.bias is missing"]


def test_an_autoencoder_goes_there_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with torch.device("meta"):
        published = AutoencoderKLHunyuanVideo().half()
    model = published.to_empty(device="cpu")
    for number, parameter in enumerate(model.parameters()):
        torch.nn.init.constant_(parameter, number)
    model.save_pretrained(tmp_path / "vae")
    tensors = load_file(tmp_path / "vae" / "diffusion_pytorch_model.safetensors")
    cli.main(["convert", str(tmp_path / "vae"), str(tmp_path / "hunyuan.safetensors"), "--to", "hunyuan-vae"])
    assert "246,478,803 parameters" in capsys.readouterr().out.replace("\n", " ")
    prefixed = {f"vae.{key}": tensor for key, tensor in load_file(tmp_path / "hunyuan.safetensors").items()}
    write_safetensors(tmp_path / "prefixed.safetensors", prefixed, metadata={})
    cli.main(["convert", str(tmp_path / "prefixed.safetensors"), str(tmp_path / "back"), "--to", "diffusers-vae"])
    back = AutoencoderKLHunyuanVideo.from_pretrained(tmp_path / "back", torch_dtype=torch.float16).state_dict()
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[key], tensor) for key, tensor in tensors.items())
    assert {path.name for path in tmp_path.iterdir()} == {
        "vae", "hunyuan.safetensors", "hunyuan.safetensors.manifest.json", "prefixed.safetensors", "back"
    }  # fmt: skip


def test_text_encoders_are_checked(tmp_path: Path) -> None:
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    T5EncoderModel(T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2)).save_pretrained(tmp_path / "t5")
    sizes = CLIPTextConfig(vocab_size=20, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, eos_token_id=2)
    CLIPTextModel(sizes).save_pretrained(tmp_path / "clip")
    for name in ("t5", "clip"):
        facts = describe(tmp_path / name)
        assert facts["problems"] == [], facts
        assert facts["kind"].startswith("text encoder")
        tensors = load_file(tmp_path / name / "model.safetensors")
        gone = next(key for key in tensors if key.endswith("layer_norm.weight") or key.endswith("layer_norm1.weight"))
        del tensors[gone]
        write_safetensors(tmp_path / name / "model.safetensors", tensors, metadata={"format": "pt"})
        assert len(describe(tmp_path / name)["problems"]) == 1


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"GGUF" + bytes(50), "GGUF"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"\x80\x02}q\x00.", "pickle"),
        (b"some words", "no complete safetensors file"),
    ],
)
def test_an_unknown_file_is_named(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(UserError, match=words):
        describe(tmp_path / "x")


def test_a_torch_file_is_named_and_not_opened(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / "x.pt")
    with pytest.raises(UserError, match="PyTorch file .* not opened"):
        describe(tmp_path / "x.pt")


def test_differences_are_found_in_any_pair_of_formats(tmp_path: Path) -> None:
    tensors = write_weights(tmp_path / "a.safetensors", "flux", DEV)
    export_weights(tmp_path / "a.safetensors", tmp_path / "b.safetensors", target_format="opensora")
    assert compare(tmp_path / "a.safetensors", tmp_path / "b.safetensors").equal
    tensors["img_in.bias"][3] += 0.5
    write_safetensors(tmp_path / "c.safetensors", tensors, metadata={})
    result = compare(tmp_path / "a.safetensors", tmp_path / "c.safetensors")
    assert [item.key for item in result.tensors if not item.same_bits] == ["img_in.bias"]
    worst = result.tensors[0]
    assert (worst.key, worst.max_abs) == ("img_in.bias", 0.5)
    assert compare(tmp_path / "a.safetensors", tmp_path / "c.safetensors", rtol=0.5).equal


def test_a_missing_tensor_and_a_nan_are_differences(tmp_path: Path) -> None:
    whole, less, broken = (tmp_path / f"{name}.safetensors" for name in ("whole", "less", "broken"))
    write_safetensors(whole, {"a": torch.tensor([1.0, 2.0]), "b": torch.ones(1)}, metadata={})
    write_safetensors(less, {"a": torch.tensor([1.0, 2.0])}, metadata={})
    write_safetensors(broken, {"a": torch.tensor([1.0, math.nan]), "b": torch.ones(1)}, metadata={})
    assert not compare(whole, less).equal and not compare(less, whole).equal
    for pair in ((whole, broken), (broken, whole)):
        result = compare(*pair, rtol=0.5)
        assert not result.equal and result.tensors[0].max_abs == math.inf
    write_safetensors(less, {"a": torch.tensor([1.0, 2.5]), "b": torch.ones(1)}, metadata={})
    # 0.5 over the largest value of the second, 2.5
    assert [compare(whole, less, rtol=rtol).equal for rtol in (0.21, 0.19)] == [True, False]


def run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = 0
    try:
        cli.main(arguments)
    except SystemExit as end:
        code = int(end.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


def test_exit_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors")
    write_weights(Path(a), "flux", DEV)
    write_weights(Path(b), "flux", DEV, seed=1)
    assert run(["compare", a, a], capsys)[0] == 0
    code, out, _ = run(["compare", a, b, "--json"], capsys)
    facts: dict[str, Any] = json.loads(out)
    assert (code, facts["equal"]) == (1, False)
    code, out, err = run(["compare", a, str(tmp_path / "none")], capsys)
    assert (code, out) == (2, "")
    assert "no weights at" in err
    code, out, _ = run(["inspect", a, "--json"], capsys)
    assert (code, json.loads(out)["format"]) == (0, "flux")
    code, out, err = run(["convert", a, str(tmp_path / "o.safetensors"), "--to", "opensora", "--verify", "--json"], capsys)
    assert code == 0
    assert json.loads(out)["proof"]["unproved"] == []
    for wrong in (
        ["convert", a],
        ["convert", a, b, "--to", "opensora"],
        ["convert", a, str(tmp_path / "x"), "--to", "peft"],
        ["convert", a, "/proc/x", "--to", "flux"],
        ["inspect"],
    ):
        code, out, err = run(wrong, capsys)
        assert (code, out) == (2, "")
        assert len(err.strip().splitlines()) == 1, err


def test_fp8_weights_become_what_is_asked_or_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A distributed checkpoint that no reader takes must not be called a conversion."""
    given = write_weights(tmp_path / "f8.safetensors", "flux", DEV, dtype=torch.float8_e4m3fn)
    code, _, err = run(["convert", str(tmp_path / "f8.safetensors"), str(tmp_path / "m"), "--to", "megasora"], capsys)
    assert code == 2 and "is of type F8_E4M3" in err and "add --dtype bf16" in err
    for target, fmt in (("m", "megasora"), ("flux.safetensors", "flux")):
        words = [str(tmp_path / "f8.safetensors"), str(tmp_path / target), "--to", fmt, "--dtype", "bf16", "--verify"]
        assert run(["convert", *words], capsys)[0] == 0
    code, _, err = run(["convert", str(tmp_path / "m"), str(tmp_path / "back.safetensors"), "--to", "flux"], capsys)
    assert code == 0, err
    for name in ("flux", "back"):
        found = load_file(tmp_path / f"{name}.safetensors")
        assert all(torch.equal(found[key], value.to(torch.bfloat16)) for key, value in given.items())


def test_flags_that_would_do_nothing_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_weights(tmp_path / "a.safetensors", "flux", DEV)
    kohya_adapter(tmp_path / "lora.safetensors")
    for words, said in (
        (["lora.safetensors", "out", "--to", "peft", "--dtype", "bf16"], "leave --dtype out"),
        (["lora.safetensors", "out", "--to", "peft", "--verify"], "leave --verify out"),
        (["a.safetensors", "out", "--to", "flux", "--lora_scale", "0.5"], "--merge_lora, which is not given"),
        (["a.safetensors", "out", "--to", "flux", "--workers", "-1"], "--workers -1 must be at least 1"),
    ):
        code, _, err = run(["convert", str(tmp_path / words[0]), str(tmp_path / words[1]), *words[2:]], capsys)
        assert code == 2 and said in err, err
