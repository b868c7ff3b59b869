"""Orders to a rank behind a channel, and its answers, as bytes: the kind's name, a line's end, its JSON."""

from __future__ import annotations

from typing import Any, get_args

from ..core.plain_json import from_json, to_json
from .answers import DestinationAnswer, SourceAnswer
from .ranks import DestinationOrder, SourceOrder

_KINDS = {kind.__name__: kind for said in (SourceOrder, DestinationOrder, SourceAnswer, DestinationAnswer) for kind in get_args(said)}


def encode(value: SourceOrder | DestinationOrder | SourceAnswer | DestinationAnswer) -> bytes:
    """`decode` is the exact inverse."""
    return type(value).__name__.encode() + b"\n" + to_json(value)


def decode(data: bytes) -> Any:
    """The order or answer. Raises `KeyError` or `ValueError` if it is none."""
    name, _, values = data.partition(b"\n")
    return from_json(_KINDS[name.decode()], values)
