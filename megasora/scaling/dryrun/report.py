"""Tables of dry runs."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from megasora.config.schema import RunConfig
from megasora.perf.flops import LAYER_KINDS
from megasora.scaling.dryrun.expected import Compared, compare
from megasora.scaling.dryrun.jobs import ClassRun
from megasora.scaling.dryrun.result import DryRun
from megasora.scaling.dryrun.room import Room, room_line


def show_run(run: DryRun, config: RunConfig, room: Room) -> None:
    """Everything about one rank."""
    console = Console()
    at = run.at
    console.print(
        f"[bold]{run.recipe}[/bold], rank {run.rank} of {run.world_size}: tp {at.tp}, cp {at.cp}, dp {at.dp}, pp {at.pp}; "
        f"{len(run.microbatches)} micro-batches, {sum(pack.samples for pack in run.microbatches)} samples, "
        f"{sum(pack.num_text + pack.num_video for pack in run.microbatches):,} tokens of its share"
    )
    for table in (_flops(run), _messages(run), _memory(run), _timeline(run)):
        console.print(table)
    console.print(room_line(room), highlight=False)
    console.print(_verdict(compare(run, config)))
    console.print("In a GPU's place: " + "; ".join(run.stand_ins) + ".", style="dim")
    console.print(f"{run.operations:,} operations in {run.seconds:.1f} s", style="dim")


def show_classes(runs: Sequence[ClassRun], config: RunConfig, room: Room) -> None:
    """A row for each class of ranks."""
    first = runs[0].run
    console = Console()
    groups = sorted({message.group for one in runs for message in one.run.messages if message.bytes > 1e6})
    table = Table(title=f"{first.recipe} on {first.world_size} GPUs: {len(runs)} classes of ranks")
    for name in ("rank run", "ranks", "stage", "samples", "tokens", "TFLOPs", "recomputed", *(f"{group} GB" for group in groups)):
        table.add_column(name, justify="right")
    for name in ("state GB", "activations GB", "peak GB"):
        table.add_column(name, justify="right")
    for one in runs:
        run, of = one.run, one.of
        sent = (sum(m.bytes for m in run.messages if m.group == group and m.kind != "receive") for group in groups)
        table.add_row(
            str(of.rank),
            f"{len(of.ranks)}{'' if of.match == 'same' else ' at most'}",
            str(of.stage),
            str(of.samples),
            f"{of.tokens:,}",
            f"{run.total_flops / 1e12:,.1f}",
            f"{sum(layer.recompute for layer in run.flops) / 1e12:,.1f}",
            *(_gb(size) for size in sent),
            *(_gb(size) for size in (run.memory.state, run.memory.activations, run.memory.total)),
        )
    console.print(table)
    for why in dict.fromkeys(one.of.why for one in runs):
        console.print(f"alike: {why}", style="dim")
    console.print(room_line(room), highlight=False)
    console.print(_verdict([compared for one in runs for compared in compare(one.run, config)]))
    console.print("In a GPU's place: " + "; ".join(first.stand_ins) + ".", style="dim")


def _gb(size: float) -> str:
    return f"{size / 1e9:,.2f}" if size >= 5e6 else "0" if not size else f"{size / 1e9:.1g}"


def _flops(run: DryRun) -> Table:
    table = Table(title="TFLOPs of the step")
    for name in ("", "forward", "backward", "recomputed", "total"):
        table.add_column(name, justify="right" if name else "left")
    rows = {layer.kind: (layer.forward, layer.backward, layer.recompute, layer.total) for layer in run.flops}
    for kind in LAYER_KINDS:
        if any(rows[kind]):
            table.add_row(kind, *(f"{value / 1e12:,.3f}" for value in rows[kind]))
    table.add_section()
    table.add_row("all", *(f"{sum(row[place] for row in rows.values()) / 1e12:,.3f}" for place in range(4)))
    for part in run.bytes_moved:
        table.caption = (
            f"{table.caption}, " if table.caption else "bytes moved by everything else: "
        ) + f"{part.name} {_gb(part.bytes)} GB"
    return table


def _messages(run: DryRun) -> Table:
    table = Table(title="Messages of the step (payload on the rank)")
    for name in ("kind", "group", "ranks", "in", "beside computation", "number", "GB"):
        table.add_column(name, justify="right" if name in ("ranks", "number", "GB") else "left")
    for message in run.messages:
        beside = "yes" if message.overlaps else "no"
        row = (message.kind, message.group, str(message.group_size), message.phase, beside, f"{message.count:,}", _gb(message.bytes))
        table.add_row(*row)
    return table


def _memory(run: DryRun) -> Table:
    memory = run.memory
    where = "" if memory.peak_phase == "step end" else f" of micro-batch {memory.peak_microbatch}, chunk {memory.peak_chunk}"
    table = Table(title=f"Memory at the peak: {memory.peak_phase}{where}", show_header=False)
    for name in ("weights", "gradients", "optimizer", "ema", "padding", "inputs", "activations"):
        if size := getattr(memory, name):
            table.add_row(name, f"{_gb(size)} GB")
    for part in memory.at_peak:
        if part.bytes >= 5e6:
            table.add_row(
                f"  allocated in {part.name}" if part.name in ("forward", "backward", "recompute") else f"  {part.name}", _gb(part.bytes)
            )
    table.add_section()
    table.add_row("all", f"{_gb(memory.total)} GB")
    return table


def _timeline(run: DryRun, *, most: int = 24) -> Table:
    """Passes in order; the middle ones are left out of a long step."""
    table = Table(title="Activations over the step, GB")
    for name in ("pass", "chunk", "micro-batch", "before", "peak", "after"):
        table.add_column(name, justify="left" if name == "pass" else "right")
    events = list(run.timeline)
    for number, event in enumerate(events):
        if len(events) > most and most // 2 <= number < len(events) - most // 2:
            if number == most // 2:
                table.add_row(f"({len(events) - most} more)", "", "", "", "", "")
            continue
        sizes = (_gb(event.before), _gb(event.peak), _gb(event.after))
        table.add_row(event.phase, str(event.chunk), str(event.microbatch), *sizes)
    return table


def _verdict(compared: Sequence[Compared]) -> str:
    """How the closed forms compare."""
    exact = [one for one in compared if one.name != "activations"]
    wrong = [one for one in exact if one.counted != one.computed]
    activations = [one for one in compared if one.name == "activations"]
    text = f"{len(exact) - len(wrong)} of {len(exact)} numbers equal their closed forms to the last digit"
    for one in wrong:
        text += f"\n  {one.name}: {one.counted:,} counted, {one.computed:,} {one.unit} computed"
    share = max((one.counted / max(1, one.computed) for one in activations), default=0.0)
    return f"{text}; activations are {share:.2f} of what `validate` estimates for packs of the largest clips"
