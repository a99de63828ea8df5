"""A micro-batch of two samples on one rank, against the formulas written out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megasora.diffusion.philox import normal_at
from megasora.models.mmdit.schedule import MicroBatch
from megasora.parallel.pack import Pack, PackSplit, SampleShape
from megasora.training.microbatch import TrainingSample, build_microbatch, velocity_loss

SIGMA, CHANNELS = 0.25, 2
SHAPES = [SampleShape(text_tokens=1, grid=(1, 1, 3)), SampleShape(text_tokens=1, grid=(1, 1, 1))]


def sample(tokens: int, *, key: int, t: float, weight: float = 1.0) -> TrainingSample:
    values = torch.arange(1.0, 1.0 + tokens * CHANNELS, dtype=torch.float64).view(tokens, CHANNELS)
    return TrainingSample(
        tokens=values, text=torch.full((1, 2), float(key)), vec=torch.full((2,), t), cond=None, t=t, noise_key=key, weight=weight
    )


def built(*samples: TrainingSample) -> MicroBatch:
    pack = Pack(SHAPES, split=PackSplit())
    return build_microbatch(pack, samples, sigma_min=SIGMA, dtype=torch.float64, first_stage=True, last_stage=True)


def test_inputs_and_targets_are_those_of_the_path() -> None:
    long, short = sample(3, key=5, t=0.5), sample(1, key=6, t=0.75)
    batch = built(long, short)
    assert batch.inputs is not None and batch.target is not None
    noise = [normal_at(torch.arange(n * CHANNELS).view(n, CHANNELS), key=key, dtype=torch.float64) for n, key in ((3, 5), (1, 6))]
    # x_t = (1 - t) x_0 + (1 - 3/4 (1 - t)) x_1, v = 3/4 x_1 - x_0 with sigma_min 1/4
    noised = [0.5 * long.tokens + 0.625 * noise[0], 0.25 * short.tokens + 0.8125 * noise[1]]
    target = [0.75 * noise[0] - long.tokens, 0.75 * noise[1] - short.tokens]
    torch.testing.assert_close(batch.inputs.img, torch.cat(noised))
    torch.testing.assert_close(batch.target, torch.cat(target))
    assert batch.inputs.t.tolist() == [0.5, 0.75]
    assert batch.inputs.txt.tolist() == [[5, 5], [6, 6]]


def test_every_sample_weighs_the_same_whatever_its_length() -> None:
    batch = built(sample(3, key=5, t=0.5), sample(1, key=6, t=0.75))
    assert batch.weight is not None
    assert batch.weight.tolist() == pytest.approx([1 / 6, 1 / 6, 1 / 6, 1 / 2])  # 1 / (tokens x 2 channels)
    assert batch.num_counted == 2


def test_a_sample_of_weight_zero_has_no_part_in_loss_and_count() -> None:
    batch = built(sample(3, key=5, t=0.5, weight=0.0), sample(1, key=6, t=0.75))
    assert batch.target is not None and batch.weight is not None
    assert batch.weight.tolist() == [0, 0, 0, 0.5]
    loss, counted, _ = velocity_loss(batch.target + 2.0, batch, context_rank=0)
    assert (loss.item(), counted.item()) == (4.0, 1)


def test_the_loss_is_the_mean_square_of_each_sample_counted_on_context_rank_0() -> None:
    batch = built(sample(3, key=5, t=0.5), sample(1, key=6, t=0.75))
    assert batch.target is not None
    off = torch.tensor([[1.0, 1.0]] * 3 + [[3.0, 1.0]], dtype=torch.float64)  # mean squares 1 and 5
    for rank, count in ((0, 2), (1, 0)):
        loss, counted, report = velocity_loss(batch.target + off, replace(batch), context_rank=rank)
        assert (loss.item(), counted.item(), report.item()) == (pytest.approx(6.0), count, pytest.approx(6.0))
