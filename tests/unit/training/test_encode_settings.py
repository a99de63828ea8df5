"""The command line reads the flags of `megasora data encode` without waiting for torch."""

from __future__ import annotations

import subprocess
import sys


def test_the_settings_of_encode_import_nothing_heavy() -> None:
    heavy = "{'torch', 'numpy', 'megasora.data', 'megasora.models'}"
    check = f"import sys, megasora.training.encode.settings; print(sorted({heavy} & sys.modules.keys()))"
    found = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
