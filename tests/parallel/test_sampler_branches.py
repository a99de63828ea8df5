"""What the sampler asks of the model, with a model whose answer tells its inputs apart: 1 x text + 16 x vector + 256 x condition."""

from __future__ import annotations

import pytest
import torch
from megatron.core.enums import ModelType
from torch import Tensor, nn

from megasora import recipes
from megasora.config.schema import EncodersConfig, FlowConfig, ModelConfig, ParallelConfig, PrecisionConfig, SampleConfig
from megasora.diffusion.conditions import given_frames
from megasora.diffusion.patchify import unpatchify
from megasora.diffusion.philox import Stream, key_of, normal_at
from megasora.models.mmdit.megatron_config import transformer_config
from megasora.models.mmdit.model import ModelInputs
from megasora.models.sampler import ClipSampler, ClipSize, Prompt
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
    """(latents, times asked for); the prompt is told as 4 + 16 x 2, the empty one as 1 + 16 x 1, the image as 128."""
    context = groups.initialize(ParallelConfig(), device=torch.device("cpu"), num_attention_heads=MODEL.num_attention_heads, seed=0)
    config = transformer_config(MODEL, ParallelConfig(), PrecisionConfig(dtype="fp32"), device=torch.device("cpu"), provider="local")
    stage = Telling(config)
    sampler = ClipSampler(
        [stage],
        megatron_config=config,
        model=MODEL,
        sample=SampleConfig(**{**vars(SETTINGS), "steps": steps}),
        flow=FlowConfig(),
        encoders=EncodersConfig(),
        context=context,
    )
    (run,) = given_frames("i2v_head", num_frames=5)
    given = ((run, torch.ones(MODEL.latent_channels, 1, 8, 8)),) if image else ()  # half of the tokens' condition is 1, half 0
    prompt = Prompt(
        text=torch.full((16, MODEL.text_dim), 4.0),
        vec=torch.full((MODEL.vec_dim,), 2.0),
        null_text=torch.full((16, MODEL.text_dim), 1.0),
        null_vec=torch.full((MODEL.vec_dim,), 1.0),
        kind="i2v_head" if image else "t2v",
        given=given,
    )
    size = ClipSize(num_frames=5, height=64, width=64)
    return [sampler.sample(prompt, size, seed=number) for number in numbers], stage.times


def noise(number: int) -> Tensor:
    """[C, 2, 8, 8], element token x 64 + channel of the clip's own draw."""
    key = key_of(seed=number, stream=Stream.SAMPLE)
    return unpatchify(normal_at(torch.arange(32 * 64), key=key).view(32, 64), grid=(2, 4, 4), patch=2)


def test_without_an_image_text_and_vector_are_guided_and_every_clip_has_its_own_noise(pool: RankPool) -> None:
    (((first, second), _),) = pool.run(1, sampled, 1, (0, 1), False)
    # one step from noise: x_1 - v with v = 17 + 2 (36 - 17)
    torch.testing.assert_close(first, noise(0) - 55.0)
    torch.testing.assert_close(second, noise(1) - 55.0)


def test_with_an_image_the_condition_is_guided_over_the_latent_frames(pool: RankPool) -> None:
    (((latent,), _),) = pool.run(1, sampled, 1, (0,), True)
    # v = 17 + g_img (145 - 17) + 2 (164 - 145), g_img 3 on the last latent frame; the given one is written back
    assert torch.equal(latent[:, 0], torch.ones(MODEL.latent_channels, 8, 8))
    torch.testing.assert_close(latent[:, 1], noise(0)[:, 1] - (17 + 3 * 128 + 38))


def test_times_fall_from_one_and_are_shifted_by_the_latents_size(pool: RankPool) -> None:
    ((_, times),) = pool.run(1, sampled, 2, (0,), False)
    assert times == pytest.approx([1.0, 1.0, SHIFT * 0.5 / (1 + (SHIFT - 1) * 0.5)] + [SHIFT * 0.5 / (1 + (SHIFT - 1) * 0.5)])
