"""Noise search: several seeds are drawn for each clip, a scorer of the user's says which is kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from megasora.config.errors import UserError
from megasora.inference.plugin import imported
from megasora.inference.requests import ClipRequest

Scorer = Callable[[Tensor, str], float]
"""(clip fp32 [3, T, H, W] in [-1, 1], prompt) -> score; the higher, the better."""


@dataclass(frozen=True, kw_only=True)
class NoiseSearch:
    """How many clips are drawn for each that is kept."""

    best_of: int = 1
    """Clips drawn, with seeds that follow one another."""
    scorer: str | None = None
    """`module:function`, a `Scorer`."""

    def load(self) -> Scorer | None:
        """The scorer; None when there is nothing to choose from.

        Raises:
            UserError: the settings do not fit together, or it cannot be imported.
        """
        if self.best_of < 1:
            raise UserError(f"--best_of {self.best_of} must be at least 1")
        if (self.best_of > 1) != (self.scorer is not None):
            raise UserError("--best_of N and --scorer MODULE:FUNCTION belong together: give both, or neither")
        return None if self.scorer is None else imported(self.scorer, flag="--scorer")

    def facts(self, request: ClipRequest) -> dict[str, object]:
        """What a record says of the search, without its outcome; empty without one."""
        return {} if self.scorer is None else {"best_of": self.best_of, "scorer": self.scorer, "first_seed": request.seed}


def score(scorer: Scorer, clip: Tensor, prompt: str, *, name: str) -> float:
    """The scorer's number.

    Raises:
        UserError: it gives none, or NaN.
    """
    value = scorer(clip, prompt)
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise UserError(f"--scorer {name} gave {value!r}, which is no number") from error
    if number != number:
        raise UserError(f"--scorer {name} gave NaN")
    return number
