"""The life of a request, drawn once; code, logs, metrics, simulator and plots use these words.

accepted → tokenised → placed ─┬─ P: prefill_queued → prefill_started → kv_stored → first_token → commit_sent
                               └─ D: offered → granted → committed → decode_started → … → finished

kv_stored: the last layer's KV of the whole prompt lies in P's pool; first_token: the step that computed it has ended (the head,
which is the model's last layer, included). Both ends stamp granted: D when it grants, P when it knows.
"""

from __future__ import annotations

from enum import StrEnum


class Stage(StrEnum):
    ACCEPTED = "accepted"
    TOKENISED = "tokenised"
    PLACED = "placed"
    PREFILL_QUEUED = "prefill_queued"
    PREFILL_STARTED = "prefill_started"
    KV_STORED = "kv_stored"
    FIRST_TOKEN = "first_token"
    COMMIT_SENT = "commit_sent"
    OFFERED = "offered"
    GRANTED = "granted"
    COMMITTED = "committed"
    DECODE_STARTED = "decode_started"
    FINISHED = "finished"
