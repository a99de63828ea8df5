"""`megasora evaluate clips`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from megasora.cli.endings import Answer, file_errors
from megasora.cli.progress import row_bar
from megasora.config.errors import UserError

EXTRA = "evaluate"


@dataclass(frozen=True, kw_only=True)
class Args:
    """Two folders of clips with equal names: PSNR, SSIM and LPIPS, and a page to vote on. Exit code 1 when a clip was skipped."""

    a: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="A")]
    """Folder of clips or pictures."""
    b: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="B")]
    """Folder with clips of the same names."""
    measures: tuple[Literal["psnr", "ssim", "lpips"], ...] = ("psnr", "ssim")
    """What is measured; none for a page alone. --lpips adds lpips."""
    lpips: Path | None = None
    """Folder with LPIPS' weights: torchvision's AlexNet or VGG16, and lpips/weights/v0.1's lin layers."""
    device: str = "cpu"
    """Where LPIPS is computed, such as cuda."""
    csv: Path | None = None
    """Write a row per clip."""
    page: Path | None = None
    """Write a folder with a page that asks which clip is better; open its index.html in a browser."""
    names: tuple[str, str] | None = None
    """What the votes call A and B; None takes the folders' names."""
    seed: int = 0
    """Of the bootstrap and of the page's orders."""
    json: bool = False
    """Print JSON."""


def run(args: Args) -> Answer:
    """The measures, the csv and the page."""
    from megasora.evaluation import fidelity
    from megasora.evaluation.page import write_page
    from megasora.models.lpips import load_lpips

    if not args.measures and args.page is None and args.lpips is None:
        raise UserError("nothing to do: name --measures, or a folder for --page")
    if "lpips" in args.measures and args.lpips is None:
        raise UserError("--measures lpips needs --lpips DIR: torchvision's AlexNet or VGG16 and the lin layers of lpips/weights/v0.1")
    measures = tuple(dict.fromkeys((*args.measures, *(("lpips",) if args.lpips else ()))))
    with file_errors(), row_bar("clips") as bar:
        weights = None if args.lpips is None else load_lpips(args.lpips).to(args.device)
        pairs, skipped = fidelity.pair_up(args.a, args.b, smallest=fidelity.smallest_side(measures, weights))
        found = fidelity.compare_pairs(
            pairs,
            skipped,
            measures=measures,
            lpips=weights,
            device=args.device,
            on_clip=lambda done, total: bar.update(done, total, 0),
        )
        if args.csv is not None:
            fidelity.write_csv(args.csv, found.clips)
        page = None
        if args.page is not None:
            compared = {clip.name for clip in found.clips}
            names = args.names or (args.a.resolve().name, args.b.resolve().name)
            page = write_page(args.page, [pair for pair in pairs if pair.name in compared], names=names, seed=args.seed)
    data: dict[str, Any] = {**found.as_dict(seed=args.seed), "csv": _text(args.csv), "page": _text(page)}

    def show() -> None:
        fidelity.render(found, seed=args.seed)
        for path in (args.csv, page):
            if path is not None:
                print(path)

    return Answer(data=data, show=show, exit_code=1 if found.skipped else 0)


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)
