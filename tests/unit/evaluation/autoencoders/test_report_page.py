"""The page of a comparison, in headless Chromium: whole without a network, wide and narrow."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def page(made: Path) -> Path:
    return made / "out" / "report.html"


def test_names_are_text_and_nothing_comes_from_elsewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert "short &lt;b&gt;" in text and "short <b>" not in text
    assert not re.search(r"""(src|href)=["'](?!data:)""", text)
    assert "<script" not in text and "url(" not in text


@pytest.mark.parametrize("width", [1400, 390])
def test_it_is_shown_without_errors_at_any_width(page: Path, browser: Any, width: int) -> None:
    shown = browser.new_page(viewport={"width": width, "height": 900})
    said: list[str] = []
    shown.on("console", lambda message: said.append(message.text))
    shown.on("pageerror", lambda error: said.append(str(error)))
    shown.on("request", lambda request: said.append(request.url) if not request.url.startswith(("file:", "data:")) else None)
    shown.goto(page.as_uri())
    assert said == []
    images = "Array.from(document.images)"
    # four worst and best clips of each shape: original, made, difference of each autoencoder and frame; a strip for each of clips
    assert shown.evaluate(f"{images}.length") == 4 * (1 + 2 * 2) + 3 * (3 * (1 + 2 * 2) + 2)
    assert shown.evaluate(f"{images}.every((image) => image.complete && image.naturalWidth > 0)")
    assert shown.evaluate("document.documentElement.scrollWidth") <= width
    assert shown.locator("tbody tr").count() == 4
    assert shown.locator(".tiles figure").count() == 2 * 16
