"""Groups of micro-batches that the interleaved schedule accepts."""

from __future__ import annotations

import pytest

from megasora.parallel.pipeline import valid_microbatch_group


@pytest.mark.parametrize(("microbatches", "pp", "group"), [(4, 2, 2), (8, 4, 4), (10, 4, 5), (6, 4, 6), (7, 2, 4), (11, 4, 6)])
def test_the_last_group_is_whole_or_at_least_as_long_as_the_pipeline(microbatches: int, pp: int, group: int) -> None:
    # 7 on 2 stages: groups of 2 or 3 leave 1, groups of 4 leave 3; 11 on 4: 4 leave 3, 5 leave 1, 6 leave 5
    assert valid_microbatch_group(microbatches, pp) == group


def test_fewer_micro_batches_than_stages_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 4"):
        valid_microbatch_group(3, 4)
