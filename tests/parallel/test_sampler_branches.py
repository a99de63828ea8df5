"""What the sampler asks of the model, with a model whose answer tells its inputs apart: 1 x text + 16 x vector + 256 x condition."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from megatron.core.enums import ModelType
from torch import Tensor, nn

from megasora import recipes
from megasora.config.schema import FlowConfig, ModelConfig, ParallelConfig, PrecisionConfig, SampleConfig
from megasora.diffusion.patchify import unpatchify
from megasora.diffusion.philox import Stream, key_of, normal_at
from megasora.models.mmdit.megatron_config import transformer_config
from megasora.models.mmdit.model import ModelInputs
from megasora.models.sampler import Prompt, Sampler
from megasora.parallel import groups
from megasora.parallel.pack import Pack
from tests.pool import RankPool

MODEL: ModelConfig = recipes.get("tiny").model
SETTINGS = SampleConfig(height=64, width=64, num_frames=5, guidance=2.0, guidance_img=3.0, seed=9)
SHIFT = (1 + (64 // 4 - 256) * 2 / 3840) * 2**0.5
"""Of 2 x 8 x 8 latent pixels."""


class Telling(nn.Module):
    """A stage of the pipeline that remembers its times."""

    def __init__(self, config: object) -> None:
        super().__init__()
        self.config = config
        self.model_type = ModelType.encoder_or_decoder
        self.times: list[float] = []

    def set_input_tensor(self, tensor: object) -> None:
        """Nothing is received on one rank."""

    def forward(self, inputs: ModelInputs, pack: Pack, positions: Tensor | None) -> Tensor:
        self.times.append(inputs.t.item())
        assert inputs.cond is not None
        return torch.full_like(inputs.img, float(inputs.txt.mean() + 16 * inputs.y_vec.mean() + 256 * inputs.cond.mean()))


def sampled(rank: int, steps: int, numbers: tuple[int, ...], image: bool) -> tuple[list[Tensor], list[float]]:
    """(latents, times asked for); the prompt is told as 4 + 16 x 2, the empty one as 1 + 16 x 1, the image as 256."""
    context = groups.initialize(ParallelConfig(), device=torch.device("cpu"), num_attention_heads=MODEL.num_attention_heads, seed=0)
    config = transformer_config(MODEL, ParallelConfig(), PrecisionConfig(dtype="fp32"), device=torch.device("cpu"), provider="local")
    stage = Telling(config)
    vae = SimpleNamespace(temporal_compression=4, spatial_compression=8, latent_channels=MODEL.latent_channels)
    sampler = Sampler(
        [stage],
        megatron_config=config,
        model=MODEL,
        sample=SampleConfig(**{**vars(SETTINGS), "steps": steps}),
        flow=FlowConfig(),
        encoders=SimpleNamespace(vae=vae),  # type: ignore[arg-type]
        context=context,
    )
    prompt = Prompt(
        text=torch.full((16, MODEL.text_dim), 4.0),
        vec=torch.full((MODEL.vec_dim,), 2.0),
        null_text=torch.full((16, MODEL.text_dim), 1.0),
        null_vec=torch.full((MODEL.vec_dim,), 1.0),
        cond=torch.ones(32, MODEL.cond_channels) if image else None,
    )
    return [sampler.sample(prompt, number=number) for number in numbers], stage.times


def noise(number: int) -> Tensor:
    """[C, 2, 8, 8], element token x 64 + channel of the clip's own draw."""
    key = key_of(seed=9, stream=Stream.SAMPLE, sample=number)
    return unpatchify(normal_at(torch.arange(32 * 64), key=key).view(32, 64), grid=(2, 4, 4), patch=2)


def test_without_an_image_text_and_vector_are_guided_and_every_clip_has_its_own_noise(pool: RankPool) -> None:
    (((first, second), _),) = pool.run(1, sampled, 1, (0, 1), False)
    # one step from noise: x_1 - v with v = 17 + 2 (36 - 17)
    torch.testing.assert_close(first, noise(0) - 55.0)
    torch.testing.assert_close(second, noise(1) - 55.0)


def test_with_an_image_the_condition_is_guided_over_the_latent_frames(pool: RankPool) -> None:
    (((latent,), _),) = pool.run(1, sampled, 1, (0,), True)
    # v = 17 + g_img (273 - 17) + 2 (292 - 273), g_img 1 on the first latent frame and 3 on the last
    torch.testing.assert_close(latent[:, 0], noise(0)[:, 0] - (17 + 256 + 38))
    torch.testing.assert_close(latent[:, 1], noise(0)[:, 1] - (17 + 3 * 256 + 38))


def test_times_fall_from_one_and_are_shifted_by_the_latents_size(pool: RankPool) -> None:
    ((_, times),) = pool.run(1, sampled, 2, (0,), False)
    assert times == pytest.approx([1.0, 1.0, SHIFT * 0.5 / (1 + (SHIFT - 1) * 0.5)] + [SHIFT * 0.5 / (1 + (SHIFT - 1) * 0.5)])
