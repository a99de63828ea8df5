"""Published VBench scores to compare with, each with the source it was read in; what no source gives is left out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Published:
    """One model's scores in percent, not normalised, as its source prints them."""

    model: str
    source: str
    scores: Mapping[str, float]
    """By dimension, and quality, semantic and total where printed."""


_LUMINA = "arXiv 2502.06782 (Lumina-Video), table 1 and the table of all dimensions"

PUBLISHED: tuple[Published, ...] = (
    Published(
        model="Open-Sora 2.0",
        source="bytedance/ContentV README.md (arXiv 2506.05343), which prints these dimensions only. hpcaitech/Open-Sora README.md gives "
        "no score, but a gap of 0.69 points to Sora at its release",
        scores={
            "total": 84.34,
            "quality": 85.40,
            "semantic": 80.12,
            "human_action": 95.40,
            "scene": 52.71,
            "dynamic_degree": 71.39,
            "multiple_objects": 77.72,
            "appearance_style": 22.98,
        },
    ),
    Published(
        model="Sora",
        source=_LUMINA,
        scores={
            "total": 84.28,
            "quality": 85.51,
            "semantic": 79.35,
            "subject_consistency": 96.23,
            "background_consistency": 96.35,
            "temporal_flickering": 98.87,
            "motion_smoothness": 98.74,
            "dynamic_degree": 79.91,
            "aesthetic_quality": 63.46,
            "imaging_quality": 68.28,
            "object_class": 93.93,
            "multiple_objects": 70.85,
            "human_action": 98.20,
            "color": 80.11,
            "spatial_relationship": 74.29,
            "scene": 56.95,
            "appearance_style": 24.76,
            "temporal_style": 25.01,
            "overall_consistency": 26.26,
        },
    ),
    Published(
        model="HunyuanVideo",
        source=_LUMINA,
        scores={
            "total": 83.24,
            "quality": 85.09,
            "semantic": 75.82,
            "subject_consistency": 97.37,
            "background_consistency": 97.76,
            "temporal_flickering": 99.44,
            "motion_smoothness": 98.99,
            "dynamic_degree": 70.83,
            "aesthetic_quality": 60.36,
            "imaging_quality": 67.56,
            "object_class": 86.10,
            "multiple_objects": 68.55,
            "human_action": 94.40,
            "color": 91.60,
            "spatial_relationship": 68.68,
            "scene": 53.88,
            "appearance_style": 19.80,
            "temporal_style": 23.89,
            "overall_consistency": 26.44,
        },
    ),
)
