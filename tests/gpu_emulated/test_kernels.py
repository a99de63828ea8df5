"""Triton kernels in Triton's interpreter against torch's own operations, and compiled for Hopper without one.

The expected values are those of `composed` in fp64, which `test_maths` checks by hand and against finite differences. fp32: 1e-6 of the
largest value (eight roundings of 2^-24 and a bit); bf16: every result is rounded once, 2^-9 of its value, some after a tensor that was
rounded too: 2^-7.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megasora.models.mmdit.kernels.composed import COMPOSED
from megasora.models.mmdit.kernels.contract import Kernels
from megasora.parallel.pack import Rows, Runs
from tests.gpu_emulated.emulation import TE_FOLDER
from tests.pool import RankPool

PACKS = {
    "one sample": [0] * 7,
    "several, over a tile's end, one missing": [0] * 65 + [2] * 3 + [3] + [0] * 2,
    "one token": [0],
}
EPS = 1e-6


def draw(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    """Values that bf16 holds exactly, so that every dtype starts from the same numbers."""
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()
    return values.to(dtype)


def modulation(kernels: Kernels, samples: list[int], hidden: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Everything the three modulation operations give, forward and backward."""
    n = max(samples) + 1
    runs = Runs.of(torch.tensor(samples), num_samples=n)
    x, branch, grad, passed = (draw(len(samples), hidden, seed=seed, dtype=dtype) for seed in range(4))
    shift, scale, gate = (draw(n, hidden, seed=seed, dtype=dtype) / 2 for seed in range(4, 7))
    result: dict[str, Tensor] = {}
    normed = kernels.norm_modulate(x, shift=shift, scale=scale, runs=runs, eps=EPS)
    result |= {"norm": normed.out}
    for name, through in (("norm backward", None), ("norm backward with a residual", passed)):
        grads = kernels.norm_modulate_backward(grad, passed=through, x=x, mean=normed.mean, rstd=normed.rstd, scale=scale, runs=runs)
        result |= {f"{name} {field}": value for field, value in grads._asdict().items()}
    result["gated"] = kernels.gated_residual(x, gate=gate, branch=branch, runs=runs)
    gated = kernels.gated_residual_backward(grad, gate=gate, branch=branch, runs=runs)
    result |= {f"gated backward {field}": value for field, value in gated._asdict().items()}
    tokens, normed = kernels.gated_norm_modulate(x, gate=gate, branch=branch, shift=shift, scale=scale, runs=runs, eps=EPS)
    result |= {"gated norm tokens": tokens, "gated norm": normed.out}
    both = kernels.gated_norm_modulate_backward(
        grad, passed=passed, tokens=tokens, branch=branch, mean=normed.mean, rstd=normed.rstd, gate=gate, scale=scale, runs=runs
    )
    result |= {f"gated norm backward {field}": value for part in both for field, value in part._asdict().items()}
    return result


