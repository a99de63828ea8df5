"""Whole sampling runs against a plain loop over diffusers' and transformers' classes; ours are only the conversion and the noise."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import sentencepiece
import torch
from diffusers import AutoencoderKLHunyuanVideo, FluxTransformer2DModel
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel

from megasora.config.schema import RunConfig
from megasora.diffusion.patchify import unpatchify
from megasora.diffusion.philox import Stream, key_of, normal_at
from megasora.inference.requests import Common
from megasora.inference.sample import Extras, Outcome, Wanted, run_sample
from tests.pool import RankPool
from tests.published.small_weights import save_mmdit, small_config, transformer

HEIGHT, WIDTH, FRAMES, STEPS = 48, 32, 69, 12
KINDS = ("t2v", "i2v_head", "i2v_tail", "i2v_loop", "v2v_head", "v2v_tail", "v2v_head_easy", "v2v_tail_easy")
PROMPT = "A rabbit in a meadow"
TOLERANCE = 1e-4
"""||a - b|| / ||b|| in fp32 after 12 steps of three evaluations."""


class Conditioned(torch.nn.Module):
    """diffusers' x_embedder with Open-Sora's condition added."""

    def __init__(self, inner: torch.nn.Module, cond_in: torch.nn.Linear) -> None:
        super().__init__()
        self.inner, self.cond_in = inner, cond_in
        self.condition = torch.zeros(0)

    def forward(self, x: Tensor) -> Tensor:
        """[n, N, C] -> [n, N, H]."""
        out: Tensor = self.inner(x) + self.cond_in(self.condition)
        return out


def tokens_of(latent: Tensor) -> Tensor:
    """[C, T, H, W] -> [T H/2 W/2, 4 C], channels outermost (einops 'c t (h ph) (w pw) -> (t h w) (c ph pw)')."""
    c, t, h, w = latent.shape
    return latent.reshape(c, t, h // 2, 2, w // 2, 2).permute(1, 2, 4, 0, 3, 5).reshape(t * h * w // 4, 4 * c)


def latent_of(tokens: Tensor, t: int, h: int, w: int) -> Tensor:
    """Inverse of `tokens_of`."""
    c = tokens.shape[1] // 4
    return tokens.reshape(t, h // 2, w // 2, c, 2, 2).permute(3, 0, 1, 4, 2, 5).reshape(c, t, h, w)


def texts_of(config: RunConfig, texts: list[str]) -> tuple[Tensor, Tensor]:
    """T5's last hidden states of 16 padded tokens and CLIP's pooled outputs, no masks."""
    t5, folder = T5EncoderModel.from_pretrained(config.encoders.t5), Path(str(config.encoders.t5))
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spiece.model"))
    rows = [[*pieces.encode(text)[:15], 1] for text in texts]
    ids = torch.tensor([row + [0] * (16 - len(row)) for row in rows])
    clip = CLIPTextModel.from_pretrained(config.encoders.clip)
    tokenizer = CLIPTokenizer.from_pretrained(config.encoders.clip)
    batch = tokenizer(texts, padding="max_length", truncation=True, max_length=77, return_tensors="pt")
    with torch.no_grad():
        return t5(ids).last_hidden_state, clip(batch.input_ids).pooler_output


def given_latents(config: RunConfig, kind: str, picture: Tensor, clip: Tensor) -> list[tuple[int, Tensor]]:
    """(first latent frame, scaled latent) of the frames a kind gives; each run is encoded on its own in one call."""
    vae = AutoencoderKLHunyuanVideo.from_pretrained(config.encoders.vae)
    last = (FRAMES - 1) // 4
    count = 65 if kind.endswith("easy") else 33
    runs: dict[str, list[tuple[int, Tensor]]] = {
        "t2v": [],
        "i2v_head": [(0, picture)],
        "i2v_tail": [(last, clip[:, -1:])],  # a clip stands in for the end image: its last frame
        "i2v_loop": [(0, picture), (last, clip[:, -1:])],
        "v2v_head": [(0, clip[:, :count])],
        "v2v_tail": [(last + 1 - (count // 4 + 1), clip[:, -count:])],
    }
    with torch.no_grad():
        return [
            (at, vae.quant_conv(vae.encoder(pixels[None]))[0].chunk(2)[0] * vae.config.scaling_factor)
            for at, pixels in runs[kind.removesuffix("_easy")]
        ]


@torch.no_grad()
def plain_loop(
    model: FluxTransformer2DModel, config: RunConfig, given: list[tuple[int, Tensor]], noise: Tensor, *, kind: str, negative: str
) -> Tensor:
    """The published loop on one clip: three branches, oscillation, ramp, write-back."""
    c, t, h, w = noise.shape
    texts, vecs = texts_of(config, [f"{PROMPT}. 24 FPS. 4 motion score.", negative])
    mask, latents = torch.zeros(1, t, h, w), torch.zeros(c, t, h, w)
    for at, latent in given:
        mask[:, at : at + latent.shape[1]] = 1
        latents[:, at : at + latent.shape[1]] = latent
    condition = tokens_of(torch.cat([mask, latents]))
    ids = torch.cartesian_prod(torch.arange(t), torch.arange(h // 2), torch.arange(w // 2)).float()
    alpha = (1 + 2 * (h * w // 4 - 256) / 3840) * math.sqrt(t)
    times = [alpha * u / (1 + (alpha - 1) * u) for u in (1 - i / STEPS for i in range(STEPS + 1))]
    x = tokens_of(noise)
    frame = torch.arange(t).repeat_interleave(h * w // 4)
    for i in range(STEPS):
        model.x_embedder.condition = torch.stack([condition, condition, torch.zeros_like(condition)])
        both, uncond, nothing = model(
            hidden_states=x.expand(3, -1, -1),
            encoder_hidden_states=texts[[0, 1, 1]],
            pooled_projections=vecs[[0, 1, 1]],
            timestep=torch.full((3,), times[i]),
            img_ids=ids,
            txt_ids=torch.zeros(16, 3),
        ).sample
        rests = i >= 10 and i % 2 == 1
        g_txt, g_img = (1.0, 1.0) if rests else (config.sample.guidance, config.sample.guidance_img)
        image: Any = g_img
        if kind.startswith("i2v") and g_img > 1:
            image = torch.linspace(1.0, float(torch.linspace(g_img, 1.0, STEPS + 1)[i]), t)[frame][:, None]
        x = x + (times[i + 1] - times[i]) * (nothing + image * (uncond - nothing) + g_txt * (both - uncond))
    latent = latent_of(x, t, h, w)
    for at, known in given if kind.startswith("i2v") else []:
        latent[:, at : at + known.shape[1]] = known
    return latent


def write_sources(folder: Path) -> tuple[Tensor, Tensor]:
    """A picture and a lossless clip of 80 frames at the clips' size; both as fp32 in [-1, 1]."""
    generator = np.random.default_rng(0)
    picture = generator.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    Image.fromarray(picture).save(folder / "head.png")
    frames = generator.integers(0, 256, (80, HEIGHT, WIDTH, 3), dtype=np.uint8)
    with av.open(str(folder / "clip.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=24)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "bgr0"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format="bgr0")))
        container.mux(stream.encode())
    as_tensor = [torch.from_numpy(array.copy()).float() / 127.5 - 1 for array in (picture[None], frames)]
    return as_tensor[0].permute(3, 0, 1, 2), as_tensor[1].permute(3, 0, 1, 2)


def write_table(path: Path) -> None:
    """A clip of each kind."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["prompt", "negative", "kind", "image", "end_image", "video", "seed", "name"])
        for number, kind in enumerate(KINDS):
            image = "head.png" if kind in ("i2v_head", "i2v_loop") else ""
            end_image = "clip.mkv" if kind in ("i2v_tail", "i2v_loop") else ""
            video = "clip.mkv" if kind.startswith("v2v") else ""
            writer.writerow([PROMPT, "colour bars" if number % 2 else "", kind, image, end_image, video, 100 + number, kind])


def sample_on_rank(rank: int, config: RunConfig, table: str, output: str, arguments: dict[str, Any]) -> Outcome:
    """`megasora sample --table` on one rank of a pool."""
    common = Common(kind=None, negative="", resolution=None, aspect=None, num_samples=1)
    wanted = Wanted(table=Path(table), common=common)
    return run_sample(
        config, wanted, weights=Path(table).parent / "mmdit.safetensors", output=Path(output), extras=Extras(save_latents=True), **arguments
    )


def noise_of(seed: int) -> Tensor:
    t, h, w = (FRAMES - 1) // 4 + 1, HEIGHT // 8, WIDTH // 8
    elements = torch.arange(t * (h // 2) * (w // 2) * 64).view(-1, 64)
    return unpatchify(normal_at(elements, key=key_of(seed=seed, stream=Stream.SAMPLE)), grid=(t, h // 2, w // 2), patch=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights, encoders, sources and a table."""
    path = tmp_path_factory.mktemp("published")
    cond_in = torch.nn.Linear(68, 64)
    save_mmdit(transformer(guidance=False), cond_in, path / "mmdit.safetensors")
    write_table(path / "table.csv")
    return path


def settings(folder: Path, **sample: Any) -> RunConfig:
    config = small_config(folder)
    size = {"height": HEIGHT, "width": WIDTH, "num_frames": FRAMES, "steps": STEPS}
    return replace(config, sample=replace(config.sample, **{**size, **sample}))


@pytest.mark.slow
def test_every_kind_is_what_the_published_loop_draws(pool: RankPool, folder: Path) -> None:
    picture, clip = write_sources(folder)
    config = settings(folder)
    (outcome,) = pool.run(1, sample_on_rank, config, str(folder / "table.csv"), str(folder / "one"), {})
    assert [path.name for path in outcome.made] == [f"{kind}.mp4" for kind in KINDS]
    assert outcome.failed == () and outcome.kept == ()
    model = transformer(guidance=False)
    released = load_file(folder / "mmdit.safetensors")
    cond_in = torch.nn.Linear(68, 64)
    cond_in.load_state_dict({name: released[f"cond_in.{name}"] for name in ("weight", "bias")})
    model.x_embedder = Conditioned(model.x_embedder, cond_in)
    for number, kind in enumerate(KINDS):
        given = given_latents(config, kind, picture, clip)
        expected = plain_loop(model, config, given, noise_of(100 + number), kind=kind, negative="colour bars" if number % 2 else "")
        ours = load_file(folder / "one" / f"{kind}.safetensors")["latent"]
        gap = float((ours - expected).norm() / expected.norm())
        assert gap < TOLERANCE, f"{kind}: {gap}"
        record = json.loads((folder / "one" / f"{kind}.json").read_text())
        assert record["caption"] == f"{PROMPT}. 24 FPS. 4 motion score."
        assert record["made"]["evaluations"] == STEPS * (2 if kind == "t2v" else 3)
