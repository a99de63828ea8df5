"""Mistakes in settings and their checks."""

from __future__ import annotations

from mutant_list.mutant import (
    CONFIG,
    Mutant,
)

MUTANTS = (
    Mutant("FFN that TP does not divide", "megasora/config/validate.py", "if model.ffn_hidden_size % tp:", "if False:", CONFIG),
    Mutant("heads that TP does not divide", "megasora/config/validate.py", "if model.num_attention_heads % tp:", "if False:", CONFIG),
    Mutant("no micro-batch", "megasora/config/validate.py", "if data.num_microbatches < 1:", "if False:", CONFIG),
    Mutant(
        "micro-batches that interleaving cannot take",
        "megasora/config/validate.py",
        "if vp is not None and data.num_microbatches % pp:",
        "if False:",
        CONFIG,
    ),
    Mutant(
        "a Ulysses size that does not divide",
        "megasora/config/validate.py",
        "elif size < 1 or cp % size or heads % size:",
        "elif size < 1:",
        CONFIG,
    ),
    Mutant("media weights out of range", "megasora/config/validate.py", "if not 0 <= getattr(data, name) <= 1000:", "if False:", CONFIG),
    Mutant(
        "a class twice in the mix",
        "megasora/config/validate.py",
        "if len({name for name, _ in data.resolution_mix}) < len(data.resolution_mix):",
        "if False:",
        CONFIG,
    ),
    Mutant("FP8 in fp32", "megasora/config/validate.py", 'if precision.dtype != "bf16":', "if False:", CONFIG),
    Mutant("sigma_min out of range", "megasora/config/number_checks.py", "0 <= config.flow.sigma_min < 1", "True", CONFIG),
    Mutant("EMA decay of 1", "megasora/config/number_checks.py", "0 <= settings.ema_decay < 1", "0 <= settings.ema_decay <= 1", CONFIG),
    Mutant("a negative number of checkpoints to keep", "megasora/config/number_checks.py", "saving.keep >= 0", "True", CONFIG),
    Mutant(
        "no prompts to sample",
        "megasora/config/validate.py",
        "if config.evaluation.sample_interval_steps and not config.evaluation.sample_prompts:",
        "if False:",
        CONFIG,
    ),
    Mutant(
        "conditions without a condition input",
        "megasora/config/validate.py",
        "if not config.model.cond_embed and any(",
        "if False and any(",
        CONFIG,
    ),
    Mutant(
        "optimizer's memory not shared out",
        "megasora/config/memory.py",
        "own * (moments + (0 if own_master else 4)) / shards",
        "own * (moments + (0 if own_master else 4))",
        CONFIG,
    ),
    Mutant(
        "attention's FLOPs halved",
        "megasora/perf/flops.py",
        "4 * tokens**2 * hidden_size",
        "2 * tokens**2 * hidden_size",
        ("tests/unit/perf",),
    ),
    Mutant("backward's FLOPs forgotten", "megasora/perf/flops.py", "return 3 * num_blocks", "return num_blocks", ("tests/unit/perf",)),
)
