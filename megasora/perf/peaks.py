"""Dense peak rates of GPUs, for model FLOPs utilisation. Sources: NVIDIA data sheets of A100, H100/H200 SXM, B200 (dense, no sparsity)."""

from __future__ import annotations

PEAK_BF16_TFLOPS = {"A100": 312.0, "H100": 989.0, "H200": 989.0, "B200": 2250.0}
"""bf16 tensor-core TFLOP/s by a part of the device name."""


def peak_bf16_tflops(device_name: str) -> float | None:
    """Peak of a device by its name; None when unknown (a CPU has no such figure)."""
    return next((peak for name, peak in PEAK_BF16_TFLOPS.items() if name in device_name), None)
