"""Sizes of a video DC-AE, as its folder's config.json says them (video DC-AE: hpcaitech/Open-Sora opensora/models/dc_ae, registry name
dc-ae-f32t4c128; the deep compression autoencoder of arXiv 2410.10733 with a time axis).

Both the network (models/autoencoders/dc_ae) and the converter (checkpoint/formats/dc_ae) are built from these.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megasora.config.errors import UserError
from megasora.config.io import from_dict, to_dict
from megasora.config.latent_statistics import KEY as LATENTS

CLASS_NAME = "VideoDCAE"
"""`_class_name` of our folders, where diffusers writes its classes' names."""
WEIGHTS_FILE = "model.safetensors"


@dataclass(frozen=True, kw_only=True)
class DCAEConfig:
    """Sizes of encoder and decoder. The defaults are dc-ae-f32t4c128 (opensora/models/dc_ae/models/dc_ae.py, dc_ae_f32)."""

    widths: tuple[int, ...] = (128, 256, 512, 512, 1024, 1024)
    """Channels of each stage; every stage but the last halves height and width (doubles them in the decoder)."""
    encoder_depths: tuple[int, ...] = (2, 2, 2, 3, 3, 3)
    """Blocks of each stage of the encoder."""
    decoder_depths: tuple[int, ...] = (3, 3, 3, 3, 3, 3)
    """Blocks of each stage of the decoder."""
    attention_from: int = 3
    """First stage of EfficientViT blocks; those before it have residual blocks."""
    temporal_stages: tuple[int, ...] = (3, 4)
    """Stages that also halve (double) the frames."""
    latent_channels: int = 128
    """Channels of the latent; 256 in the paper's other variant (arXiv 2503.09642, table 1)."""
    head_dim: int = 32
    """Channels of an attention head."""
    scaling_factor: float = 1.0
    """Training and sampling multiply latents by it. Open-Sora's training config says 0.493 and divides (2.0284 here), but its loop never
    applies it: the released DiT lives on raw latents (hpcaitech/Open-Sora issue 892)."""

    @property
    def spatial_compression(self) -> int:
        """Pixels per latent pixel."""
        return int(2 ** (len(self.widths) - 1))

    @property
    def temporal_compression(self) -> int:
        """Frames per latent frame."""
        return int(2 ** len(self.temporal_stages))

    def halves_time(self, stage: int) -> bool:
        """Whether the step after a stage (before it, in the decoder) changes the number of frames."""
        return stage in self.temporal_stages

    def compression_after(self, stage: int | None) -> tuple[int, int]:
        """(frames, pixels) of a place of a stage's output, with the step to the next stage that ends it; None: of the latent."""
        last = len(self.widths) - 1
        steps = last if stage is None else min(stage + 1, last)
        return int(2 ** sum(self.halves_time(before) for before in range(steps))), int(2**steps)

    def problems(self) -> list[str]:
        """What cannot be built, in words."""
        stages = len(self.widths)
        found = [
            f"{name} has {len(depths)} entries for {stages} widths"
            for name, depths in (("encoder_depths", self.encoder_depths), ("decoder_depths", self.decoder_depths))
            if len(depths) != stages
        ]
        numbers = (*self.widths, *self.encoder_depths, *self.decoder_depths, self.latent_channels, self.head_dim)
        if stages < 2 or min(numbers) < 1:
            return [*found, "every size must be at least 1, with two stages or more"]
        if any(not 0 <= stage < stages - 1 for stage in self.temporal_stages):
            found.append(f"temporal_stages {list(self.temporal_stages)} must name stages before the last")
        found += [f"width {width} does not divide by head_dim" for width in self.widths[self.attention_from :] if width % self.head_dim]
        for fine, coarse, factor in self._pairs():
            if fine * factor % coarse:
                found.append(f"widths {fine} and {coarse} have no shortcut: the second must divide {factor} times the first")
        if self.widths[-1] % self.latent_channels:
            found.append(f"latent_channels {self.latent_channels} must divide the last width {self.widths[-1]}")
        return found

    def _pairs(self) -> list[tuple[int, int, int]]:
        """(channels, channels of the next stage, pixels of one coarse pixel) of every step."""
        return [
            (fine, coarse, 8 if self.halves_time(stage) else 4)
            for stage, (fine, coarse) in enumerate(zip(self.widths[:-1], self.widths[1:], strict=True))
        ]


TINY = DCAEConfig(
    widths=(4, 4, 8, 8, 16, 16),
    encoder_depths=(1,) * 6,
    decoder_depths=(1,) * 6,
    latent_channels=16,
    head_dim=8,
)
"""The same compression at toy sizes, for tests and the demo."""


def write_config(folder: Path, config: DCAEConfig) -> None:
    """Write config.json of a folder."""
    text = json.dumps({"_class_name": CLASS_NAME, **to_dict(config)}, indent=1)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")


def parse_config(facts: Mapping[str, Any], *, where: str) -> DCAEConfig:
    """Sizes from the content of a config.json.

    Raises:
        UserError: it is another class's, has an unknown key, or sizes that cannot be.
    """
    if facts.get("_class_name") != CLASS_NAME:
        raise UserError(f"{where} is for {facts.get('_class_name')}, not {CLASS_NAME}; make its folder with megasora convert --to dc-ae")
    sizes = {key: value for key, value in facts.items() if key not in ("_class_name", LATENTS)}
    config: DCAEConfig = from_dict(sizes, DCAEConfig, path=where)
    if wrong := config.problems():
        raise UserError(f"{where}: {wrong[0]}")
    return config


def read_config(folder: Path) -> DCAEConfig:
    """Sizes of a folder.

    Raises:
        UserError: it has no config.json of ours.
    """
    file = folder / "config.json"
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({error}); make the folder with megasora convert --to dc-ae") from error
    if not isinstance(facts, dict):
        raise UserError(f"{file} is no configuration; make the folder with megasora convert --to dc-ae")
    return parse_config(facts, where=str(file))
