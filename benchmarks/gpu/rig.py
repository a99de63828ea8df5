"""What the sections share: the device, models, inputs, timing."""

from __future__ import annotations

import gc
import importlib
import importlib.metadata
import importlib.util
import subprocess
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.table import LeftOutError, Row
from megasora.config.pack_tokens import FP8_ROW_MULTIPLE
from megasora.config.schema import ModelConfig, ParallelConfig, PrecisionConfig
from megasora.models.mmdit.build import build_chunks
from megasora.models.mmdit.canonical import canonical_parameters
from megasora.models.mmdit.model import MMDiT, ModelInputs
from megasora.parallel.groups import ParallelContext
from megasora.parallel.pack import Pack, PackSplit, SampleShape

PACKAGES = ("torch", "transformer-engine", "triton", "flash-attn", "megatron-core", "diffusers", "transformers")
WIDE = ModelConfig(num_double_blocks=4, num_single_blocks=8)
"""Width of the 11.9 B model; blocks in its 1 : 2 proportion."""
SMALL = replace(WIDE, hidden_size=256, num_attention_heads=2, ffn_hidden_size=1024, num_double_blocks=1, num_single_blocks=2)


@dataclass(frozen=True, kw_only=True)
class Load:
    """A pack of equal clips."""

    name: str
    clip: SampleShape
    count: int

    @property
    def samples(self) -> list[SampleShape]:
        """Of the pack."""
        return [self.clip] * self.count

    @property
    def tokens(self) -> int:
        """Text and video."""
        return self.count * self.clip.tokens


LOADS = (
    Load(name="256px", clip=SampleShape(text_tokens=512, grid=(33, 16, 16)), count=6),
    Load(name="768px", clip=SampleShape(text_tokens=512, grid=(33, 48, 48)), count=1),
)
"""129-frame clips: 53,760 and 76,544 tokens."""
SMALL_LOADS = (
    Load(name="toy pack", clip=SampleShape(text_tokens=32, grid=(3, 4, 4)), count=2),
    Load(name="toy clip", clip=SampleShape(text_tokens=32, grid=(3, 8, 8)), count=1),
)


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What all sections share."""

    context: ParallelContext
    small: bool

    @property
    def device(self) -> torch.device:
        """Where everything runs."""
        return self.context.device

    @property
    def on_gpu(self) -> bool:
        """Whether that is CUDA."""
        return self.device.type == "cuda"

    @property
    def loads(self) -> tuple[Load, ...]:
        """Packs of the two resolutions."""
        return SMALL_LOADS if self.small else LOADS

    @property
    def model(self) -> ModelConfig:
        """The block stack."""
        return SMALL if self.small else WIDE

    def need_cuda(self) -> None:
        """Raises LeftOutError on a CPU."""
        if not self.on_gpu:
            raise LeftOutError("needs CUDA")


def versions(device: torch.device) -> Row:
    """GPU, driver and packages, for the table's header."""
    found: Row = {"device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu", "driver": "none"}
    if device.type == "cuda":
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            found["driver"] = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()[0]
        except (OSError, subprocess.SubprocessError, IndexError) as error:
            found["driver"] = f"unknown ({type(error).__name__} from nvidia-smi)"
        found["CUDA"] = torch.version.cuda
    return found | {package: _version(package) for package in PACKAGES}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        pass
    module = package.replace("-", "_")
    if importlib.util.find_spec(module) is None:
        return "not installed"
    try:
        return str(getattr(importlib.import_module(module), "__version__", "unknown"))
    except Exception as error:  # noqa: BLE001 - a package that does not import is a fact for the table
        return f"does not import ({type(error).__name__})"


