"""What a cache's folder says about itself: written by its first task, compared by all that come after it."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path

from megasora.config.errors import UserError
from megasora.data.cache.identity import (
    FILE,
    FORMAT,
    NULL_FILE,
    PARTS,
    CacheFacts,
    EncoderFacts,
    differences,
    encoder_facts,
    library_versions,
    read_facts,
    save_facts,
    version_differences,
)
from megasora.data.cache.shards import BadShardError, open_shard, safetensors_bytes, shard_name, write_whole
from megasora.models.encoders.bundle import Encoders
from megasora.training.encode.plan import EncodePlan

logger = logging.getLogger(__name__)

UNPLANNED_FILE = "unplanned.jsonl"


def is_whole(folder: Path, shard: int, *, verify: bool) -> bool:
    """Whether a shard is there as it was written; one that was finished and is not any more is told of."""
    try:
        open_shard(folder, shard, verify=verify)
    except BadShardError as error:
        if (folder / f"{shard_name(shard)}.json").exists():
            logger.warning("shard %d is made again: %s", shard, error)
        return False
    return True


class CacheRecord:
    """cache.json and what stands beside it, for a planned cache.

    Args:
        plan: what is to be stored.
        folder: of the cache.

    Raises:
        UserError: encoders are missing, or the folder holds a cache made otherwise.
    """

    def __init__(self, plan: EncodePlan, folder: Path) -> None:
        self.plan, self.folder = plan, folder
        self._facts = read_facts(folder) if (folder / FILE).exists() else None
        self._identities = self._encoder_identities()
        self._refuse_another_cache()

    def _encoder_identities(self) -> dict[str, EncoderFacts | None]:
        encoders = self.plan.config.encoders
        missing = [name for name in self.plan.encoders_needed if getattr(encoders, name) is None]
        if missing:
            raise UserError(f"no encoders given: add {' '.join(f'--encoders.{name} FOLDER' for name in missing)}")
        found: dict[str, EncoderFacts | None] = dict.fromkeys(PARTS)
        for name in self.plan.encoders_needed:
            found[name] = encoder_facts(getattr(encoders, name), known=getattr(self._facts, name, None))
        return found

    def _refuse_another_cache(self) -> None:
        facts = self._facts
        if facts is None:
            return
        found = differences(self.plan.settings, facts.settings)
        for name, identity in self._identities.items():
            known: EncoderFacts | None = getattr(facts, name)
            if identity is not None and known is not None and identity.sha256 != known.sha256:
                found.append(f"encoders.{name} has the hash {known.sha256[:12]} in the cache and {identity.sha256[:12]} in this run")
        if found:
            raise UserError(f"{self.folder} holds a cache made otherwise: {'; '.join(found)}; give those settings or another --output")

    def is_finished(self, shard: int, *, verify: bool) -> bool:
        """Whether a shard is there as it was written; without cache.json nobody knows what it holds."""
        return is_whole(self.folder, shard, verify=verify) and self._facts is not None

    def begin(self, encoders: Encoders, *, decoder: str | None) -> None:
        """Write what the cache says about itself, or compare the decoder with what it says.

        Args:
            encoders: the loaded ones.
            decoder: identity of the decoder; None when only text is stored.

        Raises:
            UserError: the cache was begun with another decoder.
        """
        if self._facts is not None:
            self._check_decoder(self._facts, decoder)
            return
        settings = self.plan.settings
        null: bytes | None = None
        if settings.has_text:
            text, vec = encoders.encode_text([""], max_tokens=settings.text_tokens)
            null = safetensors_bytes({"t5": text[0], "clip": vec[0]})
            write_whole(self.folder / NULL_FILE, null)
        lines = (json.dumps({"row": row.row, "reason": row.reason}) + "\n" for row in self.plan.unplanned)
        write_whole(self.folder / UNPLANNED_FILE, "".join(lines).encode())
        facts = CacheFacts(
            format=FORMAT,
            settings=settings,
            **self._identities,
            scaling_factor=encoders.vae.facts.scaling_factor if settings.has_latents else None,
            decoder=decoder,
            versions=library_versions(),
            null_sha256=hashlib.sha256(null).hexdigest() if null is not None else None,
        )
        save_facts(self.folder, facts)

    def _check_decoder(self, facts: CacheFacts, decoder: str | None) -> None:
        """Another decoder gives other pixels and is refused; another version of anything warns."""
        if decoder is not None and facts.decoder is not None and decoder.split()[0] != facts.decoder.split()[0]:
            raise UserError(
                f"{self.folder} was decoded by {facts.decoder}, this run decodes by {decoder}; "
                f"use --data.decoder {facts.decoder.split()[0]} or another --output"
            )
        for line in version_differences(facts, decoder=decoder):
            logger.warning("cache %s was begun with another version: %s", self.folder, line)
