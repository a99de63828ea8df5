"""What must be there before a run starts: the encoders it needs, and a cache that holds what it would encode. Refused with the cure."""

from __future__ import annotations

import logging
from pathlib import Path

import torch.distributed as dist

from megasora.config.errors import UserError
from megasora.config.schema import RunConfig
from megasora.data.cache.identity import (
    CacheFacts,
    differences,
    encoder_differences,
    file_sha256,
    kinds_of,
    read_facts,
    settings_of,
    version_differences,
)
from megasora.data.cache.reading import Cache, refuse_incomplete
from megasora.models.encoders.bundle import PARTS

logger = logging.getLogger(__name__)


def encoders_needed(config: RunConfig) -> tuple[str, ...]:
    """Encoders that a training run loads: those whose output is not cached, and all of them when it measures or shows clips.

    Raises:
        UserError: data.cache is no cache.
    """
    evaluates = config.evaluation.interval_steps > 0 and config.data.eval_manifest is not None
    if config.data.cache is None or evaluates or config.evaluation.sample_interval_steps > 0:
        return PARTS
    settings = read_facts(Path(config.data.cache)).settings
    return (() if settings.has_latents else ("vae",)) + (() if settings.has_text else ("t5", "clip"))


def refuse_missing_encoders(config: RunConfig) -> None:
    """Refuse a run that needs an encoder whose folder is not given.

    Raises:
        UserError: says what needs it.
    """
    missing = [name for name in encoders_needed(config) if getattr(config.encoders, name) is None]
    if not missing:
        return
    flags = " ".join(f"--encoders.{name} FOLDER" for name in missing)
    if config.data.cache is None:
        raise UserError(f"no encoders given: add {flags}")
    held = {"both": "what training needs, evaluation needs more", "latents": "latents only", "text": "text only"}
    raise UserError(f"the cache {config.data.cache} holds {held[read_facts(Path(config.data.cache)).settings.store]}: add {flags}")


def open_training_cache(config: RunConfig) -> Cache | None:
    """The cache of data.cache, if any, after a check that it is what the run would encode; all ranks call it together.

    Raises:
        UserError: it lacks shards, or was made from other clips, settings or encoders; the same on every rank.
    """
    if config.data.cache is None:
        return None
    folder = Path(config.data.cache)
    problem: list[str | None] = [None]
    if dist.get_rank() == 0:  # hashing weights and looking at every shard once is enough
        try:
            facts = read_facts(folder)
            found = _differences(facts, config)
            if found:
                problem = [f"cache {folder} does not fit this run: {'; '.join(found)}; use the settings it was made with, or encode again"]
            else:
                refuse_incomplete(folder, facts)
            for line in version_differences(facts):
                logger.warning("cache %s was made with another version: %s", folder, line)
        except UserError as error:
            problem = [str(error)]
    dist.broadcast_object_list(problem, src=0)
    if problem[0] is not None:
        raise UserError(problem[0])
    return Cache(folder, facts=read_facts(folder))


def _differences(facts: CacheFacts, config: RunConfig) -> list[str]:
    theirs = facts.settings
    ours = settings_of(
        config,
        store=theirs.store,
        latents=theirs.latents,
        kinds=kinds_of(config, every=False),
        samples_per_shard=theirs.samples_per_shard,
        samples=theirs.samples,
        manifest_sha256=file_sha256(str(config.data.manifest)),
    )
    found = differences(ours, theirs, leave_out=("conditions", "seed"))
    lacking = [kind for kind in ours.conditions if kind not in theirs.conditions]
    if theirs.has_latents and lacking:
        found.append(f"it lacks the frames of {', '.join(lacking)} (encode with those condition weights, or --conditions all)")
    if theirs.has_latents and theirs.latents == "sampled" and config.encoders.posterior == "mean":
        found.append("it holds one sample of each latent, encoders.posterior is mean (use --encoders.posterior sample)")
    return found + encoder_differences(facts, config.encoders)
