"""What happens at some of a run's steps: measuring the held-out loss, showing samples, saving. Each says when it is due."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist
from torch import Tensor

from megasora.config.schema import RunConfig
from megasora.data.decoding.writer import write_video
from megasora.models.encoders.bundle import Encoders
from megasora.models.sampler import ClipSampler, ClipSize, caption_of_prompt, encode_prompt
from megasora.parallel.groups import ParallelContext
from megasora.training.checkpoints import RunCheckpoints
from megasora.training.evaluation import Evaluator
from megasora.training.feed import Feeder
from megasora.training.guard import Guard
from megasora.training.metrics import MetricsLog, film_strip
from megasora.training.profiling import Place
from megasora.training.step import Trainee

Shown = tuple[Tensor, str | None]
"""A sample clip's pictures, and why its file could not be written."""


class Event(Protocol):
    """Something all ranks do together between two steps, with whole parameters."""

    place: Place
    """What it counts as for who watches the run."""

    def due(self, step: int, *, last: bool) -> bool:
        """Whether it happens after this step; `last`: no step follows."""

    def happen(self, trainee: Any) -> dict[str, Any] | None:
        """Do it with who is trained; what the step's record says of it, None when there is nothing to say yet."""


class Evaluate:
    """The held-out loss.

    Args:
        evaluator: of the held-out clips.
        interval_steps: also after the last step.
    """

    place: Place = "evaluate"

    def __init__(self, evaluator: Evaluator, *, interval_steps: int) -> None:
        self.evaluator, self.interval_steps = evaluator, interval_steps

    def due(self, step: int, *, last: bool) -> bool:
        """At multiples of the interval, also before the first step, and at the end."""
        return last or step % self.interval_steps == 0

    def happen(self, trainee: Trainee) -> dict[str, Any]:
        """Measure it."""
        measured = self.evaluator.measure(trainee.chunks, trainee.megatron_config)
        return {
            "event": "eval",
            "step": trainee.step,
            "loss": measured.mean,
            "loss_by_t": measured.by_t,
            "loss_by_kind": measured.by_kind,
            "loss_by_resolution": measured.by_resolution,
            "clips": len(self.evaluator.held_out),
        }


