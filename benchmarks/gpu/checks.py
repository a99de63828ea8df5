"""Checks of numbers: parity of providers, curves, merged attention, decoding."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.rig import Setup, build, fill_deterministically, gap, inputs_of, prepare_gradients, timed
from benchmarks.gpu.table import Case, LeftOutError, Row
from megasora.config.schema import Fp8, ModelConfig, OptimizerConfig, ParallelConfig, PrecisionConfig
from megasora.models.mmdit.model import ModelInputs
from megasora.models.mmdit.schedule import MicroBatch, run_schedule
from megasora.parallel.attention_kernels import ChunkResult, chunk_backward, chunk_forward, torch_attention
from megasora.parallel.pack import Pack, PackSplit, SampleShape
from megasora.training.microbatch import velocity_loss
from megasora.training.optimizer import build_optimizer, ensure_adam_state, refresh_masters, wrap_for_training

FP8_RECIPES: tuple[Fp8, ...] = ("tensorwise", "blockwise", "delayed")
DELAYED_PASSES = 8
"""Delayed scaling starts at 1, where gradients of a mean are too small for FP8; each pass brings the next layer's scale."""
PARITY = {
    "local bf16, torch attention": PrecisionConfig(dtype="bf16", provider="local", attention="torch", kernels="torch"),
    "local bf16, torch attention, triton": PrecisionConfig(dtype="bf16", provider="local", attention="torch", kernels="triton"),
    "te bf16, te attention": PrecisionConfig(dtype="bf16", provider="te", attention="te"),
    "te bf16, flash attention": PrecisionConfig(dtype="bf16", provider="te", attention="flash"),
    **{f"te fp8 {recipe}": PrecisionConfig(dtype="bf16", provider="te", attention="te", fp8=recipe) for recipe in FP8_RECIPES},
}


def parity_cases(setup: Setup) -> Iterator[Case]:
    """Forward and gradients of each provider in bf16 against fp32 local layers with torch's kernels."""
    base = ModelConfig(num_double_blocks=1, num_single_blocks=1, cond_embed=True)
    model = replace(base, hidden_size=256, num_attention_heads=2, ffn_hidden_size=1024) if setup.small else base

    @cache
    def expected() -> tuple[Tensor, dict[str, Tensor]]:
        return _run(setup, model, PrecisionConfig(dtype="fp32", provider="local", attention="torch", kernels="torch"))

    for name, precision in PARITY.items():

        def measure(precision: PrecisionConfig = precision) -> Row:
            if precision.provider == "te" or precision.kernels == "triton":
                setup.need_cuda()
            output, grads = _run(setup, model, precision)
            gaps = {key: gap(grads[key], value) for key, value in expected()[1].items()}
            row: Row = {"forward": gap(output, expected()[0]), "gradient_median": statistics.median(gaps.values())}
            return row | {"gradient_worst": max(gaps.values()), "worst": max(gaps, key=gaps.__getitem__)}

        yield Case(labels={"what": name}, measure=measure)


