"""`megasora serve`: a form becomes a clip, in Chromium too; what a person can mend is one line of the page."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megasora import cli
from megasora.config.io import load_yaml, save_yaml
from megasora.data.decoding.writer import write_picture
from megasora.inference.refine_settings import RefineConfig
from megasora.inference.sampler import Sampler
from megasora.inference.serving.studio import PIXELS, Drawing, Form, Studio
from megasora.inference.serving.turns import Turns
from megasora.parallel import groups
from tests.pool import RankPool
from tests.published.small_weights import save_mmdit, small_config, transformer
from tests.unit.inference.endpoint import endpoint, says


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights, a run's config of 5 x 32 x 48 pixels and 2 steps, and a picture."""
    path = tmp_path_factory.mktemp("serve")
    torch.manual_seed(3)
    save_mmdit(transformer(guidance=False), torch.nn.Linear(68, 64), path / "mmdit.safetensors")
    config = small_config(path)
    save_yaml(replace(config, sample=replace(config.sample, height=32, width=48, num_frames=5, steps=2)), path / "config.yaml")
    write_picture(path / "first.png", torch.linspace(-1, 1, 48).expand(3, 32, 48))
    return path


def draw(rank: int, folder: str, url: str) -> tuple[dict[str, Drawing], list[tuple[int, int]]]:
    """Drawings of a studio by what is asked, and the steps it told of the first."""
    path = Path(folder)
    steps: list[tuple[int, int]] = []
    sampler = Sampler.load(path / "mmdit.safetensors", recipe=load_yaml(path / "config.yaml"))
    studio = Studio(sampler, folder=path / "studio", refine=RefineConfig(url=url, tries=1))
    form = Form(prompt="A rabbit")
    made = {"clip": studio.draw(form, on_step=lambda done, of: steps.append((done, of)))}
    forms = {
        "picture": replace(form, num_frames=1.0, seed=9.0),
        "image": replace(form, image=str(path / "first.png"), steps=1.0, guidance=2.0),
        "pixels": replace(form, resolution=PIXELS, height=16.0, width=32.0, steps=1.0),
        "refined": replace(form, refine=True, steps=1.0),
        "empty": replace(form, prompt=" "),
        "frames": replace(form, num_frames=6.0),
        "seed": replace(form, seed=1.5),
        "side": replace(form, resolution=PIXELS, height=16.0),
        "aspect": replace(form, resolution="256px", aspect="7:3"),
        "steps": replace(form, steps=0.0),
    }
    made |= {name: studio.draw(one, on_step=lambda done, of: None) for name, one in forms.items()}
    groups.destroy()
    return made, steps


def test_a_form_becomes_a_clip_or_one_line(pool: RankPool, folder: Path) -> None:
    with endpoint(lambda body, _: (200, says("A long-eared rabbit."))) as there:
        ((made, steps),) = pool.run(1, draw, str(folder), there.url)
    assert steps == [(0, 2), (1, 2), (2, 2)]
    names = ("clip", "picture", "image", "pixels", "refined")
    records = {name: json.loads(made[name].record.read_text()) for name in names}  # type: ignore[union-attr]
    assert all(made[name].clip.is_file() for name in names)  # type: ignore[union-attr]
    assert made["clip"].moves and not made["picture"].moves
    assert records["picture"]["seed"] == 9 and records["picture"]["size"] == {"num_frames": 1, "height": 32, "width": 48}
    assert records["image"]["kind"] == "i2v_head" and records["image"]["sample"]["guidance"] == 2.0
    assert records["pixels"]["size"] == {"num_frames": 5, "height": 16, "width": 32}
    assert records["refined"]["prompt"] == "A long-eared rabbit." and "A long-eared rabbit." in made["refined"].said
    assert "refinement" not in records["clip"]
    mistakes = {
        "empty": "the prompt is empty",
        "frames": "num_frames 6 is not 1 or 4k+1; use 5",
        "seed": "seed 1.5 is no whole number",
        "side": "give height and width together",
        "aspect": "aspect '7:3' is not one of",
        "steps": "steps 0 must be at least 1",
    }
    for name, words in mistakes.items():
        assert made[name].clip is None and made[name].record is None
        assert made[name].said.startswith(words) and "\n" not in made[name].said


