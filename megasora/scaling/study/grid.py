"""The file that declares a study, and the points that it stands for.

A point is a layout, a size and a number of ranks. Strong scaling gives every number of ranks the same work; weak scaling lets the settings
of `weak_grows` grow with the ranks.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from megasora import recipes
from megasora.config.errors import UserError
from megasora.config.io import from_dict, load_yaml, to_dict
from megasora.config.schema import RunConfig
from megasora.config.validate import problems

Scaling = Literal["strong", "weak"]
SHORT = {
    "tp": "parallel.tensor_model_parallel_size",
    "pp": "parallel.pipeline_model_parallel_size",
    "vp": "parallel.virtual_pipeline_model_parallel_size",
    "cp": "parallel.context_parallel_size",
    "zero": "parallel.zero_stage",
}
"""Short names that a grid may use for settings."""
MEASURING: dict[str, Any] = {
    "checkpoint.interval_steps": 0,
    "checkpoint.save_last": False,
    "evaluation.interval_steps": 0,
    "evaluation.sample_interval_steps": 0,
    "train.tensorboard": False,
    "recovery.report_interval_steps": 0,
}
"""Settings of every point, unless the grid gives others: nothing but steps is measured, and nothing is kept."""


@dataclass(frozen=True, kw_only=True)
class SlurmSettings:
    """How points become jobs of a cluster; the rest is what `megasora slurm render` takes by itself."""

    partition: str | None = None
    account: str | None = None
    gpus_per_node: int = 8
    cpus_per_gpu: int = 12
    time: str = "01:00:00"
    """Time limit of a job."""
    options: tuple[str, ...] = ()
    """More options of sbatch without their dashes."""
    setup: tuple[str, ...] = ()
    """Shell lines before the launch."""
    encoders: str | None = None
    """Folder of the three encoders."""
    at_once: int = 4
    """Jobs in the queue at the same time."""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A study as its file declares it."""

    recipe: str
    """A recipe or the config.yaml of a run (relative to the grid's file)."""
    gpus: tuple[int, ...]
    """Numbers of ranks."""
    layouts: dict
    """Name -> settings; tp, pp, vp, cp and zero are short for the settings of `parallel`."""
    steps: int
    """Steps of every run, warm-up included."""
    warmup_steps: int = 2
    """First steps that are not counted."""
    repeats: int = 1
    """Runs of every point."""
    overrides: dict = field(default_factory=dict)
    """Settings of all points."""
    sizes: dict = field(default_factory=lambda: {"recipe": {}})
    """Name -> settings of a size of model, clip or batch."""
    scaling: tuple[Scaling, ...] = ("strong",)
    weak_grows: tuple[str, ...] = ("data.global_tokens",)
    """Settings that weak scaling multiplies by ranks / work_gpus."""
    work_gpus: int | None = None
    """Ranks that the sizes' work is meant for; None: the fewest of `gpus`."""
    profile_steps: str | None = None
    """Steps first:last that the first repeat of every point traces (`--profile.steps`); they are not counted."""
    timeout_s: float = 3600.0
    """Longest time of a run on this machine; a job has its own limit."""
    seed: int = 0
    """Of the order of points, drawn anew for each repeat."""
    environment: dict = field(default_factory=dict)
    """Variables of the runs on this machine; OMP_NUM_THREADS is 1 unless given."""
    slurm: SlurmSettings = field(default_factory=SlurmSettings)


@dataclass(frozen=True, kw_only=True)
class Point:
    """One cell of the grid."""

    id: str
    """Name of its folder."""
    layout: str
    size: str
    gpus: int
    scaling: tuple[Scaling, ...]
    """Series it belongs to: where nothing grows yet, strong and weak scaling share a point."""
    config: RunConfig

    @property
    def axes(self) -> dict[str, int | None]:
        """Sizes of the parallel axes; dp is None where the ranks do not divide."""
        parallel = self.config.parallel
        dp, rest = divmod(self.gpus, parallel.model_parallel_size)
        return {
            "tp": parallel.tensor_model_parallel_size,
            "pp": parallel.pipeline_model_parallel_size,
            "vp": parallel.num_model_chunks,
            "cp": parallel.context_parallel_size,
            "dp": None if rest else dp,
        }


