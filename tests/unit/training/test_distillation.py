"""Gradients of a clip with latent distillation, against the whole graph differentiated at once; with and without recomputation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megasora import recipes
from megasora.config.autoencoder_run import AutoencoderRunConfig
from megasora.config.dc_ae import DCAEConfig
from megasora.config.distillation import DistillationConfig
from megasora.models.autoencoders.alignment import alignment_of
from megasora.models.autoencoders.dc_ae.model import Encoder
from megasora.models.autoencoders.teacher import Grid, make_tiny_teacher
from megasora.training.autoencoder.backward import MEASURED, ClipDraws, Losses, backward_clip
from megasora.training.autoencoder.distillation import Distillation
from megasora.training.autoencoder.network import TrainedNetwork, new_network
from megasora.training.autoencoder.teaching import build_distillation

SIZES = DCAEConfig(
    widths=(4, 8, 8),
    encoder_depths=(1, 1, 1),
    decoder_depths=(1, 1, 1),
    attention_from=2,
    temporal_stages=(0, 1),
    latent_channels=8,
    head_dim=4,
)
SHARE = 0.25
LAST = {
    "stages.0": "encoder.stages.0.op_list.1.main.conv.weight",
    "stages.2": "encoder.stages.2.op_list.0.local_module.main.point_conv.conv.weight",
    "latent": "encoder.project_out.main.op_list.0.conv.weight",
}
DRAWS = ClipDraws(posterior=0, patches=1)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_teacher(tmp_path_factory.mktemp("teacher") / "tiny")


def run_of(teacher: Path, *, recompute: str = "none", **settings: Any) -> AutoencoderRunConfig:
    config = recipes.get_autoencoder("tiny_ae")
    autoencoder = replace(config.autoencoder, sizes=SIZES, spatial_compression=4, recompute=recompute)
    return replace(config, autoencoder=autoencoder, distillation=DistillationConfig(weight=0.3, teacher=str(teacher), **settings))


def parts_of(config: AutoencoderRunConfig) -> tuple[TrainedNetwork, Distillation]:
    network = new_network(config.autoencoder, weights=None, load=True, seed=7)
    for parameter in network.module.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
    distillation = build_distillation(config, network, device=torch.device("cpu"), dtype=torch.float64)
    network.module.double()
    distillation.projector.double()
    return network, distillation


def clip_levels(frames: int = 8) -> Tensor:
    return torch.randint(256, (3, frames, 16, 24), generator=torch.Generator().manual_seed(frames), dtype=torch.uint8)


def measured(config: AutoencoderRunConfig, network: TrainedNetwork, distillation: Distillation, levels: Tensor) -> dict[str, float]:
    losses_of = Losses(settings=config.loss, lpips=None, adversary=config.discriminator, discriminator=None, distillation=distillation)
    numbers = backward_clip(network, levels, losses_of=losses_of, draws=DRAWS, share=SHARE)
    return dict(zip(MEASURED, numbers.tolist(), strict=True))


@pytest.mark.parametrize("recompute", ["none", "stages"])
@pytest.mark.parametrize(
    ("layer", "balance"), [("stages.0", "adaptive"), ("stages.2", "adaptive"), ("latent", "adaptive"), ("latent", "plain")]
)
def test_gradients_are_those_of_the_weighted_sum(teacher: Path, layer: str, balance: str, recompute: str) -> None:
    config = run_of(teacher, layer=layer, balance=balance, recompute=recompute, cosine_margin=0.1, gram_margin=0.01)
    network, distillation = parts_of(config)
    levels = clip_levels()
    said = measured(config, network, distillation, levels)

    whole, other = parts_of(replace(config, autoencoder=replace(config.autoencoder, recompute="none")))
    seen: list[Tensor] = []
    handle = other.layer.register_forward_hook(lambda module, inputs, output: seen.append(output))
    video = levels.float() / 127.5 - 1
    made = whole.reconstruct(video, whole.share(num_frames=8, height=16, width=24), key=None).pixels
    pixels = (video - made).abs().mean()
    handle.remove()
    terms = alignment_of(
        other.projector(seen[0])[0],
        other.teacher.features(video, Grid(*seen[0].shape[-3:])),
        cosine_margin=0.1,
        gram_margin=0.01,
        pairs="frame",
    )
    aligned = terms.cosine + terms.gram
    weight = torch.tensor(0.3, dtype=torch.float64)
    if balance == "adaptive":
        last = whole.module.get_parameter(LAST[layer])
        of_pixels, of_teacher = (torch.autograd.grad(loss, last, retain_graph=True)[0].norm() for loss in (pixels, aligned))
        weight = weight * of_pixels / (of_teacher + 1e-4)
    (SHARE * (pixels + weight.detach() * aligned)).backward(retain_graph=True)
    expected = {name: parameter.grad for name, parameter in whole.module.named_parameters()}
    projected = torch.autograd.grad(SHARE * aligned, list(other.projector.parameters()))

    assert said["alignment_balance"] == pytest.approx(float(weight), rel=1e-9)
    assert said["cosine"] + said["gram"] == pytest.approx(float(aligned), rel=1e-9)
    assert said["cosine"] > 0 and said["gram"] > 0
    assert said["objective"] == pytest.approx(float(pixels), rel=1e-9)
    for name, parameter in network.module.named_parameters():
        wanted = expected[name]
        assert parameter.grad is not None and wanted is not None
        assert (parameter.grad - wanted).norm() <= 1e-9 * max(wanted.norm().item(), 1e-12), name
    for parameter, wanted in zip(distillation.projector.parameters(), projected, strict=True):
        assert parameter.grad is not None
        assert (parameter.grad - wanted).norm() <= 1e-9 * wanted.norm()


@pytest.mark.parametrize("frames", [1, 8, 12])
def test_clips_of_all_lengths_are_aligned_and_the_hook_is_gone_after(teacher: Path, frames: int) -> None:
    config = run_of(teacher, layer="stages.0", frames="first", projector="mlp", projector_width=6, gram="clip", recompute="stages")
    network, distillation = parts_of(config)
    said = measured(config, network, distillation, clip_levels(frames))
    assert 0 < said["cosine"] < 2
    assert not distillation.layer._forward_hooks
    assert all(parameter.grad is not None for parameter in distillation.projector.parameters())


def test_the_decoder_stays_as_it_is_where_the_encoder_alone_is_trained(teacher: Path) -> None:
    config = run_of(teacher, layer="latent", trained="encoder")
    network, distillation = parts_of(config)
    measured(config, network, distillation, clip_levels())
    grown = {name for name, parameter in network.module.named_parameters() if parameter.grad is not None}
    assert grown == {name for name, _ in network.module.named_parameters() if name.startswith("encoder.")}


@pytest.mark.parametrize("sizes", [DCAEConfig(), SIZES], ids=["published", "small"])
def test_a_stages_places_cover_what_the_sizes_say(sizes: DCAEConfig) -> None:
    with torch.device("meta"):
        encoder = Encoder(sizes)
        shapes: dict[int | None, tuple[int, ...]] = {}
        for number, stage in enumerate(encoder.stages):
            stage.register_forward_hook(lambda module, inputs, output, number=number: shapes.__setitem__(number, tuple(output.shape[2:])))
        shapes[None] = tuple(encoder(torch.empty(1, 3, 16, 64, 96)).shape[2:])
    assert len(shapes) == len(sizes.widths) + 1
    for stage_number, (t, h, w) in shapes.items():
        frames, pixels = sizes.compression_after(stage_number)
        assert (t, h, w) == (16 // frames, 64 // pixels, 96 // pixels)
    if sizes == DCAEConfig():
        assert sizes.compression_after(3) == (2, 16)  # 1024 x 16 x 16 x 16 of 32 frames of 256px
