"""Which decoder a run uses."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Literal

import torch

from megasora.config.errors import UserError
from megasora.data.decode import Decoder
from megasora.data.decode_pyav import PyAVDecoder


def open_decoder(kind: Literal["auto", "pyav", "dali"], *, device: torch.device) -> Decoder:
    """The run's decoder; `auto` takes DALI on CUDA when it is installed, PyAV otherwise.

    Raises:
        UserError: DALI is asked for and not installed.
    """
    if kind == "dali" or (kind == "auto" and device.type == "cuda" and _dali_installed()):
        if not _dali_installed():
            raise UserError('decoder dali needs nvidia-dali: pip install "megasora[data]", or use --data.decoder pyav')
        from megasora.data.decode_dali import DaliDecoder  # needs the package at import

        return DaliDecoder(device=device)
    return PyAVDecoder()


def _dali_installed() -> bool:
    return find_spec("nvidia") is not None and find_spec("nvidia.dali") is not None
