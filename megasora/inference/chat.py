"""One question to a language model, one answer: a chat endpoint of OpenAI's kind, or a function of the user's.

What is asked for follows hpcaitech/Open-Sora opensora/utils/prompt_refine.py: a prompt becomes the detailed description that the weights
were trained on, of a clip, of a clip with a given picture, or of a picture; or a motion score is guessed. An answer that does not come, or
is none, is a `NoAnswerError` with its cause; what then is drawn is the caller's business.
"""

from __future__ import annotations

import base64
import http.client
import json
import mimetypes
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from megasora.inference.plugin import imported
from megasora.inference.refine_settings import RefineConfig

Use = Literal["t2v", "i2v", "t2i", "motion_score"]
Ask = Callable[[str, Use, Path | None], str]
"""(prompt, use, picture) -> answer; raises NoAnswerError."""

_DESCRIBE = (
    "You write the text from which a generator draws {what}. Rewrite what the user asks for as one description in English of "
    "{words} words, in plain everyday language and whole sentences. Keep every subject, number, colour, place and style that the "
    "user names, and add only what makes the picture definite: how things look, where they stand, the light, the surroundings. "
    "{more} Answer with the description alone: no title, no quotation marks, no remark about the task."
)
INSTRUCTIONS: dict[Use, str] = {
    "t2v": _DESCRIBE.format(
        what="a short clip",
        words="60 to 100",
        more="Say what moves and how, in one continuous shot that starts with a phrase like 'A view of' or 'A close-up of'.",
    ),
    "i2v": _DESCRIBE.format(
        what="a short clip in which the picture that comes with the request is a frame",
        words="60 to 100",
        more="Describe what the picture shows and how it moves; if the user names no action, choose a likely one. Stay in one shot: no "
        "cut, no change of scene, no other point of view.",
    ),
    "t2i": _DESCRIBE.format(what="a single picture", words="25 to 50", more="Describe one moment, seen from one point of view."),
    "motion_score": (
        "A video generator takes a motion score, a whole number from 1 to 15 (the motion value that FFmpeg's VMAF filter measures): 1 is a "
        "still scene, 4 is people walking or modelling, 15 is violent motion. Choose the score that suits the user's description best. "
        "Answer exactly 'N motion score' with N the number."
    ),
}
TEMPERATURE, TOP_P = 0.01, 0.7
"""hpcaitech/Open-Sora opensora/utils/prompt_refine.py; so are the longest answers."""
MAX_TOKENS: dict[Use, int] = {"t2v": 250, "i2v": 250, "t2i": 250, "motion_score": 100}
MOST_BYTES = 1_000_000
"""Of an answer: far more than its tokens can take."""
_BUSY = (408, 409, 425, 429)
_REFUSAL = re.compile(
    r"(?:i['’]?m|i am|we['’]?re)?\s*(?:very |really |so )?(?:sorry|unable to|not able to|afraid)\b|(?:sorry|unfortunately)\b|as an ai\b"
    r"|i (?:can['’]?t|cannot|can not|won['’]?t|will not|must decline)\b",
    re.IGNORECASE,
)


class NoAnswerError(Exception):
    """There is no usable answer; the message is the cause, the same for every question with the same cause."""

    def __init__(self, cause: str, *, again: bool = False, down: bool = False) -> None:
        super().__init__(cause)
        self.again = again
        """Whether asking again may help."""
        self.down = down
        """Whether the endpoint itself is at fault, so that the next question will fail as well."""


def asker(config: RefineConfig) -> Ask:
    """The function that asks, of the settings.

    Raises:
        UserError: a function that cannot be imported.
    """
    config.check()
    if config.function is not None:
        return _of_function(config.function)
    return lambda prompt, use, image: _text(_ask(config, _body(config, prompt, use, image)))


def _of_function(name: str) -> Ask:
    found = imported(name, flag="--refine.function")

    def ask(prompt: str, use: Use, image: Path | None) -> str:
        try:
            answer = found(prompt, use, image)
        except Exception as error:  # noqa: BLE001 - the user's code; other ranks wait for what comes of it
            raise NoAnswerError(f"{name} raised {type(error).__name__}: {error}") from error
        if not isinstance(answer, str):
            raise NoAnswerError(f"{name} returned {type(answer).__name__}, not text")
        return _plain(answer)

    return ask