def read_grid(path: Path) -> Grid:
    """A grid from its file.

    Raises:
        UserError: the file is missing, not YAML, or declares what cannot be.
    """
    try:
        data = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UserError(f"cannot read the grid {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    grid: Grid = from_dict(data, Grid, path=path.name)
    check_grid(grid, path.name)
    if grid.recipe.endswith((".yaml", ".yml")):
        grid = dataclasses.replace(grid, recipe=str((path.parent / grid.recipe).absolute()))
    return grid


def check_grid(grid: Grid, name: str) -> None:
    """Refuse a grid that measures nothing.

    Raises:
        UserError: says the cure.
    """
    if not grid.gpus or min(grid.gpus) < 1 or len(set(grid.gpus)) < len(grid.gpus):
        raise UserError(f"{name}.gpus: {list(grid.gpus)} must be different numbers of 1 or more")
    if not grid.layouts or not grid.sizes or not grid.scaling:
        raise UserError(f"{name}: layouts, sizes and scaling need at least one entry each; a layout of one rank is `dp: {{}}`")
    if grid.repeats < 1 or grid.warmup_steps < 0 or grid.steps <= grid.warmup_steps:
        raise UserError(
            f"{name}: {grid.steps} steps, {grid.warmup_steps} of them warm-up, {grid.repeats} repeats measure nothing; "
            "use steps above warmup_steps and at least 1 repeat"
        )
    if grid.timeout_s <= 0 or grid.slurm.at_once < 1 or (grid.work_gpus is not None and grid.work_gpus < 1):
        raise UserError(f"{name}: timeout_s must be positive, slurm.at_once and work_gpus at least 1")
    for kind, table in (("layouts", grid.layouts), ("sizes", grid.sizes)):
        for key, value in table.items():
            if not re.fullmatch(r"[\w.+-]+", str(key)) or not isinstance(value or {}, dict):
                raise UserError(f"{name}.{kind}.{key}: needs a name of letters, digits, _ . + - and a mapping of settings")


def settings_of(recipe: str) -> RunConfig:
    """A recipe's or a config.yaml's own settings.

    Raises:
        UserError: there is no such recipe or file.
    """
    return load_yaml(Path(recipe)) if recipe.endswith((".yaml", ".yml")) else recipes.get(recipe)


def points_of(grid: Grid) -> list[Point]:
    """All points, in the order of sizes, layouts and ranks.

    Raises:
        UserError: a setting does not exist, or has the wrong type.
    """
    base = settings_of(grid.recipe)
    found: dict[tuple[Any, ...], Point] = {}
    for (size, sized), (layout, laid_out), gpus, scaling in itertools.product(
        grid.sizes.items(), grid.layouts.items(), grid.gpus, grid.scaling
    ):
        settings = {**MEASURING, "train.steps": grid.steps, **grid.overrides, **(sized or {}), **(laid_out or {})}
        config = overridden(base, settings, path=f"{size}, {layout}")
        if scaling == "weak":
            config = _grown(config, grid, gpus=gpus)
        key = (size, layout, gpus, config)
        if key in found:
            found[key] = dataclasses.replace(found[key], scaling=(*found[key].scaling, scaling))
            continue
        name = f"{f'{size}_' if len(grid.sizes) > 1 else ''}{layout}_{gpus}_{scaling}"
        found[key] = Point(id=name, layout=str(layout), size=str(size), gpus=gpus, scaling=(scaling,), config=config)
    return list(found.values())


def refusal(point: Point) -> str | None:
    """Why a point cannot run, as `megasora validate` says it; None where it can."""
    found = problems(point.config, world_size=point.gpus, check_memory=point.config.device != "cpu")
    return "; ".join(map(str, found)) if found else None


def overridden(config: RunConfig, settings: dict[str, Any], *, path: str) -> RunConfig:
    """The config with settings of dotted names (or of `SHORT` ones) replaced.

    Raises:
        UserError: a name is unknown or a value has the wrong type; names the place.
    """
    data = to_dict(config)
    for name, value in settings.items():
        *sections, last = SHORT.get(name, name).split(".")
        at = data
        for section in sections:
            if not isinstance(at.get(section), dict):
                raise UserError(
                    f"{path}: no section {section!r} of {name!r}; there are {', '.join(k for k in data if isinstance(data[k], dict))}"
                )
            at = at[section]
        at[last] = value
    changed: RunConfig = from_dict(data, RunConfig, path=path)
    return changed


def _grown(config: RunConfig, grid: Grid, *, gpus: int) -> RunConfig:
    data, settings = to_dict(config), {}
    for name in grid.weak_grows:
        value = data
        for part in SHORT.get(name, name).split("."):
            if not isinstance(value, dict) or part not in value:
                raise UserError(f"weak_grows: there is no setting {name!r}")
            value = value[part]
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UserError(f"weak_grows: {name} is {value!r}; only a number can grow with the ranks")
        times = value * gpus / (grid.work_gpus or min(grid.gpus))
        settings[name] = round(times) if isinstance(value, int) else times
    return overridden(config, settings, path="weak_grows")
