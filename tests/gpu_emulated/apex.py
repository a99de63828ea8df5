"""apex (NVIDIA/apex) as far as Megatron-core 0.16.1 takes it: FusedAdam, the two functions of `amp_C` beside it, and the extension that
adds a weight's gradient to `main_grad` inside the product. Written from its interface; computes in plain torch, like `extension`.

Its FusedAdam counts steps in its parameter groups, and only once it has stepped; torch's AdamW counts for each parameter.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tests.gpu_emulated.extension import CALLS, Call, RefusingModule, multi_tensor_adam, multi_tensor_l2norm, multi_tensor_scale

_CHUNK = 2048 * 32


class MultiTensorApply:
    """Calls an operation on lists of tensors."""

    available = True

    def __call__(self, op: Callable[..., Any], noop_flag: Tensor, lists: Sequence[Sequence[Tensor]], *arguments: Any) -> Any:
        """The operation's answer."""
        return op(_CHUNK, noop_flag, lists, *arguments)


apply = MultiTensorApply()


class FusedAdam(torch.optim.Optimizer):
    """Adam over all tensors of a group at once; apex/optimizers/fused_adam.py without capture and master weights."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "bias_correction": bias_correction, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.adam_w_mode = int(adam_w_mode)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One step of every group that has gradients."""
        assert closure is None, "Megatron gives none"
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            for parameter in parameters:
                assert parameter.is_cuda, "amp_C takes CUDA tensors"
                if not self.state[parameter]:
                    self.state[parameter] = {name: torch.zeros_like(parameter.data) for name in ("exp_avg", "exp_avg_sq")}
            states = [self.state[parameter] for parameter in parameters]
            lists = [
                [parameter.grad for parameter in parameters],
                [parameter.data for parameter in parameters],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
            ]
            settings = (group["lr"], *group["betas"], group["eps"], group["step"], self.adam_w_mode, int(group["bias_correction"]))
            apply(multi_tensor_adam, torch.zeros(1, dtype=torch.int), lists, *settings, group["weight_decay"])


def wgrad_gemm_accum_fp32(inputs: Tensor, grad_output: Tensor, main_grad: Tensor) -> None:
    """main_grad += grad_output^T inputs; logged, so that a test sees whether anything asked for it."""
    CALLS.append(Call("fused_weight_gradient", tuple(main_grad.shape)))
    main_grad.add_(grad_output.float().t() @ inputs.float())


def install() -> None:
    """Make apex and its extensions importable; what is not here refuses when it is called, submodules do not exist."""
    apex, optimizers, applier = (types.ModuleType(name) for name in ("apex", "apex.optimizers", "apex.multi_tensor_apply"))
    apex.__path__ = []  # a package with no folder: Megatron asks for apex.contrib and apex.normalization too and goes on without
    parts: dict[types.ModuleType, dict[str, Any]] = {
        apex: {"optimizers": optimizers, "multi_tensor_apply": applier},
        optimizers: {"FusedAdam": FusedAdam, "FusedSGD": type("FusedSGD", (), {})},
        applier: {"multi_tensor_applier": apply},
        RefusingModule("amp_C"): {"multi_tensor_l2norm": multi_tensor_l2norm, "multi_tensor_scale": multi_tensor_scale},
        RefusingModule("fused_weight_gradient_mlp_cuda"): {"wgrad_gemm_accum_fp32": wgrad_gemm_accum_fp32},
    }
    for module, names in parts.items():
        for name, value in names.items():
            setattr(module, name, value)
        sys.modules[module.__name__] = module
