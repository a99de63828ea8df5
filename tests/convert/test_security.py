"""Hostile and damaged files: every one ends in a clear error (or reads as what it is), nothing in it is executed or allocated."""

from __future__ import annotations

import json
import os
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megasora.checkpoint.export import export_weights
from megasora.checkpoint.megatron_io import BadCheckpointError, MegatronReader, read_contents
from megasora.checkpoint.safetensors_io import BadFileError, SafetensorsReader, write_safetensors
from megasora.checkpoint.source import open_source
from megasora.config.errors import UserError
from tests.convert.models import DEV, random_weights, write_weights

HEADERS, INDICES, TABLES, ARCHIVES = 7000, 2500, 1500, 1500
"""Damaged inputs of each kind: 12,500 in all."""
ODD_VALUES: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    1,
    2**31,
    2**63,
    2**64,
    1e300,
    "",
    "F32",
    "x" * 50,
    [],
    [0],
    [2**62, 2**62],
    [-1, 4],
    {},
    {"a": 1},
)


def header_bytes(table: Any) -> bytes:
    text = json.dumps(table).encode()
    return len(text).to_bytes(8, "little") + text


def plain_table() -> dict[str, Any]:
    return {
        "__metadata__": {"format": "pt"},
        "img_in.weight": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
        "img_in.bias": {"dtype": "F32", "shape": [2], "data_offsets": [16, 24]},
        "txt_in.bias": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
    }


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t["img_in.bias"].update(data_offsets=[8, 16]), "starts at 8"),
        (lambda t: t["img_in.bias"].update(data_offsets=[20, 28]), "starts at 20"),
        (lambda t: t["img_in.bias"].update(shape=[3]), "has 8 bytes"),
        (lambda t: t["img_in.bias"].update(shape=[2**40, 2**40]), "has 8 bytes"),
        (lambda t: t["img_in.bias"].update(dtype="F31"), "unknown type"),
        (lambda t: t["img_in.bias"].update(shape=[-2]), "impossible shape"),
        (lambda t: t["img_in.bias"].update(shape=[2.0]), "impossible shape"),
        (lambda t: t["img_in.bias"].pop("dtype"), "not described"),
        (lambda t: t.pop("txt_in.bias"), "32 bytes of data"),
        (lambda t: t.update(__metadata__={"a": 1}), "no table of strings"),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path: Path, change: Callable[[dict[str, Any]], Any], words: str) -> None:
    table = plain_table()
    change(table)
    (tmp_path / "w.safetensors").write_bytes(header_bytes(table) + bytes(32))
    with pytest.raises(BadFileError, match=words):
        SafetensorsReader(tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "0 bytes"),
        (b"\xff" * 16, "header would be"),
        ((50_000_000).to_bytes(8, "little") + b"{}", "header would be"),
        ((2).to_bytes(8, "little") + b"[]", "header is a list"),
        ((40).to_bytes(8, "little") + b"[" * 40, "no JSON"),
        (len(b'{"a":{},"a":{}}').to_bytes(8, "little") + b'{"a":{},"a":{}}', "stands twice"),
    ],
)
def test_a_file_that_is_none_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "w.safetensors").write_bytes(content)
    with pytest.raises(BadFileError, match=words):
        SafetensorsReader(tmp_path / "w.safetensors")


def test_deep_json_is_refused(tmp_path: Path) -> None:
    text = b'{"a":' * 100_000
    (tmp_path / "w.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(BadFileError, match="no JSON"):
        SafetensorsReader(tmp_path / "w.safetensors")


@pytest.mark.parametrize("name", ["../w.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "missing.safetensors"])
def test_an_index_that_points_elsewhere_is_refused(tmp_path: Path, name: str) -> None:
    write_safetensors(tmp_path / "a.safetensors", {"a": torch.zeros(1)}, metadata={})
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(UserError, match="outside its folder|missing"):
        SafetensorsReader(tmp_path)


def test_an_index_and_its_files_must_agree(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "a.safetensors", {"a": torch.zeros(1), "b": torch.zeros(1)}, metadata={})
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "a.safetensors"}}))
    with pytest.raises(BadFileError, match="disagree about 1 tensors, the first 'b'"):
        SafetensorsReader(tmp_path)
    write_safetensors(tmp_path / "b.safetensors", {"a": torch.zeros(1)}, metadata={})
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(BadFileError, match="stands in a.safetensors and b.safetensors"):
        SafetensorsReader(tmp_path)


