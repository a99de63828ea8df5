"""`megasora serve`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from megasora.cli.recipe_arguments import RecipeArgs, config_defaults
from megasora.config.errors import UserError
from megasora.inference.refine_settings import RefineConfig

EXTRA = "serve"


@dataclass(frozen=True, kw_only=True)
class Args(RecipeArgs):
    """A page in the browser that draws what `megasora sample` draws, one clip at a time, on one GPU or the CPU.

    It listens on this machine only, unless --host says otherwise; whoever reaches it may draw. It loads nothing from a network.
    """

    weights: Path
    """Weights of any format, or a training checkpoint."""
    output: Path = Path("clips")
    """Folder where clips and their records are kept."""
    select: Literal["model", "ema"] = "model"
    """Which weights of a training checkpoint."""
    offload: Literal["none", "encoders", "model"] = "none"
    """What waits in host memory while it is not needed: encoders (text encoders are dropped, the autoencoder waits); model (that too)."""
    refine: RefineConfig = field(default_factory=RefineConfig)
    """Let a language model rewrite the prompts; off without --refine.url or --refine.function."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 lets other machines in."""
    port: int = 7860
    """Port to listen on."""
    share: bool = False
    """Also give the page a public address through gradio's servers, which sees and carries all traffic."""
    open: bool = False
    """Open it in a browser here."""


def defaults(words: Sequence[str]) -> Mapping[str, Any]:
    """The recipe's settings."""
    return config_defaults(words, command="serve")


def run(args: Args) -> None:
    """Serve until interrupted."""
    ranks = int(os.environ.get("WORLD_SIZE", os.environ.get("SLURM_NTASKS", "1")))
    if ranks > 1:
        raise UserError(f"serve draws on one rank, and {ranks} were started: start it without torchrun, or use megasora sample --table")
    from megasora.inference.serving.page import build_page, import_gradio, open_page

    import_gradio()  # says which extra is missing before anything is loaded
    from megasora.inference.chat import asker
    from megasora.inference.sampler import Sampler
    from megasora.inference.serving.studio import Studio
    from megasora.inference.serving.turns import Turns

    args.refine.check()
    if args.refine.on:
        asker(args.refine)
    sampler = Sampler.load(args.weights, recipe=args.config, select=args.select, offload=args.offload)
    turns = Turns()
    page = build_page(Studio(sampler, folder=args.output, refine=args.refine), turns=turns, title=f"megasora: {args.weights.name}")
    address = open_page(page, host=args.host, port=args.port, share=args.share, in_browser=args.open, folder=args.output)
    print(f"megasora serve: {address}  (clips in {args.output}; Ctrl-C ends it)", flush=True)
    try:
        turns.work()
    finally:
        page.close(verbose=False)
