"""Plain values (dataclasses of numbers, text, bytes, words of a `StrEnum`, and tuples of these) as JSON.

A dataclass is the list of its fields, bytes are text of one character each. What is read is made by the constructors, which check it; who
reads from a peer that may be of another version compares versions first.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from enum import StrEnum
from functools import cache
from types import NoneType, UnionType
from typing import Any, TypeVar, cast, get_args, get_origin, get_type_hints

T = TypeVar("T")
Reader = Callable[[Any], Any]


def to_json(value: object) -> bytes:
    """`from_json` is the exact inverse."""
    return json.dumps(value, default=_plain, separators=(",", ":")).encode()


def from_json(kind: type[T], data: bytes) -> T:
    """The value of dataclass `kind` in `data`. Raises `ValueError` or `TypeError` if that is none."""
    value: T = reader(cast(Any, kind))(json.loads(data))
    return value


def _plain(value: Any) -> Any:
    """What the json module does not know."""
    return value.decode("latin-1") if isinstance(value, bytes) else [getattr(value, field.name) for field in fields(value)]


@cache
def reader(kind: Any) -> Reader:
    """What makes a value of type `kind` of what JSON has for it."""
    if is_dataclass(kind):
        return _of_fields(kind)
    if get_origin(kind) is tuple:
        of_each = reader(get_args(kind)[0])
        return tuple if of_each is _as_it_is else lambda values: tuple(map(of_each, values))
    if isinstance(kind, UnionType):
        (of_it,) = (reader(each) for each in get_args(kind) if each is not NoneType)
        return lambda value: None if value is None else of_it(value)
    if kind is bytes:
        return lambda text: text.encode("latin-1")
    return kind if isinstance(kind, type) and issubclass(kind, StrEnum) else _as_it_is


def _of_fields(kind: Any) -> Reader:
    hints = get_type_hints(kind)
    readers = [reader(hints[field.name]) for field in fields(kind)]
    return lambda values: kind(*(read(value) for read, value in zip(readers, values, strict=True)))


def _as_it_is(value: Any) -> Any:
    return value
