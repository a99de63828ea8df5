"""Rotary embedding, modulation and time embedding by hand, and their written-out backwards against finite differences."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megasora.models.mmdit.heads import HeadLayout, Projected, collect_heads, place_heads
from megasora.models.mmdit.kernels.composed import COMPOSED
from megasora.models.mmdit.layers import sinusoidal_embedding
from megasora.models.mmdit.modulation import gated_norm_modulate, gated_residual, norm_modulate
from megasora.models.mmdit.rotary import Rotation, rotation_of
from megasora.parallel.pack import Rows, Runs

RUNS = Runs.of(torch.tensor([0, 0, 1]), num_samples=2)
"""Two tokens of sample 0, one of sample 1."""


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64, requires_grad=True)


def test_angles_are_position_over_theta_axis_by_axis() -> None:
    # axes of 2, 4 and 2 dims have the frequencies 1; 1 and 1/10; 1 with theta 100 (FLUX math.rope)
    positions = torch.tensor([[2.0, 3.0, 5.0]], dtype=torch.float64)
    rotation = rotation_of(positions, axes_dim=(2, 4, 2), theta=100.0, dtype=torch.float64)
    assert torch.atan2(rotation.sin, rotation.cos).flatten().tolist() == pytest.approx([2.0, 3.0, 0.3, 5.0 - 2 * math.pi])


def test_a_query_is_normed_scaled_and_turned_by_its_angle() -> None:
    # (3, 4) has the rms sqrt(12.5); a quarter turn takes (a, b) to (-b, a); keys get no turn and values nothing at all
    quarter = Rotation(torch.zeros(1, 1, 1, dtype=torch.float64), torch.ones(1, 1, 1, dtype=torch.float64))
    weights = (torch.tensor([2.0, 10.0], dtype=torch.float64), torch.ones(2, dtype=torch.float64))
    projected = torch.tensor([[3.0, 4.0, 1.0, 1.0, 7.0, 8.0]], dtype=torch.float64)
    stream = Projected(tensor=projected, weights=weights, rotation=quarter, rows=Rows(count=1))
    q, k, v = place_heads([stream], heads=1, layout=HeadLayout(num_groups=1, length=1, head_dim=2, eps=0.0), kernels=COMPOSED)
    assert q.flatten().tolist() == pytest.approx([-40 / math.sqrt(12.5), 6 / math.sqrt(12.5)])
    assert k.flatten().tolist() == pytest.approx([-1.0, 1.0])
    assert v.flatten().tolist() == [7.0, 8.0]


def test_heads_go_to_their_group_and_their_row_and_come_back() -> None:
    # two heads of one channel pair in two groups, tokens in reverse order; values are moved only
    rows = Rows(count=2, index=torch.tensor([1, 0]))
    still = Rotation(torch.ones(2, 1, 1, dtype=torch.float64), torch.zeros(2, 1, 1, dtype=torch.float64))
    ones = torch.ones(2, dtype=torch.float64)
    projected = torch.arange(24, dtype=torch.float64).view(2, 12)
    stream = Projected(tensor=projected, weights=(ones, ones), rotation=still, rows=rows)
    v = place_heads([stream], heads=2, layout=HeadLayout(num_groups=2, length=2, head_dim=2, eps=0.0), kernels=COMPOSED)[2]
    assert v.tolist() == [[[[20, 21]], [[8, 9]]], [[[22, 23]], [[10, 11]]]]
    (back,) = collect_heads(v, rows=[rows], kernels=COMPOSED)
    assert back.tolist() == [[8, 9, 10, 11], [20, 21, 22, 23]]


@pytest.mark.parametrize("groups", [1, 2])
def test_the_backwards_of_two_streams_of_heads_are_derivatives(groups: int) -> None:
    rotation = rotation_of(torch.tensor([[0.0, 1, 2], [1, 0, 3]], dtype=torch.float64), axes_dim=(2, 2, 2), theta=10.0, dtype=torch.float64)
    one = Rotation(rotation.cos[:1], rotation.sin[:1])
    rows = (Rows(count=2, index=torch.tensor([2, 0])), Rows(count=1, start=1))

    def chain(a: Tensor, b: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        streams = [
            Projected(tensor=a, weights=(weights[0], weights[1]), rotation=rotation, rows=rows[0]),
            Projected(tensor=b, weights=(weights[2], weights[3]), rotation=one, rows=rows[1]),
        ]
        q, k, v = place_heads(streams, heads=2, layout=HeadLayout(num_groups=groups, length=3, head_dim=6, eps=1e-6), kernels=COMPOSED)
        return collect_heads(q + 2 * k * v, rows=rows, kernels=COMPOSED)

    weights = tuple(draw(6, seed=seed) for seed in range(3, 7))
    assert torch.autograd.gradcheck(chain, (draw(2, 36, seed=1), draw(1, 36, seed=2), *weights))


def test_the_backward_of_heads_beside_a_feed_forward_part_is_their_derivative() -> None:
    rotation = rotation_of(torch.tensor([[0.0, 1, 2], [1, 0, 3]], dtype=torch.float64), axes_dim=(2, 2, 2), theta=10.0, dtype=torch.float64)
    rows = Rows(count=2, index=torch.tensor([1, 0]))

    def chain(tensor: Tensor, q_weight: Tensor, k_weight: Tensor) -> Tensor:
        stream = Projected(tensor=tensor, weights=(q_weight, k_weight), rotation=rotation, rows=rows)
        layout = HeadLayout(num_groups=1, length=2, head_dim=6, eps=1e-6)
        q, k, v, wide = place_heads([stream], heads=2, layout=layout, kernels=COMPOSED)
        return collect_heads(q + 2 * k * v, rows=[rows], kernels=COMPOSED, wide=wide)[0]

    assert torch.autograd.gradcheck(chain, (draw(2, 36 + 5, seed=1), draw(6, seed=2), draw(6, seed=3)))


def test_a_token_is_modulated_by_the_rows_of_its_sample() -> None:
    x = torch.tensor([[1.0, 3.0], [5.0, 1.0], [2.0, 4.0]], dtype=torch.float64)  # normed: (-1, 1), (1, -1), (-1, 1)
    shift = torch.tensor([[10.0, 20.0], [30.0, 40.0]], dtype=torch.float64)
    scale = torch.tensor([[0.0, 1.0], [2.0, -1.0]], dtype=torch.float64)
    same, modulated = norm_modulate(x, shift=shift, scale=scale, runs=RUNS, eps=0.0, kernels=COMPOSED)
    assert torch.equal(same, x)
    torch.testing.assert_close(modulated, torch.tensor([[9.0, 22.0], [11.0, 18.0], [27.0, 40.0]], dtype=torch.float64))
    added = gated_residual(x, gate=shift, branch=torch.ones_like(x), runs=RUNS, kernels=COMPOSED)
    assert added.tolist() == [[11, 23], [15, 21], [32, 44]]


@pytest.mark.parametrize("samples", [1, 2])
def test_the_backwards_of_the_modulation_are_derivatives(samples: int) -> None:
    runs = RUNS if samples == 2 else Runs.of(torch.zeros(3, dtype=torch.int64), num_samples=1)
    rows = [draw(samples, 4, seed=seed) for seed in range(2, 5)]
    tokens = [draw(3, 4, seed=seed) for seed in (1, 5)]

    def normed(x: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        return norm_modulate(x, shift=shift, scale=scale, runs=runs, eps=1e-6, kernels=COMPOSED)

    def both(x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        return gated_norm_modulate(x, gate=gate, branch=branch, shift=shift, scale=scale, runs=runs, eps=1e-6, kernels=COMPOSED)

    def gated(x: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
        return gated_residual(x, gate=gate, branch=branch, runs=runs, kernels=COMPOSED)

    # a segment sum goes through a one-hot matrix of fp32 ones: exact in fp64
    assert torch.autograd.gradcheck(normed, (tokens[0], rows[0], rows[1]))
    assert torch.autograd.gradcheck(both, (*tokens, *rows))
    assert torch.autograd.gradcheck(gated, (tokens[0], rows[0], tokens[1]))


def test_times_are_embedded_as_1000_t_cosines_first() -> None:
    # frequencies 1 and 10000^(-1/2) = 1/100 (FLUX timestep_embedding)
    (row,) = sinusoidal_embedding(torch.tensor([0.002], dtype=torch.float64), dim=4).tolist()
    assert row == pytest.approx([math.cos(2.0), math.cos(0.02), math.sin(2.0), math.sin(0.02)])
