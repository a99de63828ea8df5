"""Single operations: the kernels between matrix products, attention, the optimizer's step."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.rig import Load, Setup, build, fill_on_device, gap, timed
from benchmarks.gpu.table import Case, Row
from megasora.config.schema import ModelConfig, MomentDtype, OptimizerConfig, ParallelConfig, PrecisionConfig
from megasora.models.mmdit.kernels.composed import COMPOSED
from megasora.models.mmdit.kernels.contract import Kernels
from megasora.models.mmdit.kernels.fused import FUSED
from megasora.models.mmdit.kernels.operators import BYTES_MOVED
from megasora.parallel.attention_kernels import KernelName, choose_kernel
from megasora.parallel.pack import Pack, PackSplit, Rows, Runs
from megasora.perf.memory_traffic import MemoryTraffic
from megasora.training.moments import MOMENTS
from megasora.training.optimizer import build_optimizer, ensure_adam_state, owned_shards, refresh_masters, wrap_for_training

EPS = 1e-6
ADAM_BYTES = 4 + 30
"""Per parameter: 4 read by the gradient's norm; by Adam gradient 4, master and moments read and written 24, bf16 parameter written 2."""
Operation = Callable[[Kernels, "Inputs"], list[Tensor]]


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Random tensors of one single block's sizes, in bf16 or the same values in fp32."""

    tensors: dict[str, Tensor]
    runs: Runs
    rows: Rows

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def like(self, *names: str) -> list[Tensor]:
        """Zeros of the same shapes."""
        return [torch.zeros_like(self.tensors[name]) for name in names]

    def wide(self) -> Inputs:
        """In fp32."""
        return replace(self, tensors={name: tensor.float() for name, tensor in self.tensors.items()})


