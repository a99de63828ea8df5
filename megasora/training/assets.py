"""Makes what `tiny` needs when nothing is given: clips, captions and small random encoders. Rank 0 makes, the others wait."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

from megasora.config.errors import UserError
from megasora.config.schema import RunConfig
from megasora.training.prerequisites import refuse_missing_encoders


def with_assets(config: RunConfig, *, folder: Path) -> RunConfig:
    """The config with a manifest and encoders.

    Args:
        config: the run; the tiny recipe may leave manifest and encoders open.
        folder: where made assets are kept (inside the run folder).

    Raises:
        UserError: another recipe left them open.
    """
    encoders = config.encoders
    open_encoders = [name for name in ("vae", "t5", "clip") if getattr(encoders, name) is None]
    if config.recipe != "tiny":
        if config.data.manifest is None:
            raise UserError("no clips given: add --data.manifest TABLE (csv or parquet)")
        refuse_missing_encoders(config)
        return config
    if 0 < len(open_encoders) < 3:
        raise UserError(f"give all encoders or none; missing: {', '.join(open_encoders)}")
    if dist.get_rank() == 0:
        made = _make(config, folder=folder, make_encoders=bool(open_encoders))
        payload: list[RunConfig] = [made]
    else:
        payload = [config]
    dist.broadcast_object_list(payload, src=0)
    return payload[0]


def _make(config: RunConfig, *, folder: Path, make_encoders: bool) -> RunConfig:
    from megasora.data.manifest import read_manifest
    from megasora.data.tiny_clips import make_tiny_clips
    from megasora.models.encoders.tiny import make_tiny_encoders

    if config.data.manifest is None:
        train, evaluation = make_tiny_clips(folder / "clips")
        config = replace(config, data=replace(config.data, manifest=str(train), eval_manifest=str(evaluation)))
    if make_encoders:
        captions = [clip.text for clip in read_manifest(str(config.data.manifest)).clips]
        encoders = make_tiny_encoders(folder / "encoders", captions=captions, model=config.model, base=config.encoders)
        config = replace(config, encoders=encoders)
    return config
