"""VBench's sixteen dimensions of text to video, their normalisation and weights, as published.

Numbers: Vchitect/VBench scripts/constant.py (NORMALIZE_DIC, DIM_WEIGHT, QUALITY_LIST, SEMANTIC_LIST, QUALITY_WEIGHT, SEMANTIC_WEIGHT);
formula: scripts/cal_final_score.py; which prompts a dimension takes: dimension_to_folder.json. Names are those of the result files.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Dimension:
    """One measure."""

    name: str
    group: Literal["quality", "semantic"]
    low: float
    """Score that counts as 0."""
    high: float
    """Score that counts as 1."""
    weight: float
    """In the mean of its group."""
    prompts: str
    """Whose prompt list it is measured on."""

    def normalised(self, score: float) -> float:
        """(score - low) / (high - low), not clipped, as published."""
        return (score - self.low) / (self.high - self.low)


def _quality(name: str, low: float = 0.0, high: float = 1.0, *, weight: float = 1.0, prompts: str | None = None) -> Dimension:
    return Dimension(name=name, group="quality", low=low, high=high, weight=weight, prompts=prompts or name)


def _semantic(name: str, low: float = 0.0, high: float = 1.0) -> Dimension:
    return Dimension(name=name, group="semantic", low=low, high=high, weight=1.0, prompts=name)


DIMENSIONS: tuple[Dimension, ...] = (
    _quality("subject_consistency", 0.1462, 1.0),
    _quality("background_consistency", 0.2615, 1.0, prompts="scene"),
    _quality("temporal_flickering", 0.6293, 1.0),
    _quality("motion_smoothness", 0.706, 0.9975, prompts="subject_consistency"),
    _quality("dynamic_degree", weight=0.5, prompts="subject_consistency"),
    _quality("aesthetic_quality", prompts="overall_consistency"),
    _quality("imaging_quality", prompts="overall_consistency"),
    _semantic("object_class"),
    _semantic("multiple_objects"),
    _semantic("human_action"),
    _semantic("color"),
    _semantic("spatial_relationship"),
    _semantic("scene", 0.0, 0.8222),
    _semantic("appearance_style", 0.0009, 0.2855),
    _semantic("temporal_style", 0.0, 0.364),
    _semantic("overall_consistency", 0.0, 0.364),
)
BY_NAME = {dimension.name: dimension for dimension in DIMENSIONS}
GROUP_WEIGHTS = {"quality": 4.0, "semantic": 1.0}
"""Of the two group scores in the total."""
PROMPT_LISTS = tuple(dict.fromkeys(dimension.prompts for dimension in DIMENSIONS))
"""Names of the lists in prompts/prompts_per_dimension; 11 for 16 dimensions."""
SAMPLES = 5
"""Clips of a prompt (prompts/README.md)."""
FLICKER_SAMPLES = 25
"""Clips of a prompt of temporal_flickering, of which VBench's static filter keeps five (prompts/README.md, static_filter.py)."""
