"""LoRA adapters: the same change of weights in every naming, merged or refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megasora.checkpoint.export import export_adapter, export_weights, open_adapter
from megasora.checkpoint.formats.lora import Adapter, canonical_updates
from megasora.checkpoint.formats.mapping import shapes_in
from megasora.checkpoint.formats.rules import to_canonical_order
from megasora.checkpoint.safetensors_io import write_safetensors
from megasora.config.errors import UserError
from megasora.config.schema import ModelConfig
from tests.convert.models import random_weights, write_weights

MODEL = ModelConfig(
    hidden_size=128,
    num_attention_heads=1,
    num_double_blocks=2,
    num_single_blocks=2,
    ffn_hidden_size=512,
    cond_embed=False,
    guidance_embed=True,
)
RANK = 3


def kohya_adapter(path: Path, *, alpha: float = 1.5) -> dict[str, Tensor]:
    """An adapter over every block weight of FLUX, as kohya's trainer writes it."""
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, Tensor] = {}
    for key, shape in shapes_in("flux", MODEL).items():
        if key.endswith(".weight") and "_blocks." in key:
            stem = "lora_unet_" + key.removesuffix(".weight").replace(".", "_")
            tensors[f"{stem}.lora_down.weight"] = torch.randn(RANK, shape[1], generator=generator)
            tensors[f"{stem}.lora_up.weight"] = torch.randn(shape[0], RANK, generator=generator)
            tensors[f"{stem}.alpha"] = torch.tensor(alpha)
    write_safetensors(path, tensors, metadata={})
    return tensors


def updates(adapter: Adapter) -> dict[str, Tensor]:
    return {key: pair.scale * (pair.b @ pair.a) for key, pair in canonical_updates(adapter).items()}


def assert_same_updates(a: Adapter, b: Adapter) -> None:
    one, other = updates(a), updates(b)
    assert one.keys() == other.keys()
    for key, tensor in one.items():
        assert float((other[key] - tensor).norm()) <= 1e-6 * float(tensor.norm()), key


def test_every_naming_makes_the_same_change(tmp_path: Path) -> None:
    original = kohya_adapter(tmp_path / "k.safetensors")
    export_adapter(tmp_path / "k.safetensors", tmp_path / "d.safetensors", naming="diffusers")
    export_adapter(tmp_path / "d.safetensors", tmp_path / "p", naming="peft")
    export_adapter(tmp_path / "p", tmp_path / "back.safetensors", naming="kohya")
    kohya, diffusers, peft = (open_adapter(tmp_path / name, model=None) for name in ("k.safetensors", "d.safetensors", "p"))
    assert (kohya.fmt, diffusers.fmt, peft.fmt) == ("flux", "diffusers", "diffusers")
    assert len(diffusers.modules) > len(kohya.modules)
    assert_same_updates(kohya, diffusers)
    assert_same_updates(kohya, peft)
    back = load_file(tmp_path / "back.safetensors")
    assert back.keys() == original.keys()
    assert all(torch.equal(back[key], tensor) for key, tensor in original.items())


def test_queries_of_a_fused_pair_follow_the_rotary_order(tmp_path: Path) -> None:
    tensors = kohya_adapter(tmp_path / "k.safetensors", alpha=RANK)
    stem = "lora_unet_single_blocks_1_linear1"
    delta = tensors[f"{stem}.lora_up.weight"] @ tensors[f"{stem}.lora_down.weight"]
    made = updates(open_adapter(tmp_path / "k.safetensors", model=MODEL))
    h = MODEL.hidden_size
    expected = to_canonical_order(delta[h : 2 * h], order="heads", head_dim=MODEL.head_dim)
    assert torch.allclose(made["single_blocks.1.k_proj.weight"], expected)
    assert torch.allclose(made["single_blocks.1.v_mlp.weight"], delta[2 * h :])


def test_a_change_is_alpha_over_rank_times_the_product(tmp_path: Path) -> None:
    # 1.5 / 3 (Hu et al., arXiv 2106.09685, section 4.1)
    tensors = kohya_adapter(tmp_path / "k.safetensors", alpha=1.5)
    stem = "lora_unet_double_blocks_1_img_mod_lin"
    expected = 0.5 * tensors[f"{stem}.lora_up.weight"] @ tensors[f"{stem}.lora_down.weight"]
    made = updates(open_adapter(tmp_path / "k.safetensors", model=MODEL))
    torch.testing.assert_close(made["double_blocks.1.img_mod.lin.weight"], expected)


