"""Autoencoders from one format to another: tensor by tensor, with a manifest of hashes, and a proof that replays the inverse."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from megasora import __version__
from megasora.checkpoint import manifests
from megasora.checkpoint.autoencoder import HUNYUAN_CLASS, TITLES, AutoencoderSource, open_autoencoder
from megasora.checkpoint.conversion_plan import DTYPES, Dtype
from megasora.checkpoint.convert import manifest_of, sha256_of
from megasora.checkpoint.export import Conversion
from megasora.checkpoint.formats import dc_ae
from megasora.checkpoint.formats.dc_ae import Piece
from megasora.checkpoint.outputs import write_json
from megasora.checkpoint.safetensors_io import SafetensorsReader, SafetensorsWriter, stored_order
from megasora.checkpoint.tensors import FLOATS, ITEM_BYTES, Rows, TensorInfo, TensorReader, cast, from_torch
from megasora.checkpoint.verify import Proof
from megasora.config.dc_ae import CLASS_NAME, WEIGHTS_FILE, DCAEConfig
from megasora.config.errors import UserError
from megasora.config.files import refuse_existing, written_whole
from megasora.config.io import to_dict
from megasora.config.latent_statistics import KEY as LATENTS

SINGLE = ("hunyuan-vae", "hcae")
"""Formats of one file."""
FORMATS = (*SINGLE, "diffusers-vae", "dc-ae", "diffusers-dc-ae")
START_STD = 0.02
"""Of new kernels (opensora/models/dc_ae/utils/init.py: trunc_normal, whose cut at 100 deviations never comes)."""
START_SEED = 1024
"""Of new kernels, with the tensor's name."""


@dataclass(frozen=True, kw_only=True)
class Item:
    """One tensor of the target."""

    info: TensorInfo
    piece: Piece
    """Stored names of the source."""
    first_row: int = 0
    """Of the stacked rows, where the target has a part of them."""
    edits: tuple[str, ...] = ()
    """What was done to it that the target alone cannot undo."""

    def describe(self) -> str:
        """What it is made of, in words."""
        part = f"[{self.first_row}:{self.first_row + self.info.num_rows}]" if self.first_row else ""
        change = "" if self.piece.change == "same" else f" ({self.piece.change})"
        return (" + ".join(self.piece.sources) or "nothing") + part + change


@dataclass(frozen=True, kw_only=True)
class AutoencoderPlan:
    """A conversion before a byte is moved."""

    source: AutoencoderSource
    items: dict[str, Item]
    config: dict[str, Any]
    """config.json of a folder."""
    target_format: str

    def rows(self, key: str) -> Rows:
        """The bytes of a target tensor."""
        item, reader = self.items[key], self.source.reader
        if not item.piece.sources:
            return _new(key, item.info)
        stored = reader.infos[item.piece.sources[0]]
        rows = np.concatenate([reader.rows(name) for name in item.piece.sources])
        rows = rows[item.first_row : item.first_row + item.info.num_rows]
        rows = changed(rows, item.info.shape, item.piece.change, item_bytes=ITEM_BYTES[stored.dtype])
        return rows if stored.dtype == item.info.dtype else cast(rows, replace(item.info, dtype=stored.dtype), item.info.dtype)


