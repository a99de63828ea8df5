"""Prompts rewritten by a language model before they become captions, and motion scores it guesses.

Rank 0 asks and tells the others, so that all ranks draw the same. What cannot be answered leaves the prompt as it is: that is said once per
cause on stderr and stands in the clip's record. Answers are kept in a folder beside the clips, so that an interrupted table goes on with
the same texts; `--again` takes them from the record and asks nobody.
"""

from __future__ import annotations

import hashlib
import json
import mimetypes
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megasora.config.errors import UserError
from megasora.config.files import written_whole
from megasora.data.cache.identity import file_sha256
from megasora.inference.chat import Ask, NoAnswerError, Use, asker
from megasora.inference.refine_settings import RefineConfig
from megasora.inference.requests import ClipRequest

ANSWERS = "refinements"
"""Folder of answers beside the clips: a file for each question, so that jobs which share out a table do not overwrite one another's."""
MOTION_SCORES = (1, 15)
"""Bounds of an answer. hpcaitech/Open-Sora opensora/utils/prompt_refine.py (sys_prompt_motion_score)."""
FALLBACK_SCORE = 4
"""Of an answer that is none. hpcaitech/Open-Sora configs/diffusion/inference/256px.py (motion_score)."""
GIVE_UP_AFTER = 3
"""Questions in a row without an answer from the endpoint, after which it is not asked again in this run."""


@dataclass(frozen=True, kw_only=True)
class Refinement:
    """What is asked of the language model."""

    config: RefineConfig
    motion_score: bool = False
    """Ask for each clip's motion score (`--motion_score dynamic`)."""

    @property
    def prompts(self) -> bool:
        """Whether prompts are refined."""
        return self.config.on and self.config.prompts

    def check(self) -> None:
        """Refuse settings that cannot work.

        Raises:
            UserError: says which.
        """
        self.config.check()
        if self.motion_score and not self.config.on:
            raise UserError("--motion_score dynamic asks a language model: give --refine.url or --refine.function, or a number")
        if self.config.on and not (self.prompts or self.motion_score):
            raise UserError("--refine.no_prompts without --motion_score dynamic leaves nothing to ask")


