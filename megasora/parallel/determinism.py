"""torch's deterministic algorithms, and what CUDA needs for them."""

from __future__ import annotations

import os

import torch

from megasora.config.errors import UserError

CUBLAS_WORKSPACES = (":4096:8", ":16:8")
"""Values of CUBLAS_WORKSPACE_CONFIG under which cuBLAS repeats its bits (cuBLAS documentation, results reproducibility)."""


def use_deterministic_algorithms(device: torch.device) -> None:
    """Make torch refuse what would differ from run to run.

    Raises:
        UserError: on CUDA without cuBLAS's setting, which torch would notice only at the first product of the first step.
    """
    if device.type == "cuda" and os.environ.get("CUBLAS_WORKSPACE_CONFIG") not in CUBLAS_WORKSPACES:
        raise UserError(f"train.deterministic on CUDA needs CUBLAS_WORKSPACE_CONFIG={CUBLAS_WORKSPACES[0]}; export it in the sbatch file")
    torch.use_deterministic_algorithms(True)
