"""`megasora train-ae`: from a config to a trained autoencoder, resuming by itself when the run folder holds a good checkpoint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

from megasora.config.autoencoder_checks import raise_on_autoencoder_problems
from megasora.config.autoencoder_run import AutoencoderRunConfig
from megasora.config.distillation_checks import TINY_RECIPE
from megasora.config.errors import UserError
from megasora.config.schema import ParallelConfig
from megasora.data.tiny_clips import make_tiny_clips
from megasora.models.encoders.bundle import be_quiet
from megasora.parallel import groups
from megasora.parallel.determinism import use_deterministic_algorithms
from megasora.training.autoencoder.teaching import with_teacher
from megasora.training.autoencoder.trainer import AutoencoderTrainer
from megasora.training.checkpoints import held_lease
from megasora.training.first_rank import make_run_dir, save_config
from megasora.training.trainer import StopRequest
from megasora.training.vitals import open_sentry

TINY_RECIPES = ("tiny_ae", TINY_RECIPE)


def train_autoencoder(config: AutoencoderRunConfig) -> None:
    """Train a run to its last step.

    Raises:
        UserError: the settings, files or machine do not allow it; says the cure.
    """
    stop = StopRequest()  # from here on: a warning during the minutes of start-up counts too
    device = groups.choose_device(config.device)
    groups.start_world(device, timeout_minutes=config.parallel.timeout_minutes)
    config = replace(config, device="cpu" if device.type == "cpu" else "cuda")
    raise_on_autoencoder_problems(config, world_size=dist.get_world_size())
    be_quiet()
    if config.train.deterministic:
        use_deterministic_algorithms(device)
    sharing = config.parallel
    layout = ParallelConfig(context_parallel_size=sharing.context_parallel_size, timeout_minutes=sharing.timeout_minutes)
    context = groups.initialize(layout, device=device, num_attention_heads=1, seed=config.init.seed)
    run_dir = Path(config.run_dir or f"runs/{config.recipe}").absolute()
    make_run_dir(run_dir)
    with held_lease(run_dir / "checkpoints", take_over=config.checkpoint.take_over) as lease:
        config = with_clips(replace(config, run_dir=str(run_dir)), folder=run_dir / "assets")
        config = with_teacher(config, folder=run_dir / "assets")
        save_config(config, run_dir)
        with open_sentry(config, context=context, run_dir=run_dir) as sentry:
            AutoencoderTrainer(config, context=context, run_dir=run_dir, stop=stop, lease=lease, sentry=sentry).run()


def with_clips(config: AutoencoderRunConfig, *, folder: Path) -> AutoencoderRunConfig:
    """The config with a manifest; a tiny recipe makes its clips where none are given. All ranks call it together.

    Raises:
        UserError: another recipe left it open.
    """
    if config.data.manifest is not None:
        return config
    if config.recipe not in TINY_RECIPES:
        raise UserError("no clips given: add --data.manifest TABLE (csv or parquet)")
    made: list[tuple[str, str] | None] = [None]
    if dist.get_rank() == 0:
        train, held_out = make_tiny_clips(folder / "clips")
        made = [(str(train), str(held_out))]
    dist.broadcast_object_list(made, src=0)
    assert made[0] is not None
    manifest, eval_manifest = made[0]
    return replace(config, data=replace(config.data, manifest=manifest, eval_manifest=config.data.eval_manifest or eval_manifest))
