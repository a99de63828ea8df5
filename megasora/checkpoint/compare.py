"""Two sets of weights, tensor by tensor: same bits, or how far apart. Across formats by canonical names; memory stays bounded."""

from __future__ import annotations

import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megasora.checkpoint.megatron_io import is_megatron_checkpoint
from megasora.checkpoint.safetensors_io import SafetensorsReader
from megasora.checkpoint.source import Select, WeightSource, open_source
from megasora.checkpoint.tensors import Rows, TensorInfo, TensorReader, as_torch
from megasora.config.errors import UserError

CHUNK_BYTES = 32 << 20
"""Bytes of a tensor that are widened to fp64 at once."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One tensor in both."""

    key: str
    same_bits: bool
    max_abs: float
    """Largest |a - b|; infinite where exactly one is not a number, or shapes differ."""
    max_rel: float
    """max_abs over the largest |b|."""
    note: str = ""

    def within(self, rtol: float | None) -> bool:
        """Whether it counts as equal."""
        return self.same_bits or (rtol is not None and self.max_rel <= rtol)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All tensors, the most different first."""

    a: str
    b: str
    by: str
    """Whose names the tensors have."""
    rtol: float | None
    tensors: tuple[Difference, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]

    @property
    def equal(self) -> bool:
        """Nothing is missing and every tensor counts as equal."""
        return not self.only_a and not self.only_b and all(tensor.within(self.rtol) for tensor in self.tensors)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "a": self.a,
            "b": self.b,
            "by": self.by,
            "equal": self.equal,
            "rtol": self.rtol,
            "tensors": [
                {
                    "key": item.key,
                    "hash_equal": item.same_bits,
                    "max_abs": item.max_abs if math.isfinite(item.max_abs) else None,
                    "max_rel": item.max_rel if math.isfinite(item.max_rel) else None,
                    "note": item.note,
                }
                for item in self.tensors
            ],
            "only_a": list(self.only_a),
            "only_b": list(self.only_b),
        }


def compare(a: Path, b: Path, *, rtol: float | None = None, select: Select = "model", workers: int | None = None) -> Comparison:
    """Compare two sets of weights.

    Raises:
        UserError: one cannot be opened, or they are of different kinds.
    """
    if rtol is not None and not rtol >= 0:
        raise UserError(f"--rtol {rtol} must be 0 or positive")
    one, other, by = _readers(a, b, select)
    keys = [key for key in one.infos if key in other.infos]
    infos_a, infos_b = one.infos, other.infos
    with ThreadPoolExecutor(workers or min(4, os.cpu_count() or 1)) as pool:
        tensors = list(pool.map(lambda key: _difference(key, one, other, infos_a[key], infos_b[key]), keys))
    if not keys:
        raise UserError(f"{a} and {b} have no tensor in common; megasora inspect says what each is")
    return Comparison(
        a=str(a),
        b=str(b),
        by=by,
        rtol=rtol,
        tensors=tuple(sorted(tensors, key=lambda item: (item.same_bits, -item.max_rel, item.key))),
        only_a=tuple(key for key in infos_a if key not in infos_b),
        only_b=tuple(key for key in infos_b if key not in infos_a),
    )


def _readers(a: Path, b: Path, select: Select) -> tuple[TensorReader, TensorReader, str]:
    """The tensors to compare: canonical ones of MMDiT weights in two formats, otherwise each file's own."""
    sources: list[WeightSource | None] = []
    for path in (a, b):
        checkpoint = is_megatron_checkpoint(path)
        try:
            sources.append(open_source(path, select=select if checkpoint else "model"))
        except UserError:
            if checkpoint or not path.exists():
                raise
            sources.append(None)
    one, other = sources
    if one is None or other is None:
        plain = [SafetensorsReader(path) if source is None else source.reader for path, source in zip((a, b), sources, strict=True)]
        return plain[0], plain[1], "their own names"
    if one.fmt == other.fmt:
        return one.reader, other.reader, f"{one.fmt} names"
    return one.canonical, other.canonical, "release names"


def _difference(key: str, one: TensorReader, other: TensorReader, a: TensorInfo, b: TensorInfo) -> Difference:
    if a.shape != b.shape:
        return Difference(key=key, same_bits=False, max_abs=math.inf, max_rel=math.inf, note=f"shapes {list(a.shape)} and {list(b.shape)}")
    rows_a, rows_b = one.rows(key), other.rows(key)
    note = "" if a.dtype == b.dtype else f"types {a.dtype} and {b.dtype}"
    if not note and np.array_equal(rows_a, rows_b):
        result = Difference(key=key, same_bits=True, max_abs=0.0, max_rel=0.0)
    else:
        gap, largest = _gap(rows_a, rows_b, a, b)
        relative = gap / largest if largest else (math.inf if gap else 0.0)
        result = Difference(key=key, same_bits=False, max_abs=gap, max_rel=relative, note=note)
    one.release(key)
    other.release(key)
    return result


def _gap(rows_a: Rows, rows_b: Rows, a: TensorInfo, b: TensorInfo) -> tuple[float, float]:
    """(largest |a - b|, largest |b|), chunk by chunk in fp64."""
    gap = largest = 0.0
    step = max(1, CHUNK_BYTES // max(1, a.row_bytes, b.row_bytes))
    for start in range(0, a.num_rows, step):
        x, y = (_wide(rows[start : start + step], info) for rows, info in ((rows_a, a), (rows_b, b)))
        lost = np.isnan(x) != np.isnan(y)
        with np.errstate(invalid="ignore", over="ignore"):
            difference = np.where(x == y, 0.0, np.abs(x - y))
        gap = max(gap, math.inf if lost.any() else float(np.nanmax(difference, initial=0.0)))
        largest = max(largest, float(np.nanmax(np.abs(y), initial=0.0)))
    return gap, largest


def _wide(rows: Rows, info: TensorInfo) -> NDArray[np.float64]:
    shape = (len(rows), *info.shape[1:])
    return as_torch(rows, TensorInfo(dtype=info.dtype, shape=shape)).double().numpy().reshape(-1)


def render(result: Comparison, *, top: int) -> None:
    """Print the most different tensors and the verdict."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    different = [tensor for tensor in result.tensors if not tensor.same_bits]
    if different:
        table = Table("tensor", "max |a-b|", "relative", "note", title=f"by {result.by}, the most different first")
        for tensor in different[: max(0, top)]:
            table.add_row(tensor.key, f"{tensor.max_abs:.3e}", f"{tensor.max_rel:.3e}", tensor.note)
        console.print(table)
    for name, keys in (("A", result.only_a), ("B", result.only_b)):
        if keys:
            console.print(f"only in {name}: {len(keys)} ({', '.join(keys[:3])})", highlight=False, markup=False, soft_wrap=True)
    same = len(result.tensors) - len(different)
    verdict = "equal" if result.equal else "different"
    allowed = "" if result.rtol is None else f" (rtol {result.rtol:g})"
    console.print(f"{verdict}{allowed}: {same} of {len(result.tensors)} tensors have the same bits", highlight=False)
