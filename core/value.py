"""Values: named fields, equal if their fields are, that nobody changes once they are made."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeVar, dataclass_transform

T = TypeVar("T")


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def value(cls: type[T]) -> type[T]:
    """As `dataclass(frozen=True, slots=True)`; but that no field is set afterwards is for the type checker to see. To have it seen at run
    time too made a message of 11 fields in 2.2 µs and not in 0.14, and a request takes some seventy of them across two workers."""
    return dataclass(slots=True, unsafe_hash=True)(cls)
