"""`megasora doctor`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megasora.cli.endings import Answer, lines
from megasora.config.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Args:
    """What is installed, and what each missing part would bring; or, with --run, why a run ended."""

    run: Path | None = None
    """Folder of a run: explain its last exit, what was saved, and where its time went."""
    json: bool = False
    """Print JSON."""


def run(args: Args) -> Answer:
    """One row a part; or the last exit of a run."""
    if args.run is not None:
        return _explain(args.run)
    rows = [*_packages(), _cuda()]
    return Answer(data=rows, show=lambda: _show(rows))


def _explain(run_dir: Path) -> Answer:
    if not run_dir.is_dir():
        raise UserError(f"--run {run_dir}: no such folder; a run's folder is its --run_dir, runs/RECIPE without one")
    from megasora.checkpoint.store import complete_checkpoints
    from megasora.recovery.report import examine, report_lines

    saved = complete_checkpoints(run_dir / "checkpoints")
    report = examine(run_dir, saved_step=saved[-1].step if saved else None)
    return Answer(data=report.data(), show=lines(report_lines(report, run_dir=run_dir)))


def _show(rows: list[dict[str, str]]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("part", "state", "brings")
    for row in rows:
        table.add_row(*(escape(row[column]) for column in ("part", "state", "brings")))
    Console().print(table)


def _packages() -> list[dict[str, str]]:
    from importlib.metadata import PackageNotFoundError, version

    parts = (
        ("torch", "tensors", "pip install torch"),
        ("megatron-core", "tensor, pipeline and data parallelism", "pip install megatron-core==0.16.1"),
        ("transformer-engine", "FP8 and fused layers on CUDA", 'pip install "megasora[gpu]"'),
        ("flash-attn", "variable-length attention on CUDA", 'pip install "megasora[flash]"'),
        (
            "apex",
            "optional: FusedAdam on CUDA where Transformer Engine is missing",
            "not needed; github.com/NVIDIA/apex, built with --cuda_ext",
        ),
        ("nvidia-dali-cuda130", "video decoding on the GPU", 'pip install "megasora[data]"'),
        ("av", "video decoding on the CPU, mp4 output", "pip install av"),
        ("duckdb", "data filter and report, tables of clips", 'pip install "megasora[data]"'),
        ("pebble", "killable workers of data probe, shots and score", 'pip install "megasora[data]"'),
        ("scenedetect-headless", "scene cuts", 'pip install "megasora[data]"'),
        ("opencv-python-headless", "blur and light scores", 'pip install "megasora[data]"'),
        ("rapidocr", "text in clips", 'pip install "megasora[data]"'),
        ("pdqhash", "hashes of frames", 'pip install "megasora[data]"'),
        ("faiss-cpu", "near-duplicates", 'pip install "megasora[data]"'),
        ("ray", "data probe, shots and score on a cluster", 'pip install "megasora[ray]"'),
        ("gradio", "the page of serve", 'pip install "megasora[serve]"'),
        ("scikit-image", "SSIM of evaluate clips", 'pip install "megasora[evaluate]"'),
        ("diffusers", "the HunyuanVideo autoencoder", "pip install diffusers"),
        ("transformers", "T5 and CLIP", "pip install transformers"),
        ("tensorboard", "curves", "pip install tensorboard"),
    )
    rows = []
    for name, brings, cure in parts:
        try:
            rows.append({"part": name, "state": version(name), "brings": brings})
        except PackageNotFoundError:
            rows.append({"part": name, "state": f"missing: {cure}", "brings": brings})
    return rows


def _cuda() -> dict[str, str]:
    import torch

    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    return {"part": "CUDA devices", "state": ", ".join(names) or "none: the CPU backend runs", "brings": "speed, FP8, NVDEC"}
