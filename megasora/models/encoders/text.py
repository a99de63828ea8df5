"""Text encoders: T5 for the tokens (`txt`), CLIP's pooled output for the vector (`y_vec`).

Prompts are padded to a fixed length and no mask is passed on: the MMDiT attends to padding too, as FLUX and Open-Sora trained it
(hpcaitech/Open-Sora models/text/conditioner.py HFEmbedder: max_length padding, attention_mask None).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel

from megasora.config.errors import UserError
from megasora.parallel.transfer import send


class SentencePieceTokenizer:
    """T5's tokenizer, straight from spiece.model: pieces, then </s>, padded with <pad> = 0."""

    END, PAD = 1, 0

    def __init__(self, model_file: Path) -> None:
        import sentencepiece

        if not model_file.is_file():
            raise UserError(f"{model_file} is missing; a T5 folder needs its sentencepiece model beside the weights")
        self.processor = sentencepiece.SentencePieceProcessor(model_file=str(model_file))

    def __call__(self, texts: Sequence[str], *, max_tokens: int) -> Tensor:
        """int64 [n, max_tokens]; longer prompts are cut and still end with </s>."""
        rows = torch.full((len(texts), max_tokens), self.PAD)
        for row, text in zip(rows, texts, strict=True):
            ids = [*self.processor.encode(text)[: max_tokens - 1], self.END]
            row[: len(ids)] = torch.tensor(ids)
        return rows


class T5TextEncoder:
    """T5's encoder half on fixed-length prompts."""

    def __init__(self, model: T5EncoderModel, tokenizer: SentencePieceTokenizer) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.channels = int(model.config.d_model)

    @classmethod
    def from_folder(cls, folder: str | Path, *, device: torch.device, dtype: torch.dtype) -> T5TextEncoder:
        """Load a transformers folder with config.json, weights and spiece.model."""
        model = _load(T5EncoderModel, folder, name="t5", dtype=dtype)
        return cls(model.to(device), SentencePieceTokenizer(Path(folder) / "spiece.model"))

    @torch.no_grad()
    def encode(self, texts: Sequence[str], *, max_tokens: int) -> Float[Tensor, "n L D"]:
        """Last hidden states."""
        (ids,) = send([self.tokenizer(texts, max_tokens=max_tokens)], device=self.model.device)
        hidden: Tensor = self.model(ids).last_hidden_state
        return hidden


class ClipTextEncoder:
    """CLIP's text model; the pooled output of prompts padded to 77 tokens."""

    def __init__(self, model: CLIPTextModel, tokenizer: CLIPTokenizer) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.channels = int(model.config.hidden_size)

    @classmethod
    def from_folder(cls, folder: str | Path, *, device: torch.device, dtype: torch.dtype) -> ClipTextEncoder:
        """Load a transformers folder with config.json, weights, vocab.json and merges.txt."""
        model = _load(CLIPTextModel, folder, name="clip", dtype=dtype)
        try:
            tokenizer = CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"encoders.clip {folder} has no CLIP tokenizer (vocab.json, merges.txt): {error}") from error
        return cls(model.to(device), tokenizer)

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Float[Tensor, "n V"]:
        """Pooled outputs."""
        length = self.model.config.max_position_embeddings
        batch = self.tokenizer(list(texts), padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        (ids,) = send([batch.input_ids], device=self.model.device)
        pooled: Tensor = self.model(ids).pooler_output
        return pooled


def _load(kind: type, folder: str | Path, *, name: str, dtype: torch.dtype) -> torch.nn.Module:
    if not (Path(folder) / "config.json").is_file():
        raise UserError(f"encoders.{name} {folder} is no transformers folder (no config.json); give the folder of a {kind.__name__}")
    try:
        model, loading = kind.from_pretrained(str(folder), dtype=dtype, local_files_only=True, output_loading_info=True)  # type: ignore[attr-defined]
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"encoders.{name} {folder} does not load as {kind.__name__}: {str(error).splitlines()[0]}") from error
    if lacking := sorted(loading["missing_keys"]):  # transformers would fill them with random numbers and go on
        raise UserError(f"encoders.{name} {folder} lacks {len(lacking)} tensors of {kind.__name__}, the first {lacking[0]}")
    return cast(torch.nn.Module, model)
