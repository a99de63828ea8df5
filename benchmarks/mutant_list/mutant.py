"""A planted mistake, and the tests that may notice one, by short names."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """One mistake."""

    name: str
    file: str
    """From the root of the tree."""
    old: str
    """Occurs exactly once in the file."""
    new: str
    tests: tuple[str, ...]
    """Paths or node ids for pytest."""
    equivalent: str | None = None
    """Why no test can notice; None for a mistake that must be noticed."""


CURATION = "tests/unit/curation"
DATA = "tests/unit/data"
EVALUATION = "tests/unit/evaluation"
DIFFUSION = ("tests/unit/diffusion",)
PLAN = (f"{DATA}/test_plan.py", f"{DATA}/test_sampler.py", f"{DATA}/test_mix.py")
REQUESTS = (f"{DATA}/test_requests.py",)
PUBLISHED = ("tests/published",)
FP8_RUN = ("tests/gpu_emulated/test_runs.py::test_training_evaluation_and_sampling_run_every_block_product_in_fp8",)
SCHEDULE = ("tests/published/test_schedule.py",)
PROMPTS = ("tests/published/test_prompts.py",)
TILING = ("tests/unit/models/autoencoders/test_tiling.py",)
SHARED = ("tests/parallel/test_train_ae_shared.py",)
SLABS = ("tests/parallel/test_autoencoder_slabs.py",)
DC_AE = ("tests/unit/models/autoencoders/test_dc_ae.py", "tests/unit/models/autoencoders/test_dc_ae_golden.py")
WINDOWS = ("tests/unit/models/autoencoders/test_windows.py",)
RULES = (f"{CURATION}/test_rules.py",)
POOL = (f"{CURATION}/test_pyramid_pool.py",)
PYRAMID = (f"{CURATION}/test_pyramid.py",)
CACHE = (f"{DATA}/cache/test_cache.py",)
SHARDS = (f"{DATA}/cache/test_shards.py",)
DALI_GRAPH = (f"{DATA}/decoding/test_decode_dali_graph.py",)
DECODE = (f"{DATA}/decoding/test_decode.py",)
LOADING = (f"{DATA}/test_loading.py",)
CONFIG = ("tests/unit/config",)
PACK = ("tests/unit/parallel/test_pack.py",)
LORA = ("tests/convert/test_lora.py", "tests/convert/test_lora_packages.py")
ENCODERS = ("tests/unit/models/encoders/test_encoders.py",)
LAYOUT = ("tests/unit/models/mmdit/test_layout.py",)
MATHS = ("tests/unit/models/mmdit/test_maths.py",)
KERNELS = ("tests/gpu_emulated/test_kernels.py",)
RATES = ("tests/unit/training/test_learning_rate.py",)
LOG = ("tests/unit/training/test_metrics_log.py",)
MICROBATCH = ("tests/unit/training/test_microbatch.py",)
AHEAD = ("tests/unit/training/test_ahead.py",)
PRUNE = ("tests/unit/checkpoint/test_prune.py",)
DRAWS = ("tests/parallel/test_feed_draws.py",)
STEPS = ("tests/parallel/test_optimizer_steps.py",)
STORE = ("tests/parallel/test_store.py",)
WRITER = ("tests/parallel/test_writer.py",)
COPIES = ("tests/parallel/test_local_copies.py",)
WATCHDOG = ("tests/unit/recovery/test_watchdog.py",)
MEETING = ("tests/unit/parallel/test_meeting.py",)
DAMAGED = ("tests/parallel/test_damaged.py",)
FENCING = ("tests/unit/checkpoint/test_fencing.py",)
LEASE = ("tests/unit/checkpoint/test_lease.py",)
LONE = ("tests/parallel/test_lone_replica.py",)
APEX_REFUSED = ("tests/gpu_emulated/test_apex.py::test_training_on_the_cpu_beside_a_fused_adam_is_refused_in_one_line",)
BRANCHES = ("tests/parallel/test_sampler_branches.py",)
PARITY = "tests/parallel/test_parity.py::test_uneven_packs_give_the_gradients_of_one_rank"
DIFFUSERS = ("tests/parallel/test_against_diffusers.py::test_forward_and_gradients_agree[1-layout0-False]",)


def filter_test(name: str) -> tuple[str, ...]:
    return (f"{CURATION}/test_filter.py::test_{name}",)


def convert_test(name: str) -> tuple[str, ...]:
    return (f"tests/convert/test_convert.py::test_{name}",)


def security_test(name: str) -> tuple[str, ...]:
    return (f"tests/convert/test_security.py::test_{name}",)


def inspect_test(name: str) -> tuple[str, ...]:
    return (f"tests/convert/test_inspect.py::test_{name}",)


def parity_test(name: str) -> tuple[str, ...]:
    return (f"{PARITY}[{name}]",)


GUARD = ("tests/unit/training/test_guard.py", "tests/parallel/test_guard.py")
QUARANTINE = (f"{DATA}/test_quarantine.py",)
