"""What a rank writes into a checkpoint, and its copy in host memory.

A save's structure is the same all run long, so the plan is made once: Megatron's checks and planner, which exchange messages, run on the
caller's thread, and the copy gets its place. A copy is then one pass over the tensors into memory that is kept from save to save
(page-locked when they lie on a GPU, so that all of them travel without waiting for each other).
"""

from __future__ import annotations

import io
import json
import pickle
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor, is_main_replica
from megatron.core.dist_checkpointing.serialization import save_preprocess
from megatron.core.dist_checkpointing.strategies.torch import MCoreSavePlanner, mcore_to_pyt_state_dict
from torch import Tensor
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta

from megasora.checkpoint.megatron_io import BACKEND, METADATA
from megasora.checkpoint.rank_file import RankFile

_ALIGNMENT_BYTES = 64

Signature = tuple[Any, ...]


def signature_of(tensors: Mapping[str, ShardedTensor]) -> Signature:
    """Everything a plan depends on."""
    return tuple(
        (name, one.key, one.data.dtype, one.data.device.type, one.local_shape, one.global_shape, one.global_offset, one.replica_id)
        for name, one in tensors.items()
    )


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What this rank writes; on rank 0 also what everybody writes.

    Attributes:
        signature: of the tensors it was made for.
        names: this rank's tensors in the order of its file.
        contents: rank 0: the checkpoint's table of contents, still without places.
        indices: rank 0: every rank's pieces in the order of its file.
    """

    signature: Signature
    names: tuple[str, ...]
    contents: Metadata | None
    indices: tuple[tuple[MetadataIndex, ...], ...]


def make_plan(tensors: Mapping[str, ShardedTensor]) -> Plan:
    """Check that the ranks' rectangles make up each tensor exactly once and plan the files; all ranks together."""
    save_preprocess(dict(tensors), True)
    by_key: dict[str, list[Any]] = defaultdict(list)
    names: dict[tuple[str, tuple[int, ...]], str] = {}
    for name, one in tensors.items():
        if is_main_replica(one.replica_id):
            by_key[one.key].append(one)
            names[one.key, tuple(one.global_offset)] = name
    planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
    planner.set_up_planner(mcore_to_pyt_state_dict(by_key), is_coordinator=dist.get_rank() == 0)
    local = planner.create_local_plan()
    plans: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(local, plans)
    contents = planner.create_global_plan(plans)[1] if plans is not None else None
    return Plan(
        signature=signature_of(tensors),
        names=tuple(names[item.index.fqn, tuple(item.index.offset)] for item in local.items),
        contents=contents,
        indices=tuple(tuple(item.index for item in plan.items) for plan in plans or ()),
    )


def megatron_files(plan: Plan, files: Sequence[RankFile | None]) -> dict[str, bytes]:
    """What dist_checkpointing.load needs beside the ranks' files; rank 0."""
    common = io.BytesIO()
    torch.save({}, common)
    return {METADATA: table_of_contents(plan, files), "metadata.json": json.dumps(BACKEND).encode(), "common.pt": common.getvalue()}


def table_of_contents(plan: Plan, files: Sequence[RankFile | None]) -> bytes:
    """The `.metadata` of a checkpoint, once it is known where everything lies; rank 0."""
    assert plan.contents is not None, "only rank 0 knows what everybody writes"
    places: dict[MetadataIndex, Any] = {}
    for indices, file in zip(plan.indices, files, strict=True):
        start = 0
        for index, length in zip(indices, file.lengths if file else (), strict=True):
            assert file is not None
            places[index] = filesystem._StorageInfo(relative_path=file.name, offset=start, length=length)
            start += length
    whole = Metadata(
        state_dict_metadata=plan.contents.state_dict_metadata,
        planner_data=plan.contents.planner_data,
        storage_data=places,
        storage_meta=StorageMeta(),
    )
    return pickle.dumps(whole)


class HostCopy:
    """Host memory for what a rank writes.

    Attributes:
        tensors: in the order of the rank's file; each is a storage of its own, as torch.save wants it.
        num_bytes: allocated.
    """

    def __init__(self, sources: Sequence[Tensor]) -> None:
        sizes = [-(-source.numel() * source.element_size() // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES for source in sources]
        self.num_bytes = sum(sizes)
        self._slab = torch.empty(self.num_bytes, dtype=torch.uint8)
        self._locked = any(source.is_cuda for source in sources) and self.num_bytes > 0
        if self._locked:
            self._lock()
        self.tensors: list[Tensor] = []
        start = 0
        for source, size in zip(sources, sizes, strict=True):
            self.tensors.append(_part(self._slab, start, tuple(source.shape), source.dtype))
            start += size

    def fill(self, sources: Sequence[Tensor]) -> None:
        """Copy; when it returns the sources may change."""
        for source, target in zip(sources, self.tensors, strict=True):
            target.copy_(source, non_blocking=self._locked)
        if self._locked:
            torch.cuda.current_stream().synchronize()

    def close(self) -> None:
        """Let the memory go; nothing may read it any more."""
        if self._locked:
            torch.cuda.cudart().cudaHostUnregister(self._slab.data_ptr())
            self._locked = False
        self.tensors = []
        self._slab = torch.empty(0, dtype=torch.uint8)

    def _lock(self) -> None:
        """Page-lock the slab as it is; torch's pinned allocator would round it up to a power of two."""
        problem = torch.cuda.cudart().cudaHostRegister(self._slab.data_ptr(), self.num_bytes, 0)
        if int(problem) != 0:
            raise MemoryError(
                f"{self.num_bytes / 2**30:.1f} GiB of host memory cannot be page-locked for checkpoints (CUDA error {problem})"
            )


def _part(slab: Tensor, start: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    count = prod(shape)
    if count == 0:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(slab.numpy(), dtype=dtype, count=count, offset=start).reshape(shape)
