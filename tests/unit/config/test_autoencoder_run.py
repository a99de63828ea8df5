"""Recipes and settings of autoencoders' runs: strict both ways, known to the commands, apart from the diffusion transformers'."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megasora import recipes
from megasora.cli.parsing import parse
from megasora.config.autoencoder_checks import autoencoder_problems
from megasora.config.autoencoder_run import AutoencoderRunConfig
from megasora.config.errors import UserError
from megasora.config.io import from_dict, save_yaml, to_dict


@pytest.mark.parametrize("name", recipes.AUTOENCODER_RECIPES)
def test_a_recipe_survives_its_file(name: str, tmp_path: Path) -> None:
    config = recipes.get_autoencoder(name)
    assert from_dict(to_dict(config), AutoencoderRunConfig) == config
    save_yaml(config, tmp_path / "config.yaml")
    _, args = parse(["train-ae", str(tmp_path / "config.yaml"), "--train.steps", "7"])
    assert args.config.train.steps == 7
    assert args.config.loss == config.loss


def test_published_stages_lack_only_what_the_user_gives() -> None:
    for name in ("dc_ae_stage1", "dc_ae_stage2"):
        assert [problem.field for problem in autoencoder_problems(recipes.get_autoencoder(name), world_size=8)] == ["loss.lpips"]
    distilled = [problem.field for problem in autoencoder_problems(recipes.get_autoencoder("dc_ae_distill"), world_size=8)]
    assert distilled == ["loss.lpips", "distillation.teacher"]
    wanted = [problem.field for problem in autoencoder_problems(recipes.get_autoencoder("hunyuan_vae_finetune"), world_size=8)]
    assert wanted == ["init.weights", "loss.lpips"]


@pytest.mark.parametrize("command", ["show", "validate"])
def test_show_and_validate_take_both_kinds(command: str) -> None:
    _, of_autoencoder = parse([command, "tiny_ae", "--discriminator.weight", "0.25"])
    _, of_transformer = parse([command, "tiny", "--train.steps", "3"])
    assert of_autoencoder.config.discriminator.weight == 0.25
    assert of_transformer.config.train.steps == 3


def test_the_wrong_command_names_the_right_one() -> None:
    with pytest.raises(UserError, match="megasora train-ae takes it"):
        parse(["train", "tiny_ae"])
    with pytest.raises(UserError, match="megasora train takes it"):
        parse(["train-ae", "tiny"])
    with pytest.raises(UserError, match="did you mean hunyuan_vae_finetune"):
        parse(["train-ae", "hunyuan_vae_finetun"])


def test_an_unknown_key_is_named() -> None:
    data = to_dict(recipes.get_autoencoder("tiny_ae"))
    data["loss"]["lpips_wieght"] = 1.0
    with pytest.raises(UserError, match="did you mean lpips_weight"):
        from_dict(data, AutoencoderRunConfig)


@pytest.mark.parametrize(
    ("settings", "field", "said"),
    [
        ({"weight": -1.0}, "distillation.weight", "use 0 (none)"),
        ({"layer": "stages.3"}, "distillation.layer", "the encoder has 3 stages; use latent, or stages.0 to stages.2"),
        ({"layer": "stage 1"}, "distillation.layer", "use latent, or stages.0 to stages.2"),
        ({"teacher_px": 0}, "distillation.teacher_px", "use 224"),
        ({"cosine_margin": 2.0}, "distillation.cosine_margin", "a difference of cosines"),
        ({"gram_margin": -0.1}, "distillation.gram_margin", "a difference of cosines"),
        ({"projector_width": 0}, "distillation.projector_width", "use 2048"),
        ({"trained": "encoder"}, "discriminator.balance", "use --discriminator.balance plain"),
    ],
)
def test_settings_of_distillation_that_cannot_be_are_refused(settings: dict[str, Any], field: str, said: str) -> None:
    config = recipes.get_autoencoder("tiny_ae_distill")
    config = replace(config, distillation=replace(config.distillation, **settings))
    (problem,) = autoencoder_problems(config, world_size=1)
    assert problem.field == field
    assert said in str(problem)


def test_distillation_is_of_a_whole_clip_and_of_a_dc_ae() -> None:
    config = recipes.get_autoencoder("tiny_ae_distill")
    shared = replace(config, parallel=replace(config.parallel, context_parallel_size=2))
    assert any("use 1 with distillation" in str(problem) for problem in autoencoder_problems(shared, world_size=2))
    hunyuan = recipes.get_autoencoder("hunyuan_vae_finetune")
    other = replace(hunyuan, distillation=replace(config.distillation, teacher="folder"))
    assert any("of a DC-AE only" in str(problem) for problem in autoencoder_problems(other, world_size=1))
    off = replace(config, distillation=replace(config.distillation, weight=0.0, layer="nowhere"))
    assert autoencoder_problems(off, world_size=1) == []
