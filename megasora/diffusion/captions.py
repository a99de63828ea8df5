"""Captions as the model is trained to see them: the text, then the frame rate and motion score when known.

Source: hpcaitech/Open-Sora opensora/datasets/datasets.py and utils/inference.py (facts section 2).
"""

from __future__ import annotations

import re


def training_caption(text: str, *, fps: int | float | None, motion_score: float | None) -> str:
    """`{text} {n} FPS, {m} motion score.` with each part only when known.

    Args:
        text: the caption.
        fps: as it is named: a strided rate is a whole number (29.97 at stride 2: `14 FPS`), a file's own a float (`16.0 FPS`); the text
            model has seen these spellings (opensora/datasets/datasets.py, getitem; utils.py, map_target_fps).
        motion_score: rounded to the nearest whole number.
    """
    parts = []
    if fps is not None:
        parts.append(f"{fps} FPS")
    if motion_score is not None:
        parts.append(f"{int(motion_score + 0.5)} motion score")
    return f"{text} {', '.join(parts)}." if parts else text


def inference_caption(text: str, *, fps: float | None, motion_score: float | None) -> str:
    """The prompt as the released weights are asked: `{text}. {n} FPS. {m} motion score.`

    A full stop is added where the text has none; a text that already ends in `n FPS.` keeps it; fps and motion score that are None (a
    picture) are left out. Source: hpcaitech/Open-Sora opensora/utils/inference.py (ensure_sentence_ends_with_period,
    add_fps_info_to_text, add_motion_score_to_text), scripts/diffusion/inference.py.
    """
    text = text.strip()
    if fps is not None or motion_score is not None:
        text = text if text.endswith(".") else f"{text}."
    if fps is not None and not re.search(r"\d+ FPS\.$", text):
        text = f"{text} {fps:g} FPS."
    return text if motion_score is None else f"{text} {motion_score:g} motion score."
