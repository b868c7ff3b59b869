"""The rule both ends apply to the other's Hello."""

from __future__ import annotations

from ..core.transfer import Hello, Refused, RefusedReason


def refusal(ours: Hello, theirs: Hello) -> Refused | None:
    """Why no KV can be exchanged with the peer that said `theirs`, as a sentence naming the difference; None if it can."""
    if ours.protocol_version != theirs.protocol_version:
        message = f"protocol_version differs: {ours.protocol_version} here, {theirs.protocol_version} at {theirs.worker_id}."
        return Refused("", RefusedReason.LAYOUT, message)
    difference = ours.layout.difference(theirs.layout)
    if difference is not None:
        return Refused("", RefusedReason.LAYOUT, f"{ours.worker_id} and {theirs.worker_id} cannot exchange KV: {difference}")
    if ours.shm is None or theirs.shm is None:
        deaf = ours.worker_id if ours.shm is None else theirs.worker_id
        message = f"{ours.worker_id} and {theirs.worker_id} have no transport in common: {deaf} does not speak shm."
        return Refused("", RefusedReason.TRANSPORT, message)
    return None
