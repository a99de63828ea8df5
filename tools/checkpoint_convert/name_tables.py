"""Prints the name tables of README.md from the rules the converter runs on, so that the two cannot differ (a test compares them)."""

from __future__ import annotations

import re
from dataclasses import replace

from megasora.checkpoint.formats.mapping import compose
from megasora.checkpoint.formats.rules import Format, rules_of
from megasora.config.schema import ModelConfig

MODEL = ModelConfig(num_double_blocks=1, num_single_blocks=1, guidance_embed=True)
ORDERS = {"same": "", "heads": " (rotary rows)", "swap": " (halves swapped)"}


def stem(key: str) -> str:
    """A name for every block and for weight and bias alike."""
    return re.sub(r"\.(weight|bias)$", "", key.replace("blocks.0.", "blocks.N."))


def column(fmt: Format, canonical: str) -> str:
    """What a format calls the tensors that hold a canonical one's rows."""
    model = MODEL if fmt == "opensora" else replace(MODEL, cond_embed=False)
    names = []
    for rule in rules_of(fmt, model):
        position = 0
        for part in rule.parts:
            if part.key == canonical:
                rows = f"[{position}:{position + part.rows}]" if len(rule.parts) > 1 else ""
                names.append(f"`{stem(rule.key)}`{rows}{ORDERS[part.order]}")
            position += part.rows
    return " + ".join(names) or "(none)"


def table() -> str:
    """The table, one line per canonical tensor."""
    lines = ["| opensora (release keys, canonical) | flux (BFL) | diffusers |", "|---|---|---|"]
    for key in compose("opensora", "opensora", MODEL):
        if not key.endswith(".bias"):
            lines.append(f"| `{stem(key)}` | {column('flux', key)} | {column('diffusers', key)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
