"""Inputs of recomputed blocks in page-locked host memory: on their way there while the block runs forward, back while the next one runs
backward.

What a recomputed block keeps is its token shares [s, H]; `OffloadedPass.block` catches them where autograd saves them, so Megatron's and
Transformer Engine's checkpoints are used as they are. Copies go over one stream of their own, in the order of the blocks, so a step is the
same to the bit. The host waits for nothing: streams wait for each other.

- Out: the copy stream waits for whatever computed the inputs; the device's memory is given up behind the copy, when the block has been
  launched: the compute stream waits for the copy, which had the whole block to be made in.
- Back: memory comes from the compute stream's allocator, so the copy stream waits until that has come to the fetch, then writes; the block
  waits for its own inputs and starts the fetch of those before it. The device holds the inputs of two blocks.
- A forward pass's last inputs stay, because its backward pass begins with them and would wait.

Left out: blocks that keep more than their inputs. Host memory is torch's cached page-locked allocator, which rounds to powers of two.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


def host_memory(like: Tensor) -> Tensor:
    """Uninitialised host memory of a tensor's shape and type, page-locked for a CUDA device."""
    return torch.empty(like.shape, dtype=like.dtype, device="cpu", pin_memory=like.device.type == "cuda")


@cache
def copy_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of all copies of a device."""
    return torch.cuda.Stream(device)


class OffloadedPass:
    """The recomputed blocks of one forward pass of a chunk, in their order."""

    def __init__(self) -> None:
        self._last: _Inputs | None = None

    @contextmanager
    def block(self, tokens: Sequence[Tensor], *, stays: bool) -> Iterator[None]:
        """While a block that saves these tensors runs.

        Args:
            tokens: what goes to the host; whatever else is saved stays where it is.
            stays: they stay on the device, because their backward pass comes first or because somebody else holds them anyway.
        """
        inputs = self._last = _Inputs(tokens, before=self._last)
        if not stays:
            inputs.leave()
        with saved_tensors_hooks(inputs.pack, inputs.unpack):
            yield
        if not stays:
            inputs.let_go()


class _Inputs:
    """Those of one block, in the order in which they are given."""

    def __init__(self, tokens: Sequence[Tensor], *, before: _Inputs | None) -> None:
        self._before = before
        self._places = {_place(tensor): number for number, tensor in enumerate(tokens)}
        self._device = tokens[0].device
        self._on_device: dict[int, Tensor] = {number: tensor.detach() for number, tensor in enumerate(tokens)}
        self._on_host: list[Tensor] = []
        self._copied: torch.cuda.Event | None = None

    # --- forward

    def leave(self) -> None:
        """Start the copies to the host."""
        self._on_host = [host_memory(tensor) for tensor in self._on_device.values()]
        self._copy(self._on_host, list(self._on_device.values()))

    def let_go(self) -> None:
        """Give up the device's memory, behind the copies."""
        self._wait()
        self._on_device = {}

    def pack(self, saved: Tensor) -> Any:
        """What autograd keeps of a tensor that is saved."""
        return self._places.get(_place(saved), saved)

    # --- backward

    def fetch(self) -> None:
        """Start the copies to the device, if they are not there."""
        if self._on_device:
            return
        self._on_device = {number: torch.empty_like(host, device=self._device) for number, host in enumerate(self._on_host)}
        self._copy(list(self._on_device.values()), self._on_host)
        self._on_host = []  # the allocator keeps them until the copies are made

    def unpack(self, kept: Any) -> Tensor:
        """The tensor that was saved; the block's first one starts the fetch of the inputs before it."""
        if isinstance(kept, Tensor):
            return kept
        self.fetch()
        self._wait()
        if self._before is not None:
            self._before.fetch()
            self._before = None
        return self._on_device.pop(kept)

    # --- both

    def _copy(self, targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
        stream = copy_stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            for target, source in zip(targets, sources, strict=True):
                target.copy_(source, non_blocking=True)
        self._copied = stream.record_event()

    def _wait(self) -> None:
        if self._copied is not None:
            torch.cuda.current_stream(self._device).wait_event(self._copied)


def _place(tensor: Tensor) -> tuple[int, int]:
    """Where a tensor lies: autograd's hooks are given another object of the same memory."""
    return tensor.untyped_storage()._cdata, int(tensor.storage_offset())
