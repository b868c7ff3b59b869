"""Orders to a rank behind a channel, and its answers, as bytes."""

from __future__ import annotations

import json
from typing import Any, get_args

from ..core.plain_json import reader, to_json
from .answers import DestinationAnswer, SourceAnswer
from .ranks import DestinationOrder, SourceOrder

_KINDS = {kind.__name__: kind for said in (SourceOrder, DestinationOrder, SourceAnswer, DestinationAnswer) for kind in get_args(said)}


def encode(value: SourceOrder | DestinationOrder | SourceAnswer | DestinationAnswer) -> bytes:
    """`decode` is the exact inverse."""
    return to_json((type(value).__name__, value))


def decode(data: bytes) -> Any:
    """The order or answer. Raises `KeyError`, `ValueError` or `TypeError` if it is none."""
    name, values = json.loads(data)
    return reader(_KINDS[name])(values)
