"""Writes a FLUX.1-dev file of random weights: 780 tensors, exact names and shapes, 11.9 B parameters, 23.8 GB in bf16.

    python benchmarks/convert/make_flux.py flux1-dev-random.safetensors [--small]

Every value is a finite bf16 number drawn from (seed, tensor), so the file is the same every time. Memory stays below one tensor.
"""

from __future__ import annotations

import argparse
import zlib
from pathlib import Path

import numpy as np

from megasora.checkpoint.formats.mapping import shapes_in
from megasora.checkpoint.safetensors_io import SafetensorsWriter
from megasora.checkpoint.tensors import Rows, TensorInfo
from megasora.config.schema import ModelConfig

FLUX_DEV = ModelConfig(cond_embed=False, guidance_embed=True)
SMALL = ModelConfig(
    hidden_size=128, num_attention_heads=4, ffn_hidden_size=512, axes_dim=(4, 14, 14), cond_embed=False, guidance_embed=True
)
"""All blocks, thin: every name, few bytes."""


def values(key: str, info: TensorInfo) -> Rows:
    """Random bf16 bits with exponents near one: sign and fraction free, exponent 120 to 127."""
    generator = np.random.default_rng([7, zlib.crc32(key.encode())])
    bits = generator.integers(0, 1 << 16, size=info.numel, dtype=np.uint16)
    bits &= np.uint16(0b1000_0011_1111_1111)
    bits |= np.uint16(0b0011_1100_0000_0000)
    return bits.view(np.uint8).reshape(info.num_rows, info.row_bytes)


def make(path: Path, model: ModelConfig) -> int:
    """Write the file; returns its parameters."""
    infos = {key: TensorInfo(dtype="BF16", shape=shape) for key, shape in shapes_in("flux", model).items()}
    writer = SafetensorsWriter(path, infos, metadata={"format": "pt"})
    for number, (key, info) in enumerate(infos.items()):
        writer.write(key, values(key, info))
        if number % 20 == 0:
            writer.sync()
    writer.close()
    return sum(info.numel for info in infos.values())


def main() -> None:
    """Parse and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path)
    parser.add_argument("--small", action="store_true", help="hidden size 128, all blocks")
    args = parser.parse_args()
    print(f"{make(args.path, SMALL if args.small else FLUX_DEV):,} parameters in {args.path}")


if __name__ == "__main__":
    main()
