"""One cuDNN in a process: torch's own, also for Transformer Engine.

torch loads the cuDNN of its wheel. Transformer Engine looks for one by itself (transformer_engine/common/__init__.py,
_load_cuda_library_from_system) and takes the system's before the wheel's, so on a machine with both (NVIDIA's cudnn-devel images) a
process holds two, whose parts do not fit each other: attention then fails with CUDNN_STATUS_SUBLIBRARY_LOADING_FAILED (seen with 9.14
beside 9.19 on an H100, 2026-11-27). It imports neither.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, MutableMapping
from importlib.util import find_spec
from pathlib import Path

NAMED_BY = ("CUDNN_HOME", "CUDNN_PATH")
"""Environment variables by which Transformer Engine is told where cuDNN is."""
MAPS = Path("/proc/self/maps")


def of_torchs_wheel() -> Path | None:
    """Folder of the cuDNN that torch's CUDA wheels depend on (nvidia-cudnn), if it is installed."""
    try:
        spec = find_spec("nvidia.cudnn")
    except ModuleNotFoundError:
        return None
    folders = (spec.submodule_search_locations or []) if spec else []
    return next((folder for folder in map(Path, folders) if any((folder / "lib").glob("libcudnn.so*"))), None)


def prefer_torchs(environment: MutableMapping[str, str] = os.environ) -> None:
    """Point Transformer Engine at torch's cuDNN, unless the user named one; it acts where Transformer Engine is imported later."""
    if any(name in environment for name in NAMED_BY):
        return
    if (folder := of_torchs_wheel()) is not None:
        environment[NAMED_BY[0]] = str(folder)


def loaded(maps: Iterable[str] | None = None) -> list[str]:
    """Files of the main library of every cuDNN that this process holds; more than one is too many.

    Args:
        maps: lines of /proc/self/maps; None reads them (and finds none where there is no such file).
    """
    if maps is None:
        maps = MAPS.read_text().splitlines() if MAPS.exists() else []
    files = (line.split(maxsplit=5)[-1] for line in maps)
    return sorted({os.path.realpath(file) for file in files if re.search(r"/libcudnn\.so", file)})
