"""Settings: strict reading, all problems at once, one-line errors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from megasora import cli, recipes
from megasora.config.errors import UserError
from megasora.config.io import dump, from_dict, load_yaml, save_yaml, to_dict
from megasora.config.parameters import double_block_parameters, modulation_parameters, single_block_parameters
from megasora.config.schema import ModelConfig
from megasora.config.validate import problems


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_every_recipe_is_sound_and_survives_yaml(name: str, tmp_path: Path) -> None:
    config = recipes.get(name)
    assert problems(config, world_size=192) == []
    save_yaml(config, tmp_path / "config.yaml")
    assert load_yaml(tmp_path / "config.yaml") == config


def test_block_sizes_are_the_published_ones() -> None:
    model = ModelConfig()
    assert round(double_block_parameters(model) / 1e6, 1) == 339.8
    assert round(single_block_parameters(model) / 1e6, 1) == 141.6
    assert round(modulation_parameters(model) / 1e9, 2) == 3.23


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trian": {}}, "did you mean train"),
        ({"train": {"stepz": 1}}, r"config\.train\.stepz"),
        ({"train": {"steps": "four"}}, r"config\.train\.steps: expected int"),
        ({"precision": {"fp8": "fp9"}}, "not one of"),
        ({"train": {"steps": True}}, "expected int"),
    ],
)
def test_wrong_yaml_is_named(change: dict[str, object], message: str) -> None:
    data = yaml.safe_load(dump(recipes.get("tiny")))
    with pytest.raises(UserError, match=message):
        from_dict({**data, **change})


def test_all_problems_come_at_once() -> None:
    config = recipes.get("tiny")
    parallel = replace(config.parallel, tensor_model_parallel_size=3, virtual_pipeline_model_parallel_size=2)
    broken = replace(config, parallel=parallel, optimizer=replace(config.optimizer, lr=-1.0), device="cpu")
    fields = {problem.field for problem in problems(broken, world_size=4)}
    assert {
        "parallel.tensor_model_parallel_size",
        "parallel",
        "parallel.virtual_pipeline_model_parallel_size",
        "optimizer.lr",
    } <= fields


def test_fp8_on_the_cpu_is_refused() -> None:
    config = recipes.get("tiny")
    found = problems(replace(config, device="cpu", precision=replace(config.precision, fp8="delayed")), world_size=1)
    assert any("needs CUDA" in str(problem) for problem in found)


def test_a_model_that_cannot_fit_is_refused() -> None:
    assert any("the fullest GPU needs" in str(problem) for problem in problems(recipes.get("opensora2_stage1"), world_size=1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "did you mean train"),
        (["train", "tinyy"], "did you mean tiny"),
        (["train", "tiny", "--train.stps", "4"], "did you mean --train.steps"),
        (["train", "tiny", "--train.steps", "four"], "--train.steps"),
        (["plan", "tiny"], "plan needs --gpus"),
        (["validate", "tiny", "--gpus", "0"], "positive number"),
        (["validate", "opensora2_stage3", "--gpus", "7"], "not a multiple"),
    ],
)
def test_user_mistakes_end_in_one_line_and_exit_2(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    assert end.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("megasora: error: ")
    assert message in err


def test_overrides_reach_the_config(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["show", "tiny", "--train.steps", "7", "--parallel.tensor-model-parallel-size=2", "--data.frame_counts", "9", "1"])
    shown = from_dict(yaml.safe_load(capsys.readouterr().out))
    assert (shown.train.steps, shown.parallel.tensor_model_parallel_size, shown.data.frame_counts) == (7, 2, (9, 1))
    assert to_dict(shown)["recipe"] == "tiny"
