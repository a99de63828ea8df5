"""Rotary embedding, modulation and time embedding by hand, and their written-out backwards against finite differences."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megasora.models.mmdit.layers import sinusoidal_embedding
from megasora.models.mmdit.modulation import gated_residual, norm_modulate
from megasora.models.mmdit.rotary import Rotation, norm_rotate, rotation_of
from megasora.parallel.pack import Runs

RUNS = Runs(index=torch.tensor([0, 0, 1]), num_samples=2)
"""Two tokens of sample 0, one of sample 1."""


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64, requires_grad=True)


def test_angles_are_position_over_theta_axis_by_axis() -> None:
    # axes of 2, 4 and 2 dims have the frequencies 1; 1 and 1/10; 1 with theta 100 (FLUX math.rope)
    positions = torch.tensor([[2.0, 3.0, 5.0]], dtype=torch.float64)
    rotation = rotation_of(positions, axes_dim=(2, 4, 2), theta=100.0, dtype=torch.float64)
    assert torch.atan2(rotation.sin, rotation.cos).flatten().tolist() == pytest.approx([2.0, 3.0, 0.3, 5.0 - 2 * math.pi])


def test_a_query_is_normed_scaled_and_turned_by_its_angle() -> None:
    # (3, 4) has the rms sqrt(12.5); a quarter turn takes (a, b) to (-b, a)
    x = torch.tensor([[[3.0, 4.0]]], dtype=torch.float64)
    weight = torch.tensor([2.0, 10.0], dtype=torch.float64)
    quarter = Rotation(torch.zeros(1, 1, 1, dtype=torch.float64), torch.ones(1, 1, 1, dtype=torch.float64))
    turned = norm_rotate(x, weight=weight, rotation=quarter, eps=0.0)
    assert turned.flatten().tolist() == pytest.approx([-40 / math.sqrt(12.5), 6 / math.sqrt(12.5)])


def test_the_backward_of_the_rotation_is_its_derivative() -> None:
    rotation = rotation_of(torch.tensor([[0.0, 1, 2], [1, 0, 3]], dtype=torch.float64), axes_dim=(2, 2, 2), theta=10.0, dtype=torch.float64)
    arguments = (draw(2, 2, 6, seed=1), draw(6, seed=2))
    assert torch.autograd.gradcheck(lambda x, weight: norm_rotate(x, weight=weight, rotation=rotation, eps=1e-6), arguments)


def test_a_token_is_modulated_by_the_rows_of_its_sample() -> None:
    x = torch.tensor([[1.0, 3.0], [5.0, 1.0], [2.0, 4.0]], dtype=torch.float64)  # normed: (-1, 1), (1, -1), (-1, 1)
    shift = torch.tensor([[10.0, 20.0], [30.0, 40.0]], dtype=torch.float64)
    scale = torch.tensor([[0.0, 1.0], [2.0, -1.0]], dtype=torch.float64)
    modulated = norm_modulate(x, shift=shift, scale=scale, runs=RUNS, eps=0.0)
    torch.testing.assert_close(modulated, torch.tensor([[9.0, 22.0], [11.0, 18.0], [27.0, 40.0]], dtype=torch.float64))
    added = gated_residual(x, gate=shift, branch=torch.ones_like(x), runs=RUNS)
    assert added.tolist() == [[11, 23], [15, 21], [32, 44]]


@pytest.mark.parametrize("samples", [1, 2])
def test_the_backwards_of_the_modulation_are_derivatives(samples: int) -> None:
    runs = RUNS if samples == 2 else Runs(index=torch.zeros(3, dtype=torch.int64), num_samples=1)
    x, rows, more = draw(3, 4, seed=1), draw(samples, 4, seed=2), draw(samples, 4, seed=3)
    # a segment sum goes through a one-hot matrix of fp32 ones: exact in fp64
    assert torch.autograd.gradcheck(lambda x, a, b: norm_modulate(x, shift=a, scale=b, runs=runs, eps=1e-6), (x, rows, more))
    assert torch.autograd.gradcheck(lambda x, gate, y: gated_residual(x, gate=gate, branch=y, runs=runs), (x, rows, draw(3, 4, seed=4)))


def test_times_are_embedded_as_1000_t_cosines_first() -> None:
    # frequencies 1 and 10000^(-1/2) = 1/100 (FLUX timestep_embedding)
    (row,) = sinusoidal_embedding(torch.tensor([0.002], dtype=torch.float64), dim=4).tolist()
    assert row == pytest.approx([math.cos(2.0), math.cos(0.02), math.sin(2.0), math.sin(0.02)])
