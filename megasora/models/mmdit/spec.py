"""Layer specs: which linear layers the MMDiT is built from. Models never ask which provider they got.

`local` is Megatron-core's own (CPU and CUDA; `local_linear`), `te` Transformer Engine through Megatron-core's adapters (CUDA).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from megasora.config.errors import UserError
from megasora.models.mmdit.kernels.contract import Kernels
from megasora.models.mmdit.local_linear import LocalColumnParallelLinear, LocalRowParallelLinear

ProviderName = Literal["te", "local"]
ModuleT = TypeVar("ModuleT", bound=nn.Module)


@dataclass(frozen=True, kw_only=True)
class MMDiTSubmodules:
    """Classes of the two parallel linear layers of a block."""

    column_parallel_linear: type[nn.Module]
    row_parallel_linear: type[nn.Module]


def submodules_of(provider: ProviderName) -> MMDiTSubmodules:
    """Layer classes of a provider.

    Raises:
        UserError: Transformer Engine is asked for and not installed.
    """
    if provider == "local":
        return MMDiTSubmodules(column_parallel_linear=LocalColumnParallelLinear, row_parallel_linear=LocalRowParallelLinear)
    from megatron.core.extensions import transformer_engine as te

    if not te.HAVE_TE:
        raise UserError('provider te needs Transformer Engine on CUDA: pip install "megasora[gpu]", or use --precision.provider local')
    return MMDiTSubmodules(column_parallel_linear=te.TEColumnParallelLinear, row_parallel_linear=te.TERowParallelLinear)


def no_init(weight: Tensor) -> Tensor:
    """Leave the weight as it is: values come from `initialization` by canonical name, the same in every layout."""
    return weight


@dataclass(frozen=True, kw_only=True)
class LayerFactory:
    """Builds the linear layers of a stage with the right Megatron marks, and says who computes what stands between them."""

    config: TransformerConfig
    tp_group: dist.ProcessGroup
    submodules: MMDiTSubmodules
    kernels: Kernels

    def column(self, input_size: int, output_size: int) -> nn.Module:
        """Linear split by output rows over TP; gathers sequence-parallel tokens first."""
        layer = self.submodules.column_parallel_linear(
            input_size,
            output_size,
            config=self.config,
            init_method=no_init,
            gather_output=False,
            bias=True,
            skip_bias_add=False,
            is_expert=False,
            tp_group=self.tp_group,
        )
        return _mark_sharded(layer, {"weight": 0, "bias": 0})

    def row(self, input_size: int, output_size: int) -> nn.Module:
        """Linear split by input columns over TP; scatters its tokens afterwards. The bias is added on the scattered tokens."""
        layer = self.submodules.row_parallel_linear(
            input_size,
            output_size,
            config=self.config,
            init_method=no_init,
            bias=True,
            input_is_parallel=True,
            skip_bias_add=False,
            is_expert=False,
            tp_group=self.tp_group,
        )
        return _mark_sharded(layer, {"weight": 1})

    def on_samples(self, input_size: int, output_size: int, *, config: TransformerConfig) -> nn.Module:
        """Column-parallel linear whose rows are samples: no sequence parallelism, no gradient reduction of its own, never FP8.

        It is Megatron's own with either provider, whose fused weight gradient would need apex's extension.
        """
        config = dataclasses.replace(config, gradient_accumulation_fusion=False) if config.gradient_accumulation_fusion else config
        layer = LocalColumnParallelLinear(
            input_size,
            output_size,
            config=config,
            init_method=no_init,
            bias=True,
            gather_output=False,
            disable_grad_reduce=True,
            tp_group=self.tp_group,
        )
        return _mark_sharded(layer, {"weight": 0, "bias": 0})

    def on_tokens(self, input_size: int, output_size: int) -> nn.Linear:
        """Replicated linear on token shares: its gradient is summed over TP under sequence parallelism."""
        return mark_sequence_parallel(self.replicated(input_size, output_size), self.config)

    def replicated(self, input_size: int, output_size: int) -> nn.Linear:
        """Replicated linear whose rows are samples: every TP rank computes the same gradient."""
        return nn.utils.skip_init(nn.Linear, input_size, output_size, device=device_of(self.config), dtype=self.config.params_dtype)


def device_of(config: TransformerConfig) -> torch.device:
    """Where parameters are created."""
    return torch.device("cpu") if config.use_cpu_initialization else torch.device("cuda", torch.cuda.current_device())


def mark_sequence_parallel(module: ModuleT, config: TransformerConfig) -> ModuleT:
    """Mark parameters that act on token shares, so that Megatron sums their gradients over TP."""
    for parameter in module.parameters():
        parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    return module


def _mark_sharded(layer: nn.Module, dims: dict[str, int]) -> nn.Module:
    """Tell Megatron which parameters are TP shards (it does so itself only while initialising)."""
    for name, dim in dims.items():
        parameter = getattr(layer, name)
        if not getattr(parameter, "tensor_model_parallel", False):
            set_tensor_model_parallel_attributes(parameter, True, dim, 1)
    return layer
