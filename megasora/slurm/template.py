"""The text of a training job's sbatch file, from its top to `exit`.

Everything that depends on the job stands in the #SBATCH lines and in a few variables after them; the rest is the same in every file
(`shell.py`), so that one set of tests on a real Slurm holds for all.
"""

from __future__ import annotations

import shlex

from megasora.config.autoencoder_run import AutoencoderRunConfig
from megasora.slurm import shell
from megasora.slurm.job import MAX_CRASHES, SlurmJob

GIVEN = frozenset({"run_dir", "data.manifest", "init.weights", "init.run", "loss.lpips"})
"""Settings that a file takes from variables, so that they can be given at submission."""
MAKE_CLIPS = ("tiny", "tiny_ae")
"""Recipes that make their own clips where none are given."""
AUTOENCODERS = ("hunyuan-vae", "dc-ae")
"""Folders in ENCODERS: of the causal autoencoder, and of the one that is not."""


def render(job: SlurmJob) -> str:
    """The whole file."""
    parts = (
        _about(job),
        _options(job),
        _variables(job),
        "\n".join([shell.PREPARE, _of_job(shell.ENCODERS, job) if job.trains == "train" else shell.LPIPS, shell.ATTEMPT]),
        shell.RENDEZVOUS,
        _setup(job),
        _launch(job),
        shell.WAIT,
        shell.VERDICT,
    )
    return "\n\n".join(part for part in parts if part) + "\n"


def _of_job(text: str, job: SlurmJob) -> str:
    """With the folder of its autoencoder."""
    causal = isinstance(job.config, AutoencoderRunConfig) or job.config.encoders.causal
    return text if causal else text.replace(*AUTOENCODERS)


def _about(job: SlurmJob) -> str:
    size = f"{job.nodes} node{'s' if job.nodes > 1 else ''} of {job.gpus_per_node} {'GPUs' if job.on_gpus else 'CPU ranks'}"
    lines = [
        "#!/bin/bash",
        f"# {job.config.recipe} on {size}. This file was written by, and is submitted by",
        "#",
        *(f"#   {line}" for line in job.command.splitlines()),
        f"#   {_example(job)}",
        "#",
        "# Submit it in the environment that megasora is installed in; arguments after the file's name go to megasora "
        f"{job.trains}. It trains to",
        "# the last step: before the time limit, after preemption, a failed node or a crash it is requeued and goes on from its newest",
        "# complete checkpoint. A mistake in settings or files ends it at once, with its cure in the log. scancel ends it for good; the",
        "# same sbatch goes on.",
    ]
    if job.preemptible:
        lines.append("# Made for nodes that other jobs may take: checkpoints are close together, and restarts are not rationed.")
    return "\n".join(lines)


def _example(job: SlurmJob) -> str:
    config, init = job.config, job.config.init
    if isinstance(config, AutoencoderRunConfig):
        given = {
            "MANIFEST=clips.parquet": config.data.manifest is None,
            "WEIGHTS=vae": config.autoencoder.kind == "hunyuan" and init.weights is None,
            "RUN=runs/BEFORE": init.follows is not None and init.run is None,
            "LPIPS=lpips": config.loss.lpips is None and config.loss.lpips_weight > 0,
        }
        return _submission(job, given)
    given = {
        "MANIFEST=clips.parquet": job.config.data.manifest is None,
        "WEIGHTS=start": init.weights is None and init.run is None and init.follows in (None, "opensora2_image"),
        "RUN=runs/BEFORE": init.weights is None and init.run is None and init.follows not in (None, "opensora2_image"),
        "ENCODERS=weights": job.encoders is None,
    }
    return _submission(job, given)


def _submission(job: SlurmJob, given: dict[str, bool]) -> str:
    words = [word for word, wanted in given.items() if wanted and job.config.recipe not in MAKE_CLIPS]
    options = [f"--{name}={name.upper()}" for name in ("account", "partition") if getattr(job, name) is None]
    return " ".join([*words, "sbatch", *options, "FILE", "[--train.steps 1000 ...]"])


