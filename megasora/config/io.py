"""Reading and writing a RunConfig: strict both ways. An unknown key, a missing key or a wrong type is an error that names the place."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from pathlib import Path
from typing import Any

import yaml

from megasora.config.errors import UserError
from megasora.config.files import written_whole
from megasora.config.schema import RunConfig


def to_dict(config: Any) -> Any:
    """Plain dicts, lists and scalars of a config (tuples become lists)."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {field.name: to_dict(getattr(config, field.name)) for field in dataclasses.fields(config)}
    if isinstance(config, (list, tuple)):
        return [to_dict(item) for item in config]
    return config


def from_dict(data: Any, kind: type[Any] = RunConfig, *, path: str = "config") -> Any:
    """A config object from plain data, strictly.

    Raises:
        UserError: an unknown or missing key, or a value of the wrong type; names the dotted path and the nearest valid key.
    """
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected a mapping, got {type(data).__name__}")
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for key in data:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; valid keys: {', '.join(fields)}"
            raise UserError(f"{path}.{key}: unknown key{hint}")
    values: dict[str, Any] = {}
    for name, field in fields.items():
        if name in data:
            values[name] = _convert(data[name], hints[name], f"{path}.{name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise UserError(f"{path}.{name}: missing key")
    return kind(**values)


def _convert(value: Any, hint: Any, path: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return from_dict(value, typing.cast(type[Any], hint), path=path)
    if origin is typing.Literal:
        if value in arguments:
            return value
        raise UserError(f"{path}: {value!r} is not one of {', '.join(map(str, arguments))}")
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        (inner,) = (argument for argument in arguments if argument is not type(None))
        return _convert(value, inner, path)
    if origin is tuple:
        return _convert_tuple(value, arguments, path)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, bool) != (hint is bool) or not isinstance(value, hint):
        raise UserError(f"{path}: expected {hint.__name__}, got {value!r}")
    return value


def _convert_tuple(value: Any, arguments: tuple[Any, ...], path: str) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise UserError(f"{path}: expected a list, got {value!r}")
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        arguments = (arguments[0],) * len(value)
    if len(value) != len(arguments):
        raise UserError(f"{path}: expected {len(arguments)} values, got {len(value)}")
    return tuple(_convert(item, hint, f"{path}[{place}]") for place, (item, hint) in enumerate(zip(value, arguments, strict=True)))


def dump(config: Any) -> str:
    """The config as YAML text, keys in schema order."""
    text: str = yaml.safe_dump(to_dict(config), sort_keys=False)
    return text


def save_yaml(config: Any, path: Path) -> None:
    """Write the config next to its run; the file appears whole or not at all."""
    with written_whole(path) as temporary:
        temporary.write_text(dump(config))


def load_yaml(path: Path) -> RunConfig:
    """Read a config written by `save_yaml`.

    Raises:
        UserError: the file is missing, not YAML, or does not fit the schema.
    """
    data = read_yaml(path)
    if isinstance(data, dict) and "autoencoder" in data:
        raise UserError(f"{path} is of a run of an autoencoder: megasora train-ae takes it")
    config: RunConfig = from_dict(data)
    return config


def read_yaml(path: Path) -> Any:
    """Plain data of a file.

    Raises:
        UserError: the file is missing or not YAML.
    """
    try:
        return yaml.safe_load(path.read_text())
    except OSError as error:
        raise UserError(f"cannot read config {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {str(error).splitlines()[0]}") from error
