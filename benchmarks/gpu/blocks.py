"""One command on a CUDA machine: parity, speed, FP8, context-parallel kernels, decoding. Prints tables and writes one JSON file.

    python benchmarks/gpu/blocks.py --output $OUT [--videos clip.mp4 ...] [--only parity,speed,...]
    python benchmarks/gpu/blocks.py --device cpu --small --output /tmp/check      # the same code on a CPU, to check the benchmark itself

Sections (each fails alone and says why):
  parity   Transformer Engine and local layers, bf16, forward and gradients against the fp32 local model
  speed    forward + backward of a block stack of width 3072 on packs of 256px 129-frame clips: time, TFLOP/s, MFU, memory; bf16, FP8
  curves   200 steps of training on fixed data, bf16 and FP8 side by side
  ring     chunk attention with log-sum-exp merge against whole attention, forward and backward
  decode   DALI on the GPU: frames and means
It imports no PyAV, diffusers or tyro, which such a machine may lack.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import traceback
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megasora.config.errors import UserError
from megasora.config.pack_tokens import FP8_ROW_MULTIPLE
from megasora.config.schema import ModelConfig, OptimizerConfig, ParallelConfig, PrecisionConfig
from megasora.models.mmdit.build import build_chunks
from megasora.models.mmdit.canonical import canonical_parameters
from megasora.models.mmdit.model import MMDiT, ModelInputs
from megasora.models.mmdit.schedule import MicroBatch, run_schedule
from megasora.parallel import groups
from megasora.parallel.attention_kernels import ChunkResult, chunk_backward, chunk_forward, torch_attention
from megasora.parallel.groups import ParallelContext
from megasora.parallel.pack import Pack, PackSplit, SampleShape
from megasora.perf.flops import training_flops
from megasora.perf.peaks import peak_bf16_tflops
from megasora.training.microbatch import velocity_loss
from megasora.training.optimizer import build_optimizer, ensure_adam_state, refresh_masters, wrap_for_training

CLIP_256PX_129F = SampleShape(text_tokens=512, grid=(33, 16, 16))
WIDE = ModelConfig(num_double_blocks=4, num_single_blocks=8)
"""Width of the 11.9 B model; blocks in its 1 : 2 proportion."""
FP8_RECIPES = ("tensorwise", "blockwise", "delayed")


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What all sections share."""

    context: ParallelContext
    small: bool

    @property
    def device(self) -> torch.device:
        """Where everything runs."""
        return self.context.device


def fill_deterministically(chunk: MMDiT, model: ModelConfig) -> None:
    """The same small random weights in every precision and provider."""
    for _, parameter, pieces in canonical_parameters(chunk, model=model, tp_rank=0, tp_size=1):
        for piece in pieces:
            generator = torch.Generator().manual_seed(zlib.crc32(piece.key.encode()))  # hash() differs from run to run
            values = torch.randn(piece.shape, generator=generator) * (0.02 if len(piece.shape) == 2 else 0.01)
            piece.view(parameter.data).copy_(values + 1.0 if piece.key.endswith(".scale") else values)


def build(setup: Setup, model: ModelConfig, precision: PrecisionConfig) -> tuple[MMDiT, Any]:
    """A one-rank model."""
    chunks, config = build_chunks(model, ParallelConfig(), precision, context=setup.context)
    return chunks[0], config


def inputs_of(
    setup: Setup, model: ModelConfig, samples: Sequence[SampleShape], *, fp8: str, dtype: torch.dtype
) -> tuple[Pack, ModelInputs]:
    """Random inputs for a pack."""
    split = PackSplit(row_multiple=FP8_ROW_MULTIPLE[fp8])
    pack = Pack(samples, split=split, device=setup.device)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(setup.device, dtype)

    inputs = ModelInputs(
        img=draw(pack.num_video, model.in_channels),
        txt=draw(pack.num_text, model.text_dim),
        t=torch.full((len(samples),), 0.5, device=setup.device),
        y_vec=draw(len(samples), model.vec_dim),
        cond=draw(pack.num_video, model.cond_channels) if model.cond_embed else None,
    )
    return pack, inputs


