"""What a GPU holds beside the model: the library's context, and the encoders where clips are encoded beside training."""

from __future__ import annotations

from dataclasses import dataclass

from megasora.config.pack_tokens import largest_clip
from megasora.config.schema import RunConfig

CONTEXT_BYTES = 4e9
"""CUDA's context, NCCL's buffers, fragmentation, on top of the 4 to 8 GB that a device has beyond its data sheet (chosen)."""
TEXT_BYTES = 2 * (4.76e9 + 0.123e9)
"""T5-XXL's encoder and CLIP-L's text model in bf16."""
DC_AE_BYTES = 0.919e9 + 4.3e9
"""The video DC-AE in bf16 and the peak of a tile of 32 x 256 x 256 (counted on the meta device)."""


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
    if config.data.cache is not None or (found := largest_clip(config)) is None:
        return Beside(context=CONTEXT_BYTES, encoders=0.0)
    if not config.encoders.causal:
        return Beside(context=CONTEXT_BYTES, encoders=TEXT_BYTES + DC_AE_BYTES)
    from megasora.models.encoders.memory import AutoencoderMemory  # loads diffusers, which takes seconds

    unit = config.encoders.spatial_compression * config.model.patch_size
    frames, side = found[0], int(found[1] / unit) * unit
    memory = AutoencoderMemory(config.encoders)
    encode = memory.weights + memory.encode(num_frames=frames, height=side, width=side)
    return Beside(context=CONTEXT_BYTES, encoders=TEXT_BYTES + encode)
