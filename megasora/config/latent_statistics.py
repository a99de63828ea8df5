"""What was measured of an autoencoder's latents, as its folder's config.json keeps it beside the scaling factor that follows from it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megasora.config.errors import UserError
from megasora.config.files import written_whole
from megasora.config.io import from_dict, to_dict

KEY = "_latents"
"""In config.json. diffusers leaves names with an underscore alone, and train-ae, whose weights the numbers are no longer of, drops them."""


@dataclass(frozen=True, kw_only=True)
class LatentStatistics:
    """Of latents as the encoder gives them, neither shifted nor scaled, drawn from the posterior where it has a spread."""

    latents_mean: tuple[float, ...]
    """Of each channel (diffusers' name, as in AutoencoderKLWan's config)."""
    latents_std: tuple[float, ...]
    """Of each channel, over n."""
    mean: float
    """Of all channels together."""
    std: float
    """Of all channels together, about that mean, over n."""
    values: int
    """Numbers in each channel."""
    clips: int
    shapes: tuple[str, ...]
    """Sizes and numbers of frames that were encoded."""
    weights_sha256: str
    """Of the weights they are of: names, types, shapes and bytes of all tensors."""
    dtype: str
    tiling: str
    megasora: str
    """Version that measured."""

    @property
    def scaling_factor(self) -> float:
        """What a diffusion transformer's latents are multiplied by, so that their deviation is 1: 1 / std over all channels (latent
        diffusion, arXiv 2112.10752, appendix G). Open-Sora's DC-AE divides by its factor, 0.493: here that is 1 / 0.493 = 2.0284."""
        return 1.0 / self.std


def keep_statistics(folder: Path, statistics: LatentStatistics) -> None:
    """Write them and their scaling factor into the folder's config.json; the file changes whole or not at all.

    Raises:
        UserError: there is no folder with a config.json, or nothing varies.
    """
    if not statistics.std > 0:
        raise UserError(f"{folder}: all latents are equal, there is no scaling factor; give clips that differ")
    facts = _facts(folder)
    facts.update({"scaling_factor": statistics.scaling_factor, KEY: to_dict(statistics)})
    with written_whole(folder / "config.json", sync=True) as temporary:
        temporary.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def kept_statistics(facts: Mapping[str, Any], *, where: str) -> LatentStatistics | None:
    """What a config.json says of latents; None where nothing was measured.

    Raises:
        UserError: an entry that is none of ours.
    """
    if KEY not in facts:
        return None
    found: LatentStatistics = from_dict(facts[KEY], LatentStatistics, path=f"{where}:{KEY}")
    return found


def refuse_without_config(path: Path) -> None:
    """Refuse weights that have no config.json to write into.

    Raises:
        UserError: names what makes a folder of them.
    """
    if not (path / "config.json").is_file():
        cure = f"megasora convert {path} FOLDER --to dc-ae (HunyuanVideo's: --to diffusers-vae) makes one; then evaluate FOLDER"
        raise UserError(f"--write_config needs an autoencoder's folder with its config.json, {path} has none: {cure}")


def _facts(folder: Path) -> dict[str, Any]:
    refuse_without_config(folder)
    try:
        facts = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{folder / 'config.json'} is no JSON ({str(error)[:80]})") from error
    if not isinstance(facts, dict):
        raise UserError(f"{folder / 'config.json'} is no configuration of an autoencoder")
    return facts
