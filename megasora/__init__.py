"""megasora: Megatron-style 3D-parallel training, conversion and scaling of the Open-Sora 2.0 MMDiT."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megasora import cudnn

if TYPE_CHECKING:
    from megasora.inference.sampler import Sampler

__version__ = "0.1.0"
__all__ = ["Sampler", "__version__"]

cudnn.prefer_torchs()  # before anything imports Transformer Engine


def __getattr__(name: str) -> Any:
    """`megasora.Sampler`, imported when asked for: torch and Megatron take seconds."""
    if name == "Sampler":
        from megasora.inference.sampler import Sampler

        return Sampler
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
