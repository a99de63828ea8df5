"""The thin twins and their name tables."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

TOOLS = Path(__file__).parents[2] / "tools" / "checkpoint_convert"


def test_the_name_tables_are_those_of_the_rules() -> None:
    printed = subprocess.run([sys.executable, str(TOOLS / "name_tables.py")], check=True, capture_output=True, text=True).stdout
    assert printed.strip() in (TOOLS / "README.md").read_text()


def test_the_twins_run() -> None:
    for name in ("convert", "inspect", "compare"):
        shown = subprocess.run([sys.executable, str(TOOLS / f"{name}_weights.py"), "--help"], capture_output=True, text=True, check=False)
        assert shown.returncode == 0
        assert f"usage: megasora {name}" in shown.stdout
