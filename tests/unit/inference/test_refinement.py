"""Prompts are rewritten by whoever answers; whoever does not leaves them as they are, and it is said."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megasora import cli
from megasora.cli.parsing import parse
from megasora.config.errors import UserError
from megasora.data.decoding.writer import write_picture
from megasora.inference.chat import INSTRUCTIONS, NoAnswerError, asker
from megasora.inference.refine_settings import RefineConfig
from megasora.inference.refinement import ANSWERS, FALLBACK_SCORE, Refinement, motion_score, refine
from megasora.inference.requests import ClipRequest, Common
from megasora.inference.sample import Outcome, Wanted, run_sample
from megasora.models.sampler import ClipSize
from megasora.parallel import groups
from tests.pool import RankPool
from tests.published.small_weights import save_mmdit, small_config, transformer
from tests.unit.inference.endpoint import Endpoint, endpoint, says

LONG = "A view of a harbour at dawn. Two red boats rock on grey water while gulls circle above the quay."


def request(prompt: str = "harbour", **fields: Any) -> ClipRequest:
    base = ClipRequest(
        row=0,
        name=prompt,
        prompt=prompt,
        negative="",
        kind="t2v",
        image=None,
        end_image=None,
        video=None,
        seed=1,
        size=ClipSize(num_frames=5, height=32, width=32),
        aspect=None,
    )
    return replace(base, **fields)


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """One rank that has nobody to tell; the command's broadcast is tested on a pool."""
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)
    monkeypatch.setattr("torch.distributed.broadcast_object_list", lambda found, src: None)


def settings(there: Endpoint, *, motion_score: bool = False, **config: Any) -> Refinement:
    return Refinement(config=RefineConfig(**{"url": there.url, "timeout_s": 5.0, "tries": 1, **config}), motion_score=motion_score)


@pytest.mark.usefixtures("alone")
def test_a_good_answer_is_the_prompt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("SOME_KEY", "secret")
    with endpoint(lambda body, _: (200, says(f'"{LONG[:30]}\n{LONG[30:]}" '))) as there:
        (made,) = refine([request()], settings(there, model="small", key_variable="SOME_KEY"))
    assert made.prompt == LONG[:30] + " " + LONG[30:] and made.refined_from == "harbour"
    assert made.refinement == {"by": f"small at {there.url}", "use": "t2v"} and made.motion_score is None
    (body,), (headers,) = there.bodies, there.headers
    assert headers["path"] == "/v1/chat/completions" and headers["Authorization"] == "Bearer secret"
    assert (body["model"], body["temperature"], body["top_p"], body["max_tokens"], body["stream"]) == ("small", 0.01, 0.7, 250, False)
    assert body["messages"] == [{"role": "system", "content": INSTRUCTIONS["t2v"]}, {"role": "user", "content": "harbour"}]
    assert capsys.readouterr().err == ""


