"""Mistakes in measures of clips, votes and VBench."""

from __future__ import annotations

from mutant_list.mutant import (
    EVALUATION,
    Mutant,
)

INTERVALS = (f"{EVALUATION}/test_intervals.py",)
FIDELITY = (f"{EVALUATION}/test_fidelity.py",)
LPIPS = (f"{EVALUATION}/test_lpips.py",)
PAGE = (f"{EVALUATION}/test_page.py",)
VOTES = (f"{EVALUATION}/test_votes.py",)
VBENCH = (f"{EVALUATION}/test_vbench.py",)
FILES = "megasora/evaluation"

MUTANTS = (
    Mutant("standard deviation over n", f"{FILES}/intervals.py", "given.std(ddof=1)", "given.std()", INTERVALS),
    Mutant("Wilson without its shift", f"{FILES}/intervals.py", "centre = share + z * z / (2 * trials)", "centre = share", INTERVALS),
    Mutant(
        "bootstrap without replacement",
        f"{FILES}/intervals.py",
        "given[generator.integers(0, len(given), len(given))]",
        "generator.permutation(given)",
        INTERVALS,
    ),
    Mutant("PSNR of 256 levels", "megasora/media/likeness.py", "DATA_RANGE = 255.0", "DATA_RANGE = 256.0", FIDELITY),
    Mutant("PSNR in uint8", f"{FILES}/fidelity.py", "(one.int() - other.int())", "(one - other)", FIDELITY),
    Mutant("SSIM in fp32", "megasora/media/likeness.py", "astype(np.float64)", "astype(np.float32)", FIDELITY),
    Mutant(
        "equal clips in PSNR's mean", f"{FILES}/fidelity.py", "[value for value in given if math.isfinite(value)]", "list(given)", FIDELITY
    ),
    Mutant("frame counts may differ", f"{FILES}/fidelity.py", "elif one.num_frames != other.num_frames:", "elif False:", FIDELITY),
    Mutant(
        "clips of B alone forgotten",
        f"{FILES}/fidelity.py",
        "for name in of_b if name not in of_a]",
        "for name in of_b if False]",
        FIDELITY,
    ),
    Mutant("LPIPS without unit vectors", "megasora/models/lpips.py", "(_unit(of_a) - _unit(of_b)) ** 2", "(of_a - of_b) ** 2", LPIPS),
    Mutant("LPIPS without its shift", "megasora/models/lpips.py", "SHIFT = (-0.030, -0.088, -0.188)", "SHIFT = (0.0, 0.0, 0.0)", LPIPS),
    Mutant("unknown LPIPS tensors pass", "megasora/models/lpips.py", '("does not know", unknown)', '("does not know", [])', LPIPS),
    Mutant("the left clip is always A", f"{FILES}/page.py", 'generator.choice(("a", "b"))', '"a"', PAGE),
    Mutant("a name may end the script", f"{FILES}/page.py", '.replace("<", "\\\\u003c")', "", PAGE),
    Mutant("ties count as decided", f"{FILES}/votes.py", "decided = for_a + for_b", "decided = for_a + for_b + ties", VOTES),
    Mutant("turned sets are not turned", f"{FILES}/votes.py", "vote if ballot.a == a else _turned(vote)", "vote", VOTES),
    Mutant("a voter counts twice", f"{FILES}/votes.py", "if known is not ballot.path:", "if False:", VOTES),
    Mutant(
        "dynamic degree of full weight",
        f"{FILES}/vbench/dimensions.py",
        '"dynamic_degree", weight=0.5',
        '"dynamic_degree", weight=1.0',
        VBENCH,
    ),
    Mutant(
        "groups weigh the same",
        f"{FILES}/vbench/dimensions.py",
        '{"quality": 4.0, "semantic": 1.0}',
        '{"quality": 1.0, "semantic": 1.0}',
        VBENCH,
    ),
    Mutant(
        "a missing dimension is left out of the mean",
        f"{FILES}/vbench/scores.py",
        "if any(dimension.name not in normalised for dimension in members):",
        "if False:",
        VBENCH,
    ),
    Mutant("percent taken for shares", f"{FILES}/vbench/scores.py", "if not 0.0 <= result.score <= 1.0:", "if False:", VBENCH),
    Mutant("one seed for all clips of a prompt", f"{FILES}/vbench/prompts.py", "{base}\\n{index}\\n{prompt}", "{base}\\n{prompt}", VBENCH),
    Mutant(
        "a broken clip counts as whole",
        f"{FILES}/vbench/making.py",
        '        return "broken"\n    if found == facts',
        '        return "whole"\n    if found == facts',
        VBENCH,
    ),
    Mutant(
        "a share takes its neighbour's clips",
        f"{FILES}/vbench/making.py",
        "number % task[1] == task[0]",
        "number % task[1] <= task[0]",
        VBENCH,
    ),
)
