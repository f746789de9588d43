"""params.yaml into frozen records: each key known, each key present, each value of its type."""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from collections.abc import Hashable
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

T = TypeVar("T")


def load_params(cls: type[T], section: str, path: Path | str = Path("params.yaml")) -> T:
    """The dataclass `cls` filled from one section ("featurize.settings.clip": dots go down) of a YAML file.

    Every field must be in the file (but for one that is None by default: null may go unsaid) and every key
    must be a field: defaults live in the file alone. An int will do for a float, which must be finite; lists
    become tuples; fields may be dataclasses themselves. Raises FileNotFoundError for the file, ValueError
    naming file, key, what was wanted and what was got for the rest.
    """
    value: Any = read_yaml(path)
    where = f"{path}: "
    for depth, name in enumerate(section.split(".")):
        if not isinstance(value, dict) or name not in value:
            above = ".".join(section.split(".")[:depth])
            known = ", ".join(map(str, value)) if isinstance(value, dict) else repr(value)
            known = "nothing" if value in (None, {}) else known
            raise ValueError(f"{where}no section {section}; {above or 'the file'} has: {known}")
        value = value[name]
    return typing.cast(T, _convert(cls, value, f"{where}{section}"))


def read_yaml(path: Path | str) -> Any:
    """The object in the file, read as DVC reads it (YAML 1.2 floats, no key twice).

    Raises FileNotFoundError or ValueError, both naming the file.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file; run from the repository's root") from None
    except UnicodeDecodeError as error:
        byte = f"a byte {error.object[error.start]:#x}"
        raise ValueError(f"{path}: not UTF-8 ({byte} out of place); save it as UTF-8") from error
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not YAML: {' '.join(str(error).split())}") from error


def require_at_least(record: object, **least: float) -> None:
    """Raises ValueError naming the first of these fields that is less, or NaN; None is neither."""
    for name, bound in least.items():
        value = getattr(record, name)
        if value is not None and not value >= bound:
            raise ValueError(f"{name}: wanted {bound:g} or more, got {value}")


class _Loader(yaml.SafeLoader):
    pass


def _mapping_without_duplicates(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Hashable, Any]:
    keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
    for key in keys:
        if keys.count(key) > 1:
            raise yaml.constructor.ConstructorError(None, None, f"key {key} twice", node.start_mark)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping_without_duplicates)
# PyYAML reads 1e-4 as a string; DVC, which rewrites this file for `-S mapper.learning_rate=1e-4`, as a float.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _convert(kind: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _convert_dataclass(kind, value, where)
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        # By type too: True == 1.
        if not any(value == choice and type(value) is type(choice) for choice in args):
            raise _wanted(where, "one of " + ", ".join(map(str, args)), value)
        return value
    if origin in (typing.Union, types.UnionType):
        return _convert_union(args, value, where)
    if origin in (tuple, list):
        return _convert_sequence(origin, args, value, where)
    if origin is dict:
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            raise _wanted(where, "a mapping with text keys", value)
        return {key: _convert(args[1], item, f"{where}.{key}") for key, item in value.items()}
    if kind is Any:
        return value
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise _wanted(where, kind.__name__, value)
    if kind is float and not math.isfinite(value):
        raise _wanted(where, "a finite number", value)
    return value


def _convert_dataclass(cls: type, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise _wanted(where, f"a mapping with the keys of {cls.__name__}", value)
    hints = typing.get_type_hints(cls)
    names = [field.name for field in dataclasses.fields(cls)]
    unknown = [str(key) for key in value if key not in names]
    # Null may be left unsaid where the record says that it is what unsaid means.
    missing = [field.name for field in dataclasses.fields(cls) if field.default is not None]
    missing = [name for name in missing if name not in value]
    if unknown or missing:
        said = [f"unknown key {', '.join(unknown)}"] * bool(unknown)
        said += [f"missing key {', '.join(missing)}"] * bool(missing)
        raise ValueError(f"{where}: {'; '.join(said)}; wanted: {', '.join(names)}")
    values = {name: _convert(hints[name], value.get(name), f"{where}.{name}") for name in names}
    try:
        return cls(**values)
    except ValueError as error:  # from __post_init__, which does not know where its values came from
        raise ValueError(f"{where}: {error}") from error


def _convert_union(args: tuple[Any, ...], value: Any, where: str) -> Any:
    records = [arg for arg in args if dataclasses.is_dataclass(arg)]
    if isinstance(value, dict) and len(records) == 1:
        return _convert(records[0], value, where)  # which says what is wrong with it
    # Exact types first, so that an int given to `float | int` stays an int.
    for arg in sorted(args, key=lambda arg: type(value) is not arg):
        try:
            return _convert(arg, value, where)
        except ValueError:
            continue
    names = ["null" if arg is type(None) else getattr(arg, "__name__", str(arg)) for arg in args]
    raise _wanted(where, " or ".join(names), value)


def _convert_sequence(origin: type, args: tuple[Any, ...], value: Any, where: str) -> Any:
    if not isinstance(value, list):
        raise _wanted(where, "a list", value)
    if origin is list or args[1:] == (...,):
        kinds = [args[0]] * len(value)
    elif len(args) != len(value):
        raise _wanted(where, f"a list of {len(args)}", value)
    else:
        kinds = list(args)
    numbered = enumerate(zip(kinds, value, strict=True))
    items = [_convert(kind, item, f"{where}[{i}]") for i, (kind, item) in numbered]
    return origin(items)


def _wanted(where: str, wanted: str, got: Any) -> ValueError:
    said = "null" if got is None else f"{got!r} ({type(got).__name__})"
    return ValueError(f"{where}: wanted {wanted}, got {said}")
