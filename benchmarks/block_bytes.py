"""Bytes a block moves outside matrix products and attention, and the time of a block that follows from them.

    python benchmarks/block_bytes.py [--samples 1 6] [--json]

Counted on fake tensors at the width of the 11.9 B model and 129-frame clips of 256px, forward and backward, with torch's operations and
with Triton's. U is one pass over the tokens, S x H x 2 bytes. Linear layers stand in as Transformer Engine's: bias, its gradient and the
accumulation of the weight's gradient happen in the product's epilogue. The milliseconds are computed, not measured: products at 720
TFLOP/s, attention at 660 forward and 530 backward, bytes at 4.1 TB/s (assumed for an H200). No GPU is needed.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from typing import Any
from unittest.mock import Mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from megasora.config.schema import ModelConfig
from megasora.models.mmdit.blocks import DoubleBlock, SingleBlock
from megasora.models.mmdit.kernels.composed import COMPOSED
from megasora.models.mmdit.kernels.contract import Kernels
from megasora.models.mmdit.kernels.fused import FUSED
from megasora.models.mmdit.kernels.operators import BYTES_MOVED
from megasora.models.mmdit.recompute import Seams
from megasora.models.mmdit.rotary import Rotation, StreamRotations
from megasora.parallel.pack import HeadRows, Pack, PackSplit, SampleShape
from megasora.perf.memory_traffic import MemoryTraffic

MODEL = ModelConfig()
CLIP = SampleShape(text_tokens=512, grid=(33, 16, 16))
PRODUCT_FLOPS, ATTENTION_FLOPS, BANDWIDTH = 720e12, (660e12, 530e12), 4.1e12
KERNELS: dict[str, Kernels] = {"torch": COMPOSED, "triton": FUSED}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One block, forward and backward."""

    block: str
    kernels: str
    samples: int
    tokens: int
    forward_passes: float
    """U."""
    backward_passes: float
    operations: dict[str, float]
    """U by operation."""
    products_ms: float
    attention_ms: float
    memory_ms: float

    @property
    def passes(self) -> float:
        """U, both ways."""
        return self.forward_passes + self.backward_passes


class _Product(torch.autograd.Function):
    """A linear layer whose bias and weight gradient cost nothing beside its products."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.addmm(bias, x, weight.t())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return grad @ weight, grad.t() @ x, grad.new_empty(weight.shape[0])


class _Linear(nn.Module):
    def __init__(self, input_size: int, output_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(output_size, input_size, dtype=torch.bfloat16))
        self.bias = nn.Parameter(torch.empty(output_size, dtype=torch.bfloat16))

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return _Product.apply(x, self.weight, self.bias), None


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v)
        return torch.empty_like(q)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors)


class _Attention:
    """One rank's attention, whose kernel moves nothing that is counted."""

    num_groups = 1

    def __init__(self, rows: HeadRows) -> None:
        self._rows = rows

    def rows(self, pack: Pack) -> HeadRows:
        return self._rows

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, pack: Pack) -> Tensor:
        return _Attend.apply(q, k, v)


def layers_of(kernels: Kernels) -> Any:
    """A factory of layers that count as Transformer Engine's."""
    group = Mock(size=lambda: 1)
    config = Mock(sequence_parallel=False, use_cpu_initialization=True, params_dtype=torch.bfloat16)
    factory = Mock(config=config, tp_group=group, kernels=kernels)
    factory.column = factory.row = _Linear
    factory.on_samples = lambda input_size, output_size, config: _Linear(input_size, output_size)
    return factory


def count(block: str, kernels: str, samples: int, *, clip: SampleShape = CLIP, model: ModelConfig = MODEL) -> Row:
    """Forward and backward of one block over a pack of so many clips."""
    pack = Pack([clip] * samples, split=PackSplit())
    pack.prepare([[0]])
    for runs in (pack.text_runs, pack.video_runs, pack.joint_runs):
        _ = runs.tile_one_hot, runs.one_hot  # made once for all blocks
    attention = _Attention(pack.head_rows([0]))
    with FakeTensorMode(allow_non_fake_inputs=True):
        made = (SingleBlock if block == "single" else DoubleBlock)(
            model, layers=layers_of(KERNELS[kernels]), attention=attention, seams=Seams()
        )  # type: ignore[arg-type]
        share, video = pack.num_text + pack.num_video, pack.num_video

        def tokens(number: int) -> Tensor:
            return torch.empty(number, model.hidden_size, dtype=torch.bfloat16, requires_grad=True)

        def rotation(number: int) -> Rotation:
            return Rotation(*(torch.empty(number, 1, model.head_dim // 2) for _ in range(2)))

        rotations = StreamRotations(joint=rotation(share), txt=rotation(pack.num_text), img=rotation(video))
        vec = tokens(samples)
        inputs = (tokens(share),) if block == "single" else (tokens(pack.num_text), tokens(video))
        with MemoryTraffic(BYTES_MOVED) as forward:
            outputs = made(*inputs, vec, rotations, pack)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        grads = [torch.empty_like(output) for output in outputs]
        with MemoryTraffic(BYTES_MOVED) as backward:
            torch.autograd.backward(outputs, grads)
    unit = share * model.hidden_size * 2
    attention_flops = 4 * sum(sample.tokens**2 for sample in pack.samples) * model.hidden_size
    return Row(
        block=block,
        kernels=kernels,
        samples=samples,
        tokens=share,
        forward_passes=forward.total / unit,
        backward_passes=backward.total / unit,
        operations={name: moved / unit for name, moved in (forward.bytes + backward.bytes).most_common()},
        products_ms=(forward.product_flops + backward.product_flops) / PRODUCT_FLOPS * 1e3,
        attention_ms=(attention_flops / ATTENTION_FLOPS[0] + 2.5 * attention_flops / ATTENTION_FLOPS[1]) * 1e3,
        memory_ms=(forward.total + backward.total) / BANDWIDTH * 1e3,
    )


def main() -> None:
    """Count and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, nargs="+", default=[1, 6])
    parser.add_argument("--json", action="store_true", help="only the JSON line")
    arguments = parser.parse_args()
    rows = [count(block, name, samples) for block in ("single", "double") for samples in arguments.samples for name in KERNELS]
    if not arguments.json:
        for row in rows:
            print(
                f"{row.block}  {row.samples} clip(s)  {row.kernels:<6}  {row.forward_passes:6.1f} + {row.backward_passes:6.1f} = "
                f"{row.passes:6.1f} U   products {row.products_ms:5.1f} ms  attention {row.attention_ms:5.1f} ms  "
                f"memory {row.memory_ms:5.1f} ms (computed)"
            )
            print("    " + "  ".join(f"{name} {passes:.2f}" for name, passes in row.operations.items() if passes >= 0.05))
    print(json.dumps({"passes": {f"{r.block} {r.samples} {r.kernels}": r.passes for r in rows}, "rows": [asdict(r) for r in rows]}))


if __name__ == "__main__":
    main()
