"""Against code nobody here wrote: diffusers' FluxTransformer2DModel, same random weights and inputs, forward and every gradient, fp32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from megasora.checkpoint.export import export_weights
from megasora.checkpoint.formats.detect import detect_model
from megasora.checkpoint.formats.mapping import CanonicalReader
from megasora.checkpoint.tensors import StateDictReader
from megasora.inference.forward import run_forward
from tests.flux import small_flux
from tests.pool import RankPool

TOLERANCE = 1e-5
"""||a - b|| / ||b|| per tensor in fp32."""
AXES = (4, 14, 14)


def flux(guidance: bool) -> FluxTransformer2DModel:
    """A small FLUX with weights that leave no branch idle."""
    return small_flux(in_channels=16, num_single_layers=3, num_attention_heads=4, text_dim=24, vec_dim=12, guidance=guidance, axes=AXES)


def batch(guidance: bool) -> dict[str, Tensor]:
    """Two samples of 15 video and 7 text tokens."""
    torch.manual_seed(1)
    ids = torch.cartesian_prod(torch.arange(1.0), torch.arange(3.0), torch.arange(5.0))
    inputs = {
        "img": torch.randn(2, 15, 16),
        "img_ids": ids.expand(2, -1, -1).contiguous(),
        "txt": torch.randn(2, 7, 24),
        "txt_ids": torch.zeros(2, 7, 3),
        "timesteps": torch.tensor([0.2, 0.9]),
        "y_vec": torch.randn(2, 12),
    }
    return {**inputs, "guidance": torch.tensor([3.5, 1.0])} if guidance else inputs


def run_on_rank(rank: int, folder: str, layout: dict[str, object], weights: str = "weights.safetensors", grads: bool = True) -> None:
    """`megasora forward` on one rank of a pool."""
    path = Path(folder)
    files = {"weights": path / weights, "inputs": path / "inputs.safetensors", "output": path / "out.safetensors"}
    run_forward(**files, grads=path / "grads.safetensors" if grads else None, axes_dim=AXES, device="cpu", **layout)  # type: ignore[arg-type]


def predict(theirs: FluxTransformer2DModel, inputs: dict[str, Tensor]) -> Tensor:
    """Their forward."""
    prediction: Tensor = theirs(
        hidden_states=inputs["img"],
        encoder_hidden_states=inputs["txt"],
        pooled_projections=inputs["y_vec"],
        timestep=inputs["timesteps"],
        img_ids=inputs["img_ids"][0],
        txt_ids=inputs["txt_ids"][0],
        guidance=inputs.get("guidance"),
    ).sample
    return prediction


@pytest.mark.parametrize(
    ("world_size", "layout", "guidance"),
    [
        (1, {}, False),
        (1, {}, True),
        (4, {"tp": 2, "cp": 2, "context_parallel_backend": "ring"}, False),
        (8, {"tp": 2, "pp": 2, "cp": 2}, True),
        (4, {"tp": 2, "pp": 2, "vp": 2}, False),
    ],
)
def test_forward_and_gradients_agree(pool: RankPool, tmp_path: Path, world_size: int, layout: dict[str, object], guidance: bool) -> None:
    theirs, inputs = flux(guidance), batch(guidance)
    prediction = predict(theirs, inputs)
    prediction.square().mean().backward()
    save_file({name: tensor.contiguous() for name, tensor in theirs.state_dict().items()}, tmp_path / "weights.safetensors")
    save_file(inputs, tmp_path / "inputs.safetensors")

    pool.run(world_size, run_on_rank, str(tmp_path), layout)

    ours = load_file(tmp_path / "out.safetensors")["pred"]
    assert (ours - prediction).norm() / prediction.norm() < TOLERANCE
    gradients = StateDictReader({name: parameter.grad for name, parameter in theirs.named_parameters() if parameter.grad is not None})
    shapes = {key: info.shape for key, info in gradients.infos.items()}
    expected = CanonicalReader(gradients, fmt="diffusers", model=detect_model(shapes, "diffusers", axes_dim=AXES))
    found = load_file(tmp_path / "grads.safetensors")
    assert found.keys() == expected.shapes.keys()
    gaps = {key: float((found[key] - expected.read(key)).norm() / expected.read(key).norm()) for key in found}
    assert max(gaps.values()) < TOLERANCE, max(gaps, key=gaps.__getitem__)


@pytest.mark.parametrize("guidance", [False, True])
def test_every_format_predicts_what_diffusers_predicts(pool: RankPool, tmp_path: Path, guidance: bool) -> None:
    theirs, inputs = flux(guidance), batch(guidance)
    prediction = predict(theirs, inputs).detach()
    theirs.save_pretrained(tmp_path / "theirs")
    save_file(inputs, tmp_path / "inputs.safetensors")
    path = tmp_path / "theirs"
    chain = (("flux", "flux.safetensors"), ("opensora", "opensora.safetensors"), ("megasora", "checkpoint"), ("diffusers", "ours"))
    for fmt, name in chain:
        export_weights(path, tmp_path / name, target_format=fmt, axes_dim=AXES, prove=True)  # type: ignore[arg-type]
        path = tmp_path / name
        pool.run(1, run_on_rank, str(tmp_path), {}, name, False)
        ours = load_file(tmp_path / "out.safetensors")["pred"]
        assert (ours - prediction).norm() / prediction.norm() < TOLERANCE, fmt
    again = predict(FluxTransformer2DModel.from_pretrained(tmp_path / "ours"), inputs)
    assert torch.equal(again, prediction)