def make_inputs(setup: Setup, load: Load, model: ModelConfig) -> Inputs:
    """Inputs of every operation."""
    pack = Pack(load.samples, split=PackSplit(), device=setup.device)
    pack.prepare([[0]])
    s, n, hidden, heads, size = load.tokens, load.count, model.hidden_size, model.num_attention_heads, model.head_dim
    torch.manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, device=setup.device, dtype=torch.bfloat16)

    tensors = {name: draw(s, hidden) for name in ("x", "residual", "branch", "grad", "passed")}
    tensors |= {name: draw(n, hidden) for name in ("shift", "scale", "gate")}
    tensors |= {"qkv": draw(s, 3, heads, size), "mlp": draw(s, model.ffn_hidden_size), "collected": draw(s, hidden + model.ffn_hidden_size)}
    tensors |= {name: draw(1, s, heads, size) for name in ("q", "k", "v")}
    tensors |= {name: draw(size) for name in ("q_weight", "k_weight")}
    angles = torch.rand(s, 1, size // 2, device=setup.device) * 6.28
    tensors |= {"cos": angles.cos(), "sin": angles.sin()}
    runs = pack.joint_runs
    _ = runs.tile_one_hot, runs.one_hot  # made once for all blocks, so no part of an operation's time or bytes
    wide = tensors["x"].float()
    mean = wide.mean(-1, keepdim=True)
    tensors |= {"mean": mean, "rstd": torch.rsqrt((wide - mean).square().mean(-1, keepdim=True) + EPS)}
    return Inputs(tensors=tensors, runs=runs, rows=pack.head_rows([0]).joint)


def _norm_modulate(kernels: Kernels, i: Inputs) -> list[Tensor]:
    return [kernels.norm_modulate(i["x"], shift=i["shift"], scale=i["scale"], runs=i.runs, eps=EPS).out]


def _norm_modulate_backward(kernels: Kernels, i: Inputs) -> list[Tensor]:
    statistics_ = {"mean": i["mean"], "rstd": i["rstd"]}
    return list(kernels.norm_modulate_backward(i["grad"], passed=i["passed"], x=i["x"], scale=i["scale"], runs=i.runs, **statistics_))


def _gated_residual(kernels: Kernels, i: Inputs) -> list[Tensor]:
    return [kernels.gated_residual(i["residual"], gate=i["gate"], branch=i["branch"], runs=i.runs)]


def _gated_residual_backward(kernels: Kernels, i: Inputs) -> list[Tensor]:
    return list(kernels.gated_residual_backward(i["grad"], gate=i["gate"], branch=i["branch"], runs=i.runs))


def _gated_norm_modulate(kernels: Kernels, i: Inputs) -> list[Tensor]:
    rows = {name: i[name] for name in ("gate", "branch", "shift", "scale")}
    tokens, normed = kernels.gated_norm_modulate(i["residual"], runs=i.runs, eps=EPS, **rows)
    return [tokens, normed.out]


def _gated_norm_modulate_backward(kernels: Kernels, i: Inputs) -> list[Tensor]:
    rows = {name: i[name] for name in ("passed", "branch", "mean", "rstd", "gate", "scale")}
    normed, gated = kernels.gated_norm_modulate_backward(i["grad"], tokens=i["x"], runs=i.runs, **rows)
    return [*normed, *gated]


def _place_heads(kernels: Kernels, i: Inputs) -> list[Tensor]:
    q, k, v = (torch.empty_like(i[name]) for name in ("q", "k", "v"))
    weights, turn = (i["q_weight"], i["k_weight"]), {"cos": i["cos"], "sin": i["sin"]}
    kernels.place_heads(i["qkv"], weights=weights, rows=i.rows, eps=EPS, out=(q, k, v), **turn)
    return [q, k, v]


def _place_heads_backward(kernels: Kernels, i: Inputs) -> list[Tensor]:
    out = torch.empty_like(i["qkv"])
    grads, weights, turn = (i["q"], i["k"], i["v"]), (i["q_weight"], i["k_weight"]), {"cos": i["cos"], "sin": i["sin"]}
    return [out, *kernels.place_heads_backward(grads, qkv=i["qkv"], weights=weights, rows=i.rows, eps=EPS, out=out, **turn)]


def _collect_heads(kernels: Kernels, i: Inputs) -> list[Tensor]:
    return [kernels.collect_heads(i["q"], mlp=i["mlp"], rows=i.rows)]


def _collect_heads_backward(kernels: Kernels, i: Inputs) -> list[Tensor]:
    attended, mlp = torch.empty_like(i["q"]), torch.empty_like(i["mlp"])
    kernels.collect_heads_backward(i["collected"], mlp=i["mlp"], rows=i.rows, attended_out=attended, mlp_out=mlp)
    return [attended, mlp]


OPERATIONS: dict[str, Operation] = {
    function.__name__[1:]: function
    for function in (
        _norm_modulate,
        _norm_modulate_backward,
        _gated_residual,
        _gated_residual_backward,
        _gated_norm_modulate,
        _gated_norm_modulate_backward,
        _place_heads,
        _place_heads_backward,
        _collect_heads,
        _collect_heads_backward,
    )
}
"""One for each method of the contract."""


def kernel_cases(setup: Setup) -> Iterator[Case]:
    """Each operation with each implementation."""
    load = setup.loads[0]
    made: list[Inputs] = []  # for all cases; made by the first that runs
    for name, operation in OPERATIONS.items():
        for provider, kernels in (("torch", COMPOSED), ("triton", FUSED)):

            def measure(operation: Operation = operation, kernels: Kernels = kernels, provider: str = provider) -> Row:
                if provider == "triton":
                    setup.need_cuda()
                if not made:
                    made.append(make_inputs(setup, load, setup.model))
                return _operation(setup, operation, kernels, made[0])

            yield Case(labels={"operation": name, "kernels": provider, "tokens": load.tokens}, measure=measure)


@torch.no_grad()
def _operation(setup: Setup, operation: Operation, kernels: Kernels, inputs: Inputs) -> Row:
    with MemoryTraffic(BYTES_MOVED) as traffic:
        results = operation(kernels, inputs)
    gaps = [gap(result, value) for result, value in zip(results, operation(COMPOSED, inputs.wide()), strict=True)]
    del results
    median = statistics.median(timed(setup, lambda: operation(kernels, inputs), warm=1, repeats=5, seconds=1, batch=10))
    return {
        "ms": 1e3 * median,
        "gb_computed": traffic.total / 1e9,
        "tb_per_s": traffic.total / median / 1e12,
        "worst_gap_to_fp32": max(gaps),
    }


def attention_cases(setup: Setup) -> Iterator[Case]:
    """Each kernel at both resolutions."""
    names: tuple[KernelName, ...] = ("te", "flash", "torch")
    for load in setup.loads:
        for name in names:
            for backward in (False, True):

                def measure(load: Load = load, name: KernelName = name, backward: bool = backward) -> Row:
                    return _attention(setup, load, name, backward=backward)

                what = "forward + backward" if backward else "forward"
                yield Case(
                    labels={"size": load.name, "clips": load.count, "tokens": load.tokens, "kernel": name, "what": what}, measure=measure
                )


def _attention(setup: Setup, load: Load, name: KernelName, *, backward: bool) -> Row:
    if name != "torch":
        setup.need_cuda()
    heads, size = setup.model.num_attention_heads, setup.model.head_dim
    kernel = choose_kernel(name, num_heads=heads, head_dim=size)
    order = Pack(load.samples, split=PackSplit(), device=setup.device).attention_order([0])
    shape = (load.tokens, heads, size)
    q, k, v = (torch.randn(shape, device=setup.device, dtype=torch.bfloat16).requires_grad_(backward) for _ in range(3))
    grad = torch.randn(shape, device=setup.device, dtype=torch.bfloat16)

    def step() -> None:
        with torch.set_grad_enabled(backward):
            out = kernel(q, k, v, order)
        if backward:
            torch.autograd.grad(out, (q, k, v), grad)

    times = timed(setup, step, warm=1, repeats=5, seconds=2, batch=3)
    median = statistics.median(times)
    flops = 4 * sum(length**2 for length in order.lengths) * heads * size * (3.5 if backward else 1)
    return {"ms": 1e3 * median, "ms_min": 1e3 * min(times), "tflops": flops / median / 1e12}


def adam_cases(setup: Setup) -> Iterator[Case]:
    """Half the stack's parameters on one rank: on more, each holds its part."""
    model = _half(setup)
    labels: Row = {"blocks": f"{model.num_double_blocks} + {model.num_single_blocks}"}
    yield Case(labels=labels, measure=lambda: _adam(setup, model, OptimizerConfig(lr=1e-4)))


def state_cases(setup: Setup) -> Iterator[Case]:
    """The same with moments in each format."""
    model = _half(setup)
    formats: tuple[tuple[MomentDtype, MomentDtype], ...] = (("fp32", "fp32"), ("bf16", "bf16"), ("bf16", "fp16"), ("fp16", "fp16"))
    for first, second in formats:

        def measure(first: MomentDtype = first, second: MomentDtype = second) -> Row:
            settings = OptimizerConfig(lr=1e-4, beta2=0.99, eps=1e-8, exp_avg_dtype=first, exp_avg_sq_dtype=second)
            return _adam(setup, model, settings)

        yield Case(labels={"exp_avg": first, "exp_avg_sq": second}, measure=measure)


def _half(setup: Setup) -> ModelConfig:
    model = setup.model
    blocks = {"num_double_blocks": max(1, model.num_double_blocks // 2), "num_single_blocks": model.num_single_blocks // 2}
    return replace(model, **blocks)  # type: ignore[arg-type]


def _adam(setup: Setup, model: ModelConfig, settings: OptimizerConfig) -> Row:
    chunk, config = build(setup, model, PrecisionConfig(dtype="bf16"))
    fill_on_device(chunk)
    wrapped = wrap_for_training([chunk], config=config, parallel=ParallelConfig(), context=setup.context)
    optimizer: Any = build_optimizer(wrapped, optimizer=settings, dtype=config.params_dtype)
    refresh_masters(optimizer)
    ensure_adam_state(optimizer, step=0)
    for parameter in chunk.parameters():
        parameter.main_grad.normal_(std=1e-4)  # type: ignore[attr-defined]
    number = sum(parameter.numel() for parameter in chunk.parameters())
    held = torch.cuda.memory_allocated() if setup.on_gpu else 0
    times = timed(setup, optimizer.step, warm=2, repeats=10, seconds=5)
    beyond = (torch.cuda.max_memory_allocated() - held) / number if setup.on_gpu else None
    moments = sum(shard.state[name].nbytes for shard in owned_shards(optimizer) for name in MOMENTS)
    median = statistics.median(times)
    return {
        "optimizer": type(getattr(optimizer, "chained_optimizers", [optimizer])[0].optimizer).__module__,
        "parameters": number,
        "moment_bytes_each": moments / number,
        "more_bytes_in_a_step_each": beyond,
        "ms": 1e3 * median,
        "ms_min": 1e3 * min(times),
        "gb_computed": ADAM_BYTES * number / 1e9,
        "gb_per_s": ADAM_BYTES * number / median / 1e9,
    }
