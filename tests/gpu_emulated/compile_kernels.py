"""Compiles every Triton kernel for sm_90 at the sizes of the 11.9 B model and prints what ptxas says, as JSON. Needs Triton, not a GPU.

PYTHONPATH=.venv/te:. python -m tests.gpu_emulated.compile_kernels
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megasora.models.mmdit.kernels import operators, triton_heads, triton_norm

HOPPER = GPUTarget("cuda", 90, 32)
HIDDEN, HEAD_DIM = 3072, 128
POINTERS = {
    **dict.fromkeys(("mean", "rstd", "sums", "cos", "sin"), "*fp32"),
    "tiles": "*i32",
    "rows": "*i64",
}
"""All others point to bf16."""
WIDTHS = ("hidden", "width", "out_width", "half", "heads_width", "mlp_width", "mlp_stride", "out_stride", "head_size")
"""Multiples of sixteen, which Triton finds out at a call."""
COUNTS = ("num_tiles", "num_tokens", "heads", "groups", "length", "start", "per_group")


def cases() -> list[tuple[Any, dict[str, Any], int]]:
    """(kernel, constants, warps)."""
    result: list[tuple[Any, dict[str, Any], int]] = []
    row, column = triton_norm.row_options(HIDDEN), triton_norm.column_options(HIDDEN)
    row_warps, column_warps = row.pop("num_warps"), column.pop("num_warps")
    both = (False, True)
    result += [(triton_norm._forward, {"GATED": gated, **row}, row_warps) for gated in both]
    result += [(triton_norm._backward, {"GATED": gated, "PASSED": passed, **row}, row_warps) for gated in both for passed in both]
    result += [(kernel, column, column_warps) for kernel in (triton_norm._gated, triton_norm._gated_backward)]
    place = {"PAIRS": operators.PAIRS, "HALF": HEAD_DIM // 2}
    result += [(kernel, {"INDEXED": i, **place}, 4) for kernel in (triton_heads._place, triton_heads._place_backward) for i in both]
    collect = {"ROWS": triton_heads.ROWS, "COLUMNS": triton_heads.COLUMNS}
    for kernel in (triton_heads._collect, triton_heads._collect_backward):
        result += [(kernel, {"INDEXED": i, "MLP": m, **collect}, 4) for i in both for m in both]
    return result


def compiled(kernel: Any, constants: dict[str, Any], warps: int) -> dict[str, Any]:
    """What ptxas makes of a kernel."""
    kinds = {"eps": "fp32", **dict.fromkeys((*WIDTHS, *COUNTS), "i32"), **POINTERS, **dict.fromkeys(constants, "constexpr")}
    signature = {name: kinds.get(name, "*bf16") for name in kernel.arg_names}
    aligned = [number for number, name in enumerate(kernel.arg_names) if name in WIDTHS or signature[name].startswith("*")]
    hints = {(number,): [["tt.divisibility", 16]] for number in aligned}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=hints)
    assembly = triton.compile(source, target=HOPPER, options={"num_warps": warps}).asm
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(assembly["cubin"])
        file.flush()
        usage = subprocess.run([str(CUOBJDUMP), "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))  # type: ignore[index]
    return {
        "kernel": kernel.__name__,
        "constants": constants,
        "warps": warps,
        "registers": registers,
        "stack": stack,
        "vector_loads": assembly["ptx"].count("ld.global.v4"),
        "copies_ahead": assembly["ptx"].count("cp.async.c"),
    }


CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

if __name__ == "__main__":
    print(json.dumps([compiled(*case) for case in cases()]))
