"""What a LoRA's configuration says about its scale: PEFT's adapter_config.json, or the same table in a header of diffusers.

PEFT trains far more than the plain change of a weight under one configuration. What a merge of plain pairs would get wrong is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from typing import Any

from megasora.config.errors import UserError

WITHOUT_EFFECT = frozenset(
    ("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "lora_dropout",
     "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "megatron_config", "megatron_core", "loftq_config",
     "eva_config", "qalora_group_size", "runtime_config", "ensure_weight_tying")
)  # fmt: skip
"""Settings of peft's LoraConfig (huggingface/peft src/peft/tuners/lora/config.py) that a merge need not know: what was trained stands in
the file, and these say where, on what and how it was started."""
SCALE = frozenset(("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"))
"""Settings that make the scale."""
SAME_BASE = (True, False, "gaussian", "eva", "orthogonal")
"""Ways of starting that leave the base weights alone; pissa, corda, olora, loftq and others subtract from them, so that the adapter does
not belong to the published weights (peft src/peft/tuners/lora/layer.py, `update_layer`)."""


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """Rank and alpha of every module."""

    rank: int
    lora_alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    use_rslora: bool
    """The scale is alpha / sqrt(r) (arXiv 2312.03732) instead of alpha / r."""

    def rank_of(self, module: str) -> int:
        """Rank a module was given."""
        return next((rank for pattern, rank in self.rank_pattern.items() if matches(pattern, module)), self.rank)

    def alpha_of(self, module: str) -> float:
        """Alpha of a module, as the one that alpha / r makes the right scale of: sqrt(r) times the written one with use_rslora."""
        written = next((alpha for pattern, alpha in self.alpha_pattern.items() if matches(pattern, module)), self.lora_alpha)
        return written * sqrt(self.rank_of(module)) if self.use_rslora else written


def matches(pattern: str, module: str) -> bool:
    """Whether a key of rank_pattern or alpha_pattern is for a module: a regular expression for the whole name or for all of it after a dot
    (peft src/peft/utils/other.py, `get_pattern_key`; the first that matches counts)."""
    return re.match(rf"(.*\.)?({pattern})$", module) is not None


def parse_settings(config: Any, *, where: str) -> LoraSettings:
    """The settings of a configuration.

    Args:
        config: the table, as read from JSON.
        where: what it was read from, for messages.

    Raises:
        UserError: no LoRA configuration, a pattern that is no regular expression, or anything but plain LoRA.
    """
    if not isinstance(config, dict):
        raise UserError(f"{where} is no configuration of a LoRA adapter but a {type(config).__name__}")
    _refuse_other_than_plain(config, where)
    try:
        settings = LoraSettings(
            rank=int(config["r"]),
            lora_alpha=float(config["lora_alpha"]),
            rank_pattern={str(key): int(rank) for key, rank in (config.get("rank_pattern") or {}).items()},
            alpha_pattern={str(key): float(alpha) for key, alpha in (config.get("alpha_pattern") or {}).items()},
            use_rslora=bool(config.get("use_rslora")),
        )
        for pattern in (*settings.rank_pattern, *settings.alpha_pattern):
            re.compile(pattern)
    except (KeyError, TypeError, ValueError, AttributeError, re.error) as error:
        raise UserError(f"{where} is no configuration of a LoRA adapter ({type(error).__name__}: {error})") from error
    return settings


def _refuse_other_than_plain(config: Mapping[str, Any], where: str) -> None:
    kind = config.get("peft_type", "LORA")
    if kind not in ("LORA", None):
        raise UserError(f"{where} is of a {kind} adapter, only LoRA is supported")
    for name, value in config.items():
        if name in WITHOUT_EFFECT or name in SCALE or not value or (name == "bias" and value == "none"):
            continue
        if name != "init_lora_weights":
            raise UserError(f"{where} sets {name} to {str(value)[:60]!r}, only plain LoRA is supported")
        if value not in SAME_BASE:
            raise UserError(
                f"{where}: init_lora_weights {value!r} changed the base weights, so the adapter does not belong to the published ones; "
                "save it with peft's path_initial_model_for_weight_conversion first"
            )
