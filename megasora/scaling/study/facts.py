"""With what a study was measured, for the heads of its reports."""

from __future__ import annotations

from megasora.scaling.study.results import Results


def facts(results: Results) -> list[str]:
    """With what it was measured, a line each."""
    machine = results.machine
    gpus = f"{len(machine['gpus'])} x {machine['gpus'][0]}, " if machine.get("gpus") else ""
    memory = f"{machine.get('memory_bytes', 0) / 1e9:.0f} GB"
    versions = ", ".join(f"{name} {version}" for name, version in results.versions.items())
    grid = results.grid
    return [
        f"- command: `{results.command}`",
        f"- measured: {results.created}, commit {results.commit or 'unknown'}",
        f"- machine: {gpus}{machine.get('cores')} cores of {machine.get('cpu')}, {memory}",
        f"- versions: {versions}",
        f"- steps: {grid.get('steps')} a run, the first {grid.get('warmup_steps')} not counted, {grid.get('repeats')} repeats in "
        "orders of their own",
    ]
