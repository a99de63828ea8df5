"""Packs: every token is on exactly one rank, shares are equal, orders are permutations."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megasora.config.errors import UserError
from megasora.parallel.pack import Pack, PackSplit, SampleShape

SHAPES = st.builds(
    lambda text, t, h, w: SampleShape(text_tokens=text, grid=(t, h, w)),
    st.integers(1, 9),
    st.integers(1, 3),
    st.integers(1, 5),
    st.integers(1, 5),
)


@given(st.lists(SHAPES, min_size=1, max_size=5), st.integers(1, 3), st.integers(1, 4), st.sampled_from([1, 4]))
@settings(max_examples=60, deadline=None)
def test_shares_are_equal_and_cover_every_token_once(samples: list[SampleShape], tp: int, cp: int, multiple: int) -> None:
    split = PackSplit(tp=tp, cp=cp, row_multiple=multiple)
    packs = [Pack(samples, split=split, tp_rank=t, cp_rank=c) for c in range(cp) for t in range(tp)]
    assert len({(pack.num_text, pack.num_video) for pack in packs}) == 1
    assert packs[0].num_text + packs[0].num_video == split.share_tokens(samples)
    text = torch.cat([pack.text_index for pack in packs]).sort().values
    assert torch.equal(text, torch.arange(packs[0].text_length))
    for number, sample in enumerate(samples):
        tokens = torch.cat([pack.video_tokens_of(number)[1] for pack in packs]).sort().values
        assert torch.equal(tokens, torch.arange(sample.video_tokens))


@given(st.lists(SHAPES, min_size=1, max_size=4), st.integers(1, 2), st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_attention_order_groups_by_sample_and_inverts(samples: list[SampleShape], tp: int, cp: int) -> None:
    pack = Pack(samples, split=PackSplit(tp=tp, cp=cp))
    order = pack.attention_order(range(cp))
    assert list(order.lengths[: len(samples)]) == [sample.tokens for sample in samples]
    assert sum(order.lengths) == pack.text_length + pack.video_length
    if order.index is not None and order.inverse is not None:
        assert torch.equal(order.index[order.inverse], torch.arange(len(order.index)))


def test_cp_split_keeps_text_and_video_of_every_sample_on_every_rank() -> None:
    samples = [SampleShape(text_tokens=8, grid=(2, 4, 4)), SampleShape(text_tokens=8, grid=(1, 4, 4))]
    for rank in range(4):
        pack = Pack(samples, split=PackSplit(cp=4), cp_rank=rank)
        assert [len(pack.text_tokens_of(n)[0]) for n in range(2)] == [2, 2]
        assert [len(pack.video_tokens_of(n)[0]) for n in range(2)] == [8, 4]


def test_the_published_16_9_shape_is_padded_once_at_the_end() -> None:
    sample = SampleShape(text_tokens=512, grid=(33, 12, 21))
    pack = Pack([sample], split=PackSplit(cp=8))
    assert sample.tokens == 8828
    assert (pack.text_length, pack.video_length) == (512, 8320)
    assert pack.attention_order(range(8)).lengths == (8828, 4)


def test_streams_are_padded_to_equal_runs_of_whole_row_blocks() -> None:
    # TP 2 x CP 2 x 16 rows: multiples of 64
    split = PackSplit(tp=2, cp=2, row_multiple=16)
    assert [split.padded(tokens) for tokens in (1, 64, 65)] == [64, 64, 128]
    assert split.share_tokens([SampleShape(text_tokens=3, grid=(1, 5, 13))]) == (64 + 128) // 4
    assert PackSplit(tp=2, cp=2).padded(65) == 68


def test_join_and_split_streams_are_inverse_and_follow_the_joint_order() -> None:
    samples = [SampleShape(text_tokens=3, grid=(1, 2, 3))]
    pack = Pack(samples, split=PackSplit(tp=3))
    text, video = torch.arange(3.0), torch.arange(10.0, 16.0)
    joint = pack.join_streams(text, video)
    assert joint.tolist() == [0, 10, 11, 1, 12, 13, 2, 14, 15]
    assert [part.tolist() for part in pack.split_streams(joint)] == [text.tolist(), video.tolist()]
    assert pack.joint_stream_index([0]).tolist() == [0, 3, 4, 1, 5, 6, 2, 7, 8]


def test_positions_count_time_height_width_and_text_stands_at_zero() -> None:
    pack = Pack([SampleShape(text_tokens=1, grid=(2, 1, 2))], split=PackSplit())
    assert pack.positions.tolist() == [[0, 0, 0], [0, 0, 0], [0, 0, 1], [1, 0, 0], [1, 0, 1]]


def test_an_empty_pack_is_refused() -> None:
    with pytest.raises(UserError, match="at least one sample"):
        Pack([], split=PackSplit())