def changed(rows: Rows, shape: tuple[int, ...], change: str, *, item_bytes: int) -> Rows:
    """Rows of a tensor of pictures as one of clips (inflate) or the other way round (middle).

    Args:
        rows: bytes of the source.
        shape: of the result for middle and inflate alike: [out, in, ...].
        change: what is done.
        item_bytes: of an element.
    """
    if change == "same":
        return rows
    outputs, inputs = shape[:2]
    if change == "middle":
        area = int(np.prod(shape[2:], dtype=np.int64)) * item_bytes
        cells = rows.reshape(outputs, inputs, -1, area)
        return np.ascontiguousarray(cells[:, :, cells.shape[2] // 2]).reshape(outputs, -1)
    frames, area = shape[2], shape[3] * shape[4] * item_bytes
    cells = np.zeros((outputs, inputs, frames, area), dtype=np.uint8)
    cells[:, :, frames // 2] = rows.reshape(outputs, inputs, area)
    return cells.reshape(outputs, -1)


def _new(key: str, info: TensorInfo) -> Rows:
    """Start values of a tensor that the source does not have: kernels normal, biases zero."""
    import torch

    values = np.zeros(info.shape, dtype=np.float32)
    if key.endswith(".weight"):
        draw = np.random.default_rng([START_SEED, zlib.crc32(key.encode())])
        values = (START_STD * draw.standard_normal(info.shape)).astype(np.float32)
    rows, own = from_torch(torch.from_numpy(values))
    return rows if info.dtype == "F32" else cast(rows, own, info.dtype)


def plan_autoencoder(
    source: AutoencoderSource, target_format: str, *, dtype: Dtype | None = None, latent_channels: int | None = None
) -> AutoencoderPlan:
    """Decide what the target is made of.

    Args:
        source: the opened weights.
        target_format: one of `FORMATS`.
        dtype: type of every floating-point tensor; None keeps each as it is.
        latent_channels: of a video DC-AE made of one of pictures; the two layers at the latent start anew when it differs.

    Raises:
        UserError: the source is not complete, or cannot become that.
    """
    if wrong := source.problems():
        raise UserError(f"{source.path}: {len(wrong)} tensors do not fit a {TITLES[source.kind]}, the first: {wrong[0]}")
    possible = {"hunyuan": ("hunyuan-vae", "diffusers-vae"), "dc-ae": ("dc-ae", "hcae", "diffusers-dc-ae"), "dc-ae-images": ("dc-ae",)}
    if target_format not in possible[source.kind]:
        raise UserError(f"{source.path} is a {TITLES[source.kind]}: --to {target_format} cannot hold it, use {possible[source.kind]}")
    if latent_channels is not None and source.kind != "dc-ae-images":
        raise UserError(f"--latent_channels is for a video DC-AE made of one of pictures, {source.path} is a {TITLES[source.kind]}")
    if source.kind == "dc-ae-images":
        items, config = _from_images(source, latent_channels)
    elif target_format == "diffusers-dc-ae":
        items, config = _to_images(source)
    else:
        pieces = {name: Piece(sources=(key,)) for name, key in source.names.items()}
        items = {name: Item(info=source.infos[name], piece=piece) for name, piece in pieces.items()}
        config = {"_class_name": HUNYUAN_CLASS, **source.facts} if source.sizes is None else _own_config(source.sizes)
        config.update({LATENTS: source.facts[LATENTS]} if LATENTS in source.facts else {})  # measured of these weights
    typed = {key: _typed(item, dtype) for key, item in items.items()}
    return AutoencoderPlan(source=source, items=typed, config=config, target_format=target_format)


def _own_config(sizes: DCAEConfig) -> dict[str, Any]:
    return {"_class_name": CLASS_NAME, **to_dict(sizes)}


def _from_images(source: AutoencoderSource, latent_channels: int | None) -> tuple[dict[str, Item], dict[str, Any]]:
    images, infos = source.sizes, source.infos
    assert images is not None
    config = replace(images, latent_channels=latent_channels or images.latent_channels)
    if wrong := config.problems():
        raise UserError(f"--latent_channels {latent_channels}: {wrong[0]}")
    shapes, items = dc_ae.tensor_shapes(config), dict[str, Item]()
    for key, piece in dc_ae.from_images(config, images).items():
        given = piece.sources or dc_ae.image_names(key)
        info = TensorInfo(dtype=infos[given[0]].dtype, shape=shapes[key])
        edits = () if piece.sources else ("new: the latent has other channels",)
        items[key] = Item(info=info, piece=piece, edits=edits)
    return items, _own_config(config)


def _to_images(source: AutoencoderSource) -> tuple[dict[str, Item], dict[str, Any]]:
    assert source.sizes is not None
    shapes, pieces = dc_ae.image_tensors(source.sizes)
    items: dict[str, Item] = {}
    for name, (piece, first_row) in pieces.items():
        stored = source.infos[piece.sources[0]]
        lossy = piece.change == "middle" and stored.shape[2] > 1
        edits = ("only the middle frame of the kernel",) if lossy else ()
        items[name] = Item(info=TensorInfo(dtype=stored.dtype, shape=shapes[name]), piece=piece, first_row=first_row, edits=edits)
    return items, dc_ae.image_config(source.sizes)


def _typed(item: Item, dtype: Dtype | None) -> Item:
    was = item.info.dtype
    if dtype is None or was == DTYPES[dtype] or was not in FLOATS:
        return item
    return replace(item, info=replace(item.info, dtype=DTYPES[dtype]), edits=(*item.edits, f"cast {was} to {DTYPES[dtype]}"))


def export_autoencoder(
    path: Path | AutoencoderSource,
    target: Path,
    *,
    target_format: str,
    dtype: Dtype | None = None,
    latent_channels: int | None = None,
    prove: bool = False,
) -> Conversion:
    """Write an autoencoder in another format; it appears only when complete.

    Args:
        path: the source, or what has been opened of it.
        target: one file (hunyuan-vae, hcae) or a folder.
        target_format, dtype, latent_channels: see `plan_autoencoder`.
        prove: verify after converting; a target that is already complete is only verified.

    Raises:
        UserError: see `plan_autoencoder`; the target exists or has the wrong ending; the proof fails.
    """
    single = target_format in SINGLE
    if (target.suffix == ".safetensors") != single:
        raise UserError(f"{target}: {target_format} is {'one file; end it in' if single else 'a folder; leave out'} .safetensors")
    source = path if isinstance(path, AutoencoderSource) else open_autoencoder(path)
    plan = plan_autoencoder(source, target_format, dtype=dtype, latent_channels=latent_channels)
    options = {"dtype": dtype, "latent_channels": latent_channels}
    manifest: dict[str, Any] = {}
    if not (prove and target.exists()):
        refuse_existing(target, cure="remove it or choose another name")
        manifest = _write(plan, target, options)
    proof = prove_autoencoder(plan, target, options) if prove else None
    infos = [item.info for item in plan.items.values()]
    edited = {edit for item in plan.items.values() for edit in item.edits}
    counts = [f"{sum(edit in item.edits for item in plan.items.values())} tensors: {edit}" for edit in sorted(edited)]
    lines = [
        f"{TITLES[plan.source.kind]} -> {target_format}: {source.path} -> {target}",
        f"{len(infos)} tensors, {sum(info.numel for info in infos):,} parameters",
        *counts,
    ]
    if proof is not None:
        lines.append(f"verified: {proof.target_hashes} target tensors have the hashes of the manifest")
        lines.append(f"verified: {proof.inverted} source tensors come back bit for bit, {proof.replayed} target tensors were made again")
    return Conversion(lines=tuple(lines), manifest=manifest, proof=proof)


def _write(plan: AutoencoderPlan, target: Path, options: Mapping[str, Any]) -> dict[str, Any]:
    infos = {key: item.info for key, item in plan.items.items()}
    target.parent.mkdir(parents=True, exist_ok=True)
    single = plan.target_format in SINGLE
    with written_whole(target) as whole:
        if not single:
            whole.mkdir()
            write_json(whole / "config.json", plan.config)
        name = WEIGHTS_FILE if plan.target_format == "dc-ae" else "diffusion_pytorch_model.safetensors"
        writer = SafetensorsWriter(
            whole if single else whole / name, {key: infos[key] for key in stored_order(infos)}, metadata={"format": "pt"}
        )
        hashes: dict[str, str] = {}
        for key in plan.items:
            rows = plan.rows(key)
            hashes[key] = sha256_of(rows)
            writer.write(key, rows)
            for name in plan.items[key].piece.sources:
                plan.source.reader.release(name)
        writer.close()
        facts = _manifest(plan, target, hashes, options)
        write_json(target.with_name(f"{target.name}.{manifests.NAME}") if single else whole / manifests.NAME, facts)
    return facts


def _manifest(plan: AutoencoderPlan, target: Path, hashes: Mapping[str, str], options: Mapping[str, Any]) -> dict[str, Any]:
    source = plan.source
    read = {key: sha256_of(source.reader.rows(key)) for key in source.names.values()}
    return {
        "format": "megasora-conversion",
        "megasora": __version__,
        "source": {"name": source.path.name, "format": source.format},
        "target": {"name": target.name, "format": plan.target_format, "config": plan.config},
        "options": dict(options),
        "dropped": {},
        "tensors": {
            key: {
                "dtype": item.info.dtype,
                "shape": list(item.info.shape),
                "sha256": hashes[key],
                "rows_of": item.describe(),
                "edits": list(item.edits),
            }
            for key, item in plan.items.items()
        },
        "source_tensors": {
            key: {"dtype": info.dtype, "shape": list(info.shape), "sha256": read[key]} for key, info in source.reader.infos.items()
        },
    }


def prove_autoencoder(plan: AutoencoderPlan, target: Path, options: Mapping[str, Any]) -> Proof:
    """Prove a finished conversion against its source.

    Raises:
        UserError: a tensor differs, or the target was made with other flags.
    """
    facts = manifest_of(target)
    if dict(options) != facts["options"]:
        raise UserError(f"{target} was made with {facts['options']}, not {dict(options)}")
    made, source = SafetensorsReader(target), plan.source.reader
    wrong = [key for key, entry in facts["tensors"].items() if key not in made.infos or sha256_of(made.rows(key)) != entry["sha256"]]
    if wrong or made.infos.keys() != plan.items.keys():
        raise UserError(f"{target}: {len(wrong)} tensors are not the ones that were written, the first {wrong[0] if wrong else 'is new'}")
    inverted: set[str] = set()
    replayed = 0
    for key, item in plan.items.items():
        rows = made.rows(key)
        if item.edits or not item.piece.sources:
            replayed += 1
            if sha256_of(plan.rows(key)) != facts["tensors"][key]["sha256"]:
                raise UserError(f"{target}: {key} cannot be made again from the source")
            continue
        _invert(rows, item, source, target)
        inverted.update(item.piece.sources)
    return Proof(target_hashes=len(facts["tensors"]), inverted=len(inverted), replayed=replayed, unproved=())


def _invert(rows: Rows, item: Item, source: TensorReader, target: Path) -> None:
    """Compare what a target tensor gives back with the source.

    Raises:
        UserError: it is not the same, bit for bit.
    """
    if item.piece.change == "inflate":
        flat = (item.info.shape[0], item.info.shape[1], *item.info.shape[3:])
        rows = changed(rows, flat, "middle", item_bytes=ITEM_BYTES[item.info.dtype])
    start = item.first_row
    for name in item.piece.sources:
        theirs = source.rows(name)
        part = rows[: len(theirs)] if not start else rows
        own = theirs[start : start + len(part)]
        if not np.array_equal(part.reshape(-1), own.reshape(-1)):
            raise UserError(f"{target}: {name} does not come back bit for bit")
        rows = rows[len(part) :]
