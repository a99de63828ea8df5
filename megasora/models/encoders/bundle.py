"""The encoders of a run together."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megasora.config.errors import UserError
from megasora.config.schema import EncodersConfig, ModelConfig
from megasora.models.autoencoders.autoencoder import Autoencoder
from megasora.models.autoencoders.choice import blank_autoencoder, load_autoencoder, mismatches
from megasora.models.encoders.text import ClipTextEncoder, T5TextEncoder

PARTS = ("vae", "t5", "clip")
"""Encoders, by their setting."""


@dataclass(frozen=True, kw_only=True)
class Encoders:
    """Autoencoder and text encoders; a part that the run does not use is not loaded."""

    autoencoder: Autoencoder | None
    t5: T5TextEncoder | None
    clip: ClipTextEncoder | None

    @property
    def vae(self) -> Autoencoder:
        """The autoencoder of a run that uses it."""
        assert self.autoencoder is not None, "the autoencoder was not loaded: the run said it does not use it"
        return self.autoencoder

    def encode_text(self, texts: Sequence[str], *, max_tokens: int) -> tuple[Tensor, Tensor]:
        """([n, L, text_dim], [n, vec_dim])."""
        assert self.t5 is not None and self.clip is not None, "the text encoders were not loaded: the run said it does not use them"
        return self.t5.encode(texts, max_tokens=max_tokens), self.clip.encode(texts)


def load_encoders(config: EncodersConfig, *, model: ModelConfig, device: torch.device, parts: Collection[str] = PARTS) -> Encoders:
    """Load encoders and check that they fit the model.

    Args:
        config: folders and number format.
        model: the model they feed.
        device: where they run.
        parts: which of PARTS; a run on a cache needs fewer.

    Raises:
        UserError: a path is not given, does not load, or has other sizes than the model takes.
    """
    missing = [name for name in PARTS if name in parts and getattr(config, name) is None]
    if missing:
        raise UserError(f"no folder given for {', '.join(f'--encoders.{name}' for name in missing)}")
    dtype = torch.bfloat16 if config.dtype == "bf16" else torch.float32
    be_quiet()
    vae = load_autoencoder(config, device=device, dtype=dtype) if "vae" in parts else None
    t5 = T5TextEncoder.from_folder(str(config.t5), device=device, dtype=dtype) if "t5" in parts else None
    clip = ClipTextEncoder.from_folder(str(config.clip), device=device, dtype=dtype) if "clip" in parts else None
    sizes: list[tuple[str, int, int]] = []
    if vae is not None:
        if wrong := mismatches(vae.facts, config):
            raise UserError("; ".join(wrong))
        sizes.append(("vae latent channels", vae.facts.latent_channels, model.latent_channels))
    if t5 is not None:
        sizes.append(("t5 channels", t5.channels, model.text_dim))
    if clip is not None:
        sizes.append(("clip channels", clip.channels, model.vec_dim))
    for name, has, wants in sizes:
        if has != wants:
            raise UserError(f"{name} are {has}, the model takes {wants}; give encoders that fit or change --model.*")
    return Encoders(autoencoder=vae, t5=t5, clip=clip)


def counted_autoencoder(config: EncodersConfig) -> Autoencoder | None:
    """`blank_autoencoder` in the run's own number format: to count what it takes before there is a device."""
    be_quiet()
    return blank_autoencoder(config, dtype=torch.bfloat16 if config.dtype == "bf16" else torch.float32)


def be_quiet() -> None:
    """Loading bars and hints of the encoders' libraries, on every rank, would bury the log; their errors still come."""
    import diffusers.utils.logging as diffusers_logging
    import transformers.utils.logging as transformers_logging

    for logging in (diffusers_logging, transformers_logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()
