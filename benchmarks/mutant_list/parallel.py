"""Mistakes in packs, splits and groups."""

from __future__ import annotations

from mutant_list.mutant import (
    MEETING,
    PACK,
    SHARED,
    Mutant,
    parity_test,
)

MUTANTS = (
    Mutant(
        "context ranks own runs of tokens",
        "megasora/parallel/pack.py",
        "range(cp_rank, length, self.split.cp)[_part(length // self.split.cp, tp_rank, self.split.tp)]",
        "range(length)[_part(length, cp_rank * self.split.tp + tp_rank, self.split.cp * self.split.tp)]",
        PACK,
    ),
    Mutant(
        "a pack is sent from pageable memory",
        "megasora/parallel/transfer.py",
        "dtype=torch.uint8, pin_memory=True",
        "dtype=torch.uint8",
        ("tests/gpu_emulated/test_transfer.py",),
    ),
    Mutant(
        "the ring waits for each gradient hop",
        "megasora/parallel/context.py",
        "travelling = _pass_on(grad_chunk, group)",
        "travelling = _pass_on(grad_chunk, group)\n                grad_chunk = travelling.arrive()",
        ("tests/parallel/test_ring.py",),
    ),
    Mutant("row multiple ignored", "megasora/parallel/pack.py", "self.tp * self.cp * self.row_multiple", "self.tp * self.cp", PACK),
    Mutant(
        "streams joined text after video",
        "megasora/parallel/pack.py",
        "for stream in (text, video)]",
        "for stream in (video, text)]",
        PACK,
    ),
    Mutant(
        "ring merge without weights",
        "megasora/parallel/context.py",
        "a.out * weight_a + b.out * weight_b",
        "(a.out + b.out) / 2",
        parity_test("cp2 ring"),
    ),
    Mutant(
        "ring's value gradients are the keys'",
        "megasora/parallel/context.py",
        "grad_chunk[1] += parts[2]",
        "grad_chunk[1] += parts[1]",
        parity_test("cp2 ring"),
    ),
    Mutant(
        "heads come back in another order",
        "megasora/parallel/context.py",
        "return _swap(out.unflatten(0, (self.num_groups, -1)), group)",
        "return _swap(out.unflatten(0, (self.num_groups, -1)), group).flip(0)",
        parity_test("cp2 ulysses"),
    ),
    Mutant(
        "gathered gradients not summed",
        "megasora/parallel/tensor.py",
        "columns //= group.size()",
        "columns //= group.size()\n        grad = grad / group.size()",
        parity_test("tp2"),
    ),
    Mutant(
        "a flat run's rectangle one column off",
        "megasora/parallel/shards.py",
        "start = offset + (top - row) * num_columns + (left - column)",
        "start = offset + (top - row) * num_columns",
        ("tests/unit/parallel/test_shards.py",),
    ),
    Mutant(
        "interleaved groups must divide",
        "megasora/parallel/pipeline.py",
        "if rest == 0 or rest >= pp_size:",
        "if rest == 0:",
        ("tests/unit/parallel/test_pipeline.py",),
    ),
    Mutant(
        "a rank answers a call to its predecessor",
        "megasora/parallel/meeting.py",
        'if call["heard"].get(str(rank)) == words:',
        'if str(rank) in call["heard"]:',
        MEETING,
    ),
    Mutant(
        "a shared clip's loss is the mean of each slab",
        "megasora/training/autoencoder/backward.py",
        "distance=settings.distance, elements=share.elements)",
        "distance=settings.distance)",
        SHARED,
    ),
    Mutant(
        "the adaptive weight of a slab's own gradients",
        "megasora/training/autoencoder/backward.py",
        "*share.total(torch.stack(parts))",
        "*torch.stack(parts)",
        SHARED,
    ),
    Mutant(
        "a slab of frames draws dropout from its own first frame",
        "megasora/models/autoencoders/discriminator.py",
        "sample=frame + number)",
        "sample=number)",
        SHARED,
    ),
    Mutant(
        "patches of odd sides are rounded down",
        "megasora/training/autoencoder/share.py",
        "count *= -(-side // unit)",
        "count *= side // unit",
        SHARED,
    ),
    Mutant(
        "a slab's posterior draws the noise of the first",
        "megasora/training/autoencoder/share.py",
        "elements if self.slabs is None else self.slabs.split(elements)",
        "elements if self.slabs is None else elements[tuple(slice(0, side) for side in posterior.mean.shape)]",
        SHARED,
    ),
)
