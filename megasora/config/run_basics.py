"""What runs of every kind have in common: the settings that the training loop, checkpoints and recovery look at."""

from __future__ import annotations

from typing import Protocol

from megasora.config.schema import CheckpointConfig, GuardConfig, OptimizerConfig, ProfileConfig, RecoveryConfig, TrainConfig


class StartBasics(Protocol):
    """What weights start from."""

    @property
    def weights(self) -> str | None: ...
    @property
    def run(self) -> str | None: ...


class DataBasics(Protocol):
    """How clips are decoded."""

    @property
    def manifest(self) -> str | None: ...
    @property
    def decode_timeout_s(self) -> float: ...
    @property
    def quarantine_after(self) -> int: ...


class RunBasics(Protocol):
    """A `RunConfig` or an `AutoencoderRunConfig`."""

    @property
    def recipe(self) -> str: ...
    @property
    def data(self) -> DataBasics: ...
    @property
    def optimizer(self) -> OptimizerConfig: ...
    @property
    def checkpoint(self) -> CheckpointConfig: ...
    @property
    def recovery(self) -> RecoveryConfig: ...
    @property
    def init(self) -> StartBasics: ...
    @property
    def train(self) -> TrainConfig: ...
    @property
    def guard(self) -> GuardConfig: ...
    @property
    def profile(self) -> ProfileConfig: ...
    @property
    def run_dir(self) -> str | None: ...
    @property
    def resume_data(self) -> str: ...
