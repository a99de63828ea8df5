"""Where converted tensors go: one safetensors file, a folder of bounded shards with an index, or a distributed checkpoint.

All of them take tensors from several threads, can go on after an interruption, and are complete only after `finish`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from megasora import __version__
from megasora.checkpoint import manifests
from megasora.checkpoint.formats.rules import Format
from megasora.checkpoint.megatron_io import MegatronFileWriter, Written, write_contents
from megasora.checkpoint.safetensors_io import SafetensorsWriter, stored_order
from megasora.checkpoint.tensors import Rows, TensorInfo
from megasora.config.io import to_dict
from megasora.config.schema import ModelConfig

JOURNAL = "journal.jsonl"
"""What an interrupted conversion has done, in its partial folder."""
Place = dict[str, Any]
"""Where a tensor was put, for the journal; empty where the layout says it."""


class Output(Protocol):
    """A target being written."""

    def write(self, key: str, rows: Rows, *, worker: int) -> Place:
        """Write a tensor."""
        ...

    def sync(self, worker: int) -> None:
        """Wait until what `worker` wrote is on disk."""
        ...

    def finish(self, places: Mapping[str, Place], facts: dict[str, Any]) -> None:
        """Write what makes the target complete, `facts` as its manifest included."""
        ...

    def abandon(self) -> None:
        """Close the files of an interrupted conversion."""
        ...


def shards_of(infos: Mapping[str, TensorInfo], *, shard_bytes: int) -> list[list[str]]:
    """Runs of tensors of at most `shard_bytes` (a larger tensor gets a shard of its own), in the order given."""
    shards: list[list[str]] = []
    room = 0
    for key, info in infos.items():
        if not shards or info.num_bytes > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(key)
        room -= info.num_bytes
    return shards


class SafetensorsOutput:
    """Safetensors shards in `folder`; `single` makes them one file of that name.

    Args:
        folder: the partial folder.
        infos: every tensor.
        fmt: the format, for the names of shards and the configuration.
        model: sizes.
        single: name of the one file, or None for shards with an index.
        shard_bytes: most bytes of a shard.
        keep: go on with the files that are there.
    """

    def __init__(
        self,
        folder: Path,
        infos: Mapping[str, TensorInfo],
        *,
        fmt: Format,
        model: ModelConfig,
        single: str | None,
        shard_bytes: int,
        keep: bool,
    ) -> None:
        self.folder, self.fmt, self.model, self.single = folder, fmt, model, single
        ordered = {key: infos[key] for key in stored_order(infos)} if single else dict(infos)
        self.infos = ordered
        shards = [list(ordered)] if single else shards_of(ordered, shard_bytes=shard_bytes)
        self.stem = "diffusion_pytorch_model" if fmt == "diffusers" else "model"
        self._writers: list[SafetensorsWriter] = []
        self._where: dict[str, int] = {}
        metadata = {"format": "pt", "megasora": __version__}
        for number, keys in enumerate(shards):
            name = single or self._name(number, len(shards))
            held = {key: ordered[key] for key in keys}
            by_width = {key: held[key] for key in stored_order(held)}
            self._writers.append(SafetensorsWriter(folder / name, by_width, metadata=metadata, keep=keep))
            self._where.update(dict.fromkeys(keys, number))

    def _name(self, number: int, count: int) -> str:
        return f"{self.stem}.safetensors" if count == 1 else f"{self.stem}-{number + 1:05d}-of-{count:05d}.safetensors"

    def write(self, key: str, rows: Rows, *, worker: int) -> Place:
        """Write a tensor."""
        self._writers[self._where[key]].write(key, rows)
        return {}

    def sync(self, worker: int) -> None:
        """Wait until everything is on disk."""
        for writer in self._writers:
            writer.sync()

    def finish(self, places: Mapping[str, Place], facts: dict[str, Any]) -> None:
        """Close the shards; write index, configuration and manifest."""
        self.abandon()
        if self.single:
            write_json(self.folder / f"{self.single}.{manifests.NAME}", facts)
            return
        if len(self._writers) > 1:
            table = {key: self._writers[number].path.name for key, number in self._where.items()}
            total = sum(info.num_bytes for info in self.infos.values())
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(table.items()))}
            write_json(self.folder / f"{self.stem}.safetensors.index.json", index)
        if self.fmt == "diffusers":
            write_json(self.folder / "config.json", diffusers_config(self.model))
        write_json(self.folder / manifests.NAME, facts)

    def abandon(self) -> None:
        """Close the files."""
        for writer in self._writers:
            writer.close()


def diffusers_config(model: ModelConfig) -> dict[str, Any]:
    """config.json of diffusers' FluxTransformer2DModel (models/transformers/transformer_flux.py)."""
    return {
        "_class_name": "FluxTransformer2DModel",
        "patch_size": 1,
        "in_channels": model.in_channels,
        "num_layers": model.num_double_blocks,
        "num_single_layers": model.num_single_blocks,
        "attention_head_dim": model.head_dim,
        "num_attention_heads": model.num_attention_heads,
        "joint_attention_dim": model.text_dim,
        "pooled_projection_dim": model.vec_dim,
        "guidance_embeds": model.guidance_embed,
        "axes_dims_rope": list(model.axes_dim),
    }


class MegatronOutput:
    """A model-only distributed checkpoint: one data file per worker.

    Args:
        folder: the partial folder.
        infos: every tensor, by canonical name.
        model: sizes.
        workers: number of data files.
        places: tensors an interrupted conversion has already written.
    """

    def __init__(
        self, folder: Path, infos: Mapping[str, TensorInfo], *, model: ModelConfig, workers: int, places: Mapping[str, Place]
    ) -> None:
        self.folder, self.infos, self.model = folder, infos, model
        ends = dict.fromkeys((f"__0_{worker}.distcp" for worker in range(workers)), 0)
        for place in places.values():
            ends[place["file"]] = max(ends[place["file"]], place["start"] + place["length"])
        self._writers = [MegatronFileWriter(folder / name, keep_bytes=end) for name, end in ends.items()]

    def write(self, key: str, rows: Rows, *, worker: int) -> Place:
        """Append a tensor to the worker's file."""
        written = self._writers[worker].write(rows, self.infos[key])
        return {"file": written.file, "start": written.start, "length": written.length}

    def sync(self, worker: int) -> None:
        """Wait until the worker's file is on disk."""
        self._writers[worker].sync()

    def finish(self, places: Mapping[str, Place], facts: dict[str, Any]) -> None:
        """Close the files; write the table of contents and the manifest."""
        self.abandon()
        written = {f"model.{key}": (self.infos[key], Written(**places[key])) for key in self.infos}
        write_contents(self.folder, written)
        files = sorted(path for path in self.folder.iterdir() if path.name != JOURNAL)
        manifest = {
            "format": manifests.WEIGHTS,
            "megasora": __version__,
            "model": to_dict(self.model),
            "files": {path.name: {"bytes": path.stat().st_size} for path in files},
            **{name: value for name, value in facts.items() if name not in ("format", "megasora")},
        }
        write_json(self.folder / manifests.NAME, manifest)

    def abandon(self) -> None:
        """Close the files."""
        for writer in self._writers:
            writer.close()


def write_json(path: Path, value: Any) -> None:
    """Write JSON, synced."""
    with path.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
