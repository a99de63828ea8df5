"""Losses and the discriminator against numbers worked out by hand and torch's own modules."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from megasora.models.autoencoders import losses
from megasora.models.autoencoders.discriminator import ClipDiscriminator, ClipNorm, smallest_side
from megasora.models.autoencoders.posterior import Posterior


def test_hinge_is_half_the_sum_of_both_margins() -> None:
    real, made = torch.tensor([2.0, 0.5]), torch.tensor([-2.0, 0.5])
    # relu(1 - real) = 0, 0.5; relu(1 + made) = 0, 1.5
    assert float(losses.discriminator_loss(real, made, kind="hinge")) == pytest.approx(0.5 * (0.25 + 0.75))


def test_vanilla_and_wasserstein_by_hand() -> None:
    real, made = torch.tensor([1.0]), torch.tensor([-1.0])
    assert float(losses.discriminator_loss(real, made, kind="vanilla")) == pytest.approx(math.log1p(math.exp(-1.0)))
    assert float(losses.discriminator_loss(real, made, kind="wasserstein")) == pytest.approx(-2.0)
    assert float(losses.generator_loss(torch.tensor([1.0, 3.0]))) == -2.0


def test_adaptive_weight_is_the_ratio_of_norms_and_bounded() -> None:
    assert float(losses.adaptive_weight(torch.tensor([3.0, 4.0]), torch.tensor([0.5]))) == pytest.approx(5 / 0.5001)
    assert float(losses.adaptive_weight(torch.tensor([5.0]), torch.zeros(1))) == pytest.approx(1e4)  # 5 / 1e-4 is above the bound
    assert float(losses.adaptive_weight(torch.zeros(1), torch.tensor([1.0]))) == 0.0


def test_kl_of_a_shifted_and_a_narrowed_normal() -> None:
    shifted = Posterior(mean=torch.tensor([[[[2.0]]]]), std=torch.ones(1, 1, 1, 1))
    narrowed = Posterior(mean=torch.zeros(1, 1, 1, 2), std=torch.full((1, 1, 1, 2), 0.5))
    assert float(losses.kl_of(shifted)) == pytest.approx(2.0)
    assert float(losses.kl_of(narrowed)) == pytest.approx(2 * (0.5 * (0.25 - 1) - math.log(0.5)))


def test_the_sum_is_the_mean_times_a_frame() -> None:
    video, made = torch.zeros(3, 2, 4, 5), torch.full((3, 2, 4, 5), 0.5)
    assert float(losses.pixel_distance(video, made, distance="l1")) == 0.5
    assert float(losses.pixel_distance(video, made, distance="l2")) == 0.25
    assert losses.scale_of(video, "sum") == 60
    assert losses.scale_of(video, "mean") == 1


def test_the_published_discriminator_has_its_parameters_and_patches() -> None:
    with torch.device("meta"):
        network = ClipDiscriminator(width=64, num_layers=5, norm="clip", dropout=0.3)
        logits = network(torch.empty(1, 3, 32, 256, 256))
    assert sum(parameter.numel() for parameter in network.parameters()) == 18_823_553
    assert tuple(logits.shape) == (1, 1, 8, 8, 8)


def test_the_norm_of_a_clip_is_batch_norm_of_a_batch_of_one() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 4, 3, 5, 5, dtype=torch.float64)
    published = nn.BatchNorm3d(4).double().train()
    ours = ClipNorm(4, groups=4).double()
    with torch.no_grad():
        for module in (published, ours):
            module.weight.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
            module.bias.copy_(torch.tensor([0.1, 0.2, 0.3, 0.4]))
    assert torch.allclose(published(x), ours(x), atol=1e-13)


def test_dropout_is_a_function_of_its_key() -> None:
    network = ClipDiscriminator(width=4, num_layers=2, norm="clip", dropout=0.5)
    network.initialize(seed=3)
    clip = torch.randn(1, 3, 4, 16, 16)
    first, again, other = (network(clip, key=key) for key in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first, network(clip))


def test_smallest_side_leaves_two_rows_of_patches() -> None:
    network = ClipDiscriminator(width=4, num_layers=3, norm="clip", dropout=0.0)
    network.initialize(seed=3)
    side = smallest_side(3)
    assert tuple(network(torch.zeros(1, 3, 1, side, side)).shape) == (1, 1, 1, 2, 2)
