"""`megasora study calibrate`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from megasora.cli.endings import Answer, file_errors, rank

if TYPE_CHECKING:
    from megasora.perf.hardware import Hardware
    from megasora.scaling.study.calibrate.profile import Calibration


@dataclass(frozen=True, kw_only=True)
class Args:
    """Measure what this machine's kernels reach, and under torchrun its collectives; a hardware profile for predictions."""

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RECIPE")] = "opensora2_stage1"
    """Recipe or config.yaml whose widths and number format are measured; on a CPU take a small one."""
    output: Path | None = None
    """Profile to write, .yaml or .json; None only shows it."""
    reference: tuple[Path, ...] = ()
    """Traced runs of one rank on this machine (train --profile.steps 8:10): what their steps take beyond kernels goes into the profile. Two
    with other --data.num_microbatches tell the host's time of a launch from the kernels'."""
    name: str | None = None
    """Name of the profile; None: the host's."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """What to measure."""
    json: bool = False
    """Print profile and measurements as JSON."""


def run(args: Args) -> Answer | None:
    """All ranks measure, rank 0 writes and shows."""
    import platform

    import torch

    from megasora.cli.recipe_arguments import config_named
    from megasora.config.errors import UserError
    from megasora.config.io import to_dict
    from megasora.parallel import groups
    from megasora.perf.hardware import save_hardware
    from megasora.scaling.study.calibrate.profile import calibrate, hardware_of
    from megasora.scaling.study.calibrate.reference import with_reference

    if args.output is not None and args.output.suffix not in (".yaml", ".yml", ".json"):
        raise UserError(f"--output {args.output} must end in .yaml or .json")
    config = config_named(args.source)
    device = groups.choose_device(args.device)
    groups.start_world(device, timeout_minutes=config.parallel.timeout_minutes)
    found = calibrate(config, device=device)
    if rank() != 0:
        return None
    machine = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()}, {torch.get_num_threads()} threads a rank"
    )
    about = f"{config.recipe} (H {config.model.hidden_size}) on {machine}, torch {torch.__version__}, {found.ranks} rank(s)"
    hardware = hardware_of(found, device=device, name=args.name or platform.node(), about=about)
    if args.reference:
        hardware = with_reference(hardware, args.reference)
    if args.output is not None:
        with file_errors():
            save_hardware(hardware, args.output)
    return Answer(data={"hardware": to_dict(hardware), "measured": asdict(found)}, show=lambda: _show(args, hardware, found))


def _show(args: Args, hardware: Hardware, found: Calibration) -> None:
    from megasora.scaling.study.tables import print_calibration

    print_calibration(hardware, found)
    if args.output is not None:
        print(f"{args.output}: megasora study run GRID.yaml --hardware {args.output} predicts with it")
