"""Where and with what a study was measured."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import megasora

PACKAGES = ("torch", "megatron-core", "transformer-engine", "flash-attn", "numpy")


def describe_machine() -> dict[str, Any]:
    """This machine: host, CPU, cores, memory, GPUs. Of a study through Slurm it is the one that submits."""
    import torch

    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return {
        "host": platform.node(),
        "system": platform.platform(),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpus": gpus,
    }


def versions() -> dict[str, str]:
    """Of Python, megasora and what it computes with; what is not installed is left out."""
    found = {"python": platform.python_version(), "megasora": megasora.__version__}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def git_commit() -> str | None:
    """Commit of the checkout that megasora runs from, with + where files have changed; None outside one."""
    folder = str(Path(megasora.__file__).parent)
    try:
        commit = subprocess.run(["git", "-C", folder, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=False)
        dirty = subprocess.run(["git", "-C", folder, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    if commit.returncode:
        return None
    return commit.stdout.strip() + ("+" if dirty.stdout.strip() else "")


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