def gap(a: Tensor, b: Tensor) -> float:
    """||a - b|| / ||b|| in fp64."""
    a, b = a.double(), b.double()
    return float((a - b).norm() / b.norm().clamp_min(1e-300))


def parity(setup: Setup) -> list[dict[str, Any]]:
    """Forward and gradients of each provider in bf16 against fp32 local layers."""
    base = ModelConfig(num_double_blocks=1, num_single_blocks=1, cond_embed=True)
    model = replace(base, hidden_size=256, num_attention_heads=2, ffn_hidden_size=1024) if setup.small else base
    samples = [SampleShape(text_tokens=64, grid=(3, 8, 8)), SampleShape(text_tokens=64, grid=(1, 16, 16))]

    def run(precision: PrecisionConfig) -> tuple[Tensor, dict[str, Tensor]]:
        chunk, config = build(setup, model, precision)
        fill_deterministically(chunk, model)
        for parameter in chunk.parameters():
            parameter.main_grad = torch.zeros_like(parameter, dtype=torch.float32)  # type: ignore[attr-defined]
            parameter.grad_added_to_main_grad = False  # type: ignore[attr-defined]
        pack, inputs = inputs_of(setup, model, samples, fp8=precision.fp8, dtype=config.params_dtype)
        output = chunk(inputs, pack)
        real = output[: sum(sample.video_tokens for sample in samples)].float()
        real.square().mean().backward()
        grads = {}
        for name, parameter in chunk.named_parameters():
            fused = parameter.main_grad.float()  # type: ignore[attr-defined]
            added = parameter.grad_added_to_main_grad  # type: ignore[attr-defined] # then .grad is a placeholder that nobody wrote
            grads[name] = fused if added or parameter.grad is None else fused + parameter.grad.float()
        return real.detach(), grads

    expected, expected_grads = run(PrecisionConfig(dtype="fp32", provider="local", attention="torch"))
    rows = []
    for name, precision in {
        "local bf16, torch attention": PrecisionConfig(dtype="bf16", provider="local", attention="torch"),
        "te bf16, te attention": PrecisionConfig(dtype="bf16", provider="te", attention="te"),
        "te bf16, flash attention": PrecisionConfig(dtype="bf16", provider="te", attention="flash"),
        **{f"te fp8 {recipe}": PrecisionConfig(dtype="bf16", provider="te", attention="te", fp8=recipe) for recipe in FP8_RECIPES},  # type: ignore[arg-type]
    }.items():
        row: dict[str, Any] = {"what": name}
        try:
            output, grads = run(precision)
            gaps = {key: gap(grads[key], value) for key, value in expected_grads.items()}
            row |= {"forward": gap(output, expected), "gradient_median": statistics.median(gaps.values())}
            row |= {"gradient_worst": max(gaps.values()), "worst": max(gaps, key=gaps.__getitem__)}
        except (UserError, RuntimeError, AssertionError) as error:
            row["failed"] = str(error).splitlines()[0][:200]
        rows.append(row)
    return rows


def timed(setup: Setup, step: Callable[[], None], *, warm: int, repeats: int) -> list[float]:
    """Seconds of each call, synchronised."""
    times = []
    for number in range(warm + repeats):
        torch.cuda.synchronize()
        started = time.perf_counter()
        step()
        torch.cuda.synchronize()
        if number >= warm:
            times.append(time.perf_counter() - started)
    return times


