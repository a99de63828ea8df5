"""The list of planted mistakes does not rot: every fragment is still there, every test that should notice exists."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[3]


@pytest.fixture
def mutants(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The list, which is no part of the package."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import mutant_list

    return mutant_list


def test_every_fragment_occurs_once_and_is_changed(mutants: ModuleType) -> None:
    counts = {mutant.name: (ROOT / mutant.file).read_text().count(mutant.old) for mutant in mutants.MUTANTS}
    assert {name: count for name, count in counts.items() if count != 1} == {}
    assert [mutant.name for mutant in mutants.MUTANTS if mutant.old == mutant.new] == []
    assert [name for name, count in Counter(mutant.name for mutant in mutants.MUTANTS).items() if count > 1] == []


def test_every_mutant_can_be_parsed(mutants: ModuleType) -> None:
    for mutant in mutants.MUTANTS:
        ast.parse((ROOT / mutant.file).read_text().replace(mutant.old, mutant.new), filename=mutant.name)


def test_the_tests_that_should_notice_exist(mutants: ModuleType) -> None:
    for test in sorted({test for mutant in mutants.MUTANTS for test in mutant.tests}):
        path, _, function = test.partition("::")
        assert (ROOT / path).exists(), test
        if function:
            assert f"def {function.split('[')[0]}(" in (ROOT / path).read_text(), test
