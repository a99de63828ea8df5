"""The best layouts of all, exactly, without running every pipeline.

Layouts that differ in ZeRO stage and recomputation alone are a family. A family's bound is the time of its busiest stage with nothing
recomputed and nothing exchanged over DP; a member's bound adds what it recomputes and exchanges. Families, and in them members, are looked
at in the order of their bounds until no bound is below the last of the best: what is left cannot be better, so the answer is that of
forecasting all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

from megasora.config.memory import MemoryEstimate, memory_estimate, stage_estimate
from megasora.config.schema import RunConfig
from megasora.config.validate import problems
from megasora.data.plan import PlannedClip
from megasora.perf.hardware import Hardware
from megasora.scaling.forecast.run import RunForecast, forecast_run
from megasora.scaling.forecast.step import StepForecast, forecast_step, least_step_time, mean_forecast
from megasora.scaling.plan.beside import beside
from megasora.scaling.plan.reasons import RuledOut, Sieve
from megasora.scaling.plan.space import Layout, Space, layouts
from megasora.scaling.settings import Clips, Failures
from megasora.scaling.workload import StepPacks, planned_clips, steps_of


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is asked."""

    config: RunConfig
    """The recipe; its layout is what the planner chooses."""
    gpus: int
    hardware: Hardware
    failures: Failures = field(default_factory=Failures)
    clips: Clips = "auto"
    steps: int = 1
    """Steps with packs of their own that a forecast is the mean of."""
    best: int = 10
    """How many layouts are shown."""
    space: Space = field(default_factory=Space)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One layout and what it is expected to do."""

    layout: Layout
    config: RunConfig
    memory: MemoryEstimate
    memory_per_stage: tuple[float, ...]
    """Bytes of each stage's fullest GPU, with what stands beside the model."""
    run: RunForecast

    @property
    def step(self) -> StepForecast:
        """Its step."""
        return self.run.step


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The best layouts, and what became of the others."""

    question: Question
    plans: tuple[Plan, ...]
    """Best first; one for each TP x PP x VP x CP and format."""
    ruled_out: tuple[RuledOut, ...]
    tried: int
    """Layouts of the space."""
    simulated: int
    """Of them had to be forecast."""


Told = Callable[[int, int], object]
"""Hears (done, of all) families."""


@dataclass(frozen=True, kw_only=True)
class _Family:
    """Layouts that differ in ZeRO stage and recomputation."""

    bound: float
    number: int
    members: tuple[Layout, ...]


def search(question: Question, *, told: Told = lambda done, of: None) -> Answer:
    """The best layouts for a recipe on a number of GPUs.

    Raises:
        UserError: the recipe's clips are not known.
    """
    planner = _Planner(question)
    tried = list(layouts(question.space, gpus=question.gpus, samples=planner.samples))
    plans = planner.best(planner.families(tried), told=told)
    planner.rule_out_by_memory(tried)
    return Answer(question=question, plans=tuple(plans), ruled_out=planner.sieve.found(), tried=len(tried), simulated=planner.simulated)


class _Planner:
    """What a search keeps."""

    def __init__(self, question: Question) -> None:
        self.question = question
        self.clips: tuple[PlannedClip, ...] = planned_clips(question.config, clips=question.clips)
        self.samples = len(self._packs(1, 1, 1)[0].clips)
        self.beside = beside(question.config)
        self.room = question.hardware.memory_bytes - self.beside.total
        self.sieve = Sieve()
        self.simulated = 0
        self.packs = lru_cache(maxsize=4096)(self._packs)

    def _packs(self, replicas: int, microbatches: int, multiple: int) -> tuple[StepPacks, ...]:
        """The steps' packs on as many replicas: they hang on nothing else of a layout."""
        config = self.question.config
        parallel = replace(
            config.parallel,
            tensor_model_parallel_size=1,
            context_parallel_size=1,
            pipeline_model_parallel_size=multiple,
            virtual_pipeline_model_parallel_size=2 if multiple > 1 else None,
        )
        data = replace(config.data, num_microbatches=microbatches, max_pack_tokens=None)
        asked = replace(config, parallel=parallel, data=data)
        return tuple(steps_of(asked, self.clips, world_size=replicas * multiple, steps=self.question.steps))

    def _packs_of(self, config: RunConfig) -> tuple[StepPacks, ...]:
        parallel = config.parallel
        return self.packs(self.question.gpus // parallel.model_parallel_size, config.data.num_microbatches, parallel.microbatch_multiple)

    def families(self, tried: Sequence[Layout]) -> list[_Family]:
        """What the settings allow, smallest bound first."""
        gathered: dict[tuple[object, ...], list[Layout]] = {}
        for layout in tried:
            key = (layout.tp, layout.pp, layout.vp, layout.cp, layout.microbatches, layout.fp8, layout.split)
            if (why := self._refused(layout, layout.config(self.question.config))) is not None:
                self.sieve.setting(layout, *why)
            else:
                gathered.setdefault(key, []).append(layout)
        found = []
        for number, members in enumerate(gathered.values()):
            bound = self._bound(replace(members[0], recompute="none").config(self.question.config), exchanges=False)
            found.append(_Family(bound=bound, number=number, members=tuple(members)))
        return sorted(found, key=lambda one: (one.bound, one.number))

    def _bound(self, config: RunConfig, *, exchanges: bool) -> float:
        question = self.question
        bounds = [
            least_step_time(config, packs, world_size=question.gpus, hardware=question.hardware, exchanges=exchanges)
            for packs in self._packs_of(config)
        ]
        return sum(bounds) / len(bounds)

    def _refused(self, layout: Layout, config: RunConfig) -> tuple[str, str] | None:
        """(setting, why) a layout cannot work."""
        question = self.question
        replicas = question.gpus // layout.ranks
        if replicas > self.samples:
            return "data.global_tokens", f"a step has {self.samples} clips for {replicas} replicas; raise --data.global_tokens"
        if layout.tp > question.hardware.node.ranks > 0:
            return "parallel.tensor_model_parallel_size", f"TP {layout.tp} leaves the {question.hardware.node.ranks} GPUs of NVLink"
        if layout.fp8 != "none" and not question.hardware.rates.matmul_fp8:
            return "precision.fp8", f"{question.hardware.name} has no FP8"
        found = problems(config, world_size=question.gpus, check_memory=False)
        return (found[0].field, found[0].message) if found else None

    def best(self, families: Sequence[_Family], *, told: Told) -> list[Plan]:
        """The best layouts."""
        groups: dict[tuple[object, ...], Plan] = {}
        last = float("inf")
        for number, family in enumerate(families):
            told(number, len(families))
            if family.bound >= last:
                break
            first = family.members[0]
            group = (first.tp, first.pp, first.vp, first.cp, first.fp8)
            known = groups[group].step.step_time_s if group in groups else float("inf")
            plan = self._best_member(family, below=min(known, last))
            if plan is not None:
                groups[group] = plan
                times = sorted(one.step.step_time_s for one in groups.values())
                last = times[self.question.best - 1] if len(times) >= self.question.best else float("inf")
        told(len(families), len(families))
        return sorted(groups.values(), key=lambda plan: (plan.step.step_time_s, plan.layout.name))[: self.question.best]

    def _best_member(self, family: _Family, *, below: float) -> Plan | None:
        """The best layout of a family that fits and is quicker than `below` seconds."""
        found = None
        configs = [(layout, layout.config(self.question.config)) for layout in family.members]
        bounded = sorted(((self._bound(config, exchanges=True), number) for number, (_, config) in enumerate(configs)))
        for bound, number in bounded:
            if bound >= below:
                break
            layout, config = configs[number]
            memory = memory_estimate(config, world_size=self.question.gpus)
            if memory.total > self.room:
                continue
            plan = self._plan(layout, config, memory)
            if plan.step.step_time_s < below:
                found, below = plan, plan.step.step_time_s
        return found

    def _plan(self, layout: Layout, config: RunConfig, memory: MemoryEstimate) -> Plan:
        self.simulated += 1
        question, gpus = self.question, self.question.gpus
        steps = [forecast_step(config, packs, world_size=gpus, hardware=question.hardware) for packs in self._packs_of(config)]
        stages = range(config.parallel.pipeline_model_parallel_size)
        return Plan(
            layout=layout,
            config=config,
            memory=memory,
            memory_per_stage=tuple(stage_estimate(config, stage=stage, world_size=gpus).total + self.beside.total for stage in stages),
            run=forecast_run(config, mean_forecast(steps), hardware=question.hardware, failures=question.failures),
        )

    def rule_out_by_memory(self, tried: Sequence[Layout]) -> None:
        """Classes (TP, PP, CP, format) of which no layout fits, with the layout that needs least; looked at from the most frugal on."""
        classes: dict[tuple[object, ...], list[Layout]] = {}
        for layout in tried:
            if not self.sieve.refused(layout):
                classes.setdefault((layout.tp, layout.pp, layout.cp, layout.fp8), []).append(layout)
        for members in classes.values():
            members.sort(key=lambda one: (_FRUGAL[one.recompute], one.zero, one.microbatches), reverse=True)
            least: tuple[float, MemoryEstimate, Layout] | None = None
            for layout in members:
                memory = memory_estimate(layout.config(self.question.config), world_size=self.question.gpus)
                if memory.total <= self.room:
                    break
                if least is None or memory.total < least[0]:
                    least = (memory.total, memory, layout)
            else:
                if least is not None:
                    self.sieve.memory(members, needs=least[1], by=least[2], room=self.room)


_FRUGAL = {"none": 0, "selective": 1, "count": 2, "half": 2, "full": 3}
"""Recomputation by the memory it saves."""
