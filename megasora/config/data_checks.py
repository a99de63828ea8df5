"""Checks of the buckets' mix and of what a run starts from; part of `config.validate`."""

from __future__ import annotations

from collections.abc import Iterator

from megasora.config.latent_frames import frame_rule, is_frame_count
from megasora.config.problem import Problem
from megasora.config.schema import RunConfig


def check_buckets(config: RunConfig, world_size: int) -> Iterator[Problem]:
    """data.bucket_mix, and the settings it stands in for."""
    data = config.data
    if data.resolution == "mix" and not data.bucket_mix:
        yield Problem(
            field="data.resolution", message="is mix, and data.bucket_mix is empty", cure="name a class, such as --data.resolution 256px"
        )
    if not data.bucket_mix:
        return
    beside = {
        "resolution": data.resolution != "mix",
        "resolution_mix": bool(data.resolution_mix),
        "buckets": data.buckets != "published",
    }
    for name, wrong in beside.items():
        if wrong:
            value = getattr(data, name)
            yield Problem(
                field=f"data.{name}",
                message=f"is {value if isinstance(value, str) else list(value)} beside data.bucket_mix, which draws classes by itself",
                cure="empty the mix with --data.bucket_mix, or use resolution mix, buckets published and no resolution_mix",
            )
    yield from _entries(config)
    named = {frames for _, frames, _, _ in data.bucket_mix}
    strange = sorted(set(data.frame_counts) - named)
    if strange:
        yield Problem(
            field="data.frame_counts",
            message=f"{strange} have no entry in data.bucket_mix",
            cure=f"use counts among {sorted(named, reverse=True)}",
        )


def _entries(config: RunConfig) -> Iterator[Problem]:
    mix, encoders = config.data.bucket_mix, config.encoders
    field, ratio, causal = "data.bucket_mix", encoders.temporal_compression, encoders.causal
    bad = sorted({frames for _, frames, _, _ in mix if not is_frame_count(frames, compression=ratio, causal=causal)})
    if bad:
        yield Problem(field=field, message=f"{bad}: frame counts are {frame_rule(compression=ratio, causal=causal)}", cure="change them")
    if len({(name, frames) for name, frames, _, _ in mix}) < len(mix):
        yield Problem(field=field, message="names a class and frame count twice", cure="give each pair once")
    out = [entry for entry in mix if not (0 <= entry[2] <= 1 and 0 <= entry[3] <= 1)]
    if out:
        yield Problem(field=field, message=f"{list(out[0])} holds a number that is no probability", cure="use 0 to 1")
    elif not any(probability > 0 and skip < 1 for _, _, probability, skip in mix):
        yield Problem(field=field, message="keeps no clip", cure="give an entry a probability above 0 and a skip below 1")
    skipped = [entry for entry in mix if entry[1] == 1 and entry[3] > 0]
    if skipped:
        yield Problem(field=field, message=f"{list(skipped[0])}: an image has no next frame count", cure="use skip 0 for 1 frame")


def check_start(config: RunConfig, world_size: int) -> Iterator[Problem]:
    """What the weights start from."""
    init = config.init
    if init.run is not None and init.weights is not None:
        yield Problem(field="init.run", message="and init.weights are both given", cure="leave one of them out")
    if init.run is None and init.run_weights != "auto":
        yield Problem(field="init.run_weights", message=f"is {init.run_weights} without init.run", cure="add --init.run FOLDER")
