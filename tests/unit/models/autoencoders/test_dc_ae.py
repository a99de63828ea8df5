"""The video DC-AE has the released tensors, and without weights it is exactly its shortcuts, in time too."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megasora.config.dc_ae import TINY, DCAEConfig
from megasora.models.autoencoders.dc_ae.attention import linear_attention
from megasora.models.autoencoders.dc_ae.convolution import INDEX_LIMIT, Convolution, in_runs
from megasora.models.autoencoders.dc_ae.model import VideoDCAE
from megasora.models.autoencoders.dc_ae.norm import ChannelNorm

KEYS = Path(__file__).with_name("dc_ae_keys.txt")
"""Names and shapes of the released class (opensora/models/dc_ae, dc-ae-f32t4c128), in its order."""


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tiny(*, seed: int = 0, **changes: object) -> VideoDCAE:
    """With weights larger than the start values, so that blocks matter."""
    torch.manual_seed(seed)
    network = VideoDCAE(TINY, **changes)  # type: ignore[arg-type]
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return network


def test_tensors_are_the_released_ones() -> None:
    with torch.device("meta"):
        network = VideoDCAE(DCAEConfig())
    assert [f"{key} {list(tensor.shape)}" for key, tensor in network.state_dict().items()] == KEYS.read_text().splitlines()
    counts = [sum(parameter.numel() for parameter in part.parameters()) for part in (network, network.encoder, network.decoder)]
    assert counts == [459_462_147, 220_439_936, 239_022_211]
    assert len(network.state_dict()) == 339 and not list(network.buffers())


def test_the_variant_of_256_channels_has_the_size_of_the_paper_s() -> None:
    with torch.device("meta"):
        network = VideoDCAE(DCAEConfig(latent_channels=256))
    assert sum(parameter.numel() for parameter in network.parameters()) == 466_540_163


def stepped_down(x: Tensor, channels: int, factors: tuple[int, int, int]) -> Tensor:
    """A shortcut down, place by place."""
    in_channels, frames, height, width = x.shape
    (ft, fh, fw), cell = factors, factors[0] * factors[1] * factors[2]
    group = in_channels * cell // channels
    out = torch.zeros(channels, frames // ft, height // fh, width // fw)
    for c, (t, h, w) in product(range(in_channels), product(*(range(side) for side in out.shape[1:]))):
        for rt, rh, rw in product(range(ft), range(fh), range(fw)):
            index = c * cell + (rt * fh + rh) * fw + rw
            out[index // group, t, h, w] += x[c, t * ft + rt, h * fh + rh, w * fw + rw] / group
    return out


def stepped_up(x: Tensor, channels: int, factors: tuple[int, int, int]) -> Tensor:
    """A shortcut up, place by place."""
    in_channels, frames, height, width = x.shape
    (ft, fh, fw), cell = factors, factors[0] * factors[1] * factors[2]
    repeats = channels * cell // in_channels
    out = torch.zeros(channels, frames * ft, height * fh, width * fw)
    for c, t, h, w in product(*(range(side) for side in out.shape)):
        index = c * cell + (t % ft * fh + h % fh) * fw + w % fw
        out[c, t, h, w] = x[index // repeats, t // ft, h // fh, w // fw]
    return out


@pytest.mark.parametrize("frames", [1, 4, 8])
def test_without_weights_the_encoder_averages_pixels(frames: int) -> None:
    network = VideoDCAE(TINY).requires_grad_(False)
    for parameter in network.parameters():
        parameter.zero_()
    for channel in range(4):  # the first convolution hands on red, green, blue and red
        network.encoder.project_in.conv.weight[channel, channel % 3, 1, 1, 1] = 1
    clip = noise(3, frames, 32, 32)
    x = clip[[0, 1, 2, 0]]
    for channels, temporal in ((4, False), (8, False), (8, False), (16, True), (16, True)):
        x = stepped_down(x, channels, (2 if temporal and x.shape[1] > 1 else 1, 2, 2))
    expected = stepped_down(x, 16, (1, 1, 1))
    torch.testing.assert_close(network.encoder(clip[None])[0], expected, rtol=1e-6, atol=1e-7)
    assert expected.shape == (16, max(1, frames // 4), 1, 1)


@pytest.mark.parametrize("frames", [1, 2])
def test_without_weights_the_decoder_repeats_channels(frames: int) -> None:
    network = VideoDCAE(TINY).requires_grad_(False)
    for parameter in network.parameters():
        parameter.zero_()
    before_the_last: list[Tensor] = []
    network.decoder.project_out.register_forward_pre_hook(lambda _, given: before_the_last.append(given[0][0]))
    latent = noise(16, frames, 1, 1)
    pixels = network.decoder(latent[None])
    x = stepped_up(latent, 16, (1, 1, 1))
    for channels, temporal in ((16, True), (8, True), (8, False), (4, False), (4, False)):
        x = stepped_up(x, channels, (2 if temporal and x.shape[1] > 1 else 1, 2, 2))
    assert torch.equal(before_the_last[0], x)
    assert pixels.shape == (1, 3, 1 if frames == 1 else 4 * frames, 32, 32) and not pixels.any()


def test_a_still_clip_and_its_picture_have_different_latents() -> None:
    # the grouping of channels in time is no extension of the one in space
    network = tiny()
    picture = noise(1, 3, 1, 32, 32)
    with torch.no_grad():
        still, alone = network.encoder(picture.expand(-1, -1, 8, -1, -1)), network.encoder(picture)
    assert float((still - alone).abs().max()) > 0.1 * float(alone.abs().max())


def test_no_frame_comes_before_another() -> None:
    # not causal: the last frame changes the first latent frame
    network = tiny()
    clip = noise(1, 3, 8, 32, 32)
    other = torch.cat([clip[:, :, :-1], noise(1, 3, 1, 32, 32, seed=1)], dim=2)
    with torch.no_grad():
        assert float((network.encoder(clip) - network.encoder(other))[:, :, 0].abs().max()) > 1e-3


def test_attention_is_the_weighted_mean_that_its_sums_say() -> None:
    heads, dim, grid = 2, 4, (2, 3, 2)
    qkv = noise(1, heads * 3 * dim, *grid)
    out = linear_attention(qkv, head_dim=dim)[0].reshape(heads, dim, -1)
    for head in range(heads):
        q, k, v = (qkv[0].reshape(heads, 3, dim, -1)[head, part] for part in range(3))
        weights = k.relu().t() @ q.relu()  # [place looked at, place that looks]
        expected = v @ weights / (weights.sum(dim=0) + 1e-15)
        torch.testing.assert_close(out[head], expected, rtol=1e-5, atol=1e-6)


def test_attention_in_bf16_divides_in_fp32() -> None:
    qkv = noise(1, 24, 2, 4, 4)
    rounded = qkv.bfloat16()
    assert linear_attention(rounded, head_dim=4).dtype == torch.float32
    torch.testing.assert_close(linear_attention(rounded, head_dim=4), linear_attention(rounded.float(), head_dim=4), rtol=2e-2, atol=2e-2)


def test_the_norm_divides_by_the_root_mean_square_of_the_channels() -> None:
    norm = ChannelNorm(3).requires_grad_(False)
    norm.weight.copy_(torch.tensor([1.0, 2.0, 1.0]))
    norm.bias.copy_(torch.tensor([0.0, 0.0, 5.0]))
    # mean of squares (9 + 16 + 0) / 3 = 25/3
    x = torch.tensor([3.0, 4.0, 0.0]).view(1, 3, 1, 1, 1)
    root = (25 / 3 + 1e-5) ** 0.5
    assert norm(x).flatten().tolist() == pytest.approx([3 / root, 8 / root, 5.0])


@pytest.mark.parametrize(("stride", "kernel", "frames"), [((1, 1, 1), 3, 9), ((2, 2, 2), 3, 8), ((1, 2, 2), 3, 5), ((1, 1, 1), 5, 7)])
def test_a_convolution_in_runs_of_frames_is_the_whole_one(stride: tuple[int, int, int], kernel: int, frames: int) -> None:
    layer = Convolution(4, 6, kernel=kernel, stride=stride, bias=True).requires_grad_(False)
    torch.nn.init.normal_(layer.weight)
    x = noise(1, 4, frames, 8, 8)
    per_frame = 6 * 8 * 8
    for limit in (1, 3 * per_frame, 6 * per_frame, INDEX_LIMIT):
        torch.testing.assert_close(in_runs(layer, x, limit=limit), layer(x), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("frames", [1, 8])
def test_recomputing_stages_gives_the_same_gradients(frames: int) -> None:
    clip = noise(1, 3, frames, 32, 32)
    gradients = []
    for recompute in ("none", "stages"):
        network = tiny(recompute=recompute)
        restored, latent = network(clip)
        (restored.square().mean() + latent.square().mean()).backward()
        gradients.append({key: parameter.grad for key, parameter in network.named_parameters()})
    assert all(torch.equal(gradients[0][key], gradient) for key, gradient in gradients[1].items())
    assert network.decoder.last_weight is network.get_parameter("decoder.project_out.op_list.2.conv.weight")


def test_bf16_stays_near_fp32() -> None:
    network = tiny().requires_grad_(False)
    clip = noise(1, 3, 8, 32, 32)
    restored, latent = network(clip)
    half, short = network.bfloat16()(clip.bfloat16())
    assert (half.dtype, short.dtype) == (torch.bfloat16, torch.bfloat16)
    for exact, rounded in ((latent, short), (restored, half)):
        assert float((rounded.float() - exact).norm() / exact.norm()) < 0.05


def test_a_new_network_is_nearly_its_shortcuts() -> None:
    # the norms' weights start at 0.02, not at 1 (opensora/models/dc_ae/utils/init.py)
    torch.manual_seed(0)
    network = VideoDCAE(TINY)
    weights = torch.cat([part.weight.flatten() for part in network.modules() if isinstance(part, ChannelNorm)])
    assert float(weights.abs().max()) < 0.1 and float(weights.std()) == pytest.approx(0.02, rel=0.3)
    assert all(not parameter.any() for key, parameter in network.named_parameters() if key.endswith("bias"))
