"""VBench: scores by hand and against published ones, the clips it wants, what is skipped, and whose share they are."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from megasora import cli
from megasora.config.errors import UserError
from megasora.data.decoding.writer import write_video
from megasora.evaluation.files import ClipFacts, clip_facts
from megasora.evaluation.vbench.dimensions import BY_NAME, DIMENSIONS
from megasora.evaluation.vbench.making import make_clips
from megasora.evaluation.vbench.prompts import PlannedClip, PromptEntry, clip_name, clip_seed, plan_clips, read_prompts, write_plan
from megasora.evaluation.vbench.published import PUBLISHED
from megasora.evaluation.vbench.scores import Result, read_results, result_files, scores_of

FACTS = ClipFacts(num_frames=5, height=32, width=48)


def results(score: float = 0.5, **others: float) -> dict[str, Result]:
    return {dimension.name: Result(score=others.get(dimension.name, score), clips=1) for dimension in DIMENSIONS}


def test_normalisation_by_hand() -> None:
    # Vchitect/VBench scripts/constant.py: (score - Min) / (Max - Min)
    found = scores_of(results(subject_consistency=0.95, motion_smoothness=0.9, scene=0.5, appearance_style=0.25)).normalised
    assert found["subject_consistency"] == pytest.approx((0.95 - 0.1462) / (1 - 0.1462))
    assert found["motion_smoothness"] == pytest.approx((0.9 - 0.706) / (0.9975 - 0.706))
    assert found["scene"] == pytest.approx(0.5 / 0.8222)
    assert found["appearance_style"] == pytest.approx((0.25 - 0.0009) / (0.2855 - 0.0009))
    assert found["human_action"] == 0.5
    assert BY_NAME["motion_smoothness"].normalised(0.9975) == pytest.approx(1.0)


def test_groups_and_total_by_hand() -> None:
    # every dimension at its best but dynamic degree at 0 and colour at 0: quality (6 x 1 + 0.5 x 0) / 6.5, semantic 8 / 9
    best = {dimension.name: Result(score=dimension.high, clips=1) for dimension in DIMENSIONS}
    found = scores_of({**best, "dynamic_degree": Result(score=0, clips=1), "color": Result(score=0, clips=1)})
    assert found.quality == pytest.approx(6 / 6.5)
    assert found.semantic == pytest.approx(8 / 9)
    assert found.total == pytest.approx((4 * 6 / 6.5 + 8 / 9) / 5)


@pytest.mark.parametrize("model", [model for model in PUBLISHED if len(model.scores) == 19], ids=lambda model: model.model)
def test_published_dimensions_give_the_published_totals(model: Any) -> None:
    # an independent witness of the weights: the leaderboard's own 16 scores of Sora and HunyuanVideo, printed to 0.01 percent
    found = scores_of({name: Result(score=value / 100, clips=1) for name, value in model.scores.items() if name in BY_NAME})
    for name in ("quality", "semantic", "total"):
        assert 100 * getattr(found, name) == pytest.approx(model.scores[name], abs=0.011)


def test_two_models_have_all_dimensions_and_every_model_a_source() -> None:
    assert [model.model for model in PUBLISHED if set(BY_NAME) <= model.scores.keys()] == ["Sora", "HunyuanVideo"]
    assert all(model.source and model.scores.keys() <= {*BY_NAME, "quality", "semantic", "total"} for model in PUBLISHED)


def test_a_missing_dimension_leaves_its_group_and_the_total_open() -> None:
    found = scores_of({name: result for name, result in results().items() if name != "scene"})
    assert (found.semantic, found.total, found.missing) == (None, None, ("scene",))
    assert found.quality is not None


def write_results(path: Path, scores: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(scores))
    return path


def test_files_are_put_together_and_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clips = [{"video_path": "a-0.mp4", "video_results": 0.5}, {"video_path": "a-1.mp4", "video_results": 0.5}]
    write_results(tmp_path / "run" / "x_eval_results.json", {"color": [0.81, clips], "scene": [0.5, clips]})
    write_results(tmp_path / "run" / "y_eval_results.json", {"dynamic_degree": [0.7, [{"video_path": "a", "video_results": True}]]})
    write_results(tmp_path / "run" / "x_full_info.json", {"no": "result"})
    cli.main(["evaluate", "vbench", "scores", str(tmp_path / "run"), "--json"])
    told = json.loads(capsys.readouterr().out)
    assert told["dimensions"]["color"] == {"score": 0.81, "normalised": 0.81, "clips": 2}
    assert told["dimensions"]["scene"]["normalised"] == pytest.approx(0.5 / 0.8222)
    assert (told["total"], len(told["missing"])) == (None, 13)
    assert [model["model"] for model in told["published"]] == ["Open-Sora 2.0", "Sora", "HunyuanVideo"]
    cli.main(["evaluate", "vbench", "scores", str(tmp_path / "run")])
    out = capsys.readouterr().out
    assert "background_consistency" in out
    assert "81.00" in out
    assert "84.34" in out
    assert "bytedance/ContentV" in out


@pytest.mark.parametrize(
    ("held", "said"),
    [
        ({"colour": [0.5, []]}, "no dimension"),
        ({"color": [67.5, []]}, "VBench writes scores in"),
        ({"color": 0.5}, "no list that begins with a score"),
        ({"color": []}, "no VBench result file"),
        ({"color": [math.nan, []]}, "no list that begins with a score"),
        ([], "no table of dimensions"),
        ({}, "no table of dimensions"),
    ],
)
def test_files_that_are_none_are_refused(tmp_path: Path, held: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        read_results([write_results(tmp_path / "x_eval_results.json", held)])


def test_two_scores_of_a_dimension_are_refused(tmp_path: Path) -> None:
    files = [write_results(tmp_path / name / "x_eval_results.json", {"color": [score, []]}) for name, score in (("a", 0.5), ("b", 0.6))]
    with pytest.raises(UserError, match="disagree about color"):
        read_results(files)
    with pytest.raises(UserError, match="no VBench results"):
        result_files([tmp_path / "nowhere"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no file"):
        result_files([tmp_path / "empty"])


def prompt_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "prompts_per_dimension"
    folder.mkdir()
    (folder / "color.txt").write_text("a red car\na blue cup\n")
    (folder / "temporal_flickering.txt").write_text("a still lamp\n")
    (folder / "scene.txt").write_text("a red car\n\nan alley\n")
    return folder


def test_prompts_come_from_a_list_a_folder_or_the_full_info(tmp_path: Path) -> None:
    (tmp_path / "all.txt").write_text("a red car\n  a blue cup \n\na red car\n")
    assert [entry.prompt for entry in read_prompts(tmp_path / "all.txt")] == ["a red car", "a blue cup"]
    folder = {entry.prompt: entry.lists for entry in read_prompts(prompt_folder(tmp_path))}
    assert folder == {
        "a red car": ("color", "scene"),
        "a blue cup": ("color",),
        "an alley": ("scene",),
        "a still lamp": ("temporal_flickering",),
    }
    info = [
        {"prompt_en": "an alley", "dimension": ["scene", "background_consistency"]},
        {"prompt_en": "a dog", "dimension": ["motion_smoothness", "dynamic_degree"]},
    ]
    (tmp_path / "full.json").write_text(json.dumps(info))
    assert {entry.prompt: entry.lists for entry in read_prompts(tmp_path / "full.json")} == {
        "an alley": ("scene",),  # background consistency is measured on scene's prompts (dimension_to_folder.json)
        "a dog": ("subject_consistency",),
    }


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("empty.txt", "\n", "holds no prompt"),
        ("full.json", '[{"prompt": "x"}]', "holds no VBench prompts"),
        ("full.json", '[{"prompt_en": "x", "dimension": ["taste"]}]', "taste is no dimension"),
        ("lists/taste.txt", "x", "is no prompt list"),
        ("gone", None, "no prompts at"),
    ],
)
def test_prompts_that_are_none_are_refused(tmp_path: Path, name: str, text: str | None, said: str) -> None:
    path = tmp_path / name
    if text is not None:
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    with pytest.raises(UserError, match=said):
        read_prompts(path.parent if "/" in name else path)


def test_the_plan_has_vbenchs_names_and_counts(tmp_path: Path) -> None:
    entries = read_prompts(prompt_folder(tmp_path))
    flat = plan_clips(entries, samples=5, flicker_samples=25, per_dimension=False, seed=1)
    assert len(flat) == 3 * 5 + 25
    assert {clip.path for clip in flat} >= {"a red car-0.mp4", "a red car-4.mp4", "a still lamp-24.mp4"}
    folders = plan_clips(entries, samples=5, flicker_samples=25, per_dimension=True, seed=1)
    assert len(folders) == (2 + 2) * 5 + 25
    assert {clip.path for clip in folders} >= {"color/a red car-0.mp4", "scene/a red car-0.mp4", "temporal_flickering/a still lamp-0.mp4"}
    by_path = {clip.path: clip.seed for clip in folders}
    assert by_path["color/a red car-3.mp4"] == by_path["scene/a red car-3.mp4"] == next(c.seed for c in flat if c.path == "a red car-3.mp4")


def test_seeds_differ_and_hang_on_nothing_else() -> None:
    seeds = {clip_seed(base, prompt, index) for base in (1, 2) for prompt in ("a", "b") for index in range(50)}
    assert len(seeds) == 200
    assert all(0 <= seed < 2**31 for seed in seeds)


@pytest.mark.parametrize("prompt", ["a/b", ".hidden", "x" * 251])
def test_a_prompt_that_is_no_file_name_is_refused(prompt: str) -> None:
    with pytest.raises(UserError, match="no file can be called"):
        clip_name(prompt, 0)


def test_folders_need_lists() -> None:
    with pytest.raises(UserError, match="needs to know the lists"):
        plan_clips([PromptEntry(prompt="a")], samples=5, flicker_samples=25, per_dimension=True, seed=0)
    with pytest.raises(UserError, match="at least 1"):
        plan_clips([PromptEntry(prompt="a")], samples=0, flicker_samples=25, per_dimension=False, seed=0)


class Drawer:
    """Stands in for a model: a grey clip."""

    def __init__(self, *, until: int | None = None) -> None:
        self.drawn: list[str] = []
        self.until = until

    def __call__(self, clip: PlannedClip, path: Path) -> None:
        if len(self.drawn) == self.until:
            raise KeyboardInterrupt
        self.drawn.append(clip.path)
        write_video(path, torch.zeros(3, 5, 32, 48), fps=8)


PLAN = plan_clips([PromptEntry(prompt=f"prompt {k}") for k in range(4)], samples=3, flicker_samples=3, per_dimension=False, seed=0)


def test_an_interrupted_run_goes_on_and_a_finished_one_makes_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        make_clips(PLAN, tmp_path, draw=Drawer(until=5), facts=FACTS, task=(0, 1))
    rest = Drawer()
    made = make_clips(PLAN, tmp_path, draw=rest, facts=FACTS, task=(0, 1))
    assert (made.planned, made.kept, made.made, made.remade) == (12, 5, 7, ())
    assert rest.drawn == [clip.path for clip in PLAN[5:]]
    assert make_clips(PLAN, tmp_path, draw=Drawer(until=0), facts=FACTS, task=(0, 1)).made == 0


def test_clips_cut_short_are_made_again_and_other_settings_are_refused(tmp_path: Path) -> None:
    make_clips(PLAN, tmp_path, draw=Drawer(), facts=FACTS, task=(0, 1))
    cut, short = tmp_path / PLAN[1].path, tmp_path / PLAN[2].path
    cut.write_bytes(cut.read_bytes()[:200])
    write_video(short, torch.zeros(3, 3, 32, 48), fps=8)
    again = make_clips(PLAN, tmp_path, draw=Drawer(), facts=FACTS, task=(0, 1))
    assert again.remade == (PLAN[1].path, PLAN[2].path)
    assert clip_facts(short) == FACTS
    with pytest.raises(UserError, match="5 frames of 32x48, these settings make 9 frames of 64x48") as raised:
        make_clips(PLAN, tmp_path, draw=Drawer(), facts=ClipFacts(num_frames=9, height=64, width=48), task=(0, 1))
    assert "\n" not in str(raised.value)


def test_shares_of_an_array_are_disjoint_and_whole(tmp_path: Path) -> None:
    drawn: list[str] = []
    for task in range(5):
        drawer = Drawer()
        make_clips(PLAN, tmp_path / str(task), draw=drawer, facts=FACTS, task=(task, 5))
        assert drawer.drawn == [clip.path for k, clip in enumerate(PLAN) if k % 5 == task]
        drawn += drawer.drawn
    assert sorted(drawn) == sorted(clip.path for clip in PLAN)


def test_progress_is_told_before_each_clip(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    make_clips(PLAN[:2], tmp_path, draw=Drawer(), facts=FACTS, task=(0, 1), on_clip=lambda done, total: told.append((done, total)))
    assert told == [(0, 2), (1, 2), (2, 2)]


def test_the_plan_file_holds_every_seed(tmp_path: Path) -> None:
    write_plan(tmp_path / "deep" / "plan.csv", PLAN)
    with (tmp_path / "deep" / "plan.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["path"], row["prompt"], int(row["index"]), int(row["seed"])) for row in rows] == [
        (clip.path, clip.prompt, clip.index, clip.seed) for clip in PLAN
    ]
