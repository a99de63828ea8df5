"""Prompts as the released weights are asked (hpcaitech/Open-Sora opensora/utils/inference.py), written out by hand."""

from __future__ import annotations

import pytest

from megasora.config.schema import SampleConfig
from megasora.diffusion.captions import inference_caption
from megasora.models.sampler import caption_of_prompt


@pytest.mark.parametrize(
    ("text", "asked"),
    [
        ("raining, sea", "raining, sea. 24 FPS. 4 motion score."),  # ensure_sentence_ends_with_period
        ("raining, sea.", "raining, sea. 24 FPS. 4 motion score."),
        ("  raining, sea. ", "raining, sea. 24 FPS. 4 motion score."),  # strip comes first
        ("raining, sea!", "raining, sea!. 24 FPS. 4 motion score."),  # only a full stop counts
        ("raining, sea. 16 FPS.", "raining, sea. 16 FPS. 4 motion score."),  # check_fps_added: \d+ FPS\.$
        ("raining, sea. 16 FPS", "raining, sea. 16 FPS. 4 motion score."),  # the stop is added first, then the rate is found
        ("24 FPS. of rain", "24 FPS. of rain. 24 FPS. 4 motion score."),  # not at the end
    ],
)
def test_a_prompt_gets_a_full_stop_its_rate_and_its_motion(text: str, asked: str) -> None:
    assert caption_of_prompt(text, settings=SampleConfig(), num_frames=129) == asked


def test_parts_that_are_turned_off_are_left_out() -> None:
    assert inference_caption("sea", fps=16.0, motion_score=None) == "sea. 16 FPS."
    assert inference_caption("sea", fps=None, motion_score=7.0) == "sea. 7 motion score."
    assert inference_caption("sea", fps=None, motion_score=None) == "sea"
    assert caption_of_prompt("sea", settings=SampleConfig(prompt_fps=False), num_frames=129) == "sea. 4 motion score."


def test_a_picture_has_neither_rate_nor_motion() -> None:
    assert caption_of_prompt("sea", settings=SampleConfig(), num_frames=1) == "sea"
