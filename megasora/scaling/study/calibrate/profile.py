"""The measurements as a hardware profile."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megasora.config.schema import RunConfig
from megasora.perf.hardware import Hardware, Link, Precision, Rates
from megasora.perf.peaks import peak_bf16_tflops
from megasora.scaling.study.calibrate.collectives import Transfer, compute_losses, fit, transfers
from megasora.scaling.study.calibrate.kernels import Measured, Scale, kernels, points
from megasora.scaling.study.calibrate.timing import timed

GPU_SCALE = Scale(
    rows=(512, 2048, 8192, 32768, 65536),
    tokens=(1024, 4096, 16384, 32768),
    memory_bytes=(2**22, 2**26, 2**30),
    parameters=50_000_000,
    repeats=7,
)
CPU_SCALE = Scale(rows=(64, 256, 1024), tokens=(64, 256, 1024), memory_bytes=(2**18, 2**22, 2**26), parameters=1_000_000, repeats=7)
PAYLOADS = {"cuda": (2**12, 2**20, 2**24, 2**28), "cpu": (2**12, 2**16, 2**20, 2**23)}
"""Bytes of collectives."""
LEAST_ROWS = 64
"""Of the products that ranks share a computer with; else a micro-batch's tokens of a rank."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What was measured."""

    kernels: tuple[Measured, ...]
    transfers: tuple[Transfer, ...]
    """Empty on one rank."""
    losses: tuple[tuple[float, float], ...]
    """Ranks at work at once on one computer -> share of its rate that each keeps."""
    ranks: int
    ranks_per_node: int


def calibrate(config: RunConfig, *, device: torch.device) -> Calibration:
    """Measure; all ranks of the world call it together. Kernels are measured on rank 0 alone, while the others wait.

    Args:
        config: whose model's widths and number format are used.
        device: of this rank.
    """
    scale = GPU_SCALE if device.type == "cuda" else CPU_SCALE
    dtype = torch.bfloat16 if config.precision.dtype == "bf16" and device.type == "cuda" else torch.float32
    found = kernels(config.model, scale, device=device, dtype=dtype) if dist.get_rank() == 0 else []
    dist.barrier()
    shared: list[object] = [found]
    dist.broadcast_object_list(shared, src=0)
    hosts: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(hosts, socket.gethostname())
    moved = transfers(PAYLOADS[device.type], device=device, repeats=scale.repeats) if dist.get_world_size() > 1 else []
    losses = []
    if device.type == "cpu":
        rows = max(LEAST_ROWS, config.data.global_tokens // config.data.num_microbatches // dist.get_world_size())
        losses = compute_losses(config.model, rows=rows, device=device, dtype=dtype, repeats=scale.repeats)
    measured: list[Measured] = shared[0]  # type: ignore[assignment]
    return Calibration(
        kernels=tuple(measured), transfers=tuple(moved), losses=tuple(losses), ranks=len(hosts), ranks_per_node=hosts.count(hosts[0])
    )


def hardware_of(found: Calibration, *, device: torch.device, name: str, about: str) -> Hardware:
    """The profile. Without ranks there is no link to measure: the memory's rate and a launch stand in its place, and it says so.

    Args:
        found: the measurements.
        device: of rank 0.
        name: of the profile.
        about: model and machine, for the source.
    """
    on_gpu = device.type == "cuda"
    memory = points(found.kernels, "memory")
    launch = next(entry for entry in found.kernels if entry.what == "launch").time.median_s
    source = f"measured by megasora study calibrate: {about}"
    rates = Rates(
        matmul=points(found.kernels, "matmul"),
        attention_forward=points(found.kernels, "attention forward"),
        attention_backward=points(found.kernels, "attention backward"),
        memory=memory,
        adam=next(entry for entry in found.kernels if entry.what == "Adam").rate,
        source=source,
    )
    return Hardware(
        name=name,
        device="cuda" if on_gpu else "cpu",
        peak=_peak(device),
        memory_bytes=float(_memory_bytes(device)),
        rates=rates,
        links=(_link(found, memory[-1][1], launch, source),),
        gpus_per_node=torch.cuda.device_count() if on_gpu else found.ranks_per_node,
        launch_s=launch,
        compute_loss=found.losses,
        host_bytes_per_s=_host_rate(device) if on_gpu else memory[-1][1],
        sources=(source,),
    )


def _link(found: Calibration, memory: float, launch: float, source: str) -> Link:
    """Of the world that was measured; a cluster's other links are added by hand."""
    if not found.transfers:
        return Link(bytes_per_s=memory, latency_s=launch, ranks=0, source="not measured: start it with torchrun on several ranks")
    rate, latency = fit(found.transfers)
    nodes = found.ranks // found.ranks_per_node
    place = f"{found.ranks} ranks of one computer" if nodes == 1 else f"{found.ranks} ranks on {nodes} computers"
    return Link(bytes_per_s=rate, latency_s=latency, ranks=0, source=f"{source}; {place}")


def _peak(device: torch.device) -> tuple[tuple[Precision, float], ...]:
    known = peak_bf16_tflops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return (("bf16", known * 1e12),) if known else ()


def _memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _host_rate(device: torch.device) -> float:
    """Bytes/s from pinned host memory to the GPU."""
    source = torch.empty(2**26, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(source, device=device)
    return source.numel() / timed(lambda: target.copy_(source, non_blocking=True), device=device, repeats=5).median_s
