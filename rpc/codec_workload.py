"""A window of the workload ↔ its message: exact inverses.

In columns: a message for each of thousands of requests would cost milliseconds of the router's loop.
"""

from __future__ import annotations

from ..core.errors import InvalidRequest
from ..core.workload import Recorded, Window
from ..proto import worker_pb2 as pb
from .codec_fields import duration, finite, parse

_NONE = -1.0
"""In place of a time that there is not."""


def encode_window(window: Window) -> bytes:
    requests = window.requests
    return pb.Workload(
        seconds=window.seconds,
        age=[each.age for each in requests],
        prompt_tokens=[each.prompt_tokens for each in requests],
        cached_tokens=[each.cached_tokens for each in requests],
        output_tokens=[each.output_tokens for each in requests],
        ttft=[_NONE if each.ttft is None else each.ttft for each in requests],
        tpot=[_NONE if each.tpot is None else each.tpot for each in requests],
        ended=[each.ended for each in requests],
    ).SerializeToString()


def decode_window(data: bytes) -> Window:
    message = parse(pb.Workload, data)
    columns = (
        [duration(age, "age") for age in message.age],
        message.prompt_tokens,
        message.cached_tokens,
        message.output_tokens,
        [_some(value, "ttft") for value in message.ttft],
        [_some(value, "tpot") for value in message.tpot],
        message.ended,
    )
    if len({len(column) for column in columns}) > 1:
        raise InvalidRequest("The columns of the workload differ in length.", field="age")
    return Window(duration(message.seconds, "seconds"), tuple(map(Recorded, *columns)))


def _some(value: float, field: str) -> float | None:
    return None if finite(value, field) < 0 else value
