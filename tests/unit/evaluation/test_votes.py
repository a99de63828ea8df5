"""Vote files to win rates, by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megasora import cli
from megasora.config.errors import UserError
from megasora.evaluation.votes import FORMAT, preferences, read_ballot

Z2 = 3.841458820694124
"""1.959964 squared."""


def ballot(path: Path, choices: list[tuple[str, str]], **changes: Any) -> Path:
    """A file of votes; each is (choice, left)."""
    votes = [{"pair": f"clip {k}", "choice": choice, "left": left} for k, (choice, left) in enumerate(choices)]
    told = {"format": FORMAT, "page": "p", "voter": path.stem, "a": "ours", "b": "theirs", "pairs": len(votes), "votes": votes}
    path.write_text(json.dumps({**told, **changes}))
    return path


def test_win_rates_and_their_intervals_by_hand(tmp_path: Path) -> None:
    first = ballot(tmp_path / "1.json", [("a", "a"), ("a", "b"), ("b", "b"), ("tie", "a")])
    second = ballot(tmp_path / "2.json", [("a", "a"), ("tie", "b")])
    (found,) = preferences([read_ballot(first), read_ballot(second)])
    assert (found.a, found.b, found.voters) == ("ours", "theirs", 2)
    assert (found.prefer_a.count, found.prefer_b.count, found.tie.count, found.prefer_a.of) == (3, 1, 2, 6)
    assert found.prefer_a.share == 0.5
    # Wilson for 3 of 6: centre (1/2 + z^2/12) / (1 + z^2/6) = 1/2, half z sqrt(1/24 + z^2/144) / (1 + z^2/6)
    half = (Z2 * (1 / 24 + Z2 / 144)) ** 0.5 / (1 + Z2 / 6)
    assert found.prefer_a.low == pytest.approx(0.5 - half)
    assert found.prefer_a.high == pytest.approx(0.5 + half)
    assert (found.decided_a.count, found.decided_a.of) == (3, 4)
    # left was chosen in (a, a), (b, b), (a, a) and not in (a, b)
    assert (found.left.count, found.left.of) == (3, 4)


def test_sets_that_stand_the_other_way_round_are_one_comparison(tmp_path: Path) -> None:
    one = ballot(tmp_path / "1.json", [("a", "a")])
    other = ballot(tmp_path / "2.json", [("a", "a"), ("a", "b")], a="theirs", b="ours")
    (found,) = preferences([read_ballot(one), read_ballot(other)])
    assert (found.prefer_a.count, found.prefer_b.count) == (1, 2)  # both votes of the second file are for theirs
    # the left clip was chosen in the first two votes, not in the third
    assert (found.left.count, found.left.of) == (2, 3)


def test_only_ties_leave_the_decided_share_unknown(tmp_path: Path) -> None:
    (found,) = preferences([read_ballot(ballot(tmp_path / "1.json", [("tie", "a")]))])
    assert (found.decided_a.of, found.decided_a.share) == (0, None)
    assert found.tie.share == 1.0


def test_one_voter_counts_once(tmp_path: Path) -> None:
    one, two = ballot(tmp_path / "1.json", [("a", "a")]), ballot(tmp_path / "2.json", [("b", "a")], voter="1")
    with pytest.raises(UserError, match="of one voter"):
        preferences([read_ballot(one), read_ballot(two)])


@pytest.mark.parametrize(
    "changes",
    [
        {"format": "other"},
        {"votes": [{"pair": "x", "choice": "c", "left": "a"}]},
        {"votes": [{"pair": "x", "choice": "a", "left": "a"}] * 2},
        {"votes": [{"pair": "x"}]},
        {"votes": 3},
        {"pairs": "many"},
    ],
)
def test_a_file_that_is_none_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="no file of votes"):
        read_ballot(ballot(tmp_path / "1.json", [("a", "a")], **changes))


def test_the_command_prints_a_table_or_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = ballot(tmp_path / "1.json", [("a", "a"), ("a", "a"), ("b", "a"), ("tie", "a")], pairs=9)
    cli.main(["evaluate", "votes", str(path)])
    out = capsys.readouterr().out
    assert "ours preferred" in out
    assert "50.0 %" in out
    assert "4 of 9 pairs" in out
    cli.main(["evaluate", "votes", str(path), "--json"])
    told = json.loads(capsys.readouterr().out)
    found = told["preferences"][0]["prefer_b"]
    assert (found["count"], found["of"], found["share"]) == (1, 4, 0.25)
    assert told["files"][0]["votes"] == 4
    for words, said in ((["evaluate", "votes"], "needs at least one FILE"), (["evaluate", "votes", "nowhere"], "no votes at nowhere")):
        with pytest.raises(SystemExit) as end:
            cli.main(words)
        assert end.value.code == 2
        assert said in capsys.readouterr().err
