"""Names of the ranges that a traced run puts into its trace, and of the axes that collectives belong to. No torch."""

from __future__ import annotations

from typing import Literal

Axis = Literal["tp", "cp", "pp", "dp", "world"]
AXES: tuple[Axis, ...] = ("tp", "cp", "pp", "dp", "world")
"""What groups are told apart by; world is every group that spans several axes."""
STEP, PLACE, COMM = "step|", "place|", "comm|"
"""step|12; place|forward_backward; comm|tp|all_gather, and comm|tp|all_gather|wait."""


def axis_of(description: str) -> Axis:
    """The axis of a group by its description: Megatron's (parallel_state.py) and ours (parallel/groups.py)."""
    if description.startswith("TENSOR_MODEL_PARALLEL"):
        return "tp"
    if description.startswith("CONTEXT"):
        return "cp"
    if description.startswith(("PIPELINE", "EMBEDDING", "POSITION_EMBEDDING")):
        return "pp"
    if description.startswith(("DATA_PARALLEL", "INTRA_PARTIAL_DATA_PARALLEL")):
        return "dp"
    return "world"