def heads(kernels: Kernels, *, groups: int, indexed: bool, mlp_width: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Heads on their way in and out, of one stream of 37 tokens in a buffer of 40; what no stream owns stays as it was."""
    tokens, length, num_heads, head_dim = 37, 40, 4, 12
    index = torch.randperm(length, generator=torch.Generator().manual_seed(0))[:tokens] if indexed else None
    rows = Rows(count=tokens, start=0 if indexed else 2, index=index)
    wide = draw(tokens, 3 * num_heads * head_dim + mlp_width, seed=1, dtype=dtype)
    qkv = wide[:, : 3 * num_heads * head_dim].unflatten(1, (3, num_heads, head_dim))
    mlp = wide[:, 3 * num_heads * head_dim :] if mlp_width else None
    weights = (1 + draw(head_dim, seed=2, dtype=dtype) / 4, 1 + draw(head_dim, seed=3, dtype=dtype) / 4)
    angle = draw(tokens, 1, head_dim // 2, seed=4, dtype=torch.float64)
    tables = [table.to(torch.promote_types(dtype, torch.float32)) for table in (angle.cos(), angle.sin())]
    shape = (groups, length, num_heads // groups, head_dim)
    out = tuple(torch.zeros(shape, dtype=dtype) for _ in range(3))
    kernels.place_heads(qkv, weights=weights, cos=tables[0], sin=tables[1], rows=rows, eps=EPS, out=out)  # type: ignore[arg-type]
    result = dict(zip(("q", "k", "v"), out, strict=True))
    grads = tuple(draw(*shape, seed=seed, dtype=dtype) for seed in (5, 6, 7))
    of_wide = torch.zeros_like(wide)
    of_qkv = of_wide[:, : 3 * num_heads * head_dim].unflatten(1, (3, num_heads, head_dim))
    of_weights = kernels.place_heads_backward(
        grads,
        qkv=qkv,
        weights=weights,
        cos=tables[0],
        sin=tables[1],
        rows=rows,
        eps=EPS,
        out=of_qkv,  # type: ignore[arg-type]
    )
    result |= {"q weight": of_weights[0], "k weight": of_weights[1]}
    attended = draw(*shape, seed=8, dtype=dtype)
    result["collected"] = kernels.collect_heads(attended, mlp=mlp, rows=rows)
    of_attended = torch.zeros_like(attended)
    grad = draw(*result["collected"].shape, seed=9, dtype=dtype)
    of_mlp = of_wide[:, 3 * num_heads * head_dim :] if mlp_width else None
    kernels.collect_heads_backward(grad, mlp=mlp, rows=rows, attended_out=of_attended, mlp_out=of_mlp)
    return result | {"attended": of_attended, "projections": of_wide}


def fused_modulation(rank: int, samples: list[int], hidden: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """`modulation` by the Triton kernels, where Triton and its interpreter are."""
    from megasora.models.mmdit.kernels.fused import FUSED

    return modulation(FUSED, samples, hidden, dtype)


def fused_heads(rank: int, arguments: dict[str, Any]) -> dict[str, Tensor]:
    """`heads` by the Triton kernels."""
    from megasora.models.mmdit.kernels.fused import FUSED

    return heads(FUSED, **arguments)


def assert_close(ours: dict[str, Tensor], exact: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Within the dtype's rounding of values and of what is summed."""
    assert ours.keys() == exact.keys()
    for name, value in exact.items():
        assert ours[name].dtype == dtype, name
        unit = 1e-6 if dtype == torch.float32 else 2**-7
        worst, largest = float((ours[name].double() - value).abs().max()), float(value.abs().max())
        assert worst <= unit * largest, f"{name}: off by {worst}, the largest value is {largest}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("samples", PACKS.values(), ids=PACKS)
def test_modulation_in_one_pass_gives_what_torch_gives(gpus: RankPool, samples: list[int], dtype: torch.dtype) -> None:
    hidden = 96  # no power of two: the last columns of a block are masked
    (ours,) = gpus.run(1, fused_modulation, samples, hidden, dtype)
    assert_close(ours, modulation(COMPOSED, samples, hidden, torch.float64), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "shape",
    [
        {"groups": 1, "indexed": False, "mlp_width": 0},
        {"groups": 1, "indexed": True, "mlp_width": 40},
        {"groups": 2, "indexed": True, "mlp_width": 0},
        {"groups": 4, "indexed": False, "mlp_width": 40},
    ],
    ids=str,
)
def test_heads_in_one_pass_are_those_of_torch(gpus: RankPool, shape: dict[str, Any], dtype: torch.dtype) -> None:
    (ours,) = gpus.run(1, fused_heads, {**shape, "dtype": dtype})
    assert_close(ours, heads(COMPOSED, **shape, dtype=torch.float64), dtype)


def test_the_kernels_compile_for_hopper_within_its_registers(tmp_path: Path) -> None:
    # a process of its own: what the interpreter runs is not what the compiler takes. ptxas comes with Triton and needs no GPU
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TE_FOLDER), os.getcwd()]), "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "tests.gpu_emulated.compile_kernels"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads(done.stdout)
    assert {row["kernel"] for row in rows} == {"_forward", "_backward", "_gated", "_gated_backward", "_place", "_place_backward", "_collect", "_collect_backward"}  # fmt: skip  # noqa: E501
    for row in rows:
        assert row["stack"] == 0, f"{row} spills registers"
        # 65,536 registers of a multiprocessor must hold at least one program
        assert row["registers"] * 32 * row["warps"] <= 65_536, row
        assert row["vector_loads"] or row["copies_ahead"], f"{row} loads word by word"
