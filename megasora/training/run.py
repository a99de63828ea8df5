"""`megasora train`: from a config to a trained run, resuming by itself when the run folder holds a good checkpoint.

The run folder: config.yaml, metrics.jsonl, tensorboard/, checkpoints/step_00000010/ and the tracker checkpoints/latest.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from megasora.checkpoint import store
from megasora.config.errors import UserError
from megasora.config.io import save_yaml, to_dict
from megasora.config.schema import RunConfig
from megasora.config.validate import raise_on_problems, refuse_missing_autoencoder
from megasora.data.cache.reading import Cache
from megasora.data.decoding.choice import open_decoder
from megasora.data.decoding.contract import Decoder
from megasora.data.decoding.writer import write_video
from megasora.data.manifest import Manifest, read_manifest
from megasora.data.plan import PlannedClip, SamplerState, plan_clips
from megasora.models.encoders.bundle import Encoders, load_encoders
from megasora.models.mmdit.initialization import initialize_weights
from megasora.models.mmdit.sharded_state import model_tensors
from megasora.models.mmdit.weights import fill_parameters
from megasora.models.sampler import ClipSampler, ClipSize, caption_of_prompt, encode_prompt
from megasora.parallel import groups
from megasora.parallel.determinism import use_deterministic_algorithms
from megasora.parallel.groups import ParallelContext
from megasora.parallel.row_shards import reshard
from megasora.training.assets import with_assets
from megasora.training.evaluation import Evaluator
from megasora.training.feed import Feeder
from megasora.training.metrics import MetricsLog, film_strip
from megasora.training.optimizer import (
    ensure_adam_state,
    refresh_masters,
    sync_parameters,
)
from megasora.training.prerequisites import encoders_needed, open_training_cache
from megasora.training.start import Start, find_start
from megasora.training.state import optimizer_tensors
from megasora.training.step import Trainee, build_trainee, step_metrics, train_step


class StopRequest:
    """Remembers SIGTERM or SIGUSR1 (SLURM's warnings): the loop saves and ends after the running step."""

    def __init__(self) -> None:
        self.asked = False
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.asked = True


def train(config: RunConfig) -> None:
    """Train a run to its last step.

    Raises:
        UserError: the settings, files or machine do not allow it; says the cure.
    """
    refuse_missing_autoencoder(config)
    stop = StopRequest()  # from here on: a warning during the minutes of start-up counts too
    device = groups.choose_device(config.device)
    groups.start_world(device, timeout_minutes=config.parallel.timeout_minutes)
    config = replace(config, device="cpu" if device.type == "cpu" else "cuda")
    raise_on_problems(config, world_size=dist.get_world_size())
    if config.train.deterministic:
        use_deterministic_algorithms(device)
    context = groups.initialize(config.parallel, device=device, num_attention_heads=config.model.num_attention_heads, seed=config.init.seed)
    run_dir = Path(config.run_dir or f"runs/{config.recipe}").absolute()
    if context.rank == 0:
        run_dir.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    config = with_assets(replace(config, run_dir=str(run_dir)), folder=run_dir / "assets")
    if context.rank == 0:
        save_yaml(config, run_dir / "config.yaml")
    _run(config, context=context, run_dir=run_dir, stop=stop)


def _run(config: RunConfig, *, context: ParallelContext, run_dir: Path, stop: StopRequest) -> None:
    manifest = read_manifest(str(config.data.manifest))
    clips, unfit = plan_clips(manifest.clips, data=config.data, encoders=config.encoders, model=config.model)
    root = run_dir / "checkpoints"
    start = find_start(config, root=root)
    cache = open_training_cache(config)
    encoders = load_encoders(config.encoders, model=config.model, device=context.device, parts=encoders_needed(config))
    trainee = build_trainee(config, context=context)
    resumed = _resume(trainee, root, config=config, context=context, manifest=manifest)
    events: list[dict[str, Any]] = [resumed] if resumed else []
    if not resumed:
        events += _initialize(trainee, config=config, context=context, start=start)
    if manifest.unread:
        events.append({"event": "columns", "unread": list(manifest.unread)})
    events += [{"event": "unfit", "row": row.row, "reason": row.reason} for row in (*manifest.skipped, *unfit)]
    evaluator = _evaluator(config, context=context, encoders=encoders, dtype=trainee.megatron_config.params_dtype)
    log = MetricsLog(
        run_dir,
        active=context.rank == 0,
        total_steps=config.train.steps,
        first_step=trainee.step,
        interval_steps=config.train.log_interval_steps,
        tensorboard=config.train.tensorboard,
    )
    with log:
        _greet(log, config, context=context, clips=clips, events=events, done=trainee.step)
        if trainee.step >= config.train.steps:
            log.say(f"nothing to do: {trainee.step} of {config.train.steps} steps are done; raise --train.steps to go on")
            return
        _loop(trainee, config=config, context=context, clips=clips, encoders=encoders, cache=cache, evaluator=evaluator, log=log,
              events=events, root=root, manifest=manifest, stop=stop)  # fmt: skip


def _initialize(trainee: Trainee, *, config: RunConfig, context: ParallelContext, start: Start | None) -> list[dict[str, Any]]:
    initialize_weights(trainee.chunks, model=config.model, context=context, seed=config.init.seed)
    events: list[dict[str, Any]] = []
    if start is not None:
        source = start.open(config)
        fill_parameters(trainee.chunks, source.read, known=source.shapes, model=config.model, context=context)
        events.append({"event": "init", "weights": start.path, "select": start.select, "notes": list(start.notes)})
    elif config.init.follows is not None:
        note = f"{config.recipe} follows {config.init.follows}: --init.run FOLDER starts from that run's weights"
        events.append({"event": "init", "weights": "random", "notes": [note]})
    refresh_masters(trainee.optimizer)
    ensure_adam_state(trainee.optimizer, step=0)
    if trainee.ema is not None:
        trainee.ema.reset()
    return events


def _checkpoint_tensors(trainee: Trainee, *, config: RunConfig, context: ParallelContext) -> dict[str, Any]:
    reshard(trainee.chunks)
    return {
        **model_tensors(trainee.chunks, model=config.model, context=context),
        **optimizer_tensors(trainee.chunks, trainee.optimizer, trainee.ema, model=config.model, context=context),
    }


def _save(trainee: Trainee, root: Path, *, config: RunConfig, context: ParallelContext, manifest: Manifest) -> dict[str, Any]:
    """Write a checkpoint and prune old ones; returns the event."""
    started = time.perf_counter()
    state = {
        "recipe": config.recipe,
        "model": to_dict(config.model),
        "parallel": to_dict(config.parallel),
        "sampler": asdict(trainee.sampler),
        "samples_seen": trainee.samples_seen,
        "seed": config.train.seed,
        "global_tokens": config.data.global_tokens,
        "dtype": config.precision.dtype,
        "ema_decay": config.optimizer.ema_decay,
        "data_sha256": manifest.sha256,
    }
    path = store.save(root, step=trainee.step, tensors=_checkpoint_tensors(trainee, config=config, context=context), state=state)
    if context.rank == 0:
        store.prune(root, keep=config.checkpoint.keep, keep_every_steps=config.checkpoint.keep_every_steps)
    return {"event": "checkpoint", "path": path.name, "seconds": round(time.perf_counter() - started, 3)}


def _resume(trainee: Trainee, root: Path, *, config: RunConfig, context: ParallelContext, manifest: Manifest) -> dict[str, Any] | None:
    """Load the newest complete checkpoint, if any; all ranks agree on which."""
    choice: list[Any] = [None]
    if context.rank == 0:
        entries = store.complete_checkpoints(root)
        choice = [(str(entries[-1].path), store.read_manifest(entries[-1].path)) if entries else None]
    dist.broadcast_object_list(choice, src=0)
    if choice[0] is None:
        return None
    folder, facts = Path(choice[0][0]), choice[0][1]
    state = facts["state"]
    _check_same_run(state, folder, config=config, manifest=manifest)
    ensure_adam_state(trainee.optimizer, step=facts["step"])
    store.load(folder, _checkpoint_tensors(trainee, config=config, context=context))
    if trainee.megatron_config.params_dtype == torch.float32:
        refresh_masters(trainee.optimizer)
    ensure_adam_state(trainee.optimizer, step=facts["step"])
    trainee.step = facts["step"]
    trainee.sampler = SamplerState(**state["sampler"])
    trainee.samples_seen = state["samples_seen"]
    given = "weights" if config.init.weights else "run" if config.init.run else None
    ignored = f"; --init.{given} is ignored" if given else ""
    return {"event": "restart", "from": folder.name, "step": trainee.step, "note": f"resumed{ignored}"}


def _check_same_run(state: dict[str, Any], folder: Path, *, config: RunConfig, manifest: Manifest) -> None:
    expected = {
        "model": to_dict(config.model),
        "seed": config.train.seed,
        "global_tokens": config.data.global_tokens,
        "dtype": config.precision.dtype,
        "data_sha256": manifest.sha256,
    }
    for name, value in expected.items():
        if state[name] != value:
            was, now = _first_difference(state[name], value)
            raise UserError(
                f"checkpoint {folder} has another {name} ({was}) than this run ({now}); "
                f"use the same settings, or a new --run_dir with --init.weights {folder}"
            )
    if (state["ema_decay"] > 0) != (config.optimizer.ema_decay > 0):
        raise UserError(f"checkpoint {folder} {'has' if state['ema_decay'] > 0 else 'lacks'} an EMA; keep optimizer.ema_decay as it was")


def _first_difference(was: Any, now: Any) -> tuple[str, str]:
    if isinstance(was, dict) and isinstance(now, dict):
        for key in now:
            if was.get(key) != now[key]:
                return f"{key}={was.get(key)}", f"{key}={now[key]}"
    return str(was), str(now)


def _evaluator(config: RunConfig, *, context: ParallelContext, encoders: Encoders, dtype: torch.dtype) -> Evaluator | None:
    if not config.evaluation.interval_steps or config.data.eval_manifest is None:
        return None
    held_out = read_manifest(config.data.eval_manifest)
    clips, _ = plan_clips(held_out.clips, data=config.data, encoders=config.encoders, model=config.model)
    evaluator = Evaluator(clips, config=config, context=context, encoders=encoders, decoder=_decoder(config, context), dtype=dtype)
    if not evaluator.held_out:
        raise UserError(f"no clip of {config.data.eval_manifest} can be decoded: {evaluator.failed[0][1]}")
    return evaluator


def _decoder(config: RunConfig, context: ParallelContext) -> Decoder:
    data = config.data
    return open_decoder(data.decoder, device=context.device, workers=data.decode_workers, timeout_s=data.decode_timeout_s)


def _greet(
    log: MetricsLog,
    config: RunConfig,
    *,
    context: ParallelContext,
    clips: Sequence[PlannedClip],
    events: list[dict[str, Any]],
    done: int,
) -> None:
    topology = context.topology
    log.say(
        f"{config.recipe}: TP {topology.tp} x PP {topology.pp} x CP {topology.cp} x DP {topology.dp}"
        f"{f' (VP {topology.vp})' if topology.vp else ''} on {context.world_size} {config.device} rank(s); {len(clips)} clips, "
        f"steps {done + 1} to {config.train.steps}; {config.run_dir}"
    )
    for event in events:
        log.say("  ".join(f"{name} {value}" for name, value in event.items()))


def _loop(
    trainee: Trainee,
    *,
    config: RunConfig,
    context: ParallelContext,
    clips: Sequence[PlannedClip],
    encoders: Encoders,
    cache: Cache | None,
    evaluator: Evaluator | None,
    log: MetricsLog,
    events: list[dict[str, Any]],
    root: Path,
    manifest: Manifest,
    stop: StopRequest,
) -> None:
    sampler = _sampler(trainee, config=config, context=context)
    feeder = Feeder(
        clips,
        config=config,
        context=context,
        encoders=encoders,
        decoder=_decoder(config, context),
        cache=cache,
        state=trainee.sampler,
        first_step=trainee.step,
        last_step=config.train.steps,
        dtype=trainee.megatron_config.params_dtype,
    )
    if evaluator is not None and trainee.step == 0:
        events.append(_evaluation_event(evaluator, trainee))
    started = time.perf_counter()
    try:
        for batch in feeder:
            result = train_step(trainee, batch, config=config, context=context, stop=stop.asked)
            events += [{"event": "skip", "clip": clip, "reason": reason} for clip, reason in result.skipped]
            last = trainee.step == config.train.steps or result.stop
            interval = config.checkpoint.interval_steps
            evaluate = evaluator is not None and (last or trainee.step % config.evaluation.interval_steps == 0)
            save = last or (interval > 0 and trainee.step % interval == 0)
            sample = sampler is not None and (last or trainee.step % config.evaluation.sample_interval_steps == 0)
            if evaluate or save or sample:
                sync_parameters(trainee.wrapped)
            if evaluator is not None and evaluate:
                events.append(_evaluation_event(evaluator, trainee))
            if sampler is not None and sample:
                feeder.settle()
                events.append(_sample_event(sampler, encoders=encoders, config=config, context=context, step=trainee.step, log=log))
            if save:
                events.append(_save(trainee, root, config=config, context=context, manifest=manifest))
            if result.stop:
                events.append({"event": "stop", "reason": "SIGTERM or SIGUSR1"})
            now = time.perf_counter()
            log.write(step_metrics(trainee, batch, result, config=config, context=context, seconds=now - started, events=events))
            events = []
            started = now
            if result.stop:
                log.say(f"stopped at step {trainee.step} as asked; the same command goes on from here")
                return
    finally:
        feeder.close()


def _sampler(trainee: Trainee, *, config: RunConfig, context: ParallelContext) -> ClipSampler | None:
    if not config.evaluation.sample_interval_steps:
        return None
    return ClipSampler(
        trainee.chunks,
        megatron_config=trainee.megatron_config,
        model=config.model,
        sample=config.sample,
        flow=config.flow,
        encoders=config.encoders,
        context=context,
    )


def _sample_event(
    sampler: ClipSampler, *, encoders: Encoders, config: RunConfig, context: ParallelContext, step: int, log: MetricsLog
) -> dict[str, Any]:
    """Sample the run's prompts, shared out over the replicas, whose first ranks write the clips; rank 0 shows them in TensorBoard."""
    folder, settings = Path(str(config.run_dir)) / "samples", config.sample
    size = ClipSize(num_frames=settings.num_frames, height=settings.height, width=settings.width)
    files = [f"step_{step:08d}_{number:02d}.mp4" for number in range(len(config.evaluation.sample_prompts))]
    leads = context.at.tp == context.at.cp == context.at.pp == 0
    own: dict[int, torch.Tensor] = {}
    for number in range(context.at.dp, len(files), context.topology.dp):
        caption = caption_of_prompt(config.evaluation.sample_prompts[number], settings=settings, num_frames=size.num_frames)
        prompt = encode_prompt(encoders, caption, text_tokens=config.data.text_tokens)
        latent = sampler.sample(prompt, size, seed=settings.seed + number)
        video = encoders.vae.decode(latent, group=context.replica)
        if leads:
            assert video is not None  # the replica's first rank gets it
            video = video.float()
            folder.mkdir(exist_ok=True)
            write_video(folder / files[number], video, fps=settings.fps)
            own[number] = film_strip(video)
    shares: list[dict[int, torch.Tensor]] = [{} for _ in range(context.topology.dp)]
    if leads:
        dist.all_gather_object(shares, own, group=context.pg_collection.dp)
    for number, strip in sorted((number, strip) for share in shares for number, strip in share.items()):
        log.add_images(f"samples/{number}", strip, step=step)
    return {"event": "sample", "files": files}


def _evaluation_event(evaluator: Evaluator, trainee: Trainee) -> dict[str, Any]:
    measured = evaluator.measure(trainee.chunks, trainee.megatron_config)
    return {
        "event": "eval",
        "step": trainee.step,
        "loss": measured.mean,
        "loss_by_t": measured.by_t,
        "loss_by_kind": measured.by_kind,
        "loss_by_resolution": measured.by_resolution,
        "clips": len(evaluator.held_out),
    }
