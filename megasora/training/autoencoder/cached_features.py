"""Clips of the coming steps with the teacher's features of each, read from a cache."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from torch import Tensor

from megasora.data.cache.teacher import TeacherCache
from megasora.parallel.transfer import send
from megasora.training.autoencoder.feed import ClipBatch, ClipFeeder, OwnClip


class FeatureFeeder:
    """See `ClipFeeder`; a clip whose features cannot be read counts as one that cannot be decoded.

    Args:
        feeder: of the clips.
        cache: of their features.
        workers: threads that read a step's features together.
    """

    def __init__(self, feeder: ClipFeeder, cache: TeacherCache, *, workers: int) -> None:
        self._feeder, self._cache = feeder, cache
        self._pool = ThreadPoolExecutor(max_workers=max(1, workers), thread_name_prefix="features")

    def __iter__(self) -> Iterator[ClipBatch]:
        """Steps until the run's last."""
        for batch in self._feeder:
            started = time.perf_counter()
            read = list(self._pool.map(self._with_features, batch.clips))
            sent = iter(send([clip.features for clip in read if clip.features is not None], device=self._feeder.context.device))
            clips = tuple(clip if clip.features is None else replace(clip, features=next(sent)) for clip in read)
            yield replace(batch, clips=clips, wait_s=batch.wait_s + time.perf_counter() - started)

    def close(self) -> None:
        """Stop decoding and reading."""
        self._feeder.close()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _with_features(self, clip: OwnClip) -> OwnClip:
        if not isinstance(clip.levels, Tensor):
            return clip
        image = clip.shape[0] == 1 < self._feeder.clips[clip.sample].num_frames
        found = self._cache.features(clip.sample, image=image)
        return replace(clip, levels=found) if isinstance(found, str) else replace(clip, features=found)
