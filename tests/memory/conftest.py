"""Ranks with an emulated H200, for Transformer Engine's layers."""

from tests.gpu_emulated.conftest import gpus  # noqa: F401 - a fixture
