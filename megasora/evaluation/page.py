"""A page that asks which of two clips is better: one HTML file and the clips beside it, without a server and without a network.

The order of the pairs and which clip stands left are drawn from a seed. Copies are named by pair and side, so no name tells the set.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from megasora.config.errors import UserError
from megasora.config.files import refuse_existing, written_whole
from megasora.evaluation.fidelity import Pair
from megasora.evaluation.votes import FORMAT

MARK = "/*PAGE*/ null"
"""Where the template takes the page's data."""
PICTURES = (".gif", ".png", ".jpg", ".jpeg", ".webp")
SHOWN = (".mp4", ".webm", *PICTURES)
"""What browsers play (H.264 in mp4, VP8, VP9 and AV1 in webm) or show."""


def write_page(folder: Path, pairs: Sequence[Pair], *, names: tuple[str, str], seed: int) -> Path:
    """Write the page; returns the HTML file.

    Args:
        folder: must not exist; holds index.html and clips/ afterwards.
        pairs: clips to compare.
        names: of the two sets, as the votes will say.
        seed: of the orders.

    Raises:
        UserError: the folder exists, the names are equal, or a clip is of a kind no browser plays.
    """
    refuse_existing(folder, cure="choose another folder for --page")
    if names[0] == names[1]:
        raise UserError(f"both sets are called {names[0]}; give two --names")
    for path in (path for pair in pairs for path in (pair.a, pair.b)):
        if path.suffix.lower() not in SHOWN:
            raise UserError(f"{path}: browsers play {', '.join(SHOWN)} only; encode it as mp4 for --page")
    data = page_data(pairs, names=names, seed=seed)
    folder.parent.mkdir(parents=True, exist_ok=True)
    by_name = {pair.name: pair for pair in pairs}
    with written_whole(folder) as temporary:
        (temporary / "clips").mkdir(parents=True)
        for entry in data["entries"]:
            pair = by_name[entry["pair"]]
            left, right = (pair.a, pair.b) if entry["left"] == "a" else (pair.b, pair.a)
            shutil.copyfile(left, temporary / entry["clips"][0])
            shutil.copyfile(right, temporary / entry["clips"][1])
        template = (files("megasora.evaluation") / "page.html").read_text(encoding="utf-8")
        (temporary / "index.html").write_text(template.replace(MARK, _script_text(data)), encoding="utf-8")
    return folder / "index.html"


def page_data(pairs: Sequence[Pair], *, names: tuple[str, str], seed: int) -> dict[str, Any]:
    """What the page knows: pairs in a drawn order, each with a drawn left side."""
    generator = random.Random(seed)
    order = list(pairs)
    generator.shuffle(order)
    entries = []
    for number, pair in enumerate(order):
        left = generator.choice(("a", "b"))
        first, second = (pair.a, pair.b) if left == "a" else (pair.b, pair.a)
        clips = [f"clips/{number:04d}_{side}{path.suffix.lower()}" for side, path in (("1", first), ("2", second))]
        kinds = ["picture" if path.suffix.lower() in PICTURES else "video" for path in (first, second)]
        entries.append({"pair": pair.name, "left": left, "clips": clips, "kinds": kinds})
    told = json.dumps([names, seed, entries])
    return {
        "format": FORMAT,
        "page": hashlib.sha256(told.encode()).hexdigest()[:16],
        "a": names[0],
        "b": names[1],
        "entries": entries,
    }


def _script_text(data: dict[str, Any]) -> str:
    """JSON that may stand in a script of an HTML page: nothing in it ends the script."""
    return json.dumps(data, indent=1).replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
