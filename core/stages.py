"""The life of a request, drawn once; code, logs, metrics, simulator and plots use these words.

accepted → tokenised → placed ─┬─ P: prefill_queued → prefill_started → first_token
                               └─ D: offered → granted → committed → decode_started → … → finished
"""

from __future__ import annotations

from enum import StrEnum


class Stage(StrEnum):
    ACCEPTED = "accepted"
    TOKENISED = "tokenised"
    PLACED = "placed"
    PREFILL_QUEUED = "prefill_queued"
    PREFILL_STARTED = "prefill_started"
    FIRST_TOKEN = "first_token"
    OFFERED = "offered"
    GRANTED = "granted"
    COMMITTED = "committed"
    DECODE_STARTED = "decode_started"
    FINISHED = "finished"
