"""Plain values (dataclasses of numbers, text, bytes, enums, and tuples of these) as JSON, by pydantic.

What is read is checked against its type and made by its constructor. Who reads from a peer that may be of another version compares
versions first.
"""

from __future__ import annotations

from functools import cache
from typing import Any, TypeVar, cast

from pydantic import ConfigDict, TypeAdapter

T = TypeVar("T")


def to_json(value: object) -> bytes:
    """`from_json` is the exact inverse."""
    return _adapter(cast(Any, type(value))).dump_json((value,))


def from_json(kind: type[T], data: bytes) -> T:
    """The value of dataclass `kind` in `data`. Raises `ValueError` if that is none, and what the constructor raises."""
    value: T = _adapter(cast(Any, kind)).validate_json(data)[0]
    return value


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    """Of a tuple of one: pydantic takes no config for a dataclass itself, and text would hold no bytes but UTF-8."""
    return TypeAdapter(tuple[kind], config=ConfigDict(ser_json_bytes="base64", val_json_bytes="base64"))
