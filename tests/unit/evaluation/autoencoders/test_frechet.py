"""Frechet distance against its closed form and scipy's root of a matrix; what a file of features must be."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from megasora.config.errors import UserError
from megasora.evaluation.autoencoders.frechet import FeatureNetwork, frechet_distance

CPU = torch.device("cpu")


def by_scipy(a: np.ndarray, b: np.ndarray) -> float:
    """As pytorch-fid's calculate_frechet_distance has it."""
    first, second = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    shift = a.mean(axis=0) - b.mean(axis=0)
    return float(shift @ shift + np.trace(first + second - 2 * sqrtm(first @ second).real))


@pytest.mark.parametrize(("of_a", "of_b"), [(50, 40), (50, 7), (4, 30)])
def test_it_is_scipys_with_many_and_with_few_samples(of_a: int, of_b: int) -> None:
    generator = np.random.default_rng(0)
    a = generator.normal(size=(of_a, 6)) @ generator.normal(size=(6, 6))
    b = generator.normal(size=(of_b, 6)) + 0.5
    # with few samples the covariances are singular, and scipy's root is good to the root of its rounding only
    tolerance = 1e-9 if min(of_a, of_b) > 6 else 1e-6
    assert frechet_distance(a, b) == pytest.approx(by_scipy(a, b), rel=tolerance)


def test_it_is_the_closed_form_where_covariances_commute() -> None:
    # one axis: (m1 - m2)^2 + (s1 - s2)^2; axes of independent values add up
    generator = np.random.default_rng(1)
    base = generator.normal(size=(500, 3))
    base = (base - base.mean(axis=0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(base, rowvar=False))).T  # covariance 1
    means, scales = np.array([1.0, -2.0, 0.5]), np.array([2.0, 0.5, 1.5])
    expected = float((means**2).sum() + ((scales - 1) ** 2).sum())
    assert frechet_distance(base * scales + means, base) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(base, base) == pytest.approx(0.0, abs=1e-9)


class Means(torch.nn.Module):
    """Channel means; asks for features as the published files do."""

    def forward(self, x: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        found = x.float().flatten(2).mean(dim=2)
        return found if return_features else found.argmax(dim=1)


def scripted(path: Path, module: torch.nn.Module) -> Path:
    torch.jit.save(torch.jit.script(module), str(path))
    return path


def test_a_torchscript_file_gives_features_instead_of_classes(tmp_path: Path) -> None:
    network = FeatureNetwork(scripted(tmp_path / "f.pt", Means()), flag="--fid", device=CPU)
    frames = torch.arange(2 * 3 * 4, dtype=torch.uint8).view(2, 3, 2, 2)
    np.testing.assert_allclose(network(frames), frames.float().mean(dim=(2, 3)).numpy())


def test_files_that_give_no_features_are_refused(tmp_path: Path) -> None:
    class Joined(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.float().mean()[None]

    class Picky(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.float() @ torch.ones(5, 2)

    torch.save({"weight": torch.ones(2)}, tmp_path / "table.pt")
    for path in (tmp_path / "table.pt", tmp_path / "none.pt"):
        with pytest.raises(UserError, match=r"--fid .* is no TorchScript file; give one that takes levels"):
            FeatureNetwork(path, flag="--fid", device=CPU)
    frames = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    for module, said in ((Joined(), r"returns no \[n, features\] for 2 inputs"), (Picky(), r"does not take \[2, 3, 4, 4\]")):
        with pytest.raises(UserError, match=said):
            FeatureNetwork(scripted(tmp_path / "m.pt", module), flag="--fid", device=CPU)(frames)
