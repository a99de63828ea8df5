"""Job files: checked before they are written, the same settings in the file as on the command line, and no shell accident."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from megasora import cli, recipes
from megasora.cli.commands import supervise
from megasora.cli.parsing import parse
from megasora.config.errors import UserError
from megasora.config.io import save_yaml
from megasora.slurm.flags import changed_flags
from megasora.slurm.job import seconds
from megasora.slurm.template import _default

EXAMPLES = Path(__file__).parents[3] / "examples" / "slurm"
RENDERED = [path for path in sorted(EXAMPLES.glob("*.sbatch")) if "megasora slurm render" in path.read_text()]


def rendered(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    cli.main(["slurm", "render", *words])
    return capsys.readouterr().out


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as end:
        cli.main(["slurm", "render", *words])
    printed = capsys.readouterr()
    assert end.value.code == 2
    assert printed.out == "" and printed.err.count("\n") == 1
    return printed.err


@pytest.mark.parametrize("path", RENDERED, ids=lambda path: path.name)
def test_an_example_is_what_its_own_command_writes(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = re.search(r"^#   megasora slurm render (.*)$", path.read_text(), re.MULTILINE)
    assert command is not None
    assert rendered(shlex.split(command.group(1)), capsys) == path.read_text()


def test_the_published_stages_are_among_the_examples() -> None:
    sizes = {path.stem: re.search(r"on (\d+) nodes? of (\d+) GPUs", path.read_text()) for path in RENDERED}
    gpus = {name: int(match.group(1)) * int(match.group(2)) for name, match in sizes.items() if match}
    assert gpus == {"single_node": 8, "preemptible": 224, "pretrain_stage1": 224, "pretrain_stage2": 192, "pretrain_stage3": 192}


@pytest.mark.parametrize("launcher", ["srun", "torchrun"])
def test_a_file_is_sound_and_says_what_it_asks_for(launcher: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["opensora2_stage1", "--nodes", "28", "--launcher", launcher, "--partition", "p", "--account", "a", "--options", "qos=high"]
    text = rendered([*words, "--setup", "module load cuda", "--time", "2-00:00:00", "--warn_s", "600", "--manifest", "m.csv"], capsys)
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    ranks, cores = (8, 12) if launcher == "srun" else (1, 96)
    asked = ("account=a", "partition=p", "nodes=28", f"ntasks-per-node={ranks}", f"cpus-per-task={cores}", "gpus-per-node=8", "qos=high")
    for option in (*asked, "time=2-00:00:00", "signal=USR1@600", "requeue", "open-mode=append"):
        assert f"#SBATCH --{option}\n" in text
    assert "\nmodule load cuda\n" in text and "MANIFEST=${MANIFEST:-m.csv}" in text
    assert text.endswith("exit $code\n")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--nodes", "1"], "has 141 GB; use --data.max_pack_tokens 8960"),
        (["--nodes", "28", "--gpu", "a100"], "and has 80 GB"),
        (["--nodes", "28", "--gpu", "a1000"], "h200"),
        (
            ["--nodes", "1", "--parallel.tensor_model_parallel_size", "3"],
            "world size 8 is not a multiple of TP x PP x CP = 3; start 6 ranks",
        ),
        (["--nodes", "0"], "--nodes 0 must be at least 1"),
        (["--nodes", "28", "--time", "noon"], "--time 'noon' is no time limit; write 24:00:00"),
        (["--nodes", "28", "--time", "4"], "--warn_s 300 must be between 1 and the 240 seconds of --time 4"),
        (["--nodes", "28", "--options", "Q"], "--options 'Q' is no option of sbatch"),
        (["--nodes", "28", "--manifest", "a", "--data.manifest", "b"], "--manifest a and data.manifest b differ"),
        (["--nodes", "28", "--weights", "a", "--run", "b"], "init.run: and init.weights are both given"),
    ],
)
def test_what_cannot_run_is_refused_with_its_cure(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert said in refused(["opensora2_stage1", *words], capsys)


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("tiny", ["--train.deterministic", "--train.no_tensorboard", "--device", "cpu", "--parallel.overlap_grad_reduce", "False"]),
        ("tiny", ["--data.resolution_mix", "64px", "0.5", "32px", "1.5", "--data.frame_counts", "9", "1", "--data.max_pack_tokens", "900"]),
        ("opensora2_stage1", ["--data.bucket_mix", "--data.resolution", "256px", "--optimizer.lr", "1e-05"]),
        ("opensora2_stage3", ["--optimizer.lr_milestones", "40", "3e-05", "--model.axes_dim", "2", "4", "122", "--init.follows", "None"]),
        ("tiny", ["--evaluation.sample_prompts", "a cat's tail", "$HOME", "--parallel.virtual_pipeline_model_parallel_size", "2"]),
    ],
)
def test_the_flags_in_a_file_mean_the_same_settings(recipe: str, words: list[str]) -> None:
    _, args = parse(["train", recipe, *words])
    flags = list(changed_flags(recipes.get(recipe), args.config))
    _, again = parse(["train", recipe, *flags])
    assert again.config == args.config != recipes.get(recipe)


def test_a_preemptible_job_saves_often_and_restarts_without_end(capsys: pytest.CaptureFixture[str]) -> None:
    text = rendered(["opensora2_stage1", "--nodes", "28", "--preemptible"], capsys)
    assert "flags=(--checkpoint.interval_steps 200)" in text and "${MAX_RESTARTS:-1000}" in text
    text = rendered(["opensora2_stage1", "--nodes", "28", "--preemptible", "--checkpoint.interval_steps", "50"], capsys)
    assert "flags=(--checkpoint.interval_steps 50)" in text


@pytest.mark.parametrize("launcher", ["srun", "torchrun"])
def test_an_autoencoder_s_job_trains_with_train_ae(launcher: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["dc_ae_stage2", "--nodes", "2", "--gpus_per_node", "4", "--launcher", launcher, "--device", "cpu", "--precision.dtype", "fp32"]
    text = rendered([*words, "--run", "runs/one", "--parallel.context_parallel_size", "2", "--preemptible"], capsys)
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    assert 'megasora train-ae "$@"' in text and "megasora train " not in text and "ENCODERS" not in text
    assert "--parallel.context_parallel_size 2" in text and "--checkpoint.interval_steps 200" in text
    assert '[ -n "$LPIPS" ] && flags+=(--loss.lpips "$LPIPS")' in text and "RUN=${RUN:-runs/one}" in text
    assert ': "${LPIPS:?' in text and "LPIPS=lpips sbatch" in text  # asked for, as it was not given
    given = rendered([*words, "--lpips", "weights"], capsys)
    assert "LPIPS=${LPIPS:-weights}" in given and "RUN=runs/BEFORE" in given
    assert "init.run: and init.weights are both given" in refused([*words, "--run", "a", "--weights", "b"], capsys)
    assert "which does not divide 8 rank(s)" in refused([*words, "--parallel.context_parallel_size", "3"], capsys)


def test_programs_get_the_file_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "job.sbatch"
    data = json.loads(rendered(["tiny", "--nodes", "2", "--gpus_per_node", "4", "--output", str(file), "--json"], capsys))
    assert (data["file"], data["nodes"], data["gpus"]) == (str(file), 2, 8)
    assert data["text"] == file.read_text()


@pytest.mark.parametrize("value", ["plain", "with space", 'a"b', "a'b", "$HOME", "`id`", "a}b", "back\\slash"])
def test_a_path_reaches_the_shell_as_it_is(value: str) -> None:
    shown = subprocess.run(["bash", "-uc", f'{_default("NAME", value)}\nprintf %s "$NAME"'], capture_output=True, text=True, check=True)
    assert shown.stdout == value


@pytest.mark.parametrize(
    ("limit", "expected"),
    [("30", 1800), ("1:30", 90), ("24:00:00", 86400), ("2-0", 172800), ("1-2:03", 93780), ("1-00:00:01", 86401), ("UNLIMITED", None)],
)
def test_time_limits_are_read_as_sbatch_reads_them(limit: str, expected: int | None) -> None:
    assert seconds(limit) == expected


def test_status_shows_each_end_and_the_mistake(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "restarts.log").write_text(
        "2026-11-27T10:00:00+00:00 job 7 restart 0 step 120: crash (exit code 137), requeued\n"
        "2026-11-27T11:00:00+00:00 job 7 restart 1 step 240: not requeued: a mistake that another try would repeat; its cure is above\n"
    )
    (tmp_path / ".mistake").write_text("rank 0: data.manifest: cannot read clips.csv\n")
    (tmp_path / "metrics.jsonl").write_text('{"step": 239}\n{"step": 240}\n{"step": 24')  # cut off by a crash
    cli.main(["slurm", "status", str(tmp_path), "--json"])
    status = json.loads(capsys.readouterr().out)
    assert [(end["restart"], end["step"]) for end in status["ends"]] == [(0, 120), (1, 240)]
    assert status["step"] == 240 and "cannot read clips.csv" in status["mistakes"][0]
    with pytest.raises(SystemExit):
        cli.main(["slurm", "status", str(tmp_path / "none")])
    assert "no run has begun there" in capsys.readouterr().err


def test_each_autoencoder_has_its_folder(capsys: pytest.CaptureFixture[str]) -> None:
    text = rendered(["opensora2_dc_ae", "--nodes", "20", "--encoders_dir", "beside/hunyuan-vae"], capsys)
    assert '--encoders.vae "$ENCODERS/dc-ae"' in text and "folder with dc-ae" in text
    assert "ENCODERS=${ENCODERS:-beside/hunyuan-vae}" in text  # a path is left as it is
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)


def test_setup_of_several_lines_stays_a_comment_before_slurm_s_options(capsys: pytest.CaptureFixture[str]) -> None:
    """sbatch reads no option behind the first line that is no comment."""
    text = rendered(["opensora2_stage1", "--nodes", "28", "--setup", "module load a\nmodule load b"], capsys)
    assert all(line.startswith("#") or not line for line in text[: text.index("#SBATCH --job-name")].splitlines())
    assert "\nset +u\nmodule load a\nmodule load b\nset -u\n" in text


def test_supervise_and_status_know_an_autoencoder_s_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("train-ae", "tiny_ae", "--run_dir", str(tmp_path))
    assert supervise._run_dir(supervise.Args(words=words)) == tmp_path
    with pytest.raises(UserError, match="megasora supervise -- train RECIPE"):
        supervise._run_dir(supervise.Args(words=("sample", "tiny")))
    save_yaml(recipes.get_autoencoder("tiny_ae"), tmp_path / "config.yaml")
    (tmp_path / "metrics.jsonl").write_text('{"step": 7}\n')
    cli.main(["slurm", "status", str(tmp_path)])
    assert capsys.readouterr().out == "step 7 of 400\n"
