"""`make demo-ae`: train a small video DC-AE on real clips, on two CPU ranks; ends with exit code 0 only when every step held.

The clips of `make demo` -> train-ae tiny_ae as DP2, a discriminator from half-way -> PSNR of held-out clips rose and did not fall again ->
the moving average as an autoencoder's folder -> a held-out clip, before and after, side by side as mp4.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path

import torch

from megasora.checkpoint.autoencoder import open_autoencoder
from megasora.checkpoint.autoencoder_export import export_autoencoder
from megasora.config.autoencoder_run import AutoencoderInitConfig
from megasora.config.errors import UserError
from megasora.data.decoding.contract import normalise
from megasora.data.decoding.pyav import PyAVDecoder
from megasora.data.decoding.writer import write_video
from megasora.data.manifest import read_manifest
from megasora.data.plan import request_of
from megasora.demo import cut_clips, launch, say
from megasora.recipes import get_autoencoder
from megasora.training.autoencoder.feed import plan_training_clips
from megasora.training.autoencoder.network import new_network
from megasora.training.autoencoder.reconstruct import reconstructed

RANKS = 2
LEAST_RISE_DB = 6.0
"""Of held-out PSNR over the run."""
MOST_FALL_DB = 1.0
"""Below its best so far, at any time after the discriminator has begun: a generator that collapses falls further."""
ENLARGED = 6
"""Times that the pictures of the mp4 are enlarged."""


def main() -> None:
    """Run everything under ./demo_ae_run."""
    started = time.time()
    root = Path("demo_ae_run").absolute()
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    try:
        say("1. clips")
        manifest, held_out = cut_clips(root / "clips")
        recipe = get_autoencoder("tiny_ae")
        say(f"2. train tiny_ae on {RANKS} ranks, {recipe.train.steps} steps, a discriminator from step {recipe.discriminator.start_step}")
        run_dir = root / "run"
        data = ["--data.manifest", str(manifest), "--data.eval_manifest", str(held_out)]
        launch(["train-ae", "tiny_ae", "--run_dir", str(run_dir), "--device", "cpu", *data], ranks=RANKS)
        check_curve(run_dir, discriminator_from=recipe.discriminator.start_step)
        say("3. the moving average as a folder")
        folder = root / "dc_ae"
        source = open_autoencoder(run_dir / "checkpoints" / f"step_{recipe.train.steps:08d}", select="ema")
        for line in export_autoencoder(source, folder, target_format="dc-ae", prove=True).lines:
            print(line)
        say("4. a held-out clip before and after")
        clip = side_by_side(held_out, folder, root / "before_and_after.mp4")
    except UserError as error:
        print(f"demo-ae: error: {error}", file=sys.stderr)
        sys.exit(2)
    trained = recipe.data
    shapes = f"--sizes {trained.resolution.removesuffix('px')} --frames 1,{max(trained.frame_counts)} --fps {trained.target_fps:g}"
    print(
        f"\ndone in {time.time() - started:.0f} s\n  curves:      tensorboard --logdir {run_dir / 'tensorboard'}\n"
        f"  clip:        {clip} (the clip, from random weights, from trained ones)\n  autoencoder: {folder}\n"
        f"  measure it:  megasora evaluate ae {folder} --clips {held_out} {shapes} --out {root / 'measured'}"
    )


def check_curve(run_dir: Path, *, discriminator_from: int) -> None:
    """PSNR of held-out clips rose, and stayed up when the discriminator came in.

    Raises:
        UserError: it did not.
    """
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    events = [event for record in records for event in record["events"] if event["event"] == "reconstruct"]
    curve = {event["step"]: event["psnr"] for event in events}
    print("held-out PSNR by step: " + ", ".join(f"{step}: {psnr:.2f}" for step, psnr in curve.items()) + " dB")
    start, end = curve[min(curve)], curve[max(curve)]
    if end < start + LEAST_RISE_DB:
        raise UserError(f"held-out PSNR rose from {start:.2f} to {end:.2f} dB, less than {LEAST_RISE_DB}")
    best = 0.0
    for step, psnr in sorted(curve.items()):
        if step > discriminator_from and psnr < best - MOST_FALL_DB:
            raise UserError(f"held-out PSNR fell from {best:.2f} to {psnr:.2f} dB at step {step}, with the discriminator")
        best = max(best, psnr)
    acted = [record for record in records if record["discriminator"] is not None]
    if not acted or acted[0]["step"] != discriminator_from + 1:
        raise UserError(f"the discriminator did not begin after step {discriminator_from}")
    print(f"discriminator's loss {acted[0]['discriminator']:.3f} at step {acted[0]['step']}, {acted[-1]['discriminator']:.3f} at the end")


@torch.no_grad()
def side_by_side(held_out: Path, folder: Path, path: Path) -> Path:
    """An mp4 of every held-out clip, one after the other: the clip, its reconstruction by random weights, and by those of a folder."""
    config = get_autoencoder("tiny_ae")
    before = new_network(config.autoencoder, weights=None, load=True, seed=AutoencoderInitConfig().seed)
    after = new_network(config.autoencoder, weights=str(folder), load=True, seed=0)
    clips, _ = plan_training_clips(read_manifest(str(held_out)).clips, config)
    decoder = PyAVDecoder()
    shown = [decoder.pixels(request_of(clip)) for clip in clips]
    rows = [torch.cat([normalise(levels), *(reconstructed(network, levels)[1] for network in (before, after))], dim=3) for levels in shown]
    whole = torch.cat(rows, dim=1).repeat_interleave(ENLARGED, 2).repeat_interleave(ENLARGED, 3)
    write_video(path, whole, fps=6.0)
    return path


if __name__ == "__main__":
    main()
