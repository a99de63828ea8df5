"""Encoders of a job that draws clips: loaded when they are needed first, once for all weights, and moved away where memory asks for it."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from megasora.config.schema import ModelConfig, RunConfig
from megasora.models.autoencoders.autoencoder import Autoencoder
from megasora.models.encoders.bundle import Encoders, be_quiet, load_encoders


class EncoderShelf:
    """Text encoders, autoencoder, and the texts that were encoded.

    Args:
        config: the run's settings.
        model: what the encoders feed; its sizes are checked.
        device: where they work.
    """

    def __init__(self, config: RunConfig, *, model: ModelConfig, device: torch.device) -> None:
        self.config, self.model, self.device = config, model, device
        self._encoders = Encoders(autoencoder=None, t5=None, clip=None)
        self._texts: dict[str, tuple[Tensor, Tensor]] = {}
        be_quiet()

    def encode_texts(self, texts: Sequence[str]) -> None:
        """Encode texts that are not known yet, one by one so that none depends on its company, and keep them in host memory."""
        new = [text for text in dict.fromkeys(texts) if text not in self._texts]
        if not new:
            return
        self._load("t5", "clip")
        for text in new:
            tokens, vecs = self._encoders.encode_text([text], max_tokens=self.config.data.text_tokens)
            self._texts[text] = (tokens[0].cpu(), vecs[0].cpu())

    def text(self, text: str) -> tuple[Tensor, Tensor]:
        """([L, D], [V]) of a text, encoded now if it is not known."""
        self.encode_texts([text])
        return self._texts[text]

    def drop_text_encoders(self) -> None:
        """Free the text encoders; texts that were encoded stay."""
        self._encoders = replace(self._encoders, t5=None, clip=None)
        release(self.device)

    @property
    def vae(self) -> Autoencoder:
        """The autoencoder, on the device."""
        self._load("vae")
        self._encoders.vae.to(self.device)
        return self._encoders.vae

    def put_autoencoder_away(self) -> None:
        """Keep the autoencoder in host memory until it is asked for."""
        if self._encoders.autoencoder is not None:
            self._encoders.vae.to("cpu")
            release(self.device)

    def _load(self, *parts: str) -> None:
        have = self._encoders
        missing = [part for part in parts if {"vae": have.autoencoder, "t5": have.t5, "clip": have.clip}[part] is None]
        if missing:
            new = load_encoders(self.config.encoders, model=self.model, device=self.device, parts=missing)
            self._encoders = Encoders(autoencoder=have.autoencoder or new.autoencoder, t5=have.t5 or new.t5, clip=have.clip or new.clip)


def release(device: torch.device) -> None:
    """Give memory that nothing refers to back to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