def _body(config: RefineConfig, prompt: str, use: Use, image: Path | None) -> dict[str, Any]:
    """The request: the instruction, then the prompt and the picture."""
    content: str | list[dict[str, Any]] = prompt
    if image is not None:
        kind = mimetypes.guess_type(image.name)[0] or "application/octet-stream"
        data = base64.b64encode(image.read_bytes()).decode()
        content = [{"type": "text", "text": prompt}, {"type": "image_url", "image_url": {"url": f"data:{kind};base64,{data}"}}]
    return {
        "model": config.model,
        "messages": [{"role": "system", "content": INSTRUCTIONS[use]}, {"role": "user", "content": content}],
        "temperature": TEMPERATURE,
        "top_p": TOP_P,
        "max_tokens": MAX_TOKENS[use],
        "stream": False,
    }


def _ask(config: RefineConfig, body: dict[str, Any]) -> bytes:
    """The endpoint's answer, after as many tries as the settings allow, each a second, two, four ... after the one before."""
    for left in reversed(range(config.tries)):
        try:
            return _ask_once(config, body)
        except NoAnswerError as error:
            if not error.again or not left:
                raise
        time.sleep(2 ** (config.tries - 1 - left))
    raise AssertionError("tries is at least 1")


def _ask_once(config: RefineConfig, body: dict[str, Any]) -> bytes:
    assert config.url is not None
    request = urllib.request.Request(  # noqa: S310 - RefineConfig.check lets http and https through
        f"{config.url.rstrip('/')}/chat/completions", data=json.dumps(body).encode(), headers={"Content-Type": "application/json"}
    )
    key = os.environ.get(config.key_variable)
    if key:
        request.add_unredirected_header("Authorization", f"Bearer {key}")  # a redirect to another host does not get it
    until = time.monotonic() + config.timeout_s
    late = f"no answer within {config.timeout_s:g} s"
    try:
        with urllib.request.urlopen(request, timeout=config.timeout_s) as response:  # noqa: S310
            found = b""
            while chunk := response.read1(65536):
                found += chunk
                if time.monotonic() > until:
                    raise NoAnswerError(late, again=True, down=True)
                if len(found) > MOST_BYTES:
                    raise NoAnswerError(f"an answer of more than {MOST_BYTES:,} bytes")
            return found
    except urllib.error.HTTPError as error:
        again = error.code in _BUSY or error.code >= 500
        key_missing = f" ({config.key_variable} is not set)" if error.code in (401, 403) and not key else ""
        raise NoAnswerError(f"HTTP {error.code} {error.reason}{key_missing}", again=again, down=error.code != 400) from error
    except TimeoutError as error:
        raise NoAnswerError(late, again=True, down=True) from error
    except urllib.error.URLError as error:
        cause = late if isinstance(error.reason, TimeoutError) else f"cannot reach {config.by}: {error.reason}"
        raise NoAnswerError(cause, again=True, down=True) from error
    except (OSError, http.client.HTTPException) as error:
        raise NoAnswerError(f"the connection broke: {type(error).__name__}", again=True, down=True) from error


def _text(answer: bytes) -> str:
    """The message of a chat completion."""
    try:
        choice = json.loads(answer)["choices"][0]
        message = choice["message"]
        text, refusal, reason = message.get("content"), message.get("refusal"), choice.get("finish_reason")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise NoAnswerError("an answer that is no chat completion") from error
    if refusal or reason == "content_filter":
        raise NoAnswerError("the model refused")
    if text is not None and not isinstance(text, str):
        raise NoAnswerError("an answer that is no chat completion")
    return _plain(text or "")


def _plain(text: str) -> str:
    """An answer as one line without the quotation marks around it."""
    line = " ".join(text.split())
    while len(line) > 1 and (line[0], line[-1]) in (('"', '"'), ("“", "”"), ("'", "'")):
        line = line[1:-1].strip()
    if not line:
        raise NoAnswerError("an empty answer")
    if _REFUSAL.match(line):
        raise NoAnswerError("the model refused")
    return line
