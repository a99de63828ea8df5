"""Profiles of GPUs and networks. Data sheets give peaks; rates were measured where a source says so, otherwise scaled by what it names.

Measured on an H100 (benchmarks/results/2026-11-27_gpu_h100.md, torch 2.11, Transformer Engine 2.11, megasora's fused kernels): products at
729 TFLOP/s of 54k rows, TE's attention 563 to 603 forward and 520 backward, memory-bound kernels at 2.6 TB/s, Adam at 1.94 TB/s, the
HunyuanVideo VAE at 168 TFLOP/s (129 frames of 256 x 256: 79.2 TFLOP in 0.472 s).
What no machine of ours measured (FP8 beyond that table, other GPUs, every network) is scaled from those rates and the data sheets, and says
so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from megasora.config.errors import UserError
from megasora.perf.hardware import Hardware, Link, Points, Rates, with_network
from megasora.perf.peaks import PEAK_BF16_TFLOPS

GB = 1e9
TERA = 1e12
H100_ROWS: Points = ((512, 380e12), (2048, 560e12), (8192, 690e12), (53760, 729e12))
"""Rows -> bf16 FLOP/s of products on an H100. The last is measured (trace: 300.8 ms for the products of 6 blocks of 53,760 tokens);
the fall below it is chosen after NVIDIA's cuBLAS figures for square products of that many rows, and is what `study
calibrate` replaces."""
H100_FP8_ROWS: Points = ((512, 380e12), (2048, 700e12), (8192, 1000e12), (53760, 1150e12))
"""The same in FP8 with its casts: 53,760 rows from the same run, tensorwise (500.9 ms against 611.4 of six blocks)."""
H100_FORWARD: Points = ((768, 380e12), (8960, 563e12), (76544, 603e12))
"""Tokens of a sample -> FLOP/s of TE's attention, measured at the last two; below them scaled as flash-attention's published curve."""
H100_BACKWARD: Points = ((768, 300e12), (8960, 519e12), (76544, 518e12))
H100_MEMORY: Points = ((1e6, 0.4e12), (1e7, 1.6e12), (3e8, 2.3e12), (2e9, 2.65e12))
"""Bytes an operation moves -> bytes/s. The last two are of the kernels table; small ones are bound by their launch."""

_H100_RATES = Rates(
    matmul=H100_ROWS,
    matmul_fp8=H100_FP8_ROWS,
    attention_forward=H100_FORWARD,
    attention_backward=H100_BACKWARD,
    memory=H100_MEMORY,
    adam=1.94e12,
    encoder=168e12,
    source="benchmarks/results/2026-11-27_gpu_h100.md at 53,760 and 76,544 tokens; smaller sizes chosen, see megasora/perf/profiles.py",
)
NVLINK4 = Link(
    bytes_per_s=360 * GB, latency_s=6e-6, ranks=8, source="NVLink 4: 450 GB/s one way (H100 data sheet), 0.8 of it in collectives (assumed)"
)
INFINIBAND = {
    "200": Link(bytes_per_s=22 * GB, latency_s=12e-6, ranks=0, source="InfiniBand HDR, one port a GPU: 25 GB/s, 0.88 of it (assumed)"),
    "400": Link(bytes_per_s=44 * GB, latency_s=12e-6, ranks=0, source="InfiniBand NDR, one port a GPU: 50 GB/s, 0.88 of it (assumed)"),
    "800": Link(bytes_per_s=88 * GB, latency_s=12e-6, ranks=0, source="InfiniBand XDR, one port a GPU: 100 GB/s, 0.88 of it (assumed)"),
}
"""Gb/s of a GPU's own port."""

H100 = Hardware(
    name="h100",
    peak=(("bf16", PEAK_BF16_TFLOPS["H100"] * TERA), ("fp8", 1979e12), ("fp32", 67e12)),
    memory_bytes=80 * GB,
    rates=_H100_RATES,
    links=(NVLINK4, INFINIBAND["400"]),
    gpus_per_node=8,
    dollars_per_gpu_hour=2.5,
    sources=(
        "NVIDIA H100 SXM data sheet: dense peaks, 80 GB",
        "price: chosen after public on-demand lists of 2025, between 2 and 3; give your own with --price",
    ),
)


def _scaled(base: Hardware, *, compute: float, memory: float, source: str) -> Rates:
    """Another GPU's rates from an H100's: what is bound by compute, by memory."""

    def times(points: Points, factor: float) -> Points:
        return tuple((size, rate * factor) for size, rate in points)

    rates = base.rates
    return Rates(
        matmul=times(rates.matmul, compute),
        matmul_fp8=times(rates.matmul_fp8, compute),
        attention_forward=times(rates.attention_forward, compute),
        attention_backward=times(rates.attention_backward, compute),
        memory=times(rates.memory, memory),
        adam=rates.adam * memory,
        encoder=rates.encoder * compute,
        source=source,
    )


def _h200() -> Hardware:
    rates = _scaled(H100, compute=1.0, memory=4.8 / 3.35, source="H100's rates; memory times 4.8 / 3.35 TB/s of the data sheets")
    return replace(
        H100,
        name="h200",
        memory_bytes=141 * GB,
        rates=rates,
        dollars_per_gpu_hour=2.0,
        sources=(
            "NVIDIA H200 SXM data sheet: the H100's peaks, 141 GB, 4.8 TB/s",
            "price: the Open-Sora 2.0 report, table 3, reckons 200 k dollars for 4,160 H200 days: 2.0 an hour",
        ),
    )


def _a100() -> Hardware:
    rates = _scaled(
        H100, compute=312 / 989 * 1.12, memory=2.04 / 3.35, source="H100's rates scaled by the data sheets; products at 0.8 of peak"
    )
    return replace(
        H100,
        name="a100",
        peak=(("bf16", PEAK_BF16_TFLOPS["A100"] * TERA), ("fp32", 19.5e12)),
        memory_bytes=80 * GB,
        rates=replace(rates, matmul_fp8=()),
        links=(
            Link(bytes_per_s=235 * GB, latency_s=7e-6, ranks=8, source="NVLink 3: 300 GB/s one way, 0.78 of it (assumed)"),
            INFINIBAND["200"],
        ),
        dollars_per_gpu_hour=1.5,
        sources=("NVIDIA A100 SXM data sheet: 312 TFLOP/s, 80 GB, 2.04 TB/s; no FP8", "price: chosen"),
    )


def _b200() -> Hardware:
    rates = _scaled(
        H100, compute=2250 / 989 * 0.95, memory=8.0 / 3.35, source="H100's rates times the data sheets' ratio, compute less 5 %: unmeasured"
    )
    return replace(
        H100,
        name="b200",
        peak=(("bf16", PEAK_BF16_TFLOPS["B200"] * TERA), ("fp8", 4500e12), ("fp32", 75e12)),
        memory_bytes=180 * GB,
        rates=rates,
        links=(
            Link(bytes_per_s=720 * GB, latency_s=6e-6, ranks=8, source="NVLink 5: 900 GB/s one way, 0.8 of it (assumed)"),
            INFINIBAND["400"],
        ),
        dollars_per_gpu_hour=4.0,
        sources=("NVIDIA B200 SXM data sheet: dense peaks, 180 GB, 8 TB/s", "price: chosen"),
    )


def _gb200() -> Hardware:
    b200 = _b200()
    link = replace(b200.links[0], ranks=72, source="NVLink 5 over a rack of 72 GPUs (GB200 NVL72)")
    return replace(
        b200,
        name="gb200",
        peak=(("bf16", 2500e12), ("fp8", 5000e12), ("fp32", 80e12)),
        memory_bytes=186 * GB,
        links=(link, INFINIBAND["400"]),
        gpus_per_node=4,
        dollars_per_gpu_hour=4.5,
        sources=("NVIDIA GB200 NVL72 data sheet: dense peaks, 186 GB, 72 GPUs in one NVLink domain; rates are the B200's", "price: chosen"),
    )


def _pcie() -> Hardware:
    """An H100 on PCIe alone: what happens without NVLink."""
    link = Link(
        bytes_per_s=42 * GB, latency_s=10e-6, ranks=8, source="PCIe 5 x16: 63 GB/s one way, two thirds of it between GPUs (assumed)"
    )
    return replace(H100, name="h100_pcie", links=(link, INFINIBAND["400"]), sources=(*H100.sources, "links: PCIe 5 in place of NVLink"))


PROFILES: dict[str, Callable[[], Hardware]] = {
    "h100": lambda: H100,
    "h200": _h200,
    "a100": _a100,
    "b200": _b200,
    "gb200": _gb200,
    "h100_pcie": _pcie,
}


def named(name: str) -> Hardware:
    """A profile: its name, and after a colon another network ("h200:ib200"), another price ("h200:price=1.8"), both with commas.

    Raises:
        UserError: unknown name or change.
    """
    base, _, changes = name.partition(":")
    if base not in PROFILES:
        raise UserError(
            f"there is no hardware profile {base!r}; there are {', '.join(PROFILES)}, or give a file that `study calibrate` wrote"
        )
    hardware = PROFILES[base]()
    for change in filter(None, changes.split(",")):
        key, _, value = change.partition("=")
        if key.removeprefix("ib") in INFINIBAND and not value:
            hardware = with_network(hardware, INFINIBAND[key.removeprefix("ib")])
        elif key == "price" and value.replace(".", "", 1).isdecimal():
            hardware = replace(hardware, dollars_per_gpu_hour=float(value))
        else:
            networks = ", ".join(f"ib{speed}" for speed in INFINIBAND)
            raise UserError(f"{name}: {change!r} changes nothing of a profile; there are {networks} and price=DOLLARS")
    return replace(hardware, name=name)
