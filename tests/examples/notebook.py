"""Runs the code cells of a notebook in one namespace, as a kernel does: `python -m tests.examples.notebook FILE`.

Jupyter is no dependency, so there is no kernel here. A cell's last expression is its result: printed as `[n] TYPE bytes of its PNG` where
it has one (`_repr_png_`, which Jupyter shows), else as `[n] repr`.
"""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path
from typing import Any


def run(path: Path) -> None:
    """Run all cells."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    for number, cell in enumerate(cell for cell in cells if cell["cell_type"] == "code"):
        tree = ast.parse("".join(cell["source"]), filename=f"cell {number}")
        last = ast.Expression(tree.body.pop().value) if tree.body and isinstance(tree.body[-1], ast.Expr) else None  # type: ignore[attr-defined]
        exec(compile(tree, f"cell {number}", "exec"), namespace)
        if last is not None:
            value = eval(compile(last, f"cell {number}", "eval"), namespace)
            shown = f"{type(value).__name__} {len(value._repr_png_())}" if hasattr(value, "_repr_png_") else repr(value)
            print(f"[{number}] {shown}", flush=True)


if __name__ == "__main__":
    run(Path(sys.argv[1]))
