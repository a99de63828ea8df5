"""The record beside a clip: everything that is needed to make it again, as JSON."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megasora import __version__
from megasora.checkpoint.manifests import NAME as MANIFEST
from megasora.config.errors import UserError
from megasora.config.files import written_whole
from megasora.config.io import to_dict
from megasora.config.schema import EncodersConfig, ModelConfig, RunConfig
from megasora.data.cache.identity import encoder_facts, file_sha256, library_versions
from megasora.inference.requests import ClipRequest

FORMAT = "megasora-clip-1"
UNSETTLED = ("made", "versions", "layout", "paths", "search", "refined_from", "refinement")
"""Parts of a record in which two records of the same clip may differ."""
ENCODING = ("dtype", "tile_size", "tile_overlap", "tile_frames", "scaling_factor")
"""Settings of the encoders that decide a clip beside their files."""
NOT_OF_A_CLIP = ("height", "width", "num_frames", "seed", "guidance_parallel", "reuse_check")
"""Settings of a run's sample section that a clip has of its own, or that only say where it is computed."""


@dataclass(frozen=True, kw_only=True)
class Hashes:
    """SHA-256 of what all clips of a run are made from."""

    weights: str
    """Of the file, of the names and hashes of a folder's files, or of a checkpoint's manifest, which holds them."""
    encoders: Mapping[str, str]


def hashes_of(weights: Path, config: RunConfig) -> Hashes:
    """Read and hash weights and encoders (24 GB of weights: half a minute)."""
    encoders = {name: encoder_facts(str(folder)).sha256 for name in ("vae", "t5", "clip") if (folder := getattr(config.encoders, name))}
    return Hashes(weights=weights_sha256(weights), encoders=encoders)


def weights_sha256(weights: Path) -> str:
    """Hash of weights of any format."""
    if weights.is_file():
        return file_sha256(weights)
    if (weights / MANIFEST).is_file():
        return file_sha256(weights / MANIFEST)
    files = sorted(path for path in weights.rglob("*.safetensors") if path.is_file())
    joined = "".join(f"{path.relative_to(weights)} {file_sha256(path)}\n" for path in files)
    return hashlib.sha256(joined.encode()).hexdigest()


def record_of(
    request: ClipRequest, *, caption: str, config: RunConfig, model: ModelConfig, weights: Path, select: str, hashes: Hashes
) -> dict[str, Any]:
    """The record of a clip, without what drawing it took.

    Args:
        request: the clip.
        caption: its prompt as the text encoders got it.
        config, model: settings; the model as its weights have it.
        weights, select: where the weights are, and which of a checkpoint's.
        hashes: of `hashes_of`.
    """
    sample = {name: value for name, value in to_dict(config.sample).items() if name not in NOT_OF_A_CLIP}
    if request.motion_score is not None:
        sample["motion_score"] = request.motion_score
    asked = {} if request.refinement is None else {"refined_from": request.refined_from, "refinement": dict(request.refinement)}
    sources = {name: path for name in ("image", "end_image", "video") if (path := getattr(request, name)) is not None}
    return {
        "format": FORMAT,
        "prompt": request.prompt,
        "caption": caption,
        **asked,
        "negative": request.negative,
        "kind": request.kind,
        "given": {name: file_sha256(path) for name, path in sources.items()},
        "seed": request.seed,
        "size": to_dict(request.size),
        "sample": sample,
        "flow": to_dict(config.flow),
        "precision": to_dict(config.precision),
        "text_tokens": config.data.text_tokens,
        "encoding": {name: to_dict(config.encoders)[name] for name in ENCODING},
        "model": to_dict(model),
        "weights": {"sha256": hashes.weights, "select": select},
        "encoders": dict(hashes.encoders),
        "paths": {"weights": str(weights), **{name: str(path) for name, path in sources.items()}},
        "versions": {"megasora": __version__, **dict(library_versions())},
        "layout": {**_layout(config), "device": config.device},
    }


def _layout(config: RunConfig) -> dict[str, int]:
    parallel = config.parallel
    return {
        "tensor": parallel.tensor_model_parallel_size,
        "pipeline": parallel.pipeline_model_parallel_size,
        "context": parallel.context_parallel_size,
        "guidance": config.sample.guidance_parallel,
    }


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any], *, path: str = "") -> list[str]:
    """What two records of clips do not have in common, apart from UNSETTLED, one phrase each."""
    found: list[str] = []
    for key in dict.fromkeys([*ours, *theirs]):
        if not path and key in UNSETTLED:
            continue
        a, b = ours.get(key), theirs.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += differences(a, b, path=f"{path}{key}.")
        elif a != b:
            found.append(f"{path}{key} was {_short(b)} and is {_short(a)}")
    return found


def _short(value: object) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 50 else f"{text[:47]}..."


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Write it whole."""
    with written_whole(path) as temporary:
        temporary.write_text(json.dumps(record, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def read_record(path: Path) -> dict[str, Any]:
    """Read a record.

    Raises:
        UserError: it cannot be read or is none.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise UserError(f"{path} is no JSON: {error}") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise UserError(f"{path} is no record of a clip ({FORMAT}); give the .json beside a clip that megasora sample made")
    defaults = to_dict(EncodersConfig())
    record["encoding"] = {name: defaults[name] for name in ENCODING} | record["encoding"]  # older ones lack the last two
    return record
