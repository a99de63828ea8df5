"""A clip's record says all that decides it: what was drawn with other settings is another clip."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megasora import recipes
from megasora.inference.record import FORMAT, Hashes, differences, read_record, record_of
from megasora.inference.requests import ClipRequest, Common, requests_of


def request() -> ClipRequest:
    config, common = recipes.get("tiny"), Common(kind=None, negative="", resolution=None, aspect=None, num_samples=1)
    (one,) = requests_of({"prompt": "a cat"}, number=0, config=config, common=common, folder=Path())
    return one


def record(**encoders: Any) -> dict[str, Any]:
    config = recipes.get("tiny")
    config = replace(config, encoders=replace(config.encoders, **encoders))
    hashes = Hashes(weights="w", encoders={})
    return record_of(request(), caption="a cat", config=config, model=config.model, weights=Path("w"), select="model", hashes=hashes)


@pytest.mark.parametrize(("name", "value"), [("tile_frames", 32), ("scaling_factor", 2.0284), ("tile_size", 64)])
def test_another_setting_of_the_encoders_is_another_clip(name: str, value: Any) -> None:
    (difference,) = differences(record(**{name: value}), record())
    assert difference.startswith(f"encoding.{name} was ")


def test_an_older_record_has_the_settings_of_its_time(tmp_path: Path) -> None:
    old = record()
    assert old["format"] == FORMAT
    for name in ("tile_frames", "scaling_factor"):
        del old["encoding"][name]
    (tmp_path / "clip.json").write_text(json.dumps(old))
    assert differences(record(), read_record(tmp_path / "clip.json")) == []
