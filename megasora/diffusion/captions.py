"""Captions as the model is trained to see them: the text, then the frame rate and motion score when known.

Source: hpcaitech/Open-Sora opensora/datasets/datasets.py and utils/inference.py (facts section 2).
"""

from __future__ import annotations


def training_caption(text: str, *, fps: float | None, motion_score: float | None) -> str:
    """`{text} {n} FPS, {m} motion score.` with each part only when known; fps is the sampled one."""
    parts = []
    if fps is not None:
        parts.append(f"{fps:g} FPS")
    if motion_score is not None:
        parts.append(f"{int(motion_score + 0.5)} motion score")
    return f"{text} {', '.join(parts)}." if parts else text


def inference_caption(text: str, *, motion_score: float | None) -> str:
    """`{text} {m} motion score.`, or the text alone."""
    return training_caption(text, fps=None, motion_score=motion_score)