def _options(job: SlurmJob) -> str:
    ranks = job.gpus_per_node if job.launcher == "srun" else 1
    known = {"account": job.account, "partition": job.partition}
    options = [
        f"job-name={job.config.recipe.replace('_', '-')}",
        f"nodes={job.nodes}",
        f"ntasks-per-node={ranks}",
        *([f"gpus-per-node={job.gpus_per_node}"] if job.on_gpus else []),
        f"cpus-per-task={job.cpus_per_gpu * job.gpus_per_node // ranks}",
        *(["mem=0"] if job.on_gpus else []),
        f"time={job.time}",
        f"signal=USR1@{job.warn_s}",
        "requeue",
        "open-mode=append",
        "output=%x-%j.log",
        *job.options,
    ]
    unknown = [f"##SBATCH --{name}={name.upper()}" for name, value in known.items() if value is None]
    return "\n".join(
        [
            *(f"#SBATCH --{name}={value}" for name, value in known.items() if value is not None),
            *([*unknown, "# (or sbatch --account --partition, or SBATCH_ACCOUNT and SBATCH_PARTITION)"] if unknown else []),
            *(f"#SBATCH --{option}" for option in options),
        ]
    )


def _variables(job: SlurmJob) -> str:
    config = job.config
    sources = {"MANIFEST": config.data.manifest, "WEIGHTS": config.init.weights, "RUN": config.init.run}
    if isinstance(config, AutoencoderRunConfig):
        sources["LPIPS"] = config.loss.lpips
    else:
        sources["ENCODERS"] = job.encoders
    run_dir = config.run_dir or f"$PWD/runs/{config.recipe.removeprefix('opensora2_')}"
    lines = [
        "set -uo pipefail",
        "# each may be given in the environment of sbatch instead",
        _default("RUN_DIR", run_dir) + "    # on a file system that all nodes see",
        *(f"{_default(name, value or '')}    # {_of_job(_ABOUT[job.trains, name], job)}" for name, value in sources.items()),
        f"{_default('MAX_RESTARTS', str(job.restarts_allowed))}"
        "    # restarts of any cause, after which a crash, or a stop that saved nothing, is left to a person",
        f"{_default('MAX_CRASHES', str(MAX_CRASHES))}    # so are this many crashes in a row that came no step further than ever before",
        f"recipe={shlex.quote(job.recipe)} ranks_per_node={job.gpus_per_node}",
        f"flags=({_array(job.flags)})" if job.flags else "flags=()",
    ]
    if config.recipe not in MAKE_CLIPS:
        lines.append(': "${MANIFEST:?the table of clips that megasora data filter wrote}"')
    if isinstance(config, AutoencoderRunConfig) and config.loss.lpips_weight > 0:
        lines.append(': "${LPIPS:?the folder of weights of LPIPS}"')
    return "\n".join(lines)


_ABOUT = {
    ("train", "MANIFEST"): "clips.parquet that megasora data filter wrote",
    ("train", "WEIGHTS"): "weights of any format to start from",
    ("train", "RUN"): "or the run of the stage before",
    ("train", "ENCODERS"): "folder with hunyuan-vae, t5-v1_1-xxl and clip-vit-large-patch14 in their published formats",
    ("train-ae", "MANIFEST"): "clips.parquet that megasora data filter wrote",
    ("train-ae", "WEIGHTS"): "folder of an autoencoder to start from",
    ("train-ae", "RUN"): "or the run of the stage before",
    ("train-ae", "LPIPS"): "folder with torchvision's vgg16 and lpips/weights/v0.1's lin layers",
}


def _default(name: str, value: str) -> str:
    """NAME=${NAME:-value}; of the value, only a $PWD at its start is the shell's."""
    start = "$PWD" if value.startswith("$PWD") else ""
    rest = value.removeprefix(start)
    return f"{name}=${{{name}:-{start}{shlex.quote(rest) if rest else ''}}}"


def _array(words: tuple[str, ...]) -> str:
    """Words for a shell's array, a flag with its values on a line where there are several."""
    lines: list[list[str]] = []
    for word in words:
        if word.startswith("--") or not lines:
            lines.append([])
        lines[-1].append(shlex.quote(word))
    return " ".join(lines[0]) if len(lines) == 1 else "\n    " + "\n    ".join(map(" ".join, lines)) + "\n"


def _setup(job: SlurmJob) -> str:
    """What others have written, such as conda's activation, reads variables that are not set."""
    return "\n".join(["set +u", *job.setup, "set -u"]) if job.setup else ""


def _launch(job: SlurmJob) -> str:
    text = shell.SRUN if job.launcher == "srun" else shell.TORCHRUN
    return text.replace("megasora train ", f"megasora {job.trains} ")