def fill_deterministically(chunk: MMDiT, model: ModelConfig) -> None:
    """The same small random weights in every precision and provider; drawn on the host, slow for large models."""
    for _, parameter, pieces in canonical_parameters(chunk, model=model, tp_rank=0, tp_size=1):
        for piece in pieces:
            generator = torch.Generator().manual_seed(zlib.crc32(piece.key.encode()))  # hash() differs from run to run
            values = torch.randn(piece.shape, generator=generator) * (0.02 if len(piece.shape) == 2 else 0.01)
            piece.view(parameter.data).copy_(values + 1.0 if piece.key.endswith(".scale") else values)


def fill_on_device(chunk: MMDiT) -> None:
    """Small random weights for timing, drawn where they live; scales of norms are 1."""
    for name, parameter in chunk.named_parameters():
        if "layernorm" in name:
            parameter.data.fill_(1.0)
        else:
            parameter.data.normal_(std=0.02)


def prepare_gradients(chunk: MMDiT) -> None:
    """What Megatron's DDP would set: fp32 sums of gradients."""
    for parameter in chunk.parameters():
        parameter.main_grad = torch.zeros_like(parameter, dtype=torch.float32)  # type: ignore[attr-defined]
        parameter.grad_added_to_main_grad = False  # type: ignore[attr-defined]


def build(setup: Setup, model: ModelConfig, precision: PrecisionConfig, parallel: ParallelConfig | None = None) -> tuple[MMDiT, Any]:
    """A one-rank model."""
    chunks, config = build_chunks(model, parallel or ParallelConfig(), precision, context=setup.context)
    return chunks[0], config


def inputs_of(
    setup: Setup, model: ModelConfig, samples: Sequence[SampleShape], *, fp8: str, dtype: torch.dtype
) -> tuple[Pack, ModelInputs]:
    """Random inputs for a pack, the same whatever its padding, which is zero."""
    split = PackSplit(row_multiple=FP8_ROW_MULTIPLE[fp8])
    pack = Pack(samples, split=split, device=setup.device)
    generator = torch.Generator().manual_seed(0)

    def draw(rows: int, channels: int, *, padded: int) -> Tensor:
        values = torch.randn(rows, channels, generator=generator).to(setup.device, dtype)
        return torch.nn.functional.pad(values, (0, 0, 0, padded - rows))

    video, text, number = sum(sample.video_tokens for sample in samples), sum(sample.text_tokens for sample in samples), len(samples)
    inputs = ModelInputs(
        img=draw(video, model.in_channels, padded=pack.num_video),
        txt=draw(text, model.text_dim, padded=pack.num_text),
        t=torch.full((number,), 0.5, device=setup.device),
        y_vec=draw(number, model.vec_dim, padded=number),
        cond=draw(video, model.cond_channels, padded=pack.num_video) if model.cond_embed else None,
    )
    return pack, inputs


def gap(a: Tensor, b: Tensor) -> float:
    """||a - b|| / ||b|| in fp64."""
    a, b = a.double(), b.double()
    return float((a - b).norm() / b.norm().clamp_min(1e-300))


def timed(setup: Setup, step: Callable[[], object], *, warm: int, repeats: int, seconds: float, batch: int = 1) -> list[float]:
    """Seconds of a call, from `repeats` batches of calls with the host waiting between batches.

    Once `seconds` are spent three batches will do; toy sizes run two. In a batch launches are hidden behind what runs.
    """
    warm, repeats = (1, 2) if setup.small else (warm, repeats)
    times: list[float] = []
    for number in range(warm + repeats):
        synchronize(setup)
        started = time.perf_counter()
        for _ in range(batch):
            step()
        synchronize(setup)
        if number >= warm:
            times.append((time.perf_counter() - started) / batch)
        if len(times) >= 3 and batch * sum(times) > seconds:
            break
    return times


def synchronize(setup: Setup) -> None:
    """Wait for the device."""
    if setup.on_gpu:
        torch.cuda.synchronize()


def clear(setup: Setup) -> None:
    """Give a case's memory back before the next.

    Raises:
        RuntimeError: the device is lost to this process.
    """
    gc.collect()
    if setup.on_gpu:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
