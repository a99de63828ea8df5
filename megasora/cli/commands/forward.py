"""`megasora forward`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Args:
    """One forward pass of weights on inputs, in any layout (the parity tool)."""

    weights: Path
    """Weights of any format."""
    inputs: Path
    """in.safetensors: img, img_ids, txt, txt_ids, timesteps, y_vec, guidance and cond where the model has them."""
    output: Path
    """out.safetensors: pred [B, N, C], fp32."""
    tp: int = 1
    pp: int = 1
    cp: int = 1
    vp: int | None = None
    grads: Path | None = None
    """Write the gradient of mean(pred^2) for every parameter under its release key."""
    axes_dim: tuple[int, int, int] | None = None
    """Rotary dims per axis; None takes K/8, 7K/16, 7K/16."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    context_parallel_backend: Literal["auto", "ulysses", "ring", "ulysses_ring"] = "auto"


def run(args: Args) -> None:
    """Read, run, write."""
    from megasora.inference.forward import run_forward

    run_forward(**vars(args))