def hang(body: dict[str, Any], there: Endpoint) -> tuple[int, dict[str, Any]]:
    there.release.wait(10)
    return 200, says(LONG)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    ("reply", "cause"),
    [
        (lambda body, _: (200, says("I'm sorry, but I can't help with that.")), "the model refused"),
        (lambda body, _: (200, says(None, refusal="no")), "the model refused"),
        (lambda body, _: (200, {"choices": [{"message": {"content": "A v"}, "finish_reason": "content_filter"}]}), "the model refused"),
        (lambda body, _: (500, "down"), "HTTP 500 Internal Server Error"),
        (lambda body, _: (401, "who?"), "HTTP 401 Unauthorized (NO_KEY is not set)"),
        (lambda body, _: (302, ""), "HTTP 302 Found"),
        (hang, "no answer within 0.3 s"),
        (lambda body, _: (200, "{not json"), "an answer that is no chat completion"),
        (lambda body, _: (200, {"choices": []}), "an answer that is no chat completion"),
        (lambda body, _: (200, says([{"type": "text"}])), "an answer that is no chat completion"),  # type: ignore[arg-type]
        (lambda body, _: (200, says(' "" ')), "an empty answer"),
        (lambda body, _: (200, says(None)), "an empty answer"),
        (lambda body, _: (200, "x" * 1_000_001), "an answer of more than 1,000,000 bytes"),
    ],
)
def test_no_answer_leaves_the_prompt_and_is_said_once(
    reply: Callable[..., Any], cause: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("NO_KEY", raising=False)
    with endpoint(reply) as there:
        made = refine([request(), request("river")], settings(there, timeout_s=0.3, key_variable="NO_KEY"))
    assert [one.prompt for one in made] == ["harbour", "river"] and [one.refined_from for one in made] == [None, None]
    assert all(one.refinement == {"by": f"gpt-4o at {there.url}", "use": "t2v", "failure": cause} for one in made)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and cause in said and "the prompt is drawn as it is" in said
    assert "Authorization" not in there.headers[0]


@pytest.mark.usefixtures("alone")
def test_a_busy_endpoint_is_asked_again_and_a_mistaken_request_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr("time.sleep", pauses.append)
    with endpoint(lambda body, here: (200, says(LONG)) if len(here.bodies) == 3 else (429, "")) as there:
        (made,) = refine([request()], settings(there, tries=3))
    assert made.prompt == LONG and len(there.bodies) == 3 and pauses == [1, 2]
    with endpoint(lambda body, _: (400, "")) as there:
        (made,) = refine([request()], settings(there, tries=3))
    assert len(there.bodies) == 1 and made.refinement is not None and made.refinement["failure"] == "HTTP 400 Bad Request"


@pytest.mark.usefixtures("alone")
def test_a_dead_endpoint_is_given_up_after_three_prompts(capsys: pytest.CaptureFixture[str]) -> None:
    with endpoint(lambda body, _: (503, "")) as there:
        made = refine([request(f"p{k}") for k in range(5)], settings(there))
    assert len(there.bodies) == 3
    failures = [dict(one.refinement or {})["failure"] for one in made]
    assert failures == ["HTTP 503 Service Unavailable"] * 3 + ["not asked: 3 questions in a row had no answer"] * 2
    assert capsys.readouterr().err.count("\n") == 2
    with endpoint(lambda body, _: (200, says("I cannot do that"))) as there:  # a refusal says nothing about the next prompt
        refine([request(f"p{k}") for k in range(5)], settings(there))
    assert len(there.bodies) == 5


@pytest.mark.usefixtures("alone")
def test_a_given_picture_is_shown_and_a_given_clip_is_not(tmp_path: Path) -> None:
    picture, clip = tmp_path / "a.png", tmp_path / "a.mp4"
    write_picture(picture, torch.zeros(3, 16, 16))
    clip.write_bytes(b"")
    with endpoint(lambda body, _: (200, says(LONG))) as there:
        requests = [
            request(kind="i2v_head", image=picture),
            request(kind="i2v_tail", end_image=picture),
            request(kind="i2v_head", image=clip),
            request(kind="v2v_head", video=clip),
            request("still", size=ClipSize(num_frames=1, height=32, width=32)),
        ]
        made = refine(requests, settings(there))
    assert [dict(one.refinement or {})["use"] for one in made] == ["i2v", "i2v", "t2v", "t2v", "t2i"]
    uses = [body["messages"][0]["content"] for body in there.bodies]
    assert uses == [INSTRUCTIONS[use] for use in ("i2v", "t2v", "t2i")]  # equal questions are asked once
    text, shown = there.bodies[0]["messages"][1]["content"]
    assert text == {"type": "text", "text": "harbour"}
    assert shown["image_url"]["url"] == "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode()


@pytest.mark.usefixtures("alone")
def test_a_drawn_first_frame_gets_a_prompt_of_its_own() -> None:
    with endpoint(lambda body, _: (200, says("a picture" if "single picture" in body["messages"][0]["content"] else LONG))) as there:
        (made,) = refine([request()], settings(there), first_frames=True)
    assert (made.prompt, made.picture_prompt) == (LONG, "a picture")


@pytest.mark.usefixtures("alone")
def test_a_motion_score_is_asked_of_the_refined_prompt(capsys: pytest.CaptureFixture[str]) -> None:
    def reply(body: dict[str, Any], _: Endpoint) -> tuple[int, dict[str, Any]]:
        return 200, says("9 motion score" if body["max_tokens"] == 100 else LONG)

    with endpoint(reply) as there:
        moving, still = refine(
            [request(), request("still", size=ClipSize(num_frames=1, height=32, width=32))], settings(there, motion_score=True)
        )
    assert moving.motion_score == 9.0 and still.motion_score is None
    assert there.bodies[1]["messages"] == [
        {"role": "system", "content": INSTRUCTIONS["motion_score"]},
        {"role": "user", "content": LONG},
    ]
    with endpoint(lambda body, _: (200, says("rather lively"))) as there:
        (made,) = refine([request()], settings(there, motion_score=True, prompts=False))
    assert made.prompt == "harbour" and made.motion_score == FALLBACK_SCORE == 4
    assert made.refinement is not None and made.refinement["motion_failure"] == "no motion score from 1 to 15 in the answer"
    assert "the motion score is 4" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("answer", "score"),
    [("1 motion score", 1), ("15 motion score.", 15), ("“7 motion score”", 7), ("8", 8), ("I would say 12 Motion  score", 12)]
    + [(bad, None) for bad in ("0 motion score", "16 motion score", "-3 motion score", "4.5 motion score", "score: high", "4 to 6", "")],
)
def test_motion_scores_have_bounds(answer: str, score: int | None) -> None:
    if score is None:
        with pytest.raises(NoAnswerError, match="1 to 15"):
            motion_score(answer)
    else:
        assert motion_score(answer) == score


