"""Who rewrites prompts before they are drawn; nothing heavy is imported here, so that `--help` is quick."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import urlsplit

from megasora.config.errors import UserError


@dataclass(frozen=True, kw_only=True)
class RefineConfig:
    """Prompt refinement by a language model; off unless url or function is given.

    The model, the number of tries and the variable are those of hpcaitech/Open-Sora opensora/utils/prompt_refine.py.
    """

    url: str | None = None
    """Base URL of an endpoint that speaks OpenAI's chat completions: http://localhost:8000/v1."""
    model: str = "gpt-4o"
    """Name of the model there; it has to see pictures for the prompts of given images."""
    key_variable: str = "OPENAI_API_KEY"
    """Environment variable that holds the endpoint's key; no key is sent where it is not set."""
    function: str | None = None
    """MODULE:FUNCTION to ask instead of an endpoint: (prompt, use, image) -> text, where use is t2v, i2v, t2i or motion_score and image is
    a path or None."""
    prompts: bool = True
    """Refine the prompts; without, only `--motion_score dynamic` is asked."""
    timeout_s: float = 30.0
    """Longest time for one answer."""
    tries: int = 3
    """How often an endpoint that fails or is busy is asked."""

    @property
    def on(self) -> bool:
        """Whether there is somebody to ask."""
        return self.url is not None or self.function is not None

    @property
    def by(self) -> str:
        """Who is asked, for a record: without what a URL may hold of names and passwords."""
        if self.function is not None:
            return self.function
        parts = urlsplit(self.url or "")
        return f"{self.model} at {parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path.rstrip('/')}"

    def check(self) -> None:
        """Refuse settings that cannot work.

        Raises:
            UserError: says which.
        """
        if self.url is not None and self.function is not None:
            raise UserError("give --refine.url or --refine.function, not both")
        if self.url is not None and urlsplit(self.url).scheme not in ("http", "https"):
            raise UserError(f"--refine.url {self.url} is no http:// or https:// address")
        if self.function is not None and not all(self.function.partition(":")):
            raise UserError(f"--refine.function {self.function} is not MODULE:FUNCTION")
        if self.timeout_s <= 0 or self.tries < 1:
            raise UserError(f"--refine.timeout_s {self.timeout_s:g} must be more than 0 and --refine.tries {self.tries} at least 1")
