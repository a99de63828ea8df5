"""How the ranks of a context group are factored into Ulysses and ring. Pure arithmetic."""

from __future__ import annotations

from megasora.config.errors import UserError


def ulysses_factor(*, backend: str, ulysses_size: int | None, context_parallel_size: int, heads_per_tp_rank: int) -> int:
    """Ulysses factor U of CP = U x R for a backend name of `ParallelConfig.context_parallel_backend`.

    Raises:
        UserError: the factor divides neither the heads of a TP rank nor CP.
    """
    cp = context_parallel_size
    largest = max(u for u in range(1, cp + 1) if cp % u == 0 and heads_per_tp_rank % u == 0)
    size = {"ulysses": cp, "ring": 1, "auto": largest, "ulysses_ring": ulysses_size or largest}[backend]
    if cp % size or heads_per_tp_rank % size:
        raise UserError(
            f"ulysses factor {size} must divide context_parallel_size ({cp}) and the heads of a tensor rank "
            f"({heads_per_tp_rank}); use --parallel.context_parallel_backend auto (it would take {largest})"
        )
    return size