def _run(setup: Setup, model: ModelConfig, precision: PrecisionConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """(output, gradients by parameter), fp32."""
    samples = [SampleShape(text_tokens=64, grid=(3, 8, 8)), SampleShape(text_tokens=64, grid=(1, 16, 16))]
    chunk, config = build(setup, model, precision)
    fill_deterministically(chunk, model)
    pack, inputs = inputs_of(setup, model, samples, fp8=precision.fp8, dtype=config.params_dtype)
    for _ in range(DELAYED_PASSES if precision.fp8 == "delayed" else 1):
        chunk.zero_grad()
        prepare_gradients(chunk)
        output = chunk(inputs, pack)
        real = output[: sum(sample.video_tokens for sample in samples)].float()
        real.square().mean().backward()
    grads = {}
    for name, parameter in chunk.named_parameters():
        fused = parameter.main_grad.float()  # type: ignore[attr-defined]
        added = parameter.grad_added_to_main_grad  # type: ignore[attr-defined] # then .grad is a placeholder that nobody wrote
        grads[name] = fused if added or parameter.grad is None else fused + parameter.grad.float()
    return real.detach(), grads


def curve_cases(setup: Setup) -> Iterator[Case]:
    """Training on tokens that are new in every step; the same data and weights for every recipe."""
    size = {"hidden_size": 256, "num_attention_heads": 2, "ffn_hidden_size": 1024}
    wide = {"hidden_size": 1024, "num_attention_heads": 8, "ffn_hidden_size": 4096}
    model = ModelConfig(num_double_blocks=2, num_single_blocks=4, **(size if setup.small else wide))  # type: ignore[arg-type]
    steps = 3 if setup.small else 200
    recipes: tuple[Fp8, ...] = ("none", *FP8_RECIPES)
    for fp8 in recipes:

        def measure(fp8: Fp8 = fp8) -> Row:
            if fp8 != "none":
                setup.need_cuda()
            losses = _curve(setup, model, PrecisionConfig(dtype="bf16", fp8=fp8), steps)
            return {"losses": losses, "first": losses[0], "last": statistics.mean(losses[-10:])}

        yield Case(labels={"fp8": fp8, "steps": steps}, measure=measure)


def _curve(setup: Setup, model: ModelConfig, precision: PrecisionConfig, steps: int) -> list[float]:
    chunk, config = build(setup, model, precision)
    fill_deterministically(chunk, model)
    parallel = ParallelConfig()
    wrapped = wrap_for_training([chunk], config=config, parallel=parallel, context=setup.context)
    optimizer = build_optimizer(wrapped, optimizer=OptimizerConfig(lr=1e-4), dtype=config.params_dtype)
    refresh_masters(optimizer)
    ensure_adam_state(optimizer, step=0)
    sample = SampleShape(text_tokens=64, grid=(3, 8, 8))
    pack, inputs = inputs_of(setup, model, [sample] * 2, fp8=precision.fp8, dtype=config.params_dtype)
    weight = torch.zeros(pack.num_video, device=setup.device)
    weight[: 2 * sample.video_tokens] = 1 / (sample.video_tokens * model.in_channels)
    losses = []
    for step in range(steps):
        batch = _fresh(inputs, pack, weight, seed=step)
        for ddp in wrapped:
            ddp.zero_grad_buffer()
        optimizer.zero_grad()
        reports = run_schedule(
            wrapped,
            [batch],
            config=config,
            context=setup.context,
            loss_function=lambda output, micro: velocity_loss(output, micro, context_rank=0),
        )
        optimizer.step()
        losses.append(float(reports[0]) / 2)
    return losses


def _fresh(inputs: ModelInputs, pack: Pack, weight: Tensor, *, seed: int) -> MicroBatch:
    """Other tokens in every step, so that nothing can be learnt by heart; to be predicted is the neighbour's token, and half the own."""
    generator = torch.Generator().manual_seed(seed)
    img = torch.randn(inputs.img.shape, generator=generator).to(inputs.img.device)
    target = torch.roll(img, 1, 0) + 0.5 * img
    return MicroBatch(pack=pack, inputs=replace(inputs, img=img.to(inputs.img.dtype)), target=target, weight=weight, num_counted=2)


def ring_cases(setup: Setup) -> Iterator[Case]:
    """Two key chunks merged by log-sum-exp against whole attention, with each of torch's kernels."""
    for kernel in ("cudnn", "flash"):
        yield Case(labels={"kernel": kernel}, measure=lambda kernel=kernel: _ring(setup, kernel))  # type: ignore[misc]


def _ring(setup: Setup, kernel: str) -> Row:
    if kernel == "cudnn":
        setup.need_cuda()
    enabled = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(kernel == "cudnn")
    try:
        return _ring_by_enabled(setup)
    finally:
        torch.backends.cuda.enable_cudnn_sdp(enabled)


def _ring_by_enabled(setup: Setup) -> Row:
    tokens, heads, width = (256, 2, 64) if setup.small else (8960, 24, 128)
    dtype = torch.float32 if setup.device.type == "cpu" else torch.bfloat16
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(tokens, heads, width, generator=generator).to(setup.device, dtype) for _ in range(4))
    half = tokens // 2
    cuts = (slice(0, half), slice(half, None))

    def forward(cut: slice) -> ChunkResult:
        return chunk_forward(q, k[cut], v[cut], q_lengths=[tokens], k_lengths=[half])

    parts = [forward(cut) for cut in cuts]
    lse = torch.logaddexp(parts[0].lse, parts[1].lse)
    out = sum(part.out * torch.exp(part.lse - lse).unsqueeze(-1) for part in parts)
    assert isinstance(out, Tensor), "two parts make a tensor"
    merged = ChunkResult(out.to(dtype), lse)

    def backward(cut: slice) -> tuple[Tensor, Tensor, Tensor]:
        return chunk_backward(grad, q, k[cut], v[cut], merged=merged, q_lengths=[tokens], k_lengths=[half])

    grads = [backward(cut) for cut in cuts]
    leaves = [x.float().requires_grad_() for x in (q, k, v)]
    order = Pack([SampleShape(text_tokens=1, grid=(1, 1, tokens - 1))], split=PackSplit(), device=setup.device).attention_order([0])
    expected = torch_attention(leaves[0], leaves[1], leaves[2], order)
    expected.backward(grad.float())
    found = (grads[0][0].float() + grads[1][0].float(), torch.cat([g[1] for g in grads]), torch.cat([g[2] for g in grads]))
    gaps = [gap(a, b.grad) for a, b in zip(found, leaves, strict=True) if b.grad is not None]
    flops = 4 * tokens * half * heads * width
    rates: Row = {}
    for name, times, call in (("forward", 1.0, forward), ("backward", 2.5, backward)):
        median = statistics.median(timed(setup, lambda call=call: call(cuts[0]), warm=1, repeats=5, seconds=1, batch=5))  # type: ignore[misc]
        rates |= {f"{name}_ms": 1e3 * median, f"{name}_tflops": times * flops / median / 1e12}
    return (
        {"dtype": str(dtype), "forward": gap(merged.out, expected)} | dict(zip(("grad_q", "grad_k", "grad_v"), gaps, strict=True)) | rates
    )


