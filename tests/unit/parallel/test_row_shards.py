"""The rows a rank holds of a parameter are rectangles of the same canonical tensors as the whole."""

from __future__ import annotations

import pytest
import torch

from megasora.config.schema import ModelConfig
from megasora.models.mmdit.canonical import pieces_of
from megasora.parallel.row_shards import held_rows, pieces_of_rows

MODEL = ModelConfig(hidden_size=16, num_attention_heads=2, ffn_hidden_size=32)


@pytest.mark.parametrize("ranks", [1, 3, 5, 16, 60, 81])
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("single_blocks.1.linear1.weight", (40, 16)),  # q, k, v, mlp of one of two TP ranks
        ("single_blocks.1.linear1.bias", (40,)),
        ("single_blocks.1.linear2.weight", (16, 24)),  # two pieces side by side
        ("double_blocks.0.img.attn.proj.weight", (16, 8)),
    ],
)
def test_the_rows_of_all_ranks_are_the_whole(name: str, shape: tuple[int, ...], ranks: int) -> None:
    whole = torch.arange(torch.Size(shape).numel()).view(shape)
    pieces = pieces_of(name, shape, model=MODEL, tp_rank=1, tp_size=2)
    expected = {(piece.key, index): value for piece in pieces for index, value in elements(piece, whole)}
    found: dict[tuple[str, int], int] = {}
    for number, rows in enumerate(whole.chunk(ranks)):  # torch deals rows out; FSDP2 follows it
        for piece in pieces_of_rows(pieces, first=number * whole.chunk(ranks)[0].shape[0], count=rows.shape[0]):
            found |= {(piece.key, index): value for index, value in elements(piece, rows)}
    assert found == expected
    assert len(found) == whole.numel()


def elements(piece: object, tensor: torch.Tensor) -> list[tuple[int, int]]:
    """(element number in the canonical tensor, value) of a piece."""
    return list(zip(piece.element_index().flatten().tolist(), piece.view(tensor).flatten().tolist(), strict=True))  # type: ignore[attr-defined]


def test_a_rank_without_rows_has_no_pieces() -> None:
    pieces = pieces_of("single_blocks.1.linear2.weight", (16, 24), model=MODEL, tp_rank=0, tp_size=2)
    assert pieces_of_rows(pieces, first=16, count=0) == ()


def test_a_parameter_that_is_not_sharded_is_held_whole() -> None:
    parameter = torch.nn.Parameter(torch.ones(3, 2))
    held, first = held_rows(parameter)
    held.zero_()
    assert first == 0 and not parameter.any()
