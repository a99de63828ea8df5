"""`megasora recipes`."""

from __future__ import annotations

from dataclasses import dataclass

from megasora import recipes
from megasora.cli.endings import Answer
from megasora.config.parameters import parameter_count


@dataclass(frozen=True, kw_only=True)
class Args:
    """List the recipes."""

    json: bool = False
    """Print JSON."""


def run(args: Args) -> Answer:
    """Names, sizes, what they are for."""
    rows: list[dict[str, object]] = [
        {
            "name": name,
            "parameters": parameter_count(recipe().model),
            "follows": recipe().init.follows,
            "about": (recipe.__doc__ or "").splitlines()[0],
        }
        for name, recipe in recipes.RECIPES.items()
    ]
    rows += [
        {
            "name": name,
            "parameters": None,
            "follows": recipe().init.follows,
            "about": f"train-ae: {(recipe.__doc__ or '').splitlines()[0]}",
        }
        for name, recipe in recipes.AUTOENCODER_RECIPES.items()
    ]
    return Answer(data=rows, show=lambda: _show(rows))


def _show(rows: list[dict[str, object]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("recipe", "parameters", "follows", "about")
    for row in rows:
        table.add_row(
            str(row["name"]), "" if row["parameters"] is None else f"{row['parameters']:,}", str(row["follows"] or ""), str(row["about"])
        )
    Console().print(table)
