"""Does the server agree with the client on TTFT? Request by request, and if not, what is known of why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .answer import Answer
from .summary import Summary, summarise

CLOSE_S = 0.002
"""How close is agreement."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """`difference`: the client's TTFT less the server's; `rest`: what of it is left without the time it took to connect."""

    compared: int
    close: int
    difference: Summary
    connect: Summary
    rest: Summary
    woke_late: Summary | None

    @property
    def agrees(self) -> bool:
        return self.close == self.compared

    def sentence(self) -> str:
        """For a person: whether they agree within 2 ms, and if not why."""
        ms = 1000
        spread = f"p50 {self.difference.p50 * ms:.2f} ms, p99 {self.difference.p99 * ms:.2f} ms"
        if self.agrees:
            return f"Client and server agree on TTFT within {CLOSE_S * ms:g} ms for all {self.compared} requests ({spread})."
        late = f"; the client itself woke late by p99 {self.woke_late.p99 * ms:.2f} ms" if self.woke_late else ""
        return (
            f"Client and server agree on TTFT within {CLOSE_S * ms:g} ms for {self.close} of {self.compared} requests ({spread}). "
            f"The server counts from when it has read the request's head to when it has the token. Connecting took p99 "
            f"{self.connect.p99 * ms:.2f} ms{late}; what is left beside connecting (p50 {self.rest.p50 * ms:.2f} ms, p99 "
            f"{self.rest.p99 * ms:.2f} ms) is the way through both processes' event loops, the network, and waiting for a core."
        )


def compare(answers: Sequence[Answer], woke_late: Sequence[float]) -> Agreement | None:
    """None if no answer tells the server's TTFT. `woke_late`: how late the client's event loop woke, in samples over the run."""
    triples = [
        (answer.ttft - answer.server_ttft, answer.connected or 0.0)
        for answer in answers
        if answer.error is None and answer.ttft is not None and answer.server_ttft is not None
    ]
    difference = summarise([apart for apart, _ in triples])
    connect = summarise([connected for _, connected in triples])
    rest = summarise([apart - connected for apart, connected in triples])
    if difference is None or connect is None or rest is None:
        return None
    close = sum(abs(apart) <= CLOSE_S for apart, _ in triples)
    return Agreement(len(triples), close, difference, connect, rest, summarise(woke_late))
