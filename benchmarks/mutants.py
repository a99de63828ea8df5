"""Planted mistakes, one at a time: does the test suite notice?

    python benchmarks/mutants.py [--only NAME ...] [--list] [--json] [--jobs 2]

Each mutant of `mutant_list/` replaces one fragment of one file in a copy of the tree and runs the tests that should notice. First their
union runs on a clean copy and must pass. Exit code 1 when one survives that is not marked as equivalent, 2 when the list is stale or the
clean copy fails.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from mutant_list import MUTANTS, Mutant

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT_S = 400
"""Of one mutant's tests; one that hangs is noticed too."""
NOT_COPIED = (".venv", ".git", "*_cache", "__pycache__", "*.egg-info", "demo_run", "runs")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a mutant."""

    name: str
    file: str
    verdict: Literal["caught", "SURVIVED", "equivalent", "STALE", "ERROR"]
    """STALE: its fragment does not occur exactly once. ERROR: pytest could not run the tests at all."""
    by: str
    """The test that noticed."""
    seconds: float


def copy_tree(folder: Path) -> None:
    """A copy of everything that tests need."""
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*NOT_COPIED), dirs_exist_ok=True)


def environment(copy: Path) -> dict[str, str]:
    """Variables under which Python imports the copy's package, also in processes that tests start."""
    return {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}


def refuse_other_package(copy: Path) -> None:
    """Make sure that the copy is what is tested, not the installed package."""
    command = [sys.executable, "-c", "import megasora, tests; print(megasora.__file__, tests.__file__)"]
    found = subprocess.run(command, cwd=copy, env=environment(copy), capture_output=True, text=True, check=True).stdout.split()
    if not all(Path(path).is_relative_to(copy) for path in found):
        raise SystemExit(f"the copy in {copy} is not what Python imports: {' '.join(found)}")


def run_tests(copy: Path, tests: Sequence[str]) -> tuple[int, str, str]:
    """(exit code of pytest, the first test that failed, the end of what it said)."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--durations=0", "--tb=short", *tests]
    with subprocess.Popen(
        command, cwd=copy, env=environment(copy), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as process:
        try:
            said, _ = process.communicate(timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            return 1, "(hangs)", ""
    failed = [line.split(" ", 2)[1] for line in said.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    return process.returncode, failed[0] if failed else "", said[-3000:]


@contextmanager
def planted(copy: Path, mutant: Mutant) -> Iterator[None]:
    """The mutant in the copy, for a while."""
    path = copy / mutant.file
    original = path.read_text()
    path.write_text(original.replace(mutant.old, mutant.new))
    try:
        yield
    finally:
        path.write_text(original)


def judge(mutant: Mutant, copy: Path) -> Outcome:
    """Plant a mutant and run its tests."""
    started = time.perf_counter()

    def outcome(verdict: Literal["caught", "SURVIVED", "equivalent", "STALE", "ERROR"], by: str) -> Outcome:
        return Outcome(name=mutant.name, file=mutant.file, verdict=verdict, by=by, seconds=round(time.perf_counter() - started, 1))

    path = copy / mutant.file
    if not path.is_file() or path.read_text().count(mutant.old) != 1:
        return outcome("STALE", "")
    with planted(copy, mutant):
        code, by, said = run_tests(copy, mutant.tests)
    if code == 0:
        return outcome("equivalent" if mutant.equivalent else "SURVIVED", "")
    if code == 1 or by:  # a mutant may break the collection of a test module: that is noticed too
        return outcome("caught", by)
    return outcome("ERROR", said.splitlines()[-1] if said else "")


def check_clean(copies: Sequence[Path], tests: Sequence[str]) -> None:
    """Run the tests without a mutant, dealt out over the copies.

    Raises:
        SystemExit: one fails.
    """
    with ThreadPoolExecutor(len(copies)) as pool:
        shares = [(copy, tests[number :: len(copies)]) for number, copy in enumerate(copies)]
        for code, by, said in pool.map(lambda share: run_tests(*share) if share[1] else (0, "", ""), shares):
            if code:
                print(f"the clean copy fails {by}\n{said}", file=sys.stderr)
                raise SystemExit(2)
    print(f"clean copy: {len(tests)} tests or files pass", file=sys.stderr, flush=True)


def run_all(mutants: Sequence[Mutant], *, jobs: int) -> list[Outcome]:
    """Judge all mutants in `jobs` copies, after their tests have passed on a clean one."""
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copies: queue.Queue[Path] = queue.Queue()
        for number in range(jobs):
            copy = Path(folder, str(number))
            copy_tree(copy)
            refuse_other_package(copy)
            copies.put(copy)
        check_clean(list(copies.queue), sorted({test for mutant in mutants for test in mutant.tests}))
        done = 0

        def work(mutant: Mutant) -> Outcome:
            nonlocal done
            copy = copies.get()
            try:
                outcome = judge(mutant, copy)
            finally:
                copies.put(copy)
            done += 1
            print(f"{done}/{len(mutants)} {outcome.verdict} {outcome.name} ({outcome.seconds} s) {outcome.by}", file=sys.stderr, flush=True)
            return outcome

        with ThreadPoolExecutor(jobs) as pool:
            return list(pool.map(work, mutants))


def table(outcomes: Sequence[Outcome]) -> str:
    """A markdown table."""
    lines = ["| mutant | file | verdict | noticed by | s |", "|---|---|---|---|---|"]
    for one in outcomes:
        by = one.by.removeprefix("tests/").split("[")[0]
        lines.append(f"| {one.name} | {one.file.removeprefix('megasora/')} | {one.verdict} | {by} | {one.seconds:.0f} |")
    return "\n".join(lines)


def chosen(names: Sequence[str] | None) -> list[Mutant]:
    """The mutants of these names, all without."""
    unknown = sorted(set(names or ()) - {mutant.name for mutant in MUTANTS})
    if unknown:
        raise SystemExit(f"no mutant is called {', '.join(unknown)}; --list names them")
    return [mutant for mutant in MUTANTS if not names or mutant.name in names]


def main() -> int:
    """Parse arguments, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these mutants")
    parser.add_argument("--list", action="store_true", help="name the mutants and end")
    parser.add_argument("--json", action="store_true", help="print only JSON")
    parser.add_argument("--jobs", type=int, default=1, help="copies that work beside each other")
    arguments = parser.parse_args()
    mutants = chosen(arguments.only)
    if arguments.list:
        print("\n".join(f"{mutant.name}: {mutant.file}" for mutant in mutants))
        return 0
    started = time.perf_counter()
    outcomes = run_all(mutants, jobs=max(1, arguments.jobs))
    counts = {
        verdict: sum(one.verdict == verdict for one in outcomes) for verdict in ("caught", "equivalent", "SURVIVED", "STALE", "ERROR")
    }
    if not arguments.json:
        print(table(outcomes))
    facts = {"planted": len(outcomes), **counts, "seconds": round(time.perf_counter() - started), "outcomes": [asdict(o) for o in outcomes]}
    print(json.dumps(facts))
    return 2 if counts["STALE"] + counts["ERROR"] else 1 if counts["SURVIVED"] else 0


if __name__ == "__main__":
    sys.exit(main())
