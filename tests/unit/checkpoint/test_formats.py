"""Names, counts and round trips of weight formats; every tensor used, none invented, bits equal."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megasora.checkpoint.export import export_weights
from megasora.checkpoint.formats.canonical import canonical_shapes
from megasora.checkpoint.formats.rules import FORMATS, Format, rules_of, to_canonical_order, to_foreign_order
from megasora.checkpoint.safetensors_io import SafetensorsReader, write_safetensors
from megasora.checkpoint.source import open_source
from megasora.config.errors import UserError
from megasora.config.parameters import parameter_count
from megasora.config.schema import ModelConfig

SMALL = ModelConfig(
    hidden_size=32,
    num_attention_heads=2,
    num_double_blocks=2,
    num_single_blocks=2,
    ffn_hidden_size=128,
    in_channels=16,
    text_dim=12,
    vec_dim=6,
    time_dim=8,
    axes_dim=(2, 7 * 16 // 16, 7 * 16 // 16),
    cond_embed=False,
)
DC_AE = ModelConfig(in_channels=128, patch_size=1)


@pytest.mark.parametrize(
    ("model", "count", "tensors"),
    [
        (ModelConfig(), 11_891_390_528, 1082),
        (ModelConfig(cond_embed=False), 11_891_178_560, 1080),
        (ModelConfig(cond_embed=False, guidance_embed=True), 11_901_408_320, 1084),
        (DC_AE, 11_891_971_200, 1082),
    ],
)
def test_published_variants_count_exactly(model: ModelConfig, count: int, tensors: int) -> None:
    shapes = canonical_shapes(model)
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == count == parameter_count(model)
    assert len(shapes) == tensors


def test_flux_dev_has_its_780_tensors() -> None:
    assert len(rules_of("flux", ModelConfig(cond_embed=False, guidance_embed=True))) == 780


def test_release_keys_match_the_released_file() -> None:
    listing = Path(__file__).parent / "open_sora_v2_keys.txt"
    released = {}
    for line in listing.read_text().splitlines():
        key, _, shape = line.partition(" ")
        released[key] = tuple(int(extent) for extent in shape.strip("[]").split(","))
    assert canonical_shapes(ModelConfig()) == released


@pytest.mark.parametrize("fmt", FORMATS)
def test_every_format_uses_each_canonical_row_once(fmt: Format) -> None:
    shapes = canonical_shapes(SMALL)
    rows: dict[str, list[int]] = {key: [] for key in shapes}
    for rule in rules_of(fmt, SMALL):
        for part in rule.parts:
            rows[part.key] += range(part.start, part.start + part.rows)
    assert {key: sorted(found) for key, found in rows.items()} == {key: list(range(shape[0])) for key, shape in shapes.items()}


def test_rotary_rows_go_from_halves_to_neighbours() -> None:
    rows = torch.arange(8)
    assert to_foreign_order(rows, order="heads", head_dim=8).tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert to_canonical_order(to_foreign_order(rows, order="heads", head_dim=4), order="heads", head_dim=4).tolist() == rows.tolist()


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    tensors = {key: torch.zeros(shape) for key, shape in canonical_shapes(SMALL).items()}
    del tensors["single_blocks.1.linear2.bias"]
    write_safetensors(tmp_path / "w.safetensors", tensors, metadata={})
    with pytest.raises(UserError, match=r"single_blocks\.1\.linear2\.bias"):
        open_source(tmp_path / "w.safetensors", axes_dim=SMALL.axes_dim)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    write_safetensors(path, {"img_in.weight": torch.zeros(4, 4)}, metadata={})
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(UserError, match="no complete safetensors"):
        SafetensorsReader(path)


def test_an_index_outside_its_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../secret.safetensors"}}')
    with pytest.raises(UserError, match="outside"):
        SafetensorsReader(tmp_path)


def test_a_condition_is_folded_only_when_asked(tmp_path: Path) -> None:
    from dataclasses import replace

    model = replace(SMALL, cond_embed=True)
    tensors = {key: torch.ones(shape) for key, shape in canonical_shapes(model).items()}
    write_safetensors(tmp_path / "w.safetensors", tensors, metadata={})
    with pytest.raises(UserError, match="drop_cond"):
        export_weights(tmp_path / "w.safetensors", tmp_path / "f.safetensors", target_format="flux")
    notes = export_weights(tmp_path / "w.safetensors", tmp_path / "f.safetensors", target_format="flux", drop_cond=True).lines
    assert any("lossy" in note for note in notes)
    assert SafetensorsReader(tmp_path / "f.safetensors").read("img_in.bias").tolist() == [2.0] * 32


def test_a_reader_describes_its_tensors_once(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "w.safetensors", {"a": torch.zeros(2), "b": torch.ones(3)}, metadata={})
    reader = SafetensorsReader(tmp_path / "w.safetensors")
    assert reader.infos is reader.infos
    assert list(reader.infos) == ["a", "b"]
