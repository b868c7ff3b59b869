"""Who waits for memory at one decode worker while another, which has just come, has little to do. Pure."""

from __future__ import annotations

from .placement import Candidate, Snapshot


def elsewhere(snapshot: Snapshot, prefill: str, decode: str) -> frozenset[str] | None:
    """For an attempt that waits for memory of `decode`: whom it should avoid, so that another decode worker takes it from the same prefill
    worker, which has its KV. None: it is best where it is.

    Of two decode workers one has too much if Offers wait there and the other would still write less with one more.
    """
    full = next((each for each in snapshot.decodes if each.member.worker_id == decode), None)
    if full is None or full.member.partner is not None or full.report is None or not full.report.grants_wait:
        return None
    if not any(each.usable and _writes(each) + 2 <= full.choices for each in snapshot.decodes if each is not full):
        return None
    return frozenset({decode, *(each.member.worker_id for each in snapshot.prefills if each.member.worker_id != prefill)})


def _writes(candidate: Candidate) -> int:
    """As many choices as the router has there, or more by the last report."""
    report = candidate.report
    return max(candidate.choices, report.waiting + report.running if report else 0)
