"""Small random encoders of the real classes, in the real folder formats, so that the demo and the tests run the real code path.

Deterministic: the same captions and sizes give the same weights. The tokenizers are trained on the captions.
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from megasora.config.files import written_whole
from megasora.config.schema import EncodersConfig, ModelConfig
from megasora.models.autoencoders.tiny import make_tiny_autoencoder
from megasora.models.encoders.bundle import be_quiet


def make_tiny_encoders(folder: Path, *, captions: Sequence[str], model: ModelConfig, base: EncodersConfig, seed: int = 0) -> EncodersConfig:
    """Make vae/, t5/ and clip/ once; returns `base` with their paths."""
    captions = [caption for caption in captions if caption.strip()] or ["A clip without a caption"]  # a tokenizer needs words
    config = replace(base, vae=str(folder / "vae"), t5=str(folder / "t5"), clip=str(folder / "clip"))
    if (folder / "done.json").exists():
        return config
    folder.parent.mkdir(parents=True, exist_ok=True)
    be_quiet()
    with written_whole(folder) as temporary:
        temporary.mkdir()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            make_tiny_autoencoder(temporary / "vae", latent_channels=model.latent_channels, config=base)
            _make_t5(temporary / "t5", captions=captions, channels=model.text_dim)
            _make_clip(temporary / "clip", captions=captions, channels=model.vec_dim)
        (temporary / "done.json").write_text(json.dumps({"seed": seed}))
        if folder.exists():
            shutil.rmtree(folder)
    return config


def _make_t5(folder: Path, *, captions: Sequence[str], channels: int) -> None:
    import sentencepiece

    folder.mkdir(parents=True)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sorted(set(captions))),
        model_writer=model,
        vocab_size=128,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    (folder / "spiece.model").write_bytes(model.getvalue())
    vocabulary = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).vocab_size()
    config = T5Config(
        vocab_size=vocabulary,
        d_model=channels,
        d_kv=16,
        d_ff=2 * channels,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
    )
    T5EncoderModel(config).save_pretrained(str(folder))


def _make_clip(folder: Path, *, captions: Sequence[str], channels: int) -> None:
    folder.mkdir(parents=True)
    letters = sorted({letter for caption in captions for letter in caption.lower() if not letter.isspace()})
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": 77}))
    config = CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=channels,
        intermediate_size=2 * channels,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=channels,
        eos_token_id=vocabulary["<|endoftext|>"],
        bos_token_id=vocabulary["<|startoftext|>"],
        pad_token_id=vocabulary["<|endoftext|>"],
    )
    CLIPTextModel(config).save_pretrained(str(folder))
