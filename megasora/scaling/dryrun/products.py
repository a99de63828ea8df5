"""FLOPs of matrix products by the layers they belong to, multiply-adds x 2, forward, backward and recomputed apart.

A product with a layer's weight is that layer's. The product that makes a weight's gradient has no weight in it: it is recognised by its
three sides and by whether Megatron's layer or torch's own is running backward.
Attention is counted by whoever stands in for it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from megasora.scaling.dryrun.place import Phase, Place

LayerKind = Literal["blocks", "attention", "modulation", "embedders", "final", "other"]
"""blocks: linear layers of the blocks on tokens; modulation: on samples, the final layer's too; final: the projection to latents;
other: products that sum over samples, which belong to no layer."""
LAYER_KINDS: tuple[LayerKind, ...] = ("blocks", "attention", "modulation", "embedders", "final", "other")
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
        self._weights: dict[tuple[int, int], LayerKind] = {}
        self._sides: dict[tuple[bool, tuple[int, ...]], LayerKind] = {}

    def watch(self, chunks: Iterable[nn.Module]) -> None:
        """Learn each linear layer's weight when it runs: ZeRO-3 makes it only then."""
        for chunk in chunks:
            for name, module in chunk.named_modules():
                weight = getattr(module, "weight", None)
                if isinstance(weight, Tensor) and weight.dim() == 2:
                    module.register_forward_pre_hook(self._learner(kind_of_layer(name)))

    def _learner(self, kind: LayerKind) -> Any:
        def learn(module: nn.Module, _inputs: Any) -> None:
            self._weights[_address(module.weight)] = kind  # type: ignore[arg-type]

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
        node = torch._C._current_autograd_node()  # type: ignore[attr-defined]
        by_megatron = node is not None and node.name().startswith("LinearWith")
        key = (by_megatron, tuple(sorted(sides)))
        kind = self._weights.get(_address(b)) or self._weights.get(_address(a))
        if kind is None:
            return self._sides.get(key, "other")
        if self.place.phase in ("forward", "recompute"):
            for megatron in (False, True):
                self._sides[megatron, key[1]] = kind
        else:
            self._sides[key] = kind
        return kind


def _address(tensor: Tensor) -> tuple[int, int]:
    return tensor.untyped_storage()._cdata, tensor.storage_offset()
