"""Configuration trees to JSON and back. Unknown keys are errors; so are values of the wrong type."""

import types
from collections.abc import Sequence
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints, overload

from vitrail.errors import UserError, did_you_mean

T = TypeVar("T")


def to_json(config: Any) -> Any:
    """Return `config` as dicts, lists and plain values. A dataclass carries its class name under "type"."""
    if is_dataclass(config):
        return {"type": type(config).__name__} | {f.name: to_json(getattr(config, f.name)) for f in fields(config)}
    if isinstance(config, tuple | list):
        return [to_json(item) for item in cast(list[Any], config)]
    return config


@overload
def from_json(kind: type[T], value: object, where: str = "") -> T: ...
@overload
def from_json(kind: object, value: object, where: str = "") -> Any: ...
def from_json(kind: Any, value: object, where: str = "") -> Any:
    """Return `value`, parsed JSON, as an instance of the dataclass `kind`, or of one of a union of them.

    Fields that are missing take their default, so an older file stays readable. `where` names the file in errors.

    Raises:
        UserError: For an unknown key, a missing field without default, or a value of the wrong type.
    """
    return _from_field(kind, value, where)


def _from_field(kind: Any, value: Any, where: str) -> Any:
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        return _from_union(get_args(kind), value, where)
    if origin is Literal:
        if value not in get_args(kind):
            raise UserError(f"{where} must be one of {', '.join(map(repr, get_args(kind)))}, not {value!r}.")
        return value
    if origin is tuple:
        return _from_tuple(get_args(kind), value, where)
    if is_dataclass(kind):
        return _from_object(kind, value, where)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise UserError(f"{where} must be of type {kind.__name__}, not {value!r}.")
    return value


def _from_union(options: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in options:
        return None
    by_name = {str(option.__name__): option for option in options if isinstance(option, type) and is_dataclass(option)}
    if by_name and isinstance(value, dict):
        name: Any = cast(dict[str, Any], value).get("type")
        if name not in by_name:
            raise UserError(f"{where} has type {name!r}; this version knows {', '.join(by_name)}.")
        return _from_field(by_name[name], value, where)
    return _from_field(next(option for option in options if option is not type(None)), value, where)


def _from_tuple(items: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise UserError(f"{where} must be a list, not {value!r}.")
    values = cast(Sequence[Any], value)
    if items[-1] is Ellipsis:
        items = (items[0],) * len(values)
    if len(items) != len(values):
        raise UserError(f"{where} must hold {len(items)} values, not {len(values)}.")
    return tuple(
        _from_field(kind, item, f"{where}[{i}]") for i, (kind, item) in enumerate(zip(items, values, strict=True))
    )


def _from_object(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise UserError(f"{where or kind.__name__} must be an object, not {value!r}.")
    value = cast(dict[str, Any], value)
    hints = get_type_hints(kind)
    known = {f.name: f for f in fields(kind)}
    if value.get("type", kind.__name__) != kind.__name__:
        raise UserError(f"{where or 'this object'} is a {value['type']}, not a {kind.__name__}.")
    given = {key: item for key, item in value.items() if key != "type"}
    for key in given:
        if key not in known:
            raise UserError(
                f"{where or kind.__name__} has an unknown setting {key!r}.{did_you_mean(key, known)} "
                "It may come from a newer version of vitrail."
            )
    for name, f in known.items():
        if name not in given and f.default is MISSING and f.default_factory is MISSING:
            raise UserError(f"{where or kind.__name__} lacks the setting {name!r}.")
    path = f"{where}." if where else ""
    return kind(**{key: _from_field(hints[key], item, f"{path}{key}") for key, item in given.items()})