def speed(setup: Setup) -> list[dict[str, Any]]:
    """Forward + backward of the block stack; FLOPs count blocks only, as MFU does."""
    model = replace(WIDE, hidden_size=256, num_attention_heads=2, ffn_hidden_size=1024, num_double_blocks=1, num_single_blocks=2)
    model, clip, counts = (model, SampleShape(text_tokens=32, grid=(3, 8, 8)), (1, 2)) if setup.small else (WIDE, CLIP_256PX_129F, (1, 3))
    settings = [PrecisionConfig(dtype="bf16", provider="te", fp8=fp8) for fp8 in ("none", *FP8_RECIPES)]  # type: ignore[arg-type]
    rows = []
    for precision in [PrecisionConfig(dtype="bf16", provider="local"), *settings]:
        for count in counts:
            row: dict[str, Any] = {"provider": precision.provider, "fp8": precision.fp8, "samples": count, "tokens": count * clip.tokens}
            try:
                row |= _speed_of(setup, model, precision, [clip] * count)
            except (UserError, RuntimeError, AssertionError) as error:
                row["failed"] = str(error).splitlines()[0][:200]
            rows.append(row)
    return rows


def _speed_of(setup: Setup, model: ModelConfig, precision: PrecisionConfig, samples: list[SampleShape]) -> dict[str, Any]:
    chunk, config = build(setup, model, precision)
    fill_deterministically(chunk, model)
    for parameter in chunk.parameters():
        parameter.main_grad = torch.zeros_like(parameter, dtype=torch.float32)  # type: ignore[attr-defined]
        parameter.grad_added_to_main_grad = False  # type: ignore[attr-defined]
    pack, inputs = inputs_of(setup, model, samples, fp8=precision.fp8, dtype=config.params_dtype)
    if setup.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()

    def step() -> None:
        chunk(inputs, pack).float().square().mean().backward()
        for parameter in chunk.parameters():
            parameter.grad = None

    times = timed(setup, step, warm=1 if setup.small else 5, repeats=2 if setup.small else 20)
    flops = training_flops([sample.tokens for sample in samples], hidden_size=model.hidden_size, num_blocks=model.num_blocks)
    median = statistics.median(times)
    on_gpu = setup.device.type == "cuda"
    peak = peak_bf16_tflops(torch.cuda.get_device_name()) if on_gpu else None
    return {
        "ms_median": 1e3 * median,
        "ms_min": 1e3 * min(times),
        "ms_max": 1e3 * max(times),
        "tflops": flops / median / 1e12,
        "mfu": flops / median / 1e12 / peak if peak else None,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None,
    }


def curves(setup: Setup) -> list[dict[str, Any]]:
    """Training on eight fixed packs; the same data and weights for every recipe."""
    size = {"hidden_size": 256, "num_attention_heads": 2, "ffn_hidden_size": 1024}
    wide = {"hidden_size": 1024, "num_attention_heads": 8, "ffn_hidden_size": 4096}
    model = ModelConfig(num_double_blocks=2, num_single_blocks=4, **(size if setup.small else wide))  # type: ignore[arg-type]
    steps = 3 if setup.small else 200
    rows = []
    for fp8 in ("none", *FP8_RECIPES):
        row: dict[str, Any] = {"fp8": fp8, "steps": steps}
        try:
            provider = "local" if setup.device.type == "cpu" and fp8 == "none" else "te"
            row["losses"] = _curve(setup, model, PrecisionConfig(dtype="bf16", provider=provider, fp8=fp8), steps)  # type: ignore[arg-type]
            row["last"] = statistics.mean(row["losses"][-10:])
        except (UserError, RuntimeError, AssertionError) as error:
            row["failed"] = str(error).splitlines()[0][:200]
        rows.append(row)
    return rows


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
    target = torch.roll(inputs.img.float(), 1, 0)
    weight = torch.zeros(pack.num_video, device=setup.device)
    weight[: 2 * sample.video_tokens] = 1 / (sample.video_tokens * model.in_channels)
    batch = MicroBatch(pack=pack, inputs=inputs, target=target, weight=weight, num_counted=2)
    losses = []
    for _ in range(steps):
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