def refine(
    requests: Sequence[ClipRequest], settings: Refinement, *, folder: Path | None = None, first_frames: bool = False
) -> list[ClipRequest]:
    """The clips with refined prompts and motion scores of their own; every rank of the world calls it and gets the same.

    Args:
        requests: the clips of all ranks.
        settings: who is asked, and for what.
        folder: of the clips, where answers are kept; None keeps none.
        first_frames: whether text-to-video clips get a first frame drawn from text, whose prompt is asked for on its own.

    Raises:
        UserError: settings that cannot work.
    """
    settings.check()
    if not (settings.prompts or settings.motion_score):
        return list(requests)
    refiner = _Refiner(settings, asker(settings.config), folder=folder, first_frames=first_frames)
    made: list[ClipRequest] = []
    for request in requests:
        found: list[Any] = [refiner.refined(request) if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(found, src=0)  # one by one: no rank waits longer than one clip's questions take
        made.append(found[0])
    return made


class _Refiner:
    """Asks, remembers, and complains once per cause; on rank 0."""

    def __init__(self, settings: Refinement, ask: Ask, *, folder: Path | None, first_frames: bool) -> None:
        self.settings, self.ask, self.folder, self.first_frames = settings, ask, folder, first_frames
        self._now: dict[str, dict[str, Any]] = {}
        self._said: set[str] = set()
        self._failed_in_a_row = 0

    def refined(self, request: ClipRequest) -> ClipRequest:
        """One clip."""
        facts: dict[str, Any] = {"by": self.settings.config.by}
        text, picture_prompt = request.prompt, None
        if self.settings.prompts:
            moves = request.size.num_frames > 1
            image = _picture(request)
            use: Use = "t2i" if not moves else "t2v" if image is None else "i2v"
            answer, cause = self._answer(request, request.prompt, use, image if use == "i2v" else None)
            text = answer or text
            facts |= {"use": use, "failure": cause}
            if self.first_frames and use == "t2v" and request.kind == "t2v":
                picture_prompt, cause = self._answer(request, request.prompt, "t2i", None)
                facts |= {"picture_failure": cause}
        score: float | None = None
        if self.settings.motion_score and request.size.num_frames > 1:
            answer, cause = self._answer(request, text, "motion_score", None)
            score = float(motion_score(answer)) if answer is not None else float(FALLBACK_SCORE)
            facts |= {"motion_failure": cause}
        refined_from = request.prompt if text != request.prompt else None
        facts = {name: value for name, value in facts.items() if value is not None}
        return replace(request, prompt=text, refined_from=refined_from, refinement=facts, motion_score=score, picture_prompt=picture_prompt)

    def _answer(self, request: ClipRequest, prompt: str, use: Use, image: Path | None) -> tuple[str | None, str | None]:
        """(answer, None) or (None, cause); asked once for all clips with the same question."""
        question = {
            "by": self.settings.config.by,
            "use": use,
            "prompt": prompt,
            "image": None if image is None else file_sha256(image),
        }
        key = json.dumps(question, sort_keys=True, ensure_ascii=False)
        kept = self._now.get(key)
        if kept is None:
            kept = self._kept(key)
            if kept is not None and kept["answer"] is None and not self._is_drawn(request):
                kept = None  # it failed in an earlier run: ask again, unless a clip was drawn from it
        if kept is None:
            answer, cause = self._asked(prompt, use, image)
            kept = {**question, "answer": answer, "cause": cause}
        self._keep(key, kept)
        if kept["answer"] is None:
            self._say(kept["cause"], use)
        return kept["answer"], kept["cause"]

    def _asked(self, prompt: str, use: Use, image: Path | None) -> tuple[str | None, str | None]:
        if self._failed_in_a_row >= GIVE_UP_AFTER:
            return None, f"not asked: {GIVE_UP_AFTER} questions in a row had no answer"
        try:
            answer = self.ask(prompt, use, image)
            if use == "motion_score":
                motion_score(answer)
        except NoAnswerError as error:
            self._failed_in_a_row = self._failed_in_a_row + 1 if error.down else 0
            return None, str(error)
        self._failed_in_a_row = 0
        return answer, None

    def _is_drawn(self, request: ClipRequest) -> bool:
        return self.folder is not None and (self.folder / f"{request.name}.json").is_file()

    def _keep(self, key: str, answer: dict[str, Any]) -> None:
        if key in self._now:
            return
        self._now[key] = answer
        if self.folder is not None and self._kept(key) != answer:
            path = _file_of(self.folder, key)
            path.parent.mkdir(parents=True, exist_ok=True)
            with written_whole(path) as temporary:
                temporary.write_text(json.dumps(answer, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    def _kept(self, key: str) -> dict[str, Any] | None:
        """What an earlier run was answered.

        Raises:
            UserError: the file is none of ours.
        """
        if self.folder is None or not (path := _file_of(self.folder, key)).is_file():
            return None
        try:
            answer = json.loads(path.read_text(encoding="utf-8"))
            return {name: answer[name] for name in ("by", "use", "prompt", "image", "answer", "cause")}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} holds no answer to a prompt; move it away to ask again") from error

    def _say(self, cause: str, use: Use) -> None:
        if cause in self._said:
            return
        self._said.add(cause)
        instead = f"the motion score is {FALLBACK_SCORE}" if use == "motion_score" else "the prompt is drawn as it is"
        print(f"megasora: {self.settings.config.by}: {cause}; {instead} (said once; each clip's record has its own)", file=sys.stderr)


def _picture(request: ClipRequest) -> Path | None:
    """The given picture that the language model is shown, the first frame if there is one; a given clip is not shown."""
    given = (path for path in (request.image, request.end_image) if path is not None)
    return next((path for path in given if (mimetypes.guess_type(path.name)[0] or "").startswith("image/")), None)


def motion_score(answer: str) -> int:
    """The N of an answer `N motion score`.

    Raises:
        NoAnswerError: another answer, or N out of bounds.
    """
    match = re.search(r"(?<![\d.-])(\d{1,3})\s+motion\s+score", answer, re.IGNORECASE) or re.fullmatch(r"\D?(\d{1,3})\D?", answer)
    low, high = MOTION_SCORES
    if match is None or not low <= int(match[1]) <= high:
        raise NoAnswerError(f"no motion score from {low} to {high} in the answer")
    return int(match[1])


def _file_of(folder: Path, question: str) -> Path:
    return folder / ANSWERS / f"{hashlib.sha256(question.encode()).hexdigest()[:32]}.json"
