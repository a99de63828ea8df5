"""Times and guidance of every step, against the published formulas written out here (hpcaitech/Open-Sora opensora/utils/sampling.py)."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megasora.config.schema import EncodersConfig, FlowConfig, ModelConfig, SampleConfig
from megasora.diffusion.conditions import condition_latent, given_frames
from megasora.diffusion.guidance import Branch, Guidance, GuidedVelocity, denoise
from megasora.models.sampler import ClipSampler, ClipSize

KINDS = ("t2v", "i2v_head", "i2v_tail", "i2v_loop", "v2v_head", "v2v_tail", "v2v_head_easy", "v2v_tail_easy")
LATENTS = {("256px", 1): (1, 32, 32), ("256px", 33): (9, 32, 32), ("256px", 129): (33, 32, 32)}
LATENTS |= {("768px", 1): (1, 72, 128), ("768px", 33): (9, 72, 128), ("768px", 129): (33, 72, 128)}
"""(T, H, W): (frames - 1) / 4 + 1 and pixels / 8 of 256 x 256 and 576 x 1024."""


def published_times(steps: int, frames: int, tokens: int) -> list[float]:
    """get_schedule: alpha = (1 + 2 (tokens - 256) / 3840) sqrt(frames), t -> alpha t / (1 + (alpha - 1) t)."""
    alpha = (1 + 2 * (tokens - 256) / 3840) * math.sqrt(frames)
    return [alpha * t / (1 + (alpha - 1) * t) for t in (1 - i / steps for i in range(steps + 1))]


@pytest.mark.parametrize("steps", [10, 50])
@pytest.mark.parametrize(("size", "frames"), LATENTS)
def test_times(steps: int, size: str, frames: int) -> None:
    t, h, w = LATENTS[size, frames]
    assert sampled_times(steps, frames, 8 * h, 8 * w) == pytest.approx(published_times(steps, t, h * w // 4), rel=1e-12)


def test_a_picture_of_256_pixels_has_even_times() -> None:
    # 32 x 32 latent pixels are 256 patches: alpha is 1
    assert sampled_times(10, 1, 256, 256) == pytest.approx([1 - i / 10 for i in range(11)])


def test_a_dc_ae_counts_each_latent_pixel() -> None:
    # (24 x 24) / 1^2 = 576 tokens; not causal: 128 frames are 32
    encoders = EncodersConfig(spatial_compression=32, causal=False)
    times = sampled_times(10, 128, 768, 768, model=ModelConfig(in_channels=128, patch_size=1), encoders=encoders)
    assert times == pytest.approx(published_times(10, 32, 576), rel=1e-12)


def sampled_times(
    steps: int, frames: int, height: int, width: int, *, model: ModelConfig | None = None, encoders: EncodersConfig | None = None
) -> list[float]:
    model, encoders = model or ModelConfig(), encoders or EncodersConfig()
    sampler = ClipSampler(
        [],
        megatron_config=None,  # type: ignore[arg-type]
        model=model,
        sample=SampleConfig(steps=steps),
        flow=FlowConfig(),
        encoders=encoders,
        context=None,  # type: ignore[arg-type]
    )
    return sampler.times(ClipSize(num_frames=frames, height=height, width=width).latent_shape(model, encoders))


def published_factors(kind: str, step: int, steps: int, frames: int) -> tuple[float, list[float]]:
    """(g_txt, g_img of each latent frame): 7.5 and 3, both oscillating, the ramp for i2v alone."""
    resting = step >= 10 and step % 2 == 1
    g_txt, g_img = (1.0, 1.0) if resting else (7.5, 3.0)
    if not kind.startswith("i2v") or g_img <= 1:
        return g_txt, [g_img] * frames
    upper = torch.linspace(3.0, 1.0, steps + 1, dtype=torch.float64)[step].item()
    return g_txt, torch.linspace(1.0, upper, frames, dtype=torch.float64).tolist()


@pytest.mark.parametrize("steps", [10, 50])
@pytest.mark.parametrize("frames", [9, 33])
@pytest.mark.parametrize("kind", KINDS)
def test_guidance_of_every_step(kind: str, steps: int, frames: int) -> None:
    guidance = guidance_of(kind)
    for step in range(steps):
        g_txt, g_img = published_factors(kind, step, steps, frames)
        scale = guidance.given_scale(step, steps=steps, latent_frame=torch.arange(frames), latent_frames=frames)
        assert guidance.text_scale(step) == g_txt
        assert scale.tolist() == pytest.approx(g_img, rel=1e-12)


def test_the_ramp_is_not_down_in_the_last_step() -> None:
    # linspace(3, 1, 51)[49] = 3 - 2 x 49 / 50; step 49 is odd, so without oscillation
    guidance = Guidance(text=7.5, given=3.0, text_oscillation=False, given_oscillation=False, ramp=True)
    last = guidance.given_scale(49, steps=50, latent_frame=torch.tensor([32]), latent_frames=33)
    assert last.item() == pytest.approx(1.04)


def guidance_of(kind: str) -> Guidance:
    sampler = ClipSampler(
        [],
        megatron_config=None,  # type: ignore[arg-type]
        model=ModelConfig(),
        sample=SampleConfig(),
        flow=FlowConfig(),
        encoders=EncodersConfig(),
        context=None,  # type: ignore[arg-type]
    )
    return sampler.guidance(kind)


ANSWERS = {Branch(False, False): 1.0, Branch(False, True): 2.0, Branch(True, True): 4.0, Branch(True, False): 8.0}


@pytest.mark.parametrize("kind", ["t2v", "i2v_head", "v2v_tail"])
def test_a_walk_of_50_steps_adds_up_as_published(kind: str) -> None:
    def velocities(x: Tensor, t: float, branches: list[Branch]) -> list[Tensor]:
        return [torch.full_like(x, ANSWERS[branch]) for branch in branches]

    times = published_times(50, 9, 256)
    velocity = GuidedVelocity(
        velocity=velocities,  # type: ignore[arg-type]
        guidance=guidance_of(kind),
        with_given=kind != "t2v",
        latent_frame=torch.arange(9),
        latent_frames=9,
    )
    end = denoise(velocity, torch.zeros(9, 1, dtype=torch.float64), times=times)
    expected = [0.0] * 9
    for step in range(50):
        g_txt, g_img = published_factors(kind, step, 50, 9)
        for frame in range(9):
            # v(0, 0) + g_img (v(0, img) - v(0, 0)) + g_txt (v(txt, img) - v(0, img)); in t2v the condition is empty in all branches
            v = 1 + g_txt * (8 - 1) if kind == "t2v" else 1 + g_img[frame] * (2 - 1) + g_txt * (4 - 2)
            expected[frame] += (times[step + 1] - times[step]) * v
    assert end[:, 0].tolist() == pytest.approx(expected, rel=1e-9)


MASKS = {
    "t2v": [0] * 33,
    "i2v_head": [1] + [0] * 32,
    "i2v_tail": [0] * 32 + [1],
    "i2v_loop": [1] + [0] * 31 + [1],
    "v2v_head": [1] * 9 + [0] * 24,  # k = 8 + is_causal
    "v2v_tail": [0] * 24 + [1] * 9,
    "v2v_head_easy": [1] * 17 + [0] * 16,  # k = 16 + is_causal
    "v2v_tail_easy": [0] * 16 + [1] * 17,
}
"""prepare_inference_condition at 129 frames, 33 latent frames."""
PIXELS = {
    "i2v_head": [(0, 1)],
    "i2v_tail": [(128, 1)],
    "i2v_loop": [(0, 1), (128, 1)],
    "v2v_head": [(0, 33)],
    "v2v_tail": [(96, 33)],
    "v2v_head_easy": [(0, 65)],
    "v2v_tail_easy": [(64, 65)],
}
"""(first frame, frames) that are encoded on their own: collect_references_batch, target_t = 32 or 64, plus 1 for a causal autoencoder."""


@pytest.mark.parametrize("kind", KINDS)
def test_condition_masks(kind: str) -> None:
    runs = given_frames(kind, num_frames=129)
    assert [(run.start, run.count) for run in runs] == PIXELS.get(kind, [])
    latents = [(run, torch.full((16, run.latent_count, 2, 3), 7.0)) for run in runs]
    condition = condition_latent((16, 33, 2, 3), latents)
    mask = torch.tensor(MASKS[kind], dtype=torch.float32)
    assert torch.equal(condition[0], mask[:, None, None].expand(33, 2, 3))
    assert torch.equal(condition[1:], 7 * mask[:, None, None].expand(16, 33, 2, 3))
