"""Latent distillation of one clip: features of a layer of the encoder, compared with a teacher's. No collective, no optimizer.

The graph is cut at the layer while the clip goes through the networks. All other losses are differentiated down to the cut; there the
alignment's gradient, weighed against theirs, joins them, and the sum goes back through the rest of the encoder. So the decoder is walked
once, and a weight is found by walking from the layer to its last weight alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megasora.config.distillation import DistillationConfig
from megasora.models.autoencoders.alignment import Projector, alignment_of
from megasora.models.autoencoders.losses import adaptive_weight
from megasora.models.autoencoders.teacher import Grid, Teacher

MOST = 1e8
"""Of the adaptive weight (hustvl/LightningDiT calculate_adaptive_weight_vf); its epsilon is that of the discriminator's."""


class Tap:
    """A forward hook that parts the graph after a layer."""

    inner: Tensor
    """The layer's output [1, C, t, h, w], with the graph before it."""
    leaf: Tensor
    """The same, from which the graph goes on."""

    def __call__(self, module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        """Give the leaf to what follows."""
        self.inner = output
        self.leaf = output.detach().requires_grad_()
        return self.leaf


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """What a clip's features are compared with, and how."""

    settings: DistillationConfig
    layer: nn.Module
    """Whose output is aligned."""
    teacher: Teacher | None
    """None where its features come from a cache."""
    projector: Projector

    @property
    def last_weight(self) -> nn.Parameter:
        """The layer's last matrix or kernel, where losses are weighed against each other (VA-VAE: the encoder's last convolution)."""
        return [parameter for parameter in self.layer.parameters() if parameter.dim() > 1][-1]

    @contextmanager
    def tapped(self) -> Iterator[Tap]:
        """While a clip goes through the encoder. The hook is gone when recomputation runs the layer again, which needs it no more."""
        tap = Tap()
        handle = self.layer.register_forward_hook(tap)
        try:
            yield tap
        finally:
            handle.remove()

    def backward(self, tap: Tap, video: Tensor, *, share: float, features: Tensor | None = None) -> dict[str, Tensor]:
        """Add `share` times the gradients that pass the cut to the parameters before it, and the alignment's to the projector's.

        Args:
            tap: `share` times the gradient of all other losses has arrived at its leaf.
            video: [3, T, H, W] in [-1, 1].
            share: 1 / clips of the step.
            features: the teacher's [D, t, h, w] of the clip; None asks it.

        Returns:
            The terms, and what their sum was multiplied by.
        """
        settings, rest = self.settings, tap.leaf.grad
        assert rest is not None, "the losses of pixels have been walked back to the cut"
        own = tap.inner.detach().requires_grad_()
        if features is None:
            assert self.teacher is not None, "without a cache there is a teacher"
            features = self.teacher.features(video, Grid(*own.shape[-3:]))
        found = alignment_of(
            self.projector(own)[0],
            features,
            cosine_margin=settings.cosine_margin,
            gram_margin=settings.gram_margin,
            pairs=settings.gram,
        )
        (share * (found.cosine + found.gram)).backward()
        assert own.grad is not None
        balance = own.new_full((), settings.weight, dtype=found.cosine.dtype)
        if settings.balance == "adaptive":
            weight = self.last_weight
            of_both = [torch.autograd.grad(tap.inner, weight, one, retain_graph=True)[0] / share for one in (rest, own.grad)]
            balance = balance * adaptive_weight(*of_both, most=MOST)
        tap.inner.backward(rest + (balance * own.grad).to(rest.dtype))
        return {"cosine": found.cosine.detach(), "gram": found.gram.detach(), "alignment_balance": balance}
