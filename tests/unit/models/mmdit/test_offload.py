"""Inputs that wait in host memory: the same gradients, also where every copy is made as late as streams allow."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from megasora.models.mmdit import offload
from megasora.models.mmdit.offload import OffloadedPass

BLOCKS = 5


class LateCopies(TorchDispatchMode):
    """Two streams: one computes at once; the other makes its copies when somebody waits for them, and until then the target is NaN.

    It is torch.cuda for the code under test. Device memory is held weakly: what is given up before its copy was made is an error, as a GPU
    would have given it to somebody else.
    """

    def __init__(self) -> None:
        super().__init__()
        self.host: list[Tensor] = []
        self.waiting: list[Callable[[], None]] = []
        self.made = 0
        self.joined = False
        """Whether the copy stream waits for all that was computed until now."""

    # --- the two streams

    def wait_stream(self, other: object) -> None:
        """Of the copy stream."""
        self.joined = True

    def record_event(self) -> int:
        """Of the copy stream: how many copies were asked for."""
        self.joined = False
        return self.made + len(self.waiting)

    def wait_event(self, event: int) -> None:
        """Of the computing stream."""
        while self.made < event:
            self.waiting.pop(0)()
            self.made += 1

    @contextmanager
    def on(self, stream: object) -> Iterator[None]:
        with self:
            yield

    # --- what runs on the copy stream

    def host_memory(self, like: Tensor) -> Tensor:
        self.host.append(torch.empty_like(like))
        return self.host[-1]

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        """Note a copy instead of making it."""
        if func is not torch.ops.aten.copy_.default:
            return func(*args, **(kwargs or {}))
        assert self.joined, "a copy that does not wait for what was computed before"
        assert args[2], "a copy that the host waits for"
        target, source = args[:2]
        target.fill_(float("nan"))
        held = [(lambda tensor=tensor: tensor) if self._on_host(tensor) else weakref.ref(tensor) for tensor in (target, source)]

        def copy() -> None:
            to, of = (reference() for reference in held)
            assert to is not None and of is not None, "memory of the device was given up before its copy"
            to.copy_(of)

        self.waiting.append(copy)
        return target

    def _on_host(self, tensor: Tensor) -> bool:
        return any(tensor is one for one in self.host)


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> LateCopies:
    copies = LateCopies()
    monkeypatch.setattr(offload, "copy_stream", lambda _: copies)
    monkeypatch.setattr(offload, "host_memory", copies.host_memory)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: copies)
    monkeypatch.setattr(torch.cuda, "stream", copies.on)
    return copies


def weights() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(4, 4, generator=generator).requires_grad_() for _ in range(BLOCKS)]


def gradients(passes: Sequence[OffloadedPass | None]) -> list[Tensor]:
    """Of blocks with two streams and a `vec` that all share; several forward passes before their backward passes, last in first out."""
    matrices, x = weights(), torch.linspace(-1, 1, 12).reshape(3, 4).requires_grad_()
    outputs = []
    for number, offloaded in enumerate(passes):
        txt, img, vec = x * (number + 1), x + number, x.sum(0, keepdim=True)
        for place, matrix in enumerate(matrices):

            def block(a: Tensor, b: Tensor, v: Tensor, matrix: Tensor = matrix) -> tuple[Tensor, Tensor]:
                return torch.tanh(a @ matrix + b), torch.sin(b @ matrix * v)

            context = nullcontext() if offloaded is None else offloaded.block((txt, img), stays=place == BLOCKS - 1)
            with context:
                txt, img = checkpoint(block, txt, img, vec, use_reentrant=True, preserve_rng_state=False)
        outputs.append((txt * img).sum())
    del txt, img
    for output in reversed(outputs):
        output.backward()
    return [tensor.grad for tensor in (x, *matrices) if tensor.grad is not None]


@pytest.mark.parametrize("num_passes", [1, 3])
def test_late_copies_give_the_same_gradients_to_the_bit(late: LateCopies, num_passes: int) -> None:
    found = gradients([OffloadedPass() for _ in range(num_passes)])
    expected = gradients([None] * num_passes)
    assert len(found) == BLOCKS + 1
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert len(late.host) == num_passes * (BLOCKS - 1) * 2  # the last block's inputs and vec stay
    assert late.made == 2 * len(late.host)
    assert not late.waiting


def test_a_forward_pass_holds_no_inputs_but_the_last(late: LateCopies) -> None:
    offloaded, held = OffloadedPass(), []
    x = torch.ones(2, 2, requires_grad=True)
    for place in range(BLOCKS):
        taken = x * 1
        held.append(weakref.ref(taken.untyped_storage()))
        with offloaded.block((taken,), stays=place == BLOCKS - 1):
            x = checkpoint(torch.sin, taken, use_reentrant=True, preserve_rng_state=False)
    del taken
    assert [reference() is not None for reference in held] == [False] * (BLOCKS - 1) + [True]


@pytest.mark.parametrize("mistake", ["_wait", "let_go"])
def test_a_missing_wait_is_seen(late: LateCopies, monkeypatch: pytest.MonkeyPatch, mistake: str) -> None:
    """Without any wait, and where the device's memory is given up before the copy."""

    def give_up(inputs: Any) -> None:
        inputs._on_device = {}

    monkeypatch.setattr(offload._Inputs, mistake, give_up if mistake == "let_go" else lambda inputs: None)
    if mistake == "_wait":
        assert any(tensor.isnan().any() for tensor in gradients([OffloadedPass()]))
        return
    with pytest.raises(AssertionError, match="given up before its copy"):
        gradients([OffloadedPass()])