def test_split_pairs_of_different_inputs_are_stacked(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    stem = "transformer.single_transformer_blocks.0."
    tensors = {}
    for name, rank in (("attn.to_q", 2), ("attn.to_v", 4)):
        tensors[f"{stem}{name}.lora_A.weight"] = torch.randn(rank, 128, generator=generator)
        tensors[f"{stem}{name}.lora_B.weight"] = torch.randn(128, rank, generator=generator)
        tensors[f"{stem}{name}.alpha"] = torch.tensor(8.0)
    write_safetensors(tmp_path / "d.safetensors", tensors, metadata={})
    export_adapter(tmp_path / "d.safetensors", tmp_path / "k.safetensors", naming="kohya")
    fused = load_file(tmp_path / "k.safetensors")
    assert fused["lora_unet_single_blocks_0_linear1.lora_down.weight"].shape == (6, 128)
    one, other = (
        updates(open_adapter(tmp_path / "d.safetensors", model=None)),
        updates(open_adapter(tmp_path / "k.safetensors", model=None)),
    )
    for key, tensor in one.items():
        assert torch.allclose(other[key], tensor, rtol=1e-5, atol=1e-5)
    assert not other["single_blocks.0.k_proj.weight"].any()


@pytest.mark.parametrize("target", ["flux", "opensora", "diffusers"])
def test_merging_adds_the_change(tmp_path: Path, target: str) -> None:
    write_weights(tmp_path / "w.safetensors", "flux", MODEL, dtype=torch.float32)
    kohya_adapter(tmp_path / "k.safetensors")
    done = export_weights(
        tmp_path / "w.safetensors",
        tmp_path / "m.safetensors",
        target_format=target,  # type: ignore[arg-type]
        merge_lora=tmp_path / "k.safetensors",
        lora_scale=0.5,
        prove=True,
    )
    assert any("LoRA is merged" in line for line in done.lines)
    from megasora.checkpoint.source import open_source

    made = open_source(tmp_path / "m.safetensors")
    before, change = random_weights(MODEL, dtype=torch.float32), updates(open_adapter(tmp_path / "k.safetensors", model=MODEL))
    for key, tensor in before.items():
        expected = tensor + 0.5 * change[key] if key in change else tensor
        assert torch.allclose(made.read(key), expected, rtol=1e-5, atol=1e-5), key


def test_anything_but_plain_lora_is_refused(tmp_path: Path) -> None:
    tensors = kohya_adapter(tmp_path / "k.safetensors")
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    cases: list[tuple[dict[str, Tensor], str]] = [
        ({**tensors, f"{name}.dora_scale": torch.ones(1)}, "no plain LoRA"),
        ({key: tensor for key, tensor in tensors.items() if key != f"{name}.lora_up.weight"}, "no pair"),
        ({**tensors, f"{name}.lora_up.weight": torch.ones(5, RANK)}, "weight \\[5, 128\\]"),
        (
            {**tensors, "lora_unet_nothing.lora_up.weight": torch.ones(5, 1), "lora_unet_nothing.lora_down.weight": torch.ones(1, 5)},
            "module nothing",
        ),
    ]
    for number, (changed, words) in enumerate(cases):
        write_safetensors(tmp_path / f"{number}.safetensors", changed, metadata={})
        with pytest.raises(UserError, match=words):
            open_adapter(tmp_path / f"{number}.safetensors", model=MODEL)


def test_peft_needs_its_configuration(tmp_path: Path) -> None:
    kohya_adapter(tmp_path / "k.safetensors")
    export_adapter(tmp_path / "k.safetensors", tmp_path / "p", naming="peft")
    config = json.loads((tmp_path / "p" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (RANK, 1.5)
    (tmp_path / "p" / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True}))
    with pytest.raises(UserError, match="use_dora"):
        open_adapter(tmp_path / "p", model=None)
    (tmp_path / "p" / "adapter_config.json").unlink()
    with pytest.raises(UserError, match="keeps its alpha"):
        open_adapter(tmp_path / "p", model=None)


def test_an_adapter_for_other_sizes_is_refused(tmp_path: Path) -> None:
    write_weights(tmp_path / "w.safetensors", "flux", replace(MODEL, num_single_blocks=1))
    kohya_adapter(tmp_path / "k.safetensors")
    with pytest.raises(UserError, match="single_blocks_1"):
        export_weights(tmp_path / "w.safetensors", tmp_path / "m.safetensors", target_format="flux", merge_lora=tmp_path / "k.safetensors")
