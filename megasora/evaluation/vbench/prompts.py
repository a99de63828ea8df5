"""VBench's prompts and the clips they ask for. The lists are VBench's own (Vchitect/VBench prompts/); the user gives them.

A clip's name is `{prompt}-{index}.mp4` (prompts/README.md), its seed depends on the base seed, the prompt and the index alone.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megasora.config.errors import UserError
from megasora.config.files import written_whole
from megasora.evaluation.vbench.dimensions import BY_NAME, PROMPT_LISTS

LONGEST_NAME_BYTES = 255
"""Of a file name on Linux (limits.h, NAME_MAX)."""
FLICKER = "temporal_flickering"


@dataclass(frozen=True, kw_only=True)
class PromptEntry:
    """A prompt and the lists it stands in; none when the file does not say."""

    prompt: str
    lists: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class PlannedClip:
    """One clip to be made."""

    path: str
    """In the output folder."""
    prompt: str
    index: int
    seed: int


def read_prompts(source: Path) -> list[PromptEntry]:
    """Prompts in their order, each once.

    Args:
        source: a text file with a prompt per line (all_dimension.txt), a folder of such files named by dimension (prompts_per_dimension),
            or VBench_full_info.json.

    Raises:
        UserError: it is none of these, or holds no prompt.
    """
    if not source.exists():
        raise UserError(f"no prompts at {source}; give prompts/all_dimension.txt or prompts/prompts_per_dimension of VBench")
    entries: list[tuple[str, tuple[str, ...]]]
    try:
        if source.is_dir():
            named = [(path.stem, _lines(path)) for path in sorted(source.glob("*.txt"))]
            unknown = [name for name, _ in named if name not in PROMPT_LISTS]
            if unknown:
                raise UserError(f"{source / unknown[0]}.txt is no prompt list of a dimension; there are {', '.join(PROMPT_LISTS)}")
            entries = [(prompt, (name,)) for name, prompts in named for prompt in prompts]
        elif source.suffix == ".json":
            entries = [(str(item["prompt_en"]).strip(), _lists_of(item["dimension"])) for item in json.loads(source.read_text("utf-8"))]
        else:
            entries = [(prompt, ()) for prompt in _lines(source)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{source} holds no VBench prompts ({type(error).__name__}: {error})") from error
    lists: dict[str, tuple[str, ...]] = {}
    for prompt, names in entries:
        lists[prompt] = tuple(dict.fromkeys((*lists.get(prompt, ()), *names)))
    if not lists:
        raise UserError(f"{source} holds no prompt; give prompts/all_dimension.txt or prompts/prompts_per_dimension of VBench")
    return [PromptEntry(prompt=prompt, lists=names) for prompt, names in lists.items()]


def _lines(path: Path) -> list[str]:
    return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _lists_of(dimensions: Any) -> tuple[str, ...]:
    unknown = [name for name in dimensions if name not in BY_NAME]
    if unknown:
        raise ValueError(f"{unknown[0]} is no dimension")
    return tuple(dict.fromkeys(BY_NAME[name].prompts for name in dimensions))


def plan_clips(entries: Sequence[PromptEntry], *, samples: int, flicker_samples: int, per_dimension: bool, seed: int) -> list[PlannedClip]:
    """Every clip of a VBench run, in an order that nothing but the prompts decides.

    Args:
        entries: prompts.
        samples: clips of a prompt (5).
        flicker_samples: clips of a prompt of temporal_flickering, where the lists are known (25).
        per_dimension: a folder per list, and a prompt of two lists in both.
        seed: base of all seeds.

    Raises:
        UserError: a prompt that cannot be a file name, folders asked for without lists, or fewer than one clip.
    """
    if samples < 1 or flicker_samples < 1:
        raise UserError(f"--samples {samples} and --flicker_samples {flicker_samples} must be at least 1")
    clips: list[PlannedClip] = []
    for entry in entries:
        if per_dimension and not entry.lists:
            raise UserError("--per_dimension needs to know the lists: give the folder prompts_per_dimension or VBench_full_info.json")
        places = [(f"{name}/", name) for name in entry.lists] if per_dimension else [("", FLICKER if FLICKER in entry.lists else "")]
        for folder, name in places:
            for index in range(flicker_samples if name == FLICKER else samples):
                file = clip_name(entry.prompt, index)
                clips.append(PlannedClip(path=folder + file, prompt=entry.prompt, index=index, seed=clip_seed(seed, entry.prompt, index)))
    return clips


def clip_name(prompt: str, index: int) -> str:
    """`{prompt}-{index}.mp4`.

    Raises:
        UserError: no file can be called so.
    """
    name = f"{prompt}-{index}.mp4"
    if "/" in name or "\0" in name or name.startswith(".") or len(name.encode()) > LONGEST_NAME_BYTES:
        raise UserError(f"no file can be called {name[:80]!r} (at most {LONGEST_NAME_BYTES} bytes, without / and a leading dot)")
    return name


def clip_seed(base: int, prompt: str, index: int) -> int:
    """Seed of one clip in [0, 2^31): VBench wants them all different and none picked, so they are a hash."""
    return int.from_bytes(hashlib.sha256(f"{base}\n{index}\n{prompt}".encode()).digest()[:4], "big") >> 1


def write_plan(path: Path, clips: Iterable[PlannedClip]) -> None:
    """A csv of every clip and its seed, as VBench asks for; the same from every task of an array."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("path", "prompt", "index", "seed"))
        writer.writerows((clip.path, clip.prompt, clip.index, clip.seed) for clip in clips)
