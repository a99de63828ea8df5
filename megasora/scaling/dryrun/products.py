"""FLOPs of matrix products by the layers they belong to, multiply-adds x 2, forward, backward and recomputed apart.

A product with a layer's weight is that layer's. The product that makes a weight's gradient has no weight in it: it is recognised by its
sides and by whether Megatron's layer or torch's own is running backward.
Attention is counted by whoever stands in for it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import Tensor, nn

from megasora.perf.flops import LayerKind
from megasora.scaling.dryrun.place import Phase, Place

PRODUCTS = frozenset({"mm", "addmm", "bmm", "baddbmm", "linear"})


def kind_of_layer(name: str) -> LayerKind:
    """Of a linear layer, by its name in the model."""
    if ".mod." in name or name.endswith(".modulation.lin") or "adaLN_modulation" in name:
        return "modulation"
    if name.startswith("final_layer"):
        return "final"
    return "blocks" if name.startswith(("double_blocks", "single_blocks")) else "embedders"


class Products:
    """Counts matrix products.

    Args:
        place: where the step is.
    """

    def __init__(self, place: Place) -> None:
        self.place = place
        self.flops: Counter[tuple[LayerKind, Phase]] = Counter()
        self._weights: dict[tuple[int, int], tuple[LayerKind, bool]] = {}
        self._sides: dict[tuple[bool, tuple[int, ...]], LayerKind] = {}

    def watch(self, chunks: Iterable[nn.Module]) -> None:
        """Learn each linear layer's weight when it runs: ZeRO-3 makes it only then."""
        for chunk in chunks:
            for name, module in chunk.named_modules():
                weight = getattr(module, "weight", None)
                if isinstance(weight, Tensor) and weight.dim() == 2:
                    module.register_forward_pre_hook(self._learner(kind_of_layer(name), by_megatron=_by_megatron(module)))

    def _learner(self, kind: LayerKind, *, by_megatron: bool) -> Any:
        def learn(module: nn.Module, _inputs: Any) -> None:
            self._weights[_address(module.weight)] = (kind, by_megatron)  # type: ignore[arg-type]

        return learn

    def attention(self, flops: int) -> None:
        """Count attention's."""
        self.flops["attention", self.place.phase] += flops

    def see(self, args: tuple[Any, ...]) -> bool:
        """Count a product, unless it is part of attention or no product of two matrices; whether it was one."""
        if self.place.in_attention:
            return True
        a, b = [value for value in args if isinstance(value, Tensor)][-2:]
        if a.dim() < 2 or b.dim() < 2:
            return False
        sides = (a.shape[-2], a.shape[-1], b.shape[-1])
        batch = a.shape[0] if a.dim() == 3 else b.shape[0] if b.dim() == 3 else 1
        self.flops[self._kind(a, b, sides), self.place.phase] += 2 * batch * sides[0] * sides[1] * sides[2]
        return True

    def _kind(self, a: Tensor, b: Tensor, sides: tuple[int, ...]) -> LayerKind:
        known = self._weights.get(_address(b)) or self._weights.get(_address(a))
        if known is None:
            node = torch._C._current_autograd_node()  # type: ignore[attr-defined]
            by_megatron = node is not None and node.name().startswith("LinearWith")
            return self._sides.get((by_megatron, sides), "other")
        if self.place.phase == "forward":
            rows, inputs, outputs = sides
            self._sides[known[1], (outputs, rows, inputs)] = known[0]  # gradient^T x input
        return known[0]


def _by_megatron(module: nn.Module) -> bool:
    """Whether the layer's products are in Megatron's autograd function; alone on its TP rank it is torch's own linear."""
    return isinstance(module, (ColumnParallelLinear, RowParallelLinear)) and module.tp_group.size() > 1


def _address(tensor: Tensor) -> tuple[int, int]:
    return tensor.untyped_storage()._cdata, int(tensor.storage_offset())