def test_turns_are_taken_in_the_thread_that_works() -> None:
    turns, found = Turns(), []

    def ask() -> None:
        found.append(turns.take(threading.get_ident))
        with pytest.raises(ZeroDivisionError):
            turns.take(lambda: 1 // 0)
        turns.end()

    asking = threading.Thread(target=ask)
    asking.start()
    turns.work()
    asking.join()
    assert found == [threading.get_ident()]


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as end:
        cli.main(["serve", "tiny", "--weights", "w", *words])
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1
    return said


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert 'serve needs the package of gradio: pip install "megasora[serve]"' in refused([], capsys)


def test_more_than_one_rank_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "2")
    assert "serve draws on one rank, and 2 were started" in refused([], capsys)


@pytest.fixture
def address(folder: Path) -> Iterator[str]:
    """The page of a server of its own process; its end is an interruption."""
    pytest.importorskip("gradio", reason='gradio is not installed (pip install "megasora[serve]")')
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["serve", "config.yaml", "--weights", "mmdit.safetensors", "--output", "clips", "--port", str(port)]
    root = str(Path(__file__).parents[3])
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    server = subprocess.Popen([sys.executable, "-m", "megasora", *words], cwd=folder, env=environment, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    line = server.stdout.readline()
    assert line.startswith(f"megasora serve: http://127.0.0.1:{port}/"), line
    yield line.split()[2]
    server.send_signal(signal.SIGINT)
    assert server.wait(60) == 130


@pytest.mark.slow
def test_a_clip_is_drawn_through_the_page(browser: Any, address: str, folder: Path, tmp_path: Path) -> None:
    complaints: list[str] = []
    outside: set[str] = set()
    tab = browser.new_context(viewport={"width": 1280, "height": 900}, accept_downloads=True).new_page()
    tab.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.on("request", lambda request: None if request.url.startswith((address, "data:", "blob:")) else outside.add(request.url))
    tab.goto(address, wait_until="networkidle")
    tab.fill("#prompt textarea", "A rabbit in a meadow")
    tab.set_input_files("#image input[type=file]", str(folder / "first.png"))
    tab.wait_for_selector("#image img")
    tab.click("#dice")
    tab.wait_for_function("document.querySelector('#seed input').value !== '42'")
    seed = int(tab.input_value("#seed input"))
    tab.click("#draw")
    tab.wait_for_function(
        "(v => v && v.readyState >= 2 && v.videoWidth === 48 && v.videoHeight === 32)(document.querySelector('#clip video'))",
        timeout=60_000,
    )
    assert f"5 x 32 x 48, seed {seed}" in tab.input_value("#said textarea")
    tab.screenshot(path=str(tmp_path / "drawn.png"))
    with tab.expect_download() as download:
        tab.click("#record")
    download.value.save_as(tmp_path / "record.json")
    record = json.loads((tmp_path / "record.json").read_text())
    assert (record["prompt"], record["kind"], record["seed"]) == ("A rabbit in a meadow", "i2v_head", seed)

    tab.fill("#num_frames input", "6")
    tab.click("#draw")
    tab.wait_for_function("document.querySelector('#said textarea').value.startsWith('num_frames 6 is not 1 or 4k+1; use 5')")
    assert tab.query_selector("#clip video") is None
    tab.reload(wait_until="networkidle")
    tab.fill("#prompt textarea", "A still rabbit")
    tab.fill("#num_frames input", "1")
    tab.click("#draw")
    tab.wait_for_function("(i => i && i.complete && i.naturalWidth === 48)(document.querySelector('#picture img'))")
    assert complaints == []
    assert outside == set()
