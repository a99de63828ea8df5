"""`megasora evaluate ae`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from megasora.cli.endings import Answer, file_errors, rank
from megasora.cli.progress import row_bar
from megasora.config.errors import UserError
from megasora.config.latent_statistics import keep_statistics, refuse_without_config

EXTRA = "evaluate"


@dataclass(frozen=True, kw_only=True)
class Args:
    """Autoencoders of clips: what comes back (PSNR, SSIM, LPIPS, FID, FVD), what it costs, what their latents are like, and a page of it.

    Finished clips are not done again, so the same command goes on. Exit code 1 when something was skipped.
    """

    weights: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="WEIGHTS")]
    """Autoencoders: folders, .safetensors files, or checkpoints of train-ae; several are compared."""
    clips: Path
    """A manifest (csv, parquet), a folder of clips, or one clip; a clip gives its first frames."""
    out: Path
    """Folder of the results: report.html, results.json, results.csv, and what is finished of every clip."""
    sizes: str = "256x256"
    """HEIGHTxWIDTH, separated by commas; clips are scaled to cover them and cut to the centre."""
    frames: str = "1,32"
    """Numbers of frames, separated by commas; each goes with each size. An autoencoder leaves out what only others take."""
    fps: float | None = None
    """Frames are taken so far apart that the rate is at most this; None takes every frame."""
    tiling: str = "whole"
    """whole, SIZE or SIZExFRAMES of tiles that overlap by a quarter, such as 256x32; 0 does not cut."""
    dtype: Literal["bf16", "fp16", "fp32"] = "fp32"
    """Number format of the autoencoder."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where it works; auto takes a GPU where there is one."""
    select: Literal["model", "ema"] = "model"
    """Which weights of checkpoints."""
    limit: int | None = None
    """The first so many clips only."""
    lpips: Path | None = None
    """Folder with LPIPS' weights, as for evaluate clips; AlexNet's are the published measure."""
    fid: Path | None = None
    """TorchScript file that gives features of frames (uint8 [n, 3, h, w]): FID, such as of inception-2015-12-05.pt."""
    fvd: Path | None = None
    """TorchScript file that gives features of clips (levels [n, 3, t, h, w]): FVD, such as of i3d_torchscript.pt."""
    shown: int = 8
    """Clips of each shape whose pictures are on the page: half the worst, half the best."""
    write_config: bool = False
    """Write scaling_factor and the latents' mean and deviation into config.json of the folders of WEIGHTS."""
    json: bool = False
    """Print JSON."""


def run(args: Args) -> Answer | None:
    """Measure, and write the report."""
    if not args.weights:
        raise UserError("evaluate ae needs at least one WEIGHTS: an autoencoder's folder, file, or checkpoint of train-ae")
    if args.shown < 0 or (args.fps is not None and args.fps <= 0):
        raise UserError("--shown is 0 or more and --fps above 0")
    settings = _settings(args)
    for path in args.weights if args.write_config else ():
        refuse_without_config(path)  # before the slow imports
    from megasora.evaluation.autoencoders.report import write_report
    from megasora.evaluation.autoencoders.run import evaluate_autoencoders
    from megasora.evaluation.autoencoders.summary import statistics_to_keep, summarise_evaluation
    from megasora.evaluation.autoencoders.table import render

    with file_errors(f"run the same command again and {args.out} goes on"):
        with row_bar("clips") as bar:
            found = evaluate_autoencoders(settings, on_clip=bar.update if rank() == 0 else None)
        if found is None:
            return None
        results = summarise_evaluation(found)
        report = write_report(results)
        for about in results.about if args.write_config else ():
            keep_statistics(about.subject.path, statistics_to_keep(about))
    data: dict[str, Any] = {**results.as_dict(), "report": {name: str(path) for name, path in report.items()}}

    def show() -> None:
        render(results)
        for about in results.about if args.write_config else ():
            print(f"written into {about.subject.path / 'config.json'}")
        print(report["page"])

    return Answer(data=data, show=show, exit_code=1 if results.skipped else 0)


def _settings(args: Args) -> Any:
    from megasora.evaluation.autoencoders.settings import EvaluationSettings, cutting_of, shapes_of

    return EvaluationSettings(
        weights=args.weights,
        clips=args.clips,
        out=args.out,
        shapes=shapes_of(args.sizes, args.frames),
        fps=args.fps,
        cutting=cutting_of(args.tiling),
        dtype=args.dtype,
        device=args.device,
        limit=args.limit,
        select=args.select,
        lpips=args.lpips,
        fid=args.fid,
        fvd=args.fvd,
        shown=args.shown,
    )