@pytest.mark.usefixtures("alone")
def test_an_interrupted_table_goes_on_with_the_same_texts(tmp_path: Path) -> None:
    def first(body: dict[str, Any], _: Endpoint) -> tuple[int, Any]:
        return (200, says(LONG)) if body["messages"][1]["content"] == "harbour" else (500, "")

    clips = [request(), request("drawn"), request("not drawn")]
    with endpoint(first) as there:
        refine(clips, settings(there), folder=tmp_path)
        assert len(list((tmp_path / ANSWERS).iterdir())) == 3
    (tmp_path / "drawn.json").write_text("{}")
    with endpoint(lambda body, _: (200, says("another text"))) as again:
        same_name = replace(settings(there), config=replace(settings(there).config, url=there.url))
        made = refine(clips, same_name, folder=tmp_path)  # the first endpoint is gone: only what failed and was not drawn is asked again
        assert [one.prompt for one in made] == [LONG, "drawn", "not drawn"]
        assert "HTTP 500" in dict(made[1].refinement or {})["failure"] and "cannot reach" in dict(made[2].refinement or {})["failure"]
        made = refine(clips, settings(again), folder=tmp_path)  # another endpoint was never asked
        assert [one.prompt for one in made] == ["another text"] * 3
    for path in (tmp_path / ANSWERS).iterdir():
        path.write_text("[3]")
    with pytest.raises(UserError, match="holds no answer to a prompt"):
        refine(clips, settings(there), folder=tmp_path)


def shout(prompt: str, use: str, image: Path | None) -> str:
    """A local model."""
    if prompt == "bad":
        raise RuntimeError("no memory")
    return f"{prompt.upper()} {use} {image}"


