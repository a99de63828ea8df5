"""Frechet distance of features (FID of frames, FVD of clips) from a network that the user gives; none is built here, none starts random.

Heusel et al. 2017 (arXiv 1706.08500), Unterthiner et al. 2018 (arXiv 1812.01717): |m1 - m2|^2 + Tr(S1 + S2 - 2 (S1 S2)^(1/2)).
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megasora.config.errors import UserError

Features = NDArray[np.float64]
ASKED = {"return_features": True, "rescale": True, "resize": True}
"""Arguments of the published files' forward, given where it has them: features instead of classes (NVlabs/stylegan2-ada-pytorch
inception-2015-12-05.pt, universome/stylegan-v i3d_torchscript.pt), levels scaled and pictures resized by the file itself."""


class FeatureNetwork:
    """Features by a TorchScript file.

    Args:
        path: the file. Frames are given as uint8 [n, 3, h, w], clips as fp32 levels 0 to 255 [n, 3, t, h, w]; it returns [n, features].
        flag: that named it, for the errors.
        device: where it works.

    Raises:
        UserError: no TorchScript.
    """

    def __init__(self, path: Path, *, flag: str, device: torch.device) -> None:
        self.path, self.flag, self.device = path, flag, device
        try:
            self.sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
            self._module = torch.jit.load(str(path), map_location=device).eval()
        except (OSError, RuntimeError, ValueError) as error:
            raise UserError(
                f"{flag} {path} is no TorchScript file; give one that takes levels and returns features, such as the published "
                "inception-2015-12-05.pt or i3d_torchscript.pt (a table of weights alone is not enough)"
            ) from error
        names = {argument.name for argument in self._module.forward.schema.arguments}
        self._asked = {name: value for name, value in ASKED.items() if name in names}

    @torch.no_grad()
    def __call__(self, levels: Tensor) -> NDArray[np.float32]:
        """[n, features] of a batch.

        Raises:
            UserError: it does not take it, or returns something else.
        """
        try:
            found = self._module(levels.to(self.device), **self._asked)
        except RuntimeError as error:
            what = str(error).strip().splitlines()[-1][:160]
            raise UserError(f"{self.flag} {self.path} does not take {list(levels.shape)}: {what}") from error
        if not isinstance(found, Tensor) or found.shape[0] != levels.shape[0]:
            raise UserError(f"{self.flag} {self.path} returns no [n, features] for {levels.shape[0]} inputs")
        features: NDArray[np.float32] = found.flatten(1).float().cpu().numpy()
        return features


def frechet_distance(a: Features, b: Features) -> float:
    """Between Gaussians of the means and covariances (over n - 1) of two sets of features [n, d], n at least 2, in fp64.

    The trace of (S1 S2)^(1/2) is the sum of the singular values of A B^T, where S1 = A^T A and S2 = B^T B: no root of a matrix is taken.
    """
    assert len(a) > 1 and len(b) > 1, "a covariance needs two samples"
    first, second = _factor(a), _factor(b)
    shift = a.mean(axis=0, dtype=np.float64) - b.mean(axis=0, dtype=np.float64)
    cross = np.linalg.svd(first @ second.T, compute_uv=False).sum()
    return float(shift @ shift + (first**2).sum() + (second**2).sum() - 2 * cross)


def _factor(features: Features) -> Features:
    """A with A^T A = covariance, of at most d rows."""
    centred = (features - features.mean(axis=0, dtype=np.float64)) / np.sqrt(len(features) - 1)
    return np.linalg.qr(centred).R if len(centred) > centred.shape[1] else centred
