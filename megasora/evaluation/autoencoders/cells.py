"""What is finished: one folder for each clip, shape and autoencoder, named by a hash of all that its numbers depend on.

So a command that was cut off goes on, one that asks for more does only what is new, and nothing of other weights or settings is mixed in.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from torch import Tensor

from megasora.config.errors import UserError
from megasora.config.files import written_whole
from megasora.evaluation.autoencoders.latents import LatentMoments
from megasora.evaluation.autoencoders.measure import ClipMeasures, Measured, Pair
from megasora.evaluation.autoencoders.pictures import save_pictures

CLIPS, FAILED, FACTS, ARRAYS = "clips", "failed", "cell.json", "arrays.npz"
LATENT = "latent_"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A finished one."""

    folder: Path
    measures: ClipMeasures
    moments: LatentMoments
    features: Mapping[str, Pair]


def key_of(made_of: Mapping[str, Any]) -> str:
    """Name of the cell that is made of these facts."""
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:24]


class Cells:
    """Those of one output folder; several ranks write beside each other, each its own clips.

    Args:
        out: the output folder.
    """

    def __init__(self, out: Path) -> None:
        self._clips, self._failed = out / CLIPS, out / FAILED

    def has(self, key: str) -> bool:
        """Whether it is finished."""
        return (self._clips / key / FACTS).is_file()

    def save(self, key: str, made_of: Mapping[str, Any], *, levels: Tensor, measured: Measured) -> None:
        """Write one with its pictures; it appears whole."""
        self._clips.mkdir(parents=True, exist_ok=True)
        target = self._clips / key
        shutil.rmtree(target, ignore_errors=True)  # of a copy that was cut off: a finished one is never made again
        facts = {"made_of": dict(made_of), "measures": asdict(measured.measures)}
        with written_whole(target) as temporary:
            temporary.mkdir()
            save_pictures(temporary, levels, measured.made)
            pairs = {f"{name}_{which}": of for name, pair in measured.features.items() for which, of in zip("ab", pair, strict=True)}
            latent = {f"{LATENT}{name}": array for name, array in measured.moments.arrays().items()}
            np.savez_compressed(temporary / ARRAYS, **latent, **pairs)  # type: ignore[arg-type]
            (temporary / FACTS).write_text(json.dumps(facts, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        (self._failed / key).unlink(missing_ok=True)

    def fail(self, key: str, reason: str) -> None:
        """Note why it cannot be; it is tried again the next time."""
        self._failed.mkdir(parents=True, exist_ok=True)
        with written_whole(self._failed / key) as temporary:
            temporary.write_text(reason + "\n", encoding="utf-8")

    def failure(self, key: str) -> str | None:
        """Why it is not there; None where nothing went wrong."""
        file = self._failed / key
        return file.read_text(encoding="utf-8").strip() if file.is_file() else None

    def load(self, key: str) -> Cell:
        """A finished one.

        Raises:
            UserError: its files were damaged since.
        """
        folder = self._clips / key
        try:
            facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))["measures"]
            with np.load(folder / ARRAYS) as stored:
                arrays = {name: stored[name] for name in stored.files}
        except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
            what = " ".join(str(error).split())[:80]
            raise UserError(f"{folder} is damaged ({what}): remove it, and the same command measures it again") from error
        latent = {name.removeprefix(LATENT): array for name, array in arrays.items() if name.startswith(LATENT)}
        names = dict.fromkeys(name[:-2] for name in arrays if not name.startswith(LATENT))
        return Cell(
            folder=folder,
            measures=ClipMeasures(**{**facts, "psnr_frames": tuple(facts["psnr_frames"])}),
            moments=LatentMoments.of_arrays(latent),
            features={name: (arrays[f"{name}_a"], arrays[f"{name}_b"]) for name in names},
        )
