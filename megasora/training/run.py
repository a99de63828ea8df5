"""`megasora train`: from a config to a trained run, resuming by itself when the run folder holds a good checkpoint.

The run folder: config.yaml, metrics.jsonl, tensorboard/, checkpoints/step_00000010/, the tracker checkpoints/latest, and recovery/.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from megasora.config.schema import RunConfig
from megasora.config.validate import raise_on_problems
from megasora.parallel import groups
from megasora.parallel.determinism import use_deterministic_algorithms
from megasora.training.assets import with_assets
from megasora.training.checkpoints import held_lease
from megasora.training.diffusion import DiffusionTrainer
from megasora.training.first_rank import make_run_dir, save_config
from megasora.training.trainer import StopRequest
from megasora.training.vitals import open_sentry


def train(config: RunConfig) -> None:
    """Train a run to its last step.

    Raises:
        UserError: the settings, files or machine do not allow it; says the cure.
    """
    stop = StopRequest()  # from here on: a warning during the minutes of start-up counts too
    device = groups.choose_device(config.device)
    groups.start_world(device, timeout_minutes=config.parallel.timeout_minutes)
    config = replace(config, device="cpu" if device.type == "cpu" else "cuda")
    memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
    raise_on_problems(config, world_size=dist.get_world_size(), gpu_bytes=float(memory))
    if config.train.deterministic:
        use_deterministic_algorithms(device)
    context = groups.initialize(config.parallel, device=device, num_attention_heads=config.model.num_attention_heads, seed=config.init.seed)
    run_dir = Path(config.run_dir or f"runs/{config.recipe}").absolute()
    make_run_dir(run_dir)
    with held_lease(run_dir / "checkpoints", take_over=config.checkpoint.take_over) as lease:
        config = with_assets(replace(config, run_dir=str(run_dir)), folder=run_dir / "assets")
        save_config(config, run_dir)
        with open_sentry(config, context=context, run_dir=run_dir) as sentry:
            DiffusionTrainer(config, context=context, run_dir=run_dir, stop=stop, lease=lease, sentry=sentry).run()
