"""LoRA files as peft and diffusers write them: the merge equals peft's own, patterns and scales included."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from megasora.checkpoint.export import export_adapter, export_weights, open_adapter
from megasora.checkpoint.formats.lora_settings import matches, parse_settings
from megasora.checkpoint.formats.rules import Format
from megasora.config.errors import UserError
from tests.convert.models import DEV, V2, write_weights

BLOCKS = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "to_add_out", "ff.net.0.proj", "ff_context.net.2", "proj_mlp", "proj_out"]
"""Ends of linear layers in double and single blocks; `proj_out` is also the model's last layer."""
PATTERNS = {
    "rank_pattern": {"attn.to_q": 6, r"single_transformer_blocks\.\d+\.proj_mlp": 2, "^proj_out": 5},
    "alpha_pattern": {"to_q": 1.5, r"transformer_blocks\.1\..*to_k": 9.0, "proj_out": 3.0, "ff": 100.0},
}
"""Ends of names, regular expressions, one anchored, one (`ff`) that is the whole of no name after a dot and so matches nothing."""


def tiny_flux() -> FluxTransformer2DModel:
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        patch_size=1, in_channels=64, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=24, pooled_projection_dim=12, guidance_embeds=True, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip


def randomise(model: nn.Module) -> None:
    """Values in every lora tensor, for B starts at zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def merged_by_peft(model: FluxTransformer2DModel, config: peft.LoraConfig, folder: Path) -> dict[str, Tensor]:
    """Adapt, save the adapter with peft and return what peft merges."""
    wrapped = peft.get_peft_model(copy.deepcopy(model), config)
    randomise(wrapped)
    wrapped.save_pretrained(folder)
    return dict(wrapped.merge_and_unload().state_dict())


def merged_by_us(base: Path, adapter: Path, target: Path) -> dict[str, Tensor]:
    export_weights(base, target, target_format="diffusers", merge_lora=adapter, axes_dim=(4, 6, 6))
    files = [target] if target.is_file() else sorted(target.glob("*.safetensors"))
    return {key: tensor for file in files for key, tensor in load_file(file).items()}


def assert_equal(made: dict[str, Tensor], expected: dict[str, Tensor], base: dict[str, Tensor]) -> None:
    assert made.keys() == expected.keys()
    changed = 0
    for key, tensor in expected.items():
        torch.testing.assert_close(made[key], tensor, rtol=1e-6, atol=1e-6, msg=key)
        changed += not torch.equal(tensor, base[key])
    assert changed > 10


@pytest.fixture
def model(tmp_path: Path) -> FluxTransformer2DModel:
    model = tiny_flux()
    model.save_pretrained(tmp_path / "base")
    return model


def base_of(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.state_dict())


CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": BLOCKS, "r": 4, "lora_alpha": 7},
    "every linear layer": {"target_modules": "all-linear", "r": 4, "lora_alpha": 2},
    "patterns": {"target_modules": BLOCKS, "r": 4, "lora_alpha": 7, **PATTERNS},
    "rslora": {"target_modules": BLOCKS, "r": 4, "lora_alpha": 7, "use_rslora": True},
    "rslora and patterns": {"target_modules": BLOCKS, "r": 4, "lora_alpha": 7, "use_rslora": True, **PATTERNS},
    "whole names": {
        "target_modules": ["transformer_blocks.0.attn.to_q", "transformer_blocks.1.attn.to_q"] + BLOCKS[4:],
        "r": 4, "lora_alpha": 7, "alpha_pattern": {"transformer_blocks.0.attn.to_q": 20},
    },
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_a_saved_peft_folder_merges_as_peft_merges_it(tmp_path: Path, model: FluxTransformer2DModel, name: str) -> None:
    expected = merged_by_peft(model, peft.LoraConfig(**CONFIGS[name]), tmp_path / "adapter")
    assert_equal(merged_by_us(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged"), expected, base_of(model))


@pytest.mark.parametrize("name", ["patterns", "rslora and patterns"])
@pytest.mark.parametrize("writer", ["save_lora_adapter", "save_lora_weights", "folder of an injected adapter"])
def test_files_of_diffusers_merge_as_peft_merges_them(tmp_path: Path, model: FluxTransformer2DModel, name: str, writer: str) -> None:
    config = peft.LoraConfig(**CONFIGS[name])
    expected = merged_by_peft(model, config, tmp_path / "peft")
    base, folder = base_of(model), tmp_path / "adapter"
    model.add_adapter(config)
    randomise(model)
    tensors = peft.get_peft_model_state_dict(model)
    if writer == "save_lora_adapter":
        model.save_lora_adapter(folder)
    elif writer == "save_lora_weights":
        FluxPipeline.save_lora_weights(folder, transformer_lora_layers=tensors, transformer_lora_adapter_metadata=config.to_dict())
    else:
        folder.mkdir()
        config.save_pretrained(folder)
        save_file(tensors, folder / "adapter_model.safetensors")
    (file,) = folder.glob("*.safetensors")
    with safe_open(file, "pt") as opened:
        first, metadata = next(iter(opened.keys())), opened.metadata() or {}
    assert first.startswith("transformer.") == (writer == "save_lora_weights")
    assert ("lora_adapter_metadata" in metadata) == (writer != "folder of an injected adapter")
    assert_equal(merged_by_us(tmp_path / "base", file, tmp_path / "merged"), expected, base)


def skeleton(shapes: Mapping[str, tuple[int, ...]]) -> nn.Module:
    """A module with a linear layer for every matrix, named as in a release file; it computes nothing."""
    root = nn.Module()
    for key, shape in shapes.items():
        if key.endswith(".weight") and len(shape) == 2:
            *path, last = key.removesuffix(".weight").split(".")
            parent = root
            for part in path:
                if part not in parent._modules:
                    parent.add_module(part, nn.Module())
                parent = parent.get_submodule(part)
            parent.add_module(last, nn.Linear(shape[1], shape[0], bias=key.removesuffix("weight") + "bias" in shapes))
    return root


@pytest.mark.parametrize("fmt", ["opensora", "flux"])
def test_an_adapter_over_release_names_merges_as_peft_merges_it(tmp_path: Path, fmt: Format) -> None:
    # Open-Sora trains LoRA with peft on its own module names (scripts/diffusion/train.py, lora_config)
    base = write_weights(tmp_path / "base.safetensors", fmt, V2 if fmt == "opensora" else DEV, dtype=torch.float32)
    model = skeleton({key: tuple(tensor.shape) for key, tensor in base.items()})
    model.load_state_dict(base, strict=False)
    ends = ["q_proj", "v_mlp", "img_attn.proj"] if fmt == "opensora" else ["img_attn.qkv", "linear1", "img_mlp.0"]
    patterns = {"rank_pattern": {ends[0]: 3}, "alpha_pattern": {r"double_blocks\.1\..*": 5.0}}
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=ends, r=2, lora_alpha=3, **patterns))  # type: ignore[arg-type]
    randomise(wrapped)
    wrapped.save_pretrained(tmp_path / "adapter")
    expected = dict(wrapped.merge_and_unload().state_dict())
    options: dict[str, Any] = {"source_format": fmt, "target_format": fmt, "axes_dim": V2.axes_dim}
    export_weights(tmp_path / "base.safetensors", tmp_path / "merged.safetensors", merge_lora=tmp_path / "adapter", **options)
    made = load_file(tmp_path / "merged.safetensors")
    changed = [key for key, tensor in base.items() if not torch.equal(made[key], tensor)]
    assert len(changed) == sum(key.removesuffix(".weight").endswith(tuple(ends)) for key in base if key.endswith(".weight"))
    for key in changed:
        torch.testing.assert_close(made[key], expected[key], rtol=1e-6, atol=1e-6, msg=key)


def test_a_file_without_a_configuration_has_scale_one_as_in_diffusers(tmp_path: Path, model: FluxTransformer2DModel) -> None:
    config = peft.LoraConfig(target_modules=BLOCKS, r=4, lora_alpha=4)
    expected = merged_by_peft(model, config, tmp_path / "peft")
    stem = "base_model.model."
    plain = {key.removeprefix(stem): tensor for key, tensor in load_file(tmp_path / "peft" / "adapter_model.safetensors").items()}
    save_file(plain, tmp_path / "plain.safetensors")
    assert_equal(merged_by_us(tmp_path / "base", tmp_path / "plain.safetensors", tmp_path / "merged"), expected, base_of(model))


def test_our_peft_folder_is_read_by_peft_with_the_same_scales(tmp_path: Path, model: FluxTransformer2DModel) -> None:
    expected = merged_by_peft(model, peft.LoraConfig(**CONFIGS["rslora and patterns"]), tmp_path / "adapter")
    export_adapter(tmp_path / "adapter", tmp_path / "ours", naming="peft")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "ours")
    made = dict(again.merge_and_unload().state_dict())
    assert_equal(made, expected, base_of(model))


@pytest.mark.parametrize("pattern", [*PATTERNS["rank_pattern"], *PATTERNS["alpha_pattern"], "transformer_blocks", "o_q", r".*\.0\..*"])
def test_a_pattern_matches_what_peft_matches(model: FluxTransformer2DModel, pattern: str) -> None:
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert [matches(pattern, name) for name in names] == [get_pattern_key([pattern], name) == pattern for name in names]


def test_scale_by_hand() -> None:
    # alpha / r = 6 / 4; with rslora 6 / sqrt(4) = alpha_of / 4; a block's own rank 16: 6 / sqrt(16) = alpha_of / 16
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "rank_pattern": {"to_q": 16}}
    assert parse_settings(config, where="x").alpha_of("a.to_k") == 6
    stable = parse_settings({**config, "use_rslora": True}, where="x")
    assert stable.alpha_of("a.to_k") / 4 == 6 / 2
    assert stable.alpha_of("a.to_q") / 16 == 6 / 4


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"use_dora": True}, "use_dora"),
    ({"lora_bias": True}, "lora_bias"),
    ({"bias": "lora_only"}, "bias"),
    ({"modules_to_save": ["norm_out.linear"]}, "modules_to_save"),
    ({"init_lora_weights": "pissa"}, "pissa"),
]


@pytest.mark.parametrize(("extra", "words"), REFUSED)
def test_more_than_plain_lora_is_refused_in_one_line(
    tmp_path: Path, model: FluxTransformer2DModel, extra: dict[str, Any], words: str
) -> None:
    merged_by_peft(model, peft.LoraConfig(target_modules=["to_q"], r=4, **extra), tmp_path / "adapter")
    with pytest.raises(UserError, match=words) as raised:
        open_adapter(tmp_path / "adapter", model=None)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"use_dora": True}, "DoRA's magnitude"),
        ({"lora_bias": True}, "lora_bias"),
        ({"modules_to_save": ["norm_out.linear"]}, "whole tensor"),
    ],
)
def test_what_no_configuration_names_is_seen_in_the_tensors(
    tmp_path: Path, model: FluxTransformer2DModel, extra: dict[str, Any], words: str
) -> None:
    merged_by_peft(model, peft.LoraConfig(target_modules=["to_q"], r=4, **extra), tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    kept = {key: value for key, value in json.loads(path.read_text()).items() if key not in extra}
    path.write_text(json.dumps(kept))
    with pytest.raises(UserError, match=words):
        open_adapter(tmp_path / "adapter", model=None)


def test_lora_of_a_convolution_is_refused(tmp_path: Path) -> None:
    conv = peft.get_peft_model(nn.Sequential(nn.Conv2d(4, 4, 3)), peft.LoraConfig(target_modules=["0"], r=2))
    conv.save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match="convolution"):
        open_adapter(tmp_path / "adapter", model=None)


def test_ranks_and_alphas_that_disagree_are_refused(tmp_path: Path, model: FluxTransformer2DModel) -> None:
    merged_by_peft(model, peft.LoraConfig(target_modules=["to_q"], r=4), tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(path.read_text())
    for change, words in (({"r": 8}, "rank 4"), ({"alpha_pattern": {"to_q(": 1}}, "no configuration"), ({"peft_type": "LOHA"}, "LOHA")):
        path.write_text(json.dumps({**config, **change}))
        with pytest.raises(UserError, match=words):
            open_adapter(tmp_path / "adapter", model=None)
    path.write_text(json.dumps(config))
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    stem = next(iter(tensors)).split(".lora_")[0]
    save_file({**tensors, f"{stem}.alpha": torch.tensor(3.0)}, tmp_path / "adapter" / "adapter_model.safetensors")
    with pytest.raises(UserError, match="alpha 3 in the file and 8"):
        open_adapter(tmp_path / "adapter", model=None)


def test_an_adapter_with_a_text_encoder_is_refused(tmp_path: Path, model: FluxTransformer2DModel) -> None:
    model.add_adapter(peft.LoraConfig(target_modules=["to_q"], r=4))
    tensors = peft.get_peft_model_state_dict(model)
    FluxPipeline.save_lora_weights(
        tmp_path, transformer_lora_layers=tensors, text_encoder_lora_layers={f"x.{key}": tensor.clone() for key, tensor in tensors.items()}
    )
    with pytest.raises(UserError, match="text encoder"):
        open_adapter(tmp_path, model=None)