class ShowSamples:
    """Clips of the run's prompts, shared out over the replicas, whose first ranks write them; rank 0 shows them in TensorBoard.

    Args:
        trainee: whose weights draw.
        config: the run.
        context: this rank's groups.
        encoders: of the run; the feeder lets go of them while clips are drawn.
        feeder: of the run.
        log: of the run.
    """

    place: Place = "evaluate"

    def __init__(
        self, trainee: Trainee, *, config: RunConfig, context: ParallelContext, encoders: Encoders, feeder: Feeder, log: MetricsLog
    ) -> None:
        self.config, self.context, self.encoders, self.feeder, self.log = config, context, encoders, feeder, log
        self.sampler = ClipSampler(
            trainee.chunks,
            megatron_config=trainee.megatron_config,
            model=config.model,
            sample=config.sample,
            flow=config.flow,
            encoders=config.encoders,
            context=context,
        )

    def due(self, step: int, *, last: bool) -> bool:
        """At multiples of the interval and at the end."""
        return last or (step > 0 and step % self.config.evaluation.sample_interval_steps == 0)

    def happen(self, trainee: Trainee) -> dict[str, Any]:
        """Draw, write and show them."""
        self.feeder.settle()
        context, prompts = self.context, self.config.evaluation.sample_prompts
        files = [f"step_{trainee.step:08d}_{number:02d}.mp4" for number in range(len(prompts))]
        leads = context.at.tp == context.at.cp == context.at.pp == 0
        own: dict[int, Shown] = {}
        for number in self._numbers(len(files)):
            video = self._draw(min(number, len(files) - 1))
            if leads and number < len(files):
                assert video is not None, "the replica's first rank gets the clip"
                video = video.float()
                own[number] = (film_strip(video), self._write(files[number], video))
        lost = self._show(own, leads=leads, step=trainee.step)
        event: dict[str, Any] = {"event": "sample", "files": [name for number, name in enumerate(files) if number not in lost]}
        if not lost:
            return event
        failed = [{"file": files[number], "reason": reason} for number, reason in lost.items()]
        said = ", ".join(f"{one['file']} ({one['reason']})" for one in failed)
        return {**event, "failed": failed, "said": f"sample clips that cannot be written: {said}; the run goes on"}

    def _numbers(self, prompts: int) -> range:
        """Of this replica's prompts; where replicas gather their weights together, all draw equally many, some for nobody."""
        dp, replicas = self.context.at.dp, self.context.topology.dp
        together = self.config.parallel.zero_stage > 1
        return range(dp, -(-prompts // replicas) * replicas if together else prompts, replicas)

    def _draw(self, number: int) -> Tensor | None:
        settings = self.config.sample
        size = ClipSize(num_frames=settings.num_frames, height=settings.height, width=settings.width)
        caption = caption_of_prompt(self.config.evaluation.sample_prompts[number], settings=settings, num_frames=size.num_frames)
        prompt = encode_prompt(self.encoders, caption, text_tokens=self.config.data.text_tokens)
        latent = self.sampler.sample(prompt, size, seed=settings.seed + number)
        return self.encoders.vae.decode(latent, group=self.context.replica)

    def _write(self, name: str, video: Tensor) -> str | None:
        """Why it could not be written: a full disk on one rank must not end what others wait for."""
        folder = Path(str(self.config.run_dir)) / "samples"
        try:
            folder.mkdir(exist_ok=True)
            write_video(folder / name, video, fps=self.config.sample.fps)
        except OSError as error:
            return error.strerror or str(error)
        return None

    def _show(self, own: dict[int, Shown], *, leads: bool, step: int) -> dict[int, str]:
        """Show the clips of all replicas; why some of them could not be written."""
        shares: list[dict[int, Shown]] = [{} for _ in range(self.context.topology.dp)]
        if leads:
            dist.all_gather_object(shares, own, group=self.context.pg_collection.dp)
        shown = sorted((item for share in shares for item in share.items()), key=lambda item: item[0])
        for number, (strip, _) in shown:
            self.log.add_images(f"samples/{number}", strip, step=step)
        return {number: problem for number, (_, problem) in shown if problem is not None}


class Save:
    """A checkpoint, which is written while steps go on; `Checkpoints.happened` says what became of it.

    Args:
        checkpoints: of the run.
        guard: of the run; what it knows is saved too.
        interval_steps: 0 saves after the last step only.
        last: whether the last step is saved.
    """

    place: Place = "save"

    def __init__(self, checkpoints: RunCheckpoints[Any], *, guard: Guard, interval_steps: int, last: bool = True) -> None:
        self.checkpoints, self.guard, self.interval_steps, self.last = checkpoints, guard, interval_steps, last

    def due(self, step: int, *, last: bool) -> bool:
        """At multiples of the interval and at the end."""
        return (last and self.last) or (step > 0 and self.interval_steps > 0 and step % self.interval_steps == 0)

    def happen(self, trainee: Any) -> None:
        """Start it."""
        self.checkpoints.save(trainee, guard=self.guard)


class Copy:
    """A copy on the nodes' own disks, between two checkpoints.

    Args:
        checkpoints: of the run.
        guard: of the run; what it knows is copied too.
        interval_steps: 0 makes none.
        but_at: where it is not made, because a checkpoint is.
    """

    place: Place = "save"

    def __init__(self, checkpoints: RunCheckpoints[Any], *, guard: Guard, interval_steps: int, but_at: Save) -> None:
        self.checkpoints, self.guard, self.interval_steps, self.but_at = checkpoints, guard, interval_steps, but_at

    def due(self, step: int, *, last: bool) -> bool:
        """At multiples of the interval without a checkpoint."""
        return step > 0 and self.interval_steps > 0 and step % self.interval_steps == 0 and not self.but_at.due(step, last=last)

    def happen(self, trainee: Any) -> None:
        """Start it."""
        self.checkpoints.copy(trainee, guard=self.guard)


def due(events: Sequence[Event], step: int, *, last: bool) -> list[Event]:
    """Those that happen after a step, in their order."""
    return [event for event in events if event.due(step, last=last)]
