"""The preference page: what it is made of, and a vote through it in headless Chromium."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from megasora import cli
from megasora.config.errors import UserError
from megasora.data.decoding.writer import write_video
from megasora.evaluation.fidelity import Pair, pair_up
from megasora.evaluation.page import page_data, write_page
from megasora.evaluation.votes import preferences, read_ballot
from tests.unit.evaluation.clips import noise, write_exact


def folders(tmp_path: Path, count: int = 4) -> tuple[Path, Path]:
    """Clips of two sets, dark and bright."""
    for number in range(count):
        for name, level in (("dark", -0.8), ("bright", 0.8)):
            (tmp_path / name).mkdir(exist_ok=True)
            write_video(tmp_path / name / f"a prompt, number {number}.mp4", torch.full((3, 8, 64, 96), level), fps=8)
    return tmp_path / "dark", tmp_path / "bright"


def pairs_of(tmp_path: Path, count: int = 4) -> list[Pair]:
    return pair_up(*folders(tmp_path, count))[0]


def data_of(page: Path) -> dict[str, Any]:
    match = re.search(r"const page = (\{.*?\n\});", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert match is not None
    return json.loads(match[1])


def test_the_page_holds_copies_whose_names_tell_nothing(tmp_path: Path) -> None:
    pairs = pairs_of(tmp_path)
    page = write_page(tmp_path / "page", pairs, names=("dark", "bright"), seed=1)
    data = data_of(page)
    assert sorted(path.name for path in page.parent.iterdir()) == ["clips", "index.html"]
    assert sorted(path.name for path in (page.parent / "clips").iterdir()) == [f"{n:04d}_{side}.mp4" for n in range(4) for side in (1, 2)]
    by_name = {pair.name: pair for pair in pairs}
    for entry in data["entries"]:
        pair = by_name[entry["pair"]]
        left, right = (pair.a, pair.b) if entry["left"] == "a" else (pair.b, pair.a)
        assert (page.parent / entry["clips"][0]).read_bytes() == left.read_bytes()
        assert (page.parent / entry["clips"][1]).read_bytes() == right.read_bytes()
    assert not re.search(r"(https?:)?//[a-z]", page.read_text(encoding="utf-8"))  # nothing comes from a network


def test_orders_come_from_the_seed(tmp_path: Path) -> None:
    pairs = [Pair(name=str(k), a=Path(f"a/{k}.mp4"), b=Path(f"b/{k}.mp4"), facts=None) for k in range(200)]  # type: ignore[arg-type]
    one, same, other = (page_data(pairs, names=("a", "b"), seed=seed) for seed in (1, 1, 2))
    assert one == same
    assert one["page"] != other["page"]
    assert [entry["pair"] for entry in one["entries"]] != [entry["pair"] for entry in other["entries"]]
    lefts = sum(entry["left"] == "a" for entry in one["entries"])
    assert 70 < lefts < 130  # 100 +- 4 standard deviations of sqrt(200) / 2 = 7.07


def test_a_name_cannot_end_the_script(tmp_path: Path) -> None:
    for folder in ("x", "y"):
        write_exact(tmp_path / folder / "<!--<script>.png", noise(1, 32, 32))
    pairs = pair_up(tmp_path / "x", tmp_path / "y")[0]
    page = write_page(tmp_path / "page", pairs, names=("x", "</script>"), seed=0)
    assert page.read_text(encoding="utf-8").count("</script>") == 1
    assert data_of(page)["b"] == "</script>"


def test_what_cannot_be_shown_is_refused(tmp_path: Path) -> None:
    pairs = pairs_of(tmp_path, 1)
    with pytest.raises(UserError, match="both sets are called x"):
        write_page(tmp_path / "page", pairs, names=("x", "x"), seed=0)
    with pytest.raises(UserError, match="exists"):
        write_page(tmp_path, pairs, names=("a", "b"), seed=0)
    moved = pairs[0].a.rename(pairs[0].a.with_suffix(".mkv"))
    with pytest.raises(UserError, match="browsers play"):
        write_page(tmp_path / "page", [Pair(name="x", a=moved, b=pairs[0].b, facts=pairs[0].facts)], names=("a", "b"), seed=0)
    assert not (tmp_path / "page").exists()


def opened(context: Any, page: Path, complaints: list[str]) -> Any:
    tab = context.new_page()
    tab.on("console", lambda message: complaints.append(message.text) if message.type in ("error", "warning") else None)
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.on("requestfailed", lambda request: complaints.append(f"failed: {request.url}"))
    tab.goto(page.as_uri())
    return tab


def await_kept(profile: Path, text: str) -> None:
    """Wait until a browser's storage on disk holds a text."""
    deadline = time.monotonic() + 60
    while not any(text.encode() in file.read_bytes() for file in (profile / "Default" / "Local Storage" / "leveldb").glob("*.log")):
        assert time.monotonic() < deadline, f"{text} is not kept"
        time.sleep(0.1)


