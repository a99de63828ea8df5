"""The command line: it says no to what it would not use, in one line with the nearest name, and answers persons and programs."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from megasora import cli, recipes
from megasora.cli.parsing import parse
from megasora.cli.registry import Command, Group, find_commands
from megasora.curation.rules import STAGES


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line a mistake ends in."""
    with pytest.raises(SystemExit) as end:
        cli.main(words)
    printed = capsys.readouterr()
    assert end.value.code == 2
    assert printed.out == ""
    assert printed.err.startswith("megasora: error: ")
    assert printed.err.count("\n") == 1
    return printed.err


def commands(group: Group) -> dict[str, Command]:
    found: dict[str, Command] = {}
    for member in group.members.values():
        found.update(commands(member) if isinstance(member, Group) else {member.name: member})
    return found


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["recipes", "--jsn"], "no flag --jsn; did you mean --json?"),
        (["doctor", "--jsn"], "no flag --jsn; did you mean --json?"),
        (["train", "tiny", "--trian.steps", "4"], "no flag --trian.steps; did you mean --train.steps?"),
        (["train", "tiny", "--train.stepz=4"], "no flag --train.stepz; did you mean --train.steps?"),
        (["train", "tiny", "again"], "no argument again"),
        (["forward", "--weigths", "x"], "no flag --weigths; did you mean --weights?"),
        (["plan", "tiny", "--gpus", "8", "--top", "3"], "no flag --top (megasora plan --help lists what there is)"),  # compare's flag
        (["data", "filter", "--whre", "3"], "data filter needs SOURCE (megasora data filter --help lists what there is)"),
        (["trian", "tiny"], "no command trian; did you mean train?"),
        (["data", "filtr", "t.parquet"], "no command filtr; did you mean filter?"),
        (["data", "pack_stats", "t.csv"], "no command pack_stats; did you mean pack-stats?"),
        (["train", "tiny", "--train.steps", "abc"], "--train.steps: invalid literal for int() with base 10: 'abc'"),
        (["train"], "train needs a recipe or a config.yaml: megasora train RECIPE; there are tiny, "),
        (["train", "--train.steps", "3"], "train needs a recipe or a config.yaml"),
        (["show", "tinyy"], "no recipe called 'tinyy': did you mean tiny?"),
        (["forward", "--weights", "x"], "forward needs --inputs, --output (megasora forward --help"),
        (["sample", "tiny", "--prompt", "a"], "sample needs --weights, --output (megasora sample --help"),
        (["data", "filter", "t.parquet"], "data filter needs --output (megasora data filter --help"),
        (["data", "filter", "t.parquet", "--output", "o", "--stage", "255px"], "invalid choice '255px' for argument '--stage'"),
        (["compare", "a"], "compare needs B (megasora compare --help"),
        (["validate", "tiny", "--gpus", "0"], "--gpus 0 must be a positive number"),
        (["plan", "tiny", "--gpus", "0"], "--gpus 0 must be a positive number"),
        (["plan", "tiny", "--gpus", "8", "--gpu", "h100:ib1"], "there are ib200, ib400, ib800 and price=DOLLARS"),
        (["plan", "tiny", "--gpus", "8", "--clips", "manifest"], "give one, or take --clips largest or drawn"),
        (["study", "ran", "grid.yaml"], "no command ran; did you mean run?"),
    ],
)
def test_a_mistake_is_one_line_with_its_cure(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert said in refused(words, capsys)


def test_only_rank_0_speaks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(SystemExit) as end:
        cli.main(["show", "tinyy"])
    assert end.value.code == 2
    assert capsys.readouterr().err == ""


def test_a_size_of_zero_is_a_problem_and_no_stack_trace(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["validate", "tiny", "--parallel.tensor_model_parallel_size", "0"])
    assert end.value.code == 2
    assert "parallel.tensor_model_parallel_size: is 0" in capsys.readouterr().err


def test_json_is_all_that_stdout_holds_and_problems_exit_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["validate", "tiny", "--json"])
    answer = json.loads(capsys.readouterr().out)
    assert answer["problems"] == []
    assert answer["memory"]["parts"].keys() >= {"weights", "gradients", "optimizer", "ema", "activations", "working_set"}
    with pytest.raises(SystemExit) as end:
        cli.main(["validate", "tiny", "--json", "--parallel.tensor_model_parallel_size", "3"])
    assert end.value.code == 2
    fields = [problem["field"] for problem in json.loads(capsys.readouterr().out)["problems"]]
    assert "parallel.tensor_model_parallel_size" in fields


@pytest.mark.parametrize("flag", ["--train.steps", "--data.global_tokens", "--data.global-tokens"])
def test_a_flag_changes_its_setting_and_nothing_else(flag: str) -> None:
    _, args = parse(["train", "tiny", flag, "77"])
    tiny = recipes.get("tiny")
    section, name = flag.removeprefix("--").replace("-", "_").split(".")
    expected = dataclasses.replace(tiny, **{section: dataclasses.replace(getattr(tiny, section), **{name: 77})})
    assert args.config == expected


