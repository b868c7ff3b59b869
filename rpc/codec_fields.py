"""What the codecs share: parsing bytes, and checks that name the field that is wrong. A codec's decode raises only `InvalidRequest`."""

from __future__ import annotations

import math
from collections.abc import Sized
from enum import StrEnum
from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from ..core.errors import InvalidRequest

M = TypeVar("M", bound=Message)
E = TypeVar("E", bound=StrEnum)


def parse(kind: type[M], data: bytes) -> M:
    """The message in `data`; text that is not UTF-8 is refused here too (protobuf checks it)."""
    try:
        return kind.FromString(data)
    except DecodeError:
        name = kind.DESCRIPTOR.name
        raise InvalidRequest(f"These {len(data)} bytes are not a {name} message (or a text in it is not UTF-8).", field=name) from None


def present(message: Message, field: str, path: str | None = None) -> None:
    """Refuse a message that lacks `field`."""
    if not message.HasField(field):
        raise InvalidRequest(f"{path or field} is missing.", field=path or field)


def chosen(message: Message, oneof: str) -> str:
    """The name of the member that is set of `oneof`."""
    name: str | None = message.WhichOneof(oneof)
    if name is None:
        raise InvalidRequest(f"{oneof} is missing, or of a kind this version does not know.", field=oneof)
    return name


def word(kind: type[E], text: str, field: str) -> E:
    """The member of `kind` that `text` names."""
    try:
        return kind(text)
    except ValueError:
        words = ", ".join(member.value for member in kind)
        raise InvalidRequest(f"{field} is {text[:40]!r}; it must be one of {words}.", field=field) from None


def finite(value: float, field: str) -> float:
    if not math.isfinite(value):
        raise InvalidRequest(f"{field} must be a finite number, not {value}.", field=field)
    return value


def duration(value: float, field: str) -> float:
    """`value` seconds, finite and not negative."""
    if finite(value, field) < 0:
        raise InvalidRequest(f"{field} must not be negative, not {value}.", field=field)
    return value


def at_most(limit: int, items: Sized, field: str) -> None:
    """Refuse a sequence longer than `limit`."""
    if len(items) > limit:
        raise InvalidRequest(f"{field} has {len(items)} entries; the limit is {limit}.", field=field)
