"""Freed tensors come back as they were, exactly when somebody kept them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megasora.models.mmdit.recompute import Seams, discard


def leaf(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()


class Calls:
    """A producer that counts its runs."""

    def __init__(self, function: object) -> None:
        self.function, self.count = function, 0

    def __call__(self, *tensors: Tensor) -> object:
        self.count += 1
        return self.function(*tensors)  # type: ignore[operator]


def gradients(*, selective: bool) -> list[Tensor]:
    """Of a chain of two seams, the second of which has two results."""
    x, w = leaf(5, 4), leaf(4, 4, seed=1)
    seams = Seams(selective=selective)
    hidden = seams.through(F.gelu, x, into=lambda a: F.linear(a, w))
    out = seams.through(lambda a: (a.sin(), a.cos()), hidden, into=lambda a, b: a * b)
    out.square().sum().backward()
    assert x.grad is not None and w.grad is not None
    return [x.grad, w.grad]


def test_gradients_are_those_without_recomputation_to_the_bit() -> None:
    for a, b in zip(gradients(selective=True), gradients(selective=False), strict=True):
        assert torch.equal(a, b)


def test_a_freed_tensor_holds_no_memory_until_its_consumer_runs_backward() -> None:
    x, w = leaf(5, 4), leaf(4, 4, seed=1)
    made = F.gelu(x)
    out = F.linear(made, w)
    discard(made, F.gelu, x, until=out)
    assert made.untyped_storage().nbytes() == 0
    out.sum().backward()
    assert torch.equal(made, F.gelu(x))


def test_what_nobody_kept_is_not_computed_again() -> None:
    """The product keeps its factors; a sum keeps nothing, as a layer does that has made its own copy in FP8."""
    x = leaf(5, 4)
    for consumer, runs in ((lambda a: a * a, 2), (lambda a: a + 1, 1)):
        producer = Calls(torch.sin)
        out = Seams(selective=True).through(producer, x, into=consumer)  # type: ignore[arg-type]
        out.sum().backward()
        assert producer.count == runs


def test_a_view_of_an_input_stays() -> None:
    """Values are a part of the projection that is kept anyway."""
    x = leaf(5, 4)
    producer = lambda a: (a[:, :2], a[:, 2:].sin())  # noqa: E731
    view, made = producer(x)
    out = view * made
    discard((view, made), producer, x, until=out)
    assert view.untyped_storage().nbytes() > 0
    assert made.untyped_storage().nbytes() == 0
    out.sum().backward()
    assert torch.equal(x.grad[:, :2], x[:, 2:].sin())  # type: ignore[index]


def test_a_tensor_made_from_a_freed_one_waits_for_it() -> None:
    """The middle is freed last and filled first: its hook stands on a tensor whose gradient comes earlier."""
    x, w = leaf(5, 4), leaf(4, 4, seed=1)
    seams = Seams(selective=True)
    middle = torch.tanh(x)
    hidden = seams.through(torch.sin, middle, into=lambda a: F.linear(a, w))
    last = seams.through(F.gelu, hidden, into=lambda a: a * a)
    out = middle + last
    seams.discard(middle, torch.tanh, x, until=last)
    out.square().sum().backward()
    y = x.detach().requires_grad_()
    again = F.gelu(F.linear(torch.tanh(y).sin(), w))
    (torch.tanh(y) + again * again).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-14, atol=1e-14)


def test_without_gradients_nothing_is_freed() -> None:
    x = leaf(5, 4)
    with torch.no_grad():
        made = x.sin()
        discard(made, torch.sin, x, until=made * 2)
    assert made.untyped_storage().nbytes() > 0