def decode_cases(setup: Setup, videos: list[Path]) -> Iterator[Case]:
    """DALI's decoder on the GPU (codec facts would need PyAV, so its operator is used directly)."""
    if not videos:
        yield Case(labels={}, measure=_without_videos)
    for path in videos:

        def measure(path: Path = path) -> Row:
            setup.need_cuda()
            return _decode(path) | _decode_ours(path)

        yield Case(labels={"file": path.name}, measure=measure)


def _without_videos() -> Row:
    raise LeftOutError("no --videos")


def _decode(path: Path) -> Row:
    try:
        from nvidia.dali import fn, pipeline_def
    except ImportError as error:
        raise LeftOutError("no nvidia.dali") from error

    @pipeline_def(batch_size=1, num_threads=1, device_id=0)  # type: ignore[untyped-decorator]
    def pipeline() -> Any:
        content, _ = fn.readers.file(files=[str(path)])
        return fn.decoders.video(content, device="mixed", start_frame=0, sequence_length=8, pad_mode="none")

    built = pipeline()
    built.build()
    (output,) = built.run()
    frames = torch.utils.dlpack.from_dlpack(output[0])
    return {"frames": list(frames.shape), "mean": float(frames.float().mean())}


def _decode_ours(path: Path) -> Row:
    """Our decoder on the GPU against PyAV's, where PyAV is there: mean difference in levels of 255."""
    if find_spec("av") is None:
        return {}
    from megasora.data.decoding.contract import DecodeRequest
    from megasora.data.decoding.dali import DaliDecoder
    from megasora.data.decoding.pyav import PyAVDecoder

    request = DecodeRequest(path=str(path), start=1, stride=2, num_frames=5, height=64, width=80)
    found = DaliDecoder(device=torch.device("cuda")).decode(request)
    return {"levels_from_pyav": float((found.cpu() - PyAVDecoder().decode(request)).abs().mean()) * 127.5}
