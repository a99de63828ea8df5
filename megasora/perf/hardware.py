"""What a GPU and its network can do, as data: data-sheet peaks, measured rates, links. Every number with its source.

A rate is what a kernel reaches, by the size that decides it: matrix products by the rows of a rank's share, attention by the length of a
sample. Between measured sizes it is interpolated on the logarithm, beyond them it stays. `megasora study calibrate` writes such a profile
for the machine at hand.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import yaml

from megasora.config.errors import UserError
from megasora.config.files import written_whole
from megasora.config.io import from_dict, to_dict

Points = tuple[tuple[float, float], ...]
"""(size, rate), sizes ascending."""
Precision = Literal["fp32", "bf16", "fp8"]


@dataclass(frozen=True, kw_only=True)
class Link:
    """How data leave a GPU."""

    bytes_per_s: float
    """In one direction, what large messages of a collective reach (not the data sheet's)."""
    latency_s: float
    """Of a message or of one step of a collective."""
    ranks: int
    """GPUs that such links join; 0 means all there are."""
    source: str


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What kernels reach; FLOP/s."""

    matmul: Points
    """Rows of the product -> FLOP/s of the block's linear layers, bf16 (fp32 on a CPU)."""
    matmul_fp8: Points = ()
    """The same in FP8, casts included; empty where it cannot."""
    attention_forward: Points
    """Tokens of a sample -> FLOP/s, 4 s^2 H."""
    attention_backward: Points
    """Tokens of a sample -> FLOP/s, 10 s^2 H (2.5 times the forward pass)."""
    memory: Points
    """Bytes of an operation -> bytes/s that it reads and writes."""
    adam: float
    """Bytes/s of the optimizer's update."""
    encoder: float = 0.0
    """FLOP/s of the autoencoder and the text encoders; 0: their time is not known."""
    source: str

    def scaled(self, factor: float) -> Rates:
        """All rates of a block's kernels times `factor`."""

        def times(points: Points) -> Points:
            return tuple((size, rate * factor) for size, rate in points)

        return replace(
            self,
            matmul=times(self.matmul),
            matmul_fp8=times(self.matmul_fp8),
            attention_forward=times(self.attention_forward),
            attention_backward=times(self.attention_backward),
            memory=times(self.memory),
        )


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """One kind of machine."""

    name: str
    device: Literal["cuda", "cpu"] = "cuda"
    peak: tuple[tuple[Precision, float], ...]
    """Dense FLOP/s of the data sheet: what MFU is a share of; empty for a CPU."""
    memory_bytes: float
    """Of a GPU, as its data sheet counts; devices report some more (an H100 of 80 GB 84, an H200 of 141 GB 149)."""
    rates: Rates
    links: tuple[Link, ...]
    """From the nearest to the farthest: inside a node (NVLink domain), then between nodes."""
    gpus_per_node: int
    """GPUs of a server, which share its CPUs, network cards and file system clients."""
    launch_s: float = 5e-6
    """Host time of one kernel's launch: a step cannot be shorter than its launches."""
    feed_s: float = 0.0
    """Host seconds a token of a rank's packs that a step waits for: reading, noise, micro-batches (of a CPU; on a GPU beside steps)."""
    compute_loss: Points = ()
    """Ranks at work on one computer -> share of its rate that each keeps (measured); empty: each has units of its own."""
    process_bytes: float = 0.0
    """Resident memory of a rank's process before its model (a CPU, where a run's peak counts it)."""
    host_bytes_per_s: float = 50e9
    """Between GPU and host memory, one way."""
    dollars_per_gpu_hour: float | None = None
    """A price to reckon with; every command takes another."""
    sources: tuple[str, ...] = field(default=())

    def peak_of(self, precision: Precision) -> float | None:
        """Data-sheet FLOP/s of a format; None where it has none."""
        return dict(self.peak).get(precision)

    def slowed(self, ranks: float) -> float:
        """Factor on the time of work that so many ranks do at once; 1 where each has units of its own."""
        return 1 / rate_at(self.compute_loss, ranks) if self.compute_loss else 1.0

    @property
    def node(self) -> Link:
        """The link inside a node."""
        return self.links[0]


def rate_at(points: Points, size: float) -> float:
    """The rate at a size: linear in log(size) between points, constant beyond them.

    Raises:
        ValueError: there is no point.
    """
    if not points:
        raise ValueError("no measured rate")
    if size <= points[0][0]:
        return points[0][1]
    for (low, slow), (high, fast) in zip(points, points[1:], strict=False):
        if size <= high:
            share = math.log(size / low) / math.log(high / low)
            return slow + share * (fast - slow)
    return points[-1][1]


def load_hardware(name: str) -> Hardware:
    """A profile by name, with changes after a colon (h200:infiniband=200), or one of a file (.yaml, .json).

    Raises:
        UserError: there is none of that name, or the file is not one; says which there are.
    """
    from megasora.perf import profiles

    if name.endswith((".yaml", ".yml", ".json")):
        return _read(Path(name))
    return profiles.named(name)


def save_hardware(hardware: Hardware, path: Path) -> None:
    """Write a profile; the file appears whole or not at all."""
    data = to_dict(hardware)
    with written_whole(path) as temporary:
        temporary.write_text(json.dumps(data, indent=1) if path.suffix == ".json" else yaml.safe_dump(data, sort_keys=False))


def _read(path: Path) -> Hardware:
    try:
        text = path.read_text()
        data = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except OSError as error:
        raise UserError(f"cannot read the hardware profile {path}: {error.strerror}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{path} is not {path.suffix[1:].upper()}: {str(error).splitlines()[0]}") from error
    hardware: Hardware = from_dict(data, Hardware, path=path.name)
    _check(hardware, path)
    return hardware


def _check(hardware: Hardware, path: Path) -> None:
    if not hardware.links:
        raise UserError(f"{path}: links must name at least one link")
    for name, points in (("matmul", hardware.rates.matmul), ("memory", hardware.rates.memory)):
        sizes = [size for size, _ in points]
        if not points or sizes != sorted(set(sizes)) or min(rate for _, rate in points) <= 0:
            raise UserError(f"{path}: rates.{name} needs [size, rate] pairs of ascending sizes and positive rates")


def with_network(hardware: Hardware, link: Link) -> Hardware:
    """The same machine with another link between its nodes."""
    return replace(hardware, links=(*hardware.links[:-1], link))
