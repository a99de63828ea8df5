"""What a GPU holds beside the model: the library's context, and the encoders where clips are encoded beside training."""

from __future__ import annotations

from dataclasses import dataclass

from megasora.config.pack_tokens import largest_clip
from megasora.config.schema import RunConfig
from megasora.models.autoencoders.memory import AutoencoderMemory
from megasora.models.encoders.bundle import counted_autoencoder

CONTEXT_BYTES = 4e9
"""CUDA's context, NCCL's buffers, fragmentation, on top of the 4 to 8 GB that a device has beyond its data sheet (chosen)."""
TEXT_BYTES = 2 * (4.76e9 + 0.123e9)
"""T5-XXL's encoder and CLIP-L's text model in bf16."""


@dataclass(frozen=True, kw_only=True)
class Beside:
    """Bytes of a GPU that the model cannot have."""

    context: float
    encoders: float

    @property
    def total(self) -> float:
        """Both."""
        return self.context + self.encoders


def beside(config: RunConfig) -> Beside:
    """Of a run: encoders only where there is no cache of latents, their largest clip with them."""
    found = largest_clip(config)
    if config.data.cache is not None or found is None:
        return Beside(context=CONTEXT_BYTES, encoders=0.0)
    autoencoder = counted_autoencoder(config.encoders)
    if autoencoder is None:
        return Beside(context=CONTEXT_BYTES, encoders=0.0)
    unit = config.encoders.spatial_compression * config.model.patch_size
    frames, side = found[0], int(found[1] / unit) * unit
    memory = AutoencoderMemory(autoencoder)
    return Beside(context=CONTEXT_BYTES, encoders=TEXT_BYTES + memory.weights + memory.encode(num_frames=frames, height=side, width=side))
