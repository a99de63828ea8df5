"""The frozen encoders, with random weights: HunyuanVideo's VAE and an encoder of T5-XXL's size."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.gpu.rig import Setup, timed
from benchmarks.gpu.table import Case, LeftOutError, Row

T5_XXL = {"vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
"""google/t5-v1_1-xxl's config.json."""
T5_SMALL = {"vocab_size": 128, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}
VAE_SMALL = {"block_out_channels": (8, 8, 16, 16), "layers_per_block": 1, "norm_num_groups": 4}


def encoder_cases(setup: Setup) -> Iterator[Case]:
    """One clip through the VAE, a batch of prompts through T5."""
    frames, side = (5, 32) if setup.small else (129, 256)
    prompts, tokens = (2, 16) if setup.small else (16, 512)
    yield Case(labels={"encoder": "VAE", "input": f"{frames} x {side} x {side}"}, measure=lambda: _vae(setup, frames, side))
    yield Case(labels={"encoder": "T5", "input": f"{prompts} x {tokens}"}, measure=lambda: _t5(setup, prompts, tokens))


def random_model(setup: Setup, make: Any) -> Any:
    """A model whose random weights are drawn in bf16 on the device (fp32 on a CPU)."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if setup.on_gpu else torch.float32)
    try:
        with torch.device(setup.device):
            return make().eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(usual)


def _vae(setup: Setup, frames: int, side: int) -> Row:
    try:
        from diffusers import AutoencoderKLHunyuanVideo

        from megasora.models.autoencoders.autoencoder import Autoencoder
        from megasora.models.autoencoders.hunyuan import HunyuanNetwork
    except ImportError as error:
        raise LeftOutError(f"no {error.name}") from error
    size: dict[str, Any] = VAE_SMALL if setup.small else {}
    vae = Autoencoder(HunyuanNetwork(random_model(setup, lambda: AutoencoderKLHunyuanVideo(**size))), tiling=None)
    video = torch.rand(3, frames, side, side, device=setup.device) * 2 - 1
    times = timed(setup, lambda: vae.posterior(video), warm=1, repeats=5, seconds=10)
    median = statistics.median(times)
    return {"dtype": str(vae.dtype), "ms": 1e3 * median, "frames_per_s": frames / median, "peak_gib": peak_gib(setup)}


def _t5(setup: Setup, prompts: int, tokens: int) -> Row:
    try:
        from transformers import T5Config, T5EncoderModel
    except ImportError as error:
        raise LeftOutError(f"no {error.name}") from error
    config = T5Config(**(T5_SMALL if setup.small else T5_XXL), feed_forward_proj="gated-gelu", dropout_rate=0.0)
    model = random_model(setup, lambda: T5EncoderModel(config))
    ids = torch.randint(3, config.vocab_size, (prompts, tokens), device=setup.device)

    @torch.no_grad()
    def step() -> None:
        model(ids)

    times = timed(setup, step, warm=1, repeats=8, seconds=5)
    median = statistics.median(times)
    return {"dtype": str(model.dtype), "ms": 1e3 * median, "tokens_per_s": prompts * tokens / median, "peak_gib": peak_gib(setup)}


def peak_gib(setup: Setup) -> float | None:
    """Most memory since the case began, on a GPU."""
    return torch.cuda.max_memory_allocated() / 2**30 if setup.on_gpu else None