class Bomb:
    """Runs a command when unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.mark,))


def test_a_pickle_in_a_checkpoint_is_not_executed(tmp_path: Path) -> None:
    write_weights(tmp_path / "w.safetensors", "flux", DEV)
    export_weights(tmp_path / "w.safetensors", tmp_path / "m", target_format="megasora")
    mark = tmp_path / "executed"
    bomb = pickle.dumps(Bomb(mark))
    (tmp_path / "m" / ".metadata").write_bytes(bomb)
    facts = json.loads((tmp_path / "m" / "manifest.json").read_text())
    facts["files"][".metadata"]["bytes"] = len(bomb)
    (tmp_path / "m" / "manifest.json").write_text(json.dumps(facts))
    with pytest.raises(BadCheckpointError, match="it names pathlib"):
        open_source(tmp_path / "m")
    assert not mark.exists()


@pytest.mark.parametrize("function", [torch.load, torch.hub.load, torch.Tensor.share_memory_, os.system])
def test_a_global_outside_the_table_is_refused_whoever_owns_it(tmp_path: Path, function: Callable[..., Any]) -> None:
    write_weights(tmp_path / "w.safetensors", "flux", DEV)
    export_weights(tmp_path / "w.safetensors", tmp_path / "m", target_format="megasora")
    (tmp_path / "m" / ".metadata").write_bytes(pickle.dumps(function))
    with pytest.raises(BadCheckpointError, match="which a checkpoint has no use for"):
        read_contents(tmp_path / "m")


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/b", "..", ""])
def test_a_piece_outside_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    write_weights(tmp_path / "w.safetensors", "flux", DEV)
    export_weights(tmp_path / "w.safetensors", tmp_path / "m", target_format="megasora")
    path = tmp_path / "m" / ".metadata"
    metadata = pickle.loads(path.read_bytes())  # our own file
    for place in metadata.storage_data.values():
        place.relative_path = name
    path.write_bytes(pickle.dumps(metadata))
    with pytest.raises(BadCheckpointError, match="points outside the folder"):
        read_contents(tmp_path / "m")


def test_a_tensor_of_another_shape_is_refused(tmp_path: Path) -> None:
    tensors = write_weights(tmp_path / "w.safetensors", "flux", DEV)
    tensors["img_in.bias"] = torch.cat([tensors["img_in.bias"]] * 2)
    write_safetensors(tmp_path / "w.safetensors", tensors, metadata={})
    with pytest.raises(UserError, match=r"img_in.bias has shape \(64,\), expected \(32,\)"):
        open_source(tmp_path / "w.safetensors", axes_dim=DEV.axes_dim)


def damaged(data: bytes, rng: random.Random) -> bytes:
    """A few bytes changed, removed, repeated or cut off."""
    content = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(len(content) or 1)
        kind = rng.randrange(5)
        if not content:
            break
        if kind == 0:
            content[place] = rng.randrange(256)
        elif kind == 1:
            content[place] ^= 1 << rng.randrange(8)
        elif kind == 2:
            del content[place : place + rng.randint(1, 8)]
        elif kind == 3:
            content[place:place] = content[place : place + rng.randint(1, 16)]
        else:
            del content[max(place, 1) :]
    return bytes(content) or b"x"


def odd(table: Any, rng: random.Random) -> Any:
    """One value somewhere in a table replaced by something unexpected."""
    target = table
    while True:
        keys = list(target) if isinstance(target, dict) else list(range(len(target)))
        if not keys:
            return table
        key = rng.choice(keys)
        if isinstance(target[key], (dict, list)) and target[key] and rng.random() < 0.6:
            target = target[key]
            continue
        target[key] = rng.choice(ODD_VALUES)
        return table


def test_ten_thousand_damaged_files_end_in_clear_errors(tmp_path: Path) -> None:
    rng = random.Random(0)
    path = tmp_path / "w.safetensors"
    refused = 0
    sound = header_bytes(plain_table())
    for number in range(HEADERS):
        header = damaged(sound, rng) if number % 2 else header_bytes(odd(plain_table(), rng))
        path.write_bytes(header + bytes(32))
        refused += _refused(lambda: _read_all(SafetensorsReader(path)))
    folder = tmp_path / "folder"
    folder.mkdir()
    write_safetensors(folder / "a.safetensors", {"a": torch.zeros(1), "b": torch.ones(2)}, metadata={})
    index = {"metadata": {"total_size": 12}, "weight_map": {"a": "a.safetensors", "b": "a.safetensors"}}
    for number in range(INDICES):
        text = damaged(json.dumps(index).encode(), rng) if number % 2 else json.dumps(odd(json.loads(json.dumps(index)), rng)).encode()
        (folder / "model.safetensors.index.json").write_bytes(text)
        refused += _refused(lambda: _read_all(SafetensorsReader(folder)))
    assert refused > (HEADERS + INDICES) * 0.5  # the rest was damaged where it does not matter, or read as another sound file


def test_damaged_checkpoints_end_in_clear_errors(tmp_path: Path) -> None:
    from dataclasses import replace

    rng = random.Random(1)
    model = replace(DEV, num_double_blocks=1, num_single_blocks=0)
    write_weights(tmp_path / "w.safetensors", "flux", model)
    export_weights(tmp_path / "w.safetensors", tmp_path / "m", target_format="megasora", workers=1)
    table, data = tmp_path / "m" / ".metadata", tmp_path / "m" / "__0_0.distcp"
    sound_table, sound_data = table.read_bytes(), data.read_bytes()
    refused = 0
    for _ in range(TABLES):
        table.write_bytes(damaged(sound_table, rng))
        refused += _refused(lambda: MegatronReader(tmp_path / "m").rows("img_in.weight"))
    assert refused > TABLES * 0.5
    table.write_bytes(sound_table)
    whole = MegatronReader(tmp_path / "m")
    place = whole.tensors["img_in.bias"].chunks[0]
    for _ in range(ARCHIVES):
        part = damaged(sound_data[place.start : place.start + place.length], rng)[: place.length].ljust(place.length, b"\0")
        data.write_bytes(sound_data[: place.start] + part + sound_data[place.start + place.length :])
        _refused(lambda: MegatronReader(tmp_path / "m").rows("img_in.bias"))
    data.write_bytes(sound_data)
    sound = open_source(tmp_path / "m")  # no damaged file has changed how the next one is read
    expected = random_weights(model)
    assert all(torch.equal(sound.read(key), tensor) for key, tensor in expected.items())


def _read_all(reader: SafetensorsReader) -> None:
    for key in reader.infos:
        reader.rows(key)
    open_source(reader.path)


def _refused(action: Callable[[], Any]) -> bool:
    """Whether it ends in a one-line error; anything else but success fails the test."""
    try:
        action()
    except UserError as error:
        return str(error).count("\n") == 0
    return False