def ring(setup: Setup) -> list[dict[str, Any]]:
    """Two key chunks merged by log-sum-exp against whole attention."""
    tokens, heads, width = (256, 2, 64) if setup.small else (8960, 24, 128)
    dtype = torch.float32 if setup.device.type == "cpu" else torch.bfloat16
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(tokens, heads, width, generator=generator).to(setup.device, dtype) for _ in range(4))
    half = tokens // 2
    parts = [chunk_forward(q, k[cut], v[cut], q_lengths=[tokens], k_lengths=[half]) for cut in (slice(0, half), slice(half, None))]
    lse = torch.logaddexp(parts[0].lse, parts[1].lse)
    out = sum(part.out * torch.exp(part.lse - lse).unsqueeze(-1) for part in parts)
    assert isinstance(out, Tensor), "two parts make a tensor"
    merged = ChunkResult(out.to(dtype), lse)
    grads = [
        chunk_backward(grad, q, k[cut], v[cut], merged=merged, q_lengths=[tokens], k_lengths=[half])
        for cut in (slice(0, half), slice(half, None))
    ]
    leaves = [x.float().requires_grad_() for x in (q, k, v)]
    order = Pack([SampleShape(text_tokens=1, grid=(1, 1, tokens - 1))], split=PackSplit(), device=setup.device).attention_order([0])
    expected = torch_attention(leaves[0], leaves[1], leaves[2], order)
    expected.backward(grad.float())
    found = (grads[0][0].float() + grads[1][0].float(), torch.cat([g[1] for g in grads]), torch.cat([g[2] for g in grads]))
    gaps = [gap(a, b.grad) for a, b in zip(found, leaves, strict=True) if b.grad is not None]
    return [{"dtype": str(dtype), "forward": gap(merged.out, expected), "grad_q": gaps[0], "grad_k": gaps[1], "grad_v": gaps[2]}]


def decode(setup: Setup, videos: list[Path]) -> list[dict[str, Any]]:
    """DALI's decoder on the GPU (codec facts would need PyAV, so its operator is used directly)."""
    from nvidia.dali import fn, pipeline_def

    rows = []
    for path in videos:
        row: dict[str, Any] = {"file": path.name}
        try:

            @pipeline_def(batch_size=1, num_threads=1, device_id=0)  # type: ignore[untyped-decorator]
            def pipeline(path: Path = path) -> Any:
                content, _ = fn.readers.file(files=[str(path)])
                return fn.decoders.video(content, device="mixed", start_frame=0, sequence_length=8, pad_mode="none")

            built = pipeline()
            built.build()
            (output,) = built.run()
            frames = torch.utils.dlpack.from_dlpack(output[0])
            row |= {"frames": list(frames.shape), "mean": float(frames.float().mean())}
        except RuntimeError as error:
            row["failed"] = str(error).strip().splitlines()[0][:200]
        rows.append(row)
    return rows


def main() -> None:
    """Run the sections asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for blocks.json")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--small", action="store_true", help="toy sizes, to check the benchmark")
    parser.add_argument("--videos", type=Path, nargs="*", default=[])
    parser.add_argument("--only", default="parity,speed,curves,ring,decode")
    arguments = parser.parse_args()
    device = groups.choose_device(arguments.device)
    groups.start_world(device, timeout_minutes=10)
    context = groups.initialize(ParallelConfig(), device=device, num_attention_heads=24, seed=0)
    setup = Setup(context=context, small=arguments.small)
    sections: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "parity": lambda: parity(setup),
        "speed": lambda: speed(setup),
        "curves": lambda: curves(setup),
        "ring": lambda: ring(setup),
        "decode": lambda: decode(setup, arguments.videos),
    }
    result: dict[str, Any] = {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "date": time.strftime("%Y-%m-%d"),
    }
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name in arguments.only.split(","):
        print(f"== {name}", flush=True)
        try:
            result[name] = sections[name]()
        except Exception as error:  # noqa: BLE001 - one section's failure must not lose the others on a rented machine
            traceback.print_exc()
            result[name] = [{"failed": f"{type(error).__name__}: {error}"}]
        for row in result[name]:
            print("  " + "  ".join(f"{key} {_short(value)}" for key, value in row.items() if key != "losses"), flush=True)
        (arguments.output / "blocks.json").write_text(json.dumps(result, indent=1) + "\n")


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