def test_a_config_file_of_a_run_stands_for_its_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["show", "tiny", "--train.steps", "9"])
    (tmp_path / "config.yaml").write_text(capsys.readouterr().out)
    _, args = parse(["validate", str(tmp_path / "config.yaml"), "--gpus", "4"])
    assert (args.config.train.steps, args.config.recipe, args.gpus) == (9, "tiny", 4)


def test_own_flags_and_settings_mix_in_any_order() -> None:
    words = [
        "sample",
        "tiny",
        "--sample.steps",
        "3",
        "--prompt",
        "a b",
        "c",
        "--weights",
        "w",
        "--device",
        "cpu",
        "--output",
        "o",
        "--steps",
        "5",
    ]
    _, args = parse(words)
    assert (args.prompt, args.weights, args.output, args.steps) == (("a b", "c"), Path("w"), Path("o"), 5)
    assert (args.config.sample.steps, args.config.device) == (3, "cpu")


@pytest.mark.parametrize("stage", sorted(STAGES))
def test_a_stage_sets_the_rules_and_a_flag_changes_one(stage: str) -> None:
    _, args = parse(["data", "filter", "t.parquet", "--max_jitter", "7", f"--stage={stage}", "--output", "o.parquet"])
    assert args.rules == dataclasses.replace(STAGES[stage], max_jitter=7.0)  # type: ignore[index]
    _, args = parse(["data", "filter", "t.parquet", "--min_aesthetic", "None", "--stage", stage, "--output", "o.parquet"])
    assert args.rules.min_aesthetic is None


def test_pack_stats_takes_the_settings_of_the_recipe_it_names() -> None:
    _, args = parse(["data", "pack-stats", "t.csv", "--dp", "2"])
    assert args.config == recipes.get("opensora2_stage1")
    _, args = parse(["data", "pack-stats", "t.csv", "--recipe", "tiny", "--dp", "2", "--data.global_tokens", "5"])
    assert (args.config.model, args.config.data.global_tokens, args.dp) == (recipes.get("tiny").model, 5, 2)


@pytest.mark.parametrize("name", sorted(commands(find_commands())))
def test_every_command_has_a_help_that_begins_with_its_usage(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = commands(find_commands())[name]
    if (command.kind.__doc__ or "").startswith("(not in this version)"):
        assert "not available in this version" in refused([*name.split(), "--help"], capsys)
        return
    with pytest.raises(SystemExit) as end:
        cli.main([*name.split(), "--help"])
    printed = capsys.readouterr().out
    assert end.value.code == 0
    assert printed.startswith(f"usage: megasora {name} ")
    assert " ".join((command.kind.__doc__ or "").split())[:40] in " ".join(printed.split())


@pytest.mark.parametrize("words", [[], ["help"], ["--help"], ["data"], ["data", "--help"]])
def test_asking_for_nothing_lists_the_commands(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(words)
    assert end.value.code == 0
    printed = capsys.readouterr().out
    assert all(f" {name} " in printed for name in (("probe", "pack-stats") if "data" in words else ("train", "convert", "data")))


def test_the_completion_script_knows_commands_and_settings() -> None:
    done = subprocess.run([sys.executable, "-m", "megasora", "--tyro-print-completion", "bash"], check=True, capture_output=True, text=True)
    assert "pack-stats" in done.stdout
    assert "--parallel.context_parallel_size" in done.stdout
    checked = subprocess.run(["bash", "-n"], input=done.stdout, check=False, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr


def test_the_command_line_lists_its_commands_without_anything_heavy() -> None:
    code = (
        "import sys; from megasora.cli.registry import find_commands; find_commands(); "
        "print(sorted({'torch', 'numpy', 'av', 'megatron', 'pyarrow'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "[]\n"


def test_a_plan_for_programs(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    small = ["--space.tp", "1", "2", "--space.pp", "1", "--space.cp", "1", "4", "--space.microbatches", "2", "--data.cache", "latents"]
    cli.main(["plan", "opensora2_stage3", "--gpus", "192", "--json", "--sbatch", str(tmp_path / "job.sh"), *small])
    answer = json.loads(capsys.readouterr().out)
    plans = answer["plans"]
    assert plans == sorted(plans, key=lambda plan: plan["step_time_s"])
    for plan in plans:
        assert plan.keys() >= {"overrides", "step_time_s", "mfu", "samples_per_s", "peak_memory_bytes", "gpu_hours", "cost_usd"}
        _, args = parse(["validate", "opensora2_stage3", "--gpus", "192", *plan["overrides"]])
        assert args.config.data.cache == "latents"
        assert plan["gpu_hours"] == pytest.approx(plan["steps"] * plan["step_time_s"] * 192 / 3600 / plan["goodput"], rel=1e-6)
    assert {one["constraint"] for one in answer["ruled_out"]} >= {"data.global_tokens"}
    assert "--parallel.zero_stage" in (tmp_path / "job.sh").read_text()


def test_a_plan_that_fits_nowhere_ends_with_1(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["plan", "opensora2_stage3", "--gpus", "1", "--gpu", "h100", "--data.cache", "x", "--json"])
    assert end.value.code == 1
    answer = json.loads(capsys.readouterr().out)
    assert answer["plans"] == []
    assert {one["constraint"] for one in answer["ruled_out"]} == {"memory"}
