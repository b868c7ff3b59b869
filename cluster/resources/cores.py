"""Which rank computes on which cores. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Share:
    """`threads` of one rank, and the cores it may use (None: any)."""

    threads: int
    cpus: tuple[int, ...] | None


def share_cores(cores: Sequence[int], wanted: Sequence[int | None]) -> list[Share]:
    """One share per rank on this host. `wanted[i]`: threads asked for, None for an equal part of what the others leave.

    Ranks get cores of their own while there are enough for all; then a prefill never takes time from a decode. If there are
    not, all may use all cores.
    """
    open_posts = sum(1 for threads in wanted if threads is None)
    left = len(cores) - sum(threads or 0 for threads in wanted)
    each, more = divmod(max(left, 0), open_posts) if open_posts else (0, 0)
    threads: list[int] = []
    for number in wanted:
        if number is None:
            number, more = max(1, each + (more > 0)), more - 1
        threads.append(number)
    if sum(threads) > len(cores):
        return [Share(number, None) for number in threads]
    starts = [sum(threads[:i]) for i in range(len(threads))]
    return [Share(number, tuple(cores[start : start + number])) for start, number in zip(starts, threads, strict=True)]


def shares_for_newcomer(cores: Sequence[int], others: Sequence[Share], wanted: Sequence[int | None]) -> list[Share]:
    """The shares of the ranks of one worker more, beside `others` that keep theirs: of the cores nobody has, as `share_cores`.

    They get cores of their own if so many are left, and nobody roams over all of them.
    """
    taken = {cpu for share in others for cpu in share.cpus or ()}
    shares = share_cores([cpu for cpu in cores if cpu not in taken], wanted)
    roaming = any(share.cpus is None for share in others)
    return [Share(share.threads, None) for share in shares] if roaming else shares
