"""The page, of gradio's parts: a form on the left, the clip on the right. Nothing of it comes from a network, and nothing is sent anywhere.

gradio is imported in this file only; `import_gradio` turns its reports of use off before it is loaded.
"""

from __future__ import annotations

import os
import random
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megasora.config.errors import UserError
from megasora.inference.serving.studio import OWN_SIZE, PIXELS, RESOLUTIONS, Form, Studio
from megasora.inference.serving.turns import Turns
from megasora.inference.sizes import NAMES

if TYPE_CHECKING:
    import gradio

MOST_WAITING = 32
"""Forms that wait for their turn; the next one is refused."""
MOST_BYTES = "64mb"
"""Of a picture that is given."""
CSS = "footer {display: none !important} #said textarea {font-size: .9em}"


def import_gradio() -> Any:
    """gradio, which from then on asks for no newer version and reports no use."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    import gradio

    return gradio


def build_page(studio: Studio, *, turns: Turns, title: str) -> gradio.Blocks:
    """The page of a studio that draws where `turns` are worked off."""
    gr = import_gradio()
    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        gr.Markdown(f"# {title}")
        with gr.Row():
            with gr.Column(scale=2):
                parts, draw, dice = _form(gr, studio)
            with gr.Column(scale=3):
                video = gr.Video(label="Clip", interactive=False, autoplay=True, loop=True, elem_id="clip", buttons=["download"])
                picture = gr.Image(label="Picture", interactive=False, visible=False, elem_id="picture", format="png", buttons=["download"])
                said = gr.Textbox(label="", show_label=False, interactive=False, lines=1, max_lines=8, elem_id="said", container=False)
                record = gr.DownloadButton("Record (.json)", interactive=False, elem_id="record")
        names = list(parts)

        def on_draw(*values: Any, progress: Any = gr.Progress()) -> tuple[Any, Any, Any, Any]:  # noqa: B008 - how gradio hands it over
            form = Form(**dict(zip(names, values, strict=True)))

            def show(done: int, steps: int) -> None:
                progress((done, steps), desc="drawing" if done else "starting", unit="steps")

            drawing = turns.take(lambda: studio.draw(form, on_step=show))
            path = None if drawing.clip is None else str(drawing.clip)
            still = path is not None and not drawing.moves
            return (
                gr.update(value=None if still else path, visible=not still),
                gr.update(value=path if still else None, visible=still),
                drawing.said,
                gr.update(value=None if drawing.record is None else str(drawing.record), interactive=drawing.record is not None),
            )

        outputs = [video, picture, said, record]
        settings = {"concurrency_limit": 1, "concurrency_id": "draw", "api_visibility": "private", "show_progress_on": [video, picture]}
        draw.click(on_draw, list(parts.values()), outputs, **settings)
        parts["prompt"].submit(on_draw, list(parts.values()), outputs, **settings)
        dice.click(lambda: random.randrange(2**31), None, parts["seed"], api_visibility="private", queue=False)
    page.queue(max_size=MOST_WAITING, default_concurrency_limit=1)
    return page


def _form(gr: Any, studio: Studio) -> tuple[dict[str, Any], Any, Any]:
    """(part of each field of `Form`, button that draws, button that rolls a seed)."""
    run = studio.defaults
    parts: dict[str, Any] = {}
    parts["prompt"] = gr.Textbox(label="Prompt", lines=3, autofocus=True, elem_id="prompt", submit_btn=False)
    parts["refine"] = gr.Checkbox(label=f"Let {studio.refine.by} rewrite it", value=studio.refine.on, visible=studio.refine.on)
    with gr.Row(visible=studio.takes_images):
        for name, label in (("image", "First image"), ("end_image", "Last image")):
            parts[name] = gr.Image(label=label, type="filepath", format="png", sources=["upload", "clipboard"], elem_id=name, height=170)
    with gr.Row():
        own = f"{OWN_SIZE}: {run.height} x {run.width}"
        sizes = [(own, OWN_SIZE), *((name, name) for name in RESOLUTIONS), (PIXELS, PIXELS)]
        parts["resolution"] = gr.Dropdown(sizes, value=OWN_SIZE, label="Size", elem_id="resolution")
        parts["aspect"] = gr.Dropdown(list(NAMES), value="16:9", label="Aspect, width:height", visible=False, elem_id="aspect")
        parts["height"] = gr.Number(run.height, label="Height", precision=0, step=studio.unit, visible=False, elem_id="height")
        parts["width"] = gr.Number(run.width, label="Width", precision=0, step=studio.unit, visible=False, elem_id="width")
    with gr.Row():
        parts["num_frames"] = gr.Number(
            run.num_frames, label=f"Frames ({studio.frame_rule})", precision=0, step=4, min_width=90, elem_id="num_frames"
        )
        parts["steps"] = gr.Number(run.steps, label="Steps", precision=0, min_width=90, elem_id="steps")
        parts["guidance"] = gr.Number(run.guidance, label="Guidance", step=0.5, min_width=90, elem_id="guidance")
    with gr.Row(equal_height=True):
        parts["seed"] = gr.Number(run.seed, label="Seed", precision=0, elem_id="seed")
        dice = gr.Button("Random seed", elem_id="dice")
    with gr.Accordion("More", open=False):
        parts["negative"] = gr.Textbox(label="Negative prompt", lines=2, value="", elem_id="negative")
        with gr.Row():
            parts["motion_score"] = gr.Number(run.motion_score, label="Motion score", elem_id="motion_score")
            parts["guidance_img"] = gr.Number(
                run.guidance_img, label="Image guidance", step=0.5, elem_id="guidance_img", visible=studio.takes_images
            )
    draw = gr.Button("Draw", variant="primary", elem_id="draw")

    def sides(resolution: str) -> tuple[Any, Any, Any]:
        by_name, pixels = resolution not in (OWN_SIZE, PIXELS), resolution == PIXELS
        return gr.update(visible=by_name), gr.update(visible=pixels), gr.update(visible=pixels)

    parts["resolution"].change(
        sides, parts["resolution"], [parts[name] for name in ("aspect", "height", "width")], api_visibility="private", queue=False
    )
    assert set(parts) == {field.name for field in fields(Form)}, "each field of a form has its part"
    return parts, draw, dice


def open_page(page: Any, *, host: str, port: int, share: bool, in_browser: bool, folder: Path) -> str:
    """Serve a page in threads of its own; returns its address.

    Raises:
        UserError: the port is taken.
    """
    gr = import_gradio()
    theme = gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    folder.mkdir(parents=True, exist_ok=True)
    try:
        _, address, public = page.launch(
            server_name=host,
            server_port=port,
            share=share,
            inbrowser=in_browser,
            prevent_thread_lock=True,
            quiet=True,
            theme=theme,
            css=CSS,
            footer_links=[],
            run_history=False,
            enable_monitoring=False,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            max_file_size=MOST_BYTES,
            allowed_paths=[str(folder.resolve())],
        )
    except OSError as error:
        raise UserError(f"cannot listen on {host}:{port}: the port is taken or not ours; choose another --port") from error
    return str(public or address)
