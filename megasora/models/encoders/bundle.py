"""The three encoders of a run together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megasora.config.errors import UserError
from megasora.config.schema import EncodersConfig, ModelConfig
from megasora.models.encoders.text import ClipTextEncoder, T5TextEncoder
from megasora.models.encoders.vae import HunyuanVAE


@dataclass(frozen=True, kw_only=True)
class Encoders:
    """Autoencoder and text encoders."""

    vae: HunyuanVAE
    t5: T5TextEncoder
    clip: ClipTextEncoder

    def encode_text(self, texts: Sequence[str], *, max_tokens: int) -> tuple[Tensor, Tensor]:
        """([n, L, text_dim], [n, vec_dim])."""
        return self.t5.encode(texts, max_tokens=max_tokens), self.clip.encode(texts)


def load_encoders(config: EncodersConfig, *, model: ModelConfig, device: torch.device) -> Encoders:
    """Load all three and check that they fit the model.

    Raises:
        UserError: a path is not given, does not load, or has other sizes than the model takes.
    """
    paths = {"vae": config.vae, "t5": config.t5, "clip": config.clip}
    missing = [name for name, path in paths.items() if path is None]
    if missing:
        raise UserError(f"no folder given for {', '.join(f'--encoders.{name}' for name in missing)}")
    dtype = torch.bfloat16 if config.dtype == "bf16" else torch.float32
    be_quiet()
    vae = HunyuanVAE.from_folder(str(config.vae), device=device, dtype=dtype)
    t5 = T5TextEncoder.from_folder(str(config.t5), device=device, dtype=dtype)
    clip = ClipTextEncoder.from_folder(str(config.clip), device=device, dtype=dtype)
    for name, has, wants in (
        ("vae latent channels", vae.latent_channels, model.latent_channels),
        ("vae temporal compression", vae.temporal_compression, config.temporal_compression),
        ("vae spatial compression", vae.spatial_compression, config.spatial_compression),
        ("t5 channels", t5.channels, model.text_dim),
        ("clip channels", clip.channels, model.vec_dim),
    ):
        if has != wants:
            raise UserError(f"{name} are {has}, the model takes {wants}; give encoders that fit or change --model.*")
    return Encoders(vae=vae, t5=t5, clip=clip)


def be_quiet() -> None:
    """Loading bars and hints of the encoders' libraries, on every rank, would bury the log; their errors still come."""
    import diffusers.utils.logging as diffusers_logging
    import transformers.utils.logging as transformers_logging

    for logging in (diffusers_logging, transformers_logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()
