"""Which decoder a run uses."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Literal

import torch

from megasora.config.errors import UserError
from megasora.data.decoding.contract import DECODE_TIMEOUT_S, Decoder
from megasora.data.decoding.pyav import PyAVDecoder


def open_decoder(
    kind: Literal["auto", "pyav", "dali", "mixed"], *, device: torch.device, workers: int = 2, timeout_s: float = DECODE_TIMEOUT_S
) -> Decoder:
    """The run's decoder. `auto` takes DALI on CUDA when it is installed and PyAV otherwise, for every file; only `mixed` chooses per file.

    Args:
        kind: setting data.decoder.
        device: where frames are wanted.
        workers: setting data.decode_workers; DALI decodes so many clips at once.
        timeout_s: setting data.decode_timeout_s.

    Raises:
        UserError: DALI is asked for and not installed, or the time is not positive.
    """
    if timeout_s <= 0:
        raise UserError(f"data.decode_timeout_s must be above 0, not {timeout_s:g}; the default is {DECODE_TIMEOUT_S:g}")
    pyav = PyAVDecoder(timeout_s=timeout_s)
    if kind == "pyav" or (kind == "auto" and not (device.type == "cuda" and _dali_installed())):
        return pyav
    if not _dali_installed():
        raise UserError(f'decoder {kind} needs nvidia-dali: pip install "megasora[data]", or use --data.decoder pyav')
    from megasora.data.decoding.dali import DaliDecoder, MixedDecoder  # needs the package at import

    dali = DaliDecoder(device=device, num_threads=max(1, workers), timeout_s=timeout_s)
    return MixedDecoder(dali=dali, pyav=pyav) if kind == "mixed" else dali


def _dali_installed() -> bool:
    return find_spec("nvidia") is not None and find_spec("nvidia.dali") is not None