def test_votes_through_the_page_come_out_of_the_file(tmp_path: Path, chromium: Any) -> None:
    a, b = folders(tmp_path)
    page = tmp_path / "page"
    cli.main(["evaluate", "clips", str(a), str(b), "--measures", "--page", str(page), "--seed", "3"])
    entries = data_of(page / "index.html")["entries"]
    complaints: list[str] = []
    profile = {"viewport": {"width": 1280, "height": 720}, "accept_downloads": True}
    context = chromium("launch_persistent_context", tmp_path / "profile", **profile)
    tab = opened(context, page / "index.html", complaints)
    tab.wait_for_function("[...document.querySelectorAll('video')].every(v => v.readyState >= 2 && v.videoWidth === 96 && !v.paused)")
    assert tab.text_content("#name") == entries[0]["pair"]
    tab.screenshot(path=str(tmp_path / "first.png"))
    tab.keyboard.press("1")
    tab.keyboard.press("2")
    tab.keyboard.press("0")
    assert tab.text_content("#count") == "pair 4 of 4, 3 voted"
    tab.close()  # Chromium writes what a page keeps some seconds later, or once no page of its origin is open
    await_kept(tmp_path / "profile", '"tie"')
    context.close()  # progress stays when the browser is closed and opened again
    context = chromium("launch_persistent_context", tmp_path / "profile", **profile)
    tab = opened(context, page / "index.html", complaints)
    assert tab.text_content("#count") == "pair 4 of 4, 3 voted"
    tab.keyboard.press("ArrowLeft")
    assert "chosen" in tab.get_attribute("#vote0", "class")
    tab.keyboard.press("ArrowRight")
    tab.click("#right")
    assert tab.is_visible("#end")
    tab.screenshot(path=str(tmp_path / "end.png"))
    with tab.expect_download() as download:
        tab.click("#download")
    download.value.save_as(tmp_path / "votes.json")
    context.close()
    assert complaints == []
    ballot = read_ballot(tmp_path / "votes.json")
    turned = {"a": "b", "b": "a"}
    wanted = [entries[0]["left"], turned[entries[1]["left"]], "tie", turned[entries[3]["left"]]]
    assert [vote.choice for vote in ballot.votes] == wanted
    assert [vote.pair for vote in ballot.votes] == [entry["pair"] for entry in entries]
    (found,) = preferences([ballot])
    assert (found.a, found.b) == ("dark", "bright")
    assert (found.left.count, found.left.of, found.tie.count) == (1, 3, 1)


def test_a_clip_that_cannot_be_played_says_so_and_the_other_one_plays(tmp_path: Path, browser: Any) -> None:
    page = write_page(tmp_path / "page", pairs_of(tmp_path, 1), names=("dark", "bright"), seed=0)
    (page.parent / "clips" / "0000_2.mp4").write_bytes(b"no video")
    tab = opened(browser.new_context(), page, [])
    tab.wait_for_selector("#right p")
    assert tab.text_content("#right p") == "This browser cannot show this clip."
    tab.wait_for_function("!document.querySelector('#left video').paused")


def test_pictures_are_shown_too(tmp_path: Path, browser: Any) -> None:
    for folder in ("x", "y"):
        write_exact(tmp_path / folder / "z.png", noise(1, 48, 64))
    page = write_page(tmp_path / "page", pair_up(tmp_path / "x", tmp_path / "y")[0], names=("x", "y"), seed=0)
    complaints: list[str] = []
    tab = opened(browser.new_context(), page, complaints)
    tab.wait_for_function("[...document.querySelectorAll('img')].length === 2")
    tab.wait_for_function("[...document.querySelectorAll('img')].every(i => i.complete && i.naturalWidth === 64)")
    tab.keyboard.press("2")
    assert tab.text_content("#count") == "1 of 1 voted"
    assert complaints == []
