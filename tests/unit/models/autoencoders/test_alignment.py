"""VA-VAE's loss (arXiv 2501.01423, equations 5 and 6) against loops over places; the projectors against matrices."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from megasora.models.autoencoders.alignment import Projector, alignment_of


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


@pytest.mark.parametrize("pairs", ["frame", "clip"])
@pytest.mark.parametrize(("m1", "m2"), [(0.0, 0.0), (0.5, 0.25)])
def test_terms_are_means_over_places_and_over_pairs(pairs: str, m1: float, m2: float) -> None:
    ours, theirs = (torch.randn(3, 2, 2, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in (1, 2))
    found = alignment_of(ours, theirs, cosine_margin=m1, gram_margin=m2, pairs=pairs)  # type: ignore[arg-type]
    z, f = ours.numpy(), theirs.numpy()
    places = list(itertools.product(range(2), range(2), range(3)))
    cosines = [max(0.0, 1 - m1 - cosine(z[:, t, i, j], f[:, t, i, j])) for t, i, j in places]
    couples = [(a, b) for a, b in itertools.product(places, places) if pairs == "clip" or a[0] == b[0]]
    grams = [
        max(0.0, abs(cosine(z[:, *a], z[:, *b]) - cosine(f[:, *a], f[:, *b])) - m2)  # places of themselves count, as in a matrix's mean
        for a, b in couples
    ]
    assert float(found.cosine) == pytest.approx(np.mean(cosines), abs=1e-12)
    assert float(found.gram) == pytest.approx(np.mean(grams), abs=1e-12)


def test_features_of_another_length_are_the_same_features() -> None:
    theirs = torch.randn(4, 1, 3, 3, dtype=torch.float64)
    found = alignment_of(7 * theirs, theirs, cosine_margin=0.0, gram_margin=0.0, pairs="frame")
    assert float(found.cosine) == pytest.approx(0, abs=1e-12)
    assert float(found.gram) == pytest.approx(0, abs=1e-12)


def test_one_convolution_is_a_matrix_at_each_place() -> None:
    projector = Projector(5, 7, width=None).double()
    projector.initialize(seed=3)
    (weight,) = projector.parameters()
    x = torch.randn(1, 5, 2, 3, 2, dtype=torch.float64)
    expected = np.einsum("dc,cthw->dthw", weight.detach().numpy()[:, :, 0, 0, 0], x[0].numpy())
    np.testing.assert_allclose(projector(x)[0].detach().numpy(), expected, atol=1e-12)


def test_an_mlp_has_three_layers_with_silu_between() -> None:
    projector = Projector(5, 7, width=6).double()
    projector.initialize(seed=3)
    weights = [parameter.detach().numpy().reshape(len(parameter), -1).squeeze() for parameter in projector.parameters()]
    assert [weight.shape for weight in weights] == [(6, 5), (6,), (6, 6), (6,), (7, 6), (7,)]
    x = torch.randn(1, 5, 1, 1, 1, dtype=torch.float64)
    a = weights[0] @ x.numpy().ravel() + weights[1]
    b = weights[2] @ (a / (1 + np.exp(-a))) + weights[3]
    np.testing.assert_allclose(projector(x).detach().numpy().ravel(), weights[4] @ (b / (1 + np.exp(-b))) + weights[5], atol=1e-12)
