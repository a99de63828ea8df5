"""The mistakes that `mutants.py` plants: realistic slips, each of which some test must notice.

A mutant is one fragment of one file and what stands there instead. `tests` are the ones that should notice, as narrow as possible; a unit
test checks that every fragment still occurs exactly once and that the tests exist.
"""

from __future__ import annotations

from mutant_list import checkpoint, config, curation, data, diffusion, evaluation, model, parallel, training
from mutant_list.mutant import Mutant

__all__ = ["MUTANTS", "Mutant"]

MUTANTS: tuple[Mutant, ...] = tuple(
    mutant for part in (diffusion, training, model, parallel, checkpoint, data, curation, config, evaluation) for mutant in part.MUTANTS
)
