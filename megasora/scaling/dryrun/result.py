"""What a dry run found: plain data, which `config.io.to_dict` makes JSON of."""

from __future__ import annotations

from dataclasses import dataclass

from megasora.parallel.topology import Coordinates
from megasora.perf.flops import LayerFlops, PackOnRank
from megasora.scaling.dryrun.messages import Message
from megasora.scaling.dryrun.place import Event, Phase


@dataclass(frozen=True, kw_only=True)
class Part:
    """Bytes of one kind."""

    name: str
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on the rank."""

    weights: int
    """Of the model's parameters; 0 with ZeRO-3, which gathers them block by block."""
    gradients: int
    """What is there when the last backward pass is through."""
    optimizer: int
    """fp32 master weights and Adam's moments, this rank's shard."""
    ema: int
    padding: int
    """What Megatron's buffers of weights and gradients hold beyond them, so that they divide by the ranks."""
    inputs: int
    """The step's micro-batches and the tables of their packs."""
    activations: int
    """Most bytes at once of all that the step allocates beside these, sharded gradients left out."""
    at_peak: tuple[Part, ...]
    """What `activations` (and the sharded gradients) consist of at that moment: by the pass that allocated it, `messages` (received from
    another stage) and `gathered weights` (ZeRO-2 and ZeRO-3)."""
    peak_phase: Phase
    peak_chunk: int
    peak_microbatch: int

    @property
    def state(self) -> int:
        """What stays from step to step."""
        return self.weights + self.gradients + self.optimizer + self.ema + self.padding

    @property
    def total(self) -> int:
        """Peak of the rank, without the library's context, encoders and a kernel's workspace."""
        return self.state + self.inputs + self.activations


@dataclass(frozen=True, kw_only=True)
class DryRun:
    """One rank's step."""

    recipe: str
    world_size: int
    rank: int
    at: Coordinates
    zero_stage: int
    microbatches: tuple[PackOnRank, ...]
    flops: tuple[LayerFlops, ...]
    bytes_moved: tuple[Part, ...]
    """By phase: read and written by what is neither a matrix product nor attention nor a message."""
    messages: tuple[Message, ...]
    memory: Memory
    timeline: tuple[Event, ...]
    operations: int
    """Operations dispatched."""
    seconds: float
    """What the dry run took."""
    stand_ins: tuple[str, ...]
    """What took a GPU's place."""

    @property
    def total_flops(self) -> int:
        """Of the step on this rank."""
        return sum(layer.total for layer in self.flops)

    def sent(self, group: str, kind: str) -> int:
        """Bytes of one kind of collective on one group."""
        return sum(message.bytes for message in self.messages if (message.group, message.kind) == (group, kind))