@pytest.mark.usefixtures("alone")
def test_a_function_answers_in_place_of_an_endpoint(capsys: pytest.CaptureFixture[str]) -> None:
    here = RefineConfig(function=f"{__name__}:shout")
    good, bad = refine([request(), request("bad")], Refinement(config=here))
    assert good.prompt == "HARBOUR t2v None" and dict(good.refinement or {})["by"] == f"{__name__}:shout"
    assert bad.prompt == "bad" and "RuntimeError: no memory" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"url": "http://x", "function": "a:b"}, "not both"),
        ({"url": "file:///etc/passwd"}, "no http:// or https://"),
        ({"function": "json"}, "not MODULE:FUNCTION"),
        ({"function": "json:nothing"}, "cannot be imported"),
        ({"function": "no_such_module:f"}, "cannot be imported"),
        ({"function": "json:__name__"}, "is no function"),
        ({"url": "http://x", "tries": 0}, "--refine.tries 0"),
        ({"url": "http://x", "timeout_s": 0.0}, "--refine.timeout_s 0"),
    ],
)
def test_settings_that_cannot_work(config: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        asker(RefineConfig(**config))
    with pytest.raises(UserError, match="asks a language model"):
        Refinement(config=RefineConfig(), motion_score=True).check()


def test_flags_of_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["sample", "tiny", "--weights", "w", "--output", "o", "--prompt", "a"]
    _, args = parse([*words, "--refine.url", "http://x/v1", "--refine.no_prompts", "--motion_score", "dynamic"])
    assert args.refine == RefineConfig(url="http://x/v1", prompts=False) and args.motion_score == "dynamic"
    _, args = parse([*words, "--motion_score", "6"])
    assert args.refine == RefineConfig() and not args.refine.on and args.motion_score == 6.0
    with pytest.raises(SystemExit) as end:
        cli.main([*words, "--motion_score", "dynamic"])
    said = capsys.readouterr().err
    assert end.value.code == 2 and "give --refine.url or --refine.function, or a number" in said and said.count("\n") == 1


def test_a_record_does_not_tell_a_password() -> None:
    assert RefineConfig(url="https://me:secret@host:8/v1/", model="m").by == "m at https://host:8/v1"


def draw(rank: int, folder: str, url: str, output: str, again: bool) -> Outcome:
    """`megasora sample --refine.url URL --motion_score dynamic` on one rank."""
    path = Path(folder)
    config = small_config(path)
    config = replace(config, sample=replace(config.sample, height=32, width=32, num_frames=5, steps=2))
    common = Common(kind=None, negative="", resolution=None, aspect=None, num_samples=1)
    wanted = Wanted(again=path / "a" / "sample_000.json", common=common) if again else Wanted(prompt=("harbour",), common=common)
    refinement = None if again else Refinement(config=RefineConfig(url=url, tries=1), motion_score=True)
    if groups.initialized():
        groups.destroy()
    weights = path / "mmdit.safetensors"
    outcome = run_sample(config, wanted, weights=weights, output=path / output, refinement=refinement)
    groups.destroy()
    return outcome


def test_all_ranks_draw_one_answer_and_again_asks_nobody(pool: RankPool, tmp_path: Path) -> None:
    torch.manual_seed(3)
    save_mmdit(transformer(guidance=False), torch.nn.Linear(68, 64), tmp_path / "mmdit.safetensors")
    small_config(tmp_path)

    def reply(body: dict[str, Any], there: Endpoint) -> tuple[int, dict[str, Any]]:
        return 200, says("9 motion score" if body["max_tokens"] == 100 else f"answer {len(there.bodies)}")

    with endpoint(reply) as there:
        pool.run(2, draw, str(tmp_path), there.url, "a", False)
        assert len(there.bodies) == 2
    record = json.loads((tmp_path / "a" / "sample_000.json").read_text())
    assert record["prompt"] == "answer 1" and record["refined_from"] == "harbour"
    assert record["caption"] == "answer 1. 24 FPS. 9 motion score." and record["sample"]["motion_score"] == 9.0
    assert record["refinement"] == {"by": f"gpt-4o at {there.url}", "use": "t2v"}
    pool.run(1, draw, str(tmp_path), "", "b", True)
    assert (tmp_path / "a" / "sample_000.mp4").read_bytes() == (tmp_path / "b" / "sample_000.mp4").read_bytes()
    again = json.loads((tmp_path / "b" / "sample_000.json").read_text())
    assert again["refined_from"] == "harbour" and again["caption"] == record["caption"]
