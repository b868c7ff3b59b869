"""What came back for one request, read from the stamped events of its stream after it has ended."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from .workload import Arrival

DONE = b"[DONE]"


@dataclass(slots=True)
class Wire:
    """One exchange as it passed over the connection. Times are seconds on the client's clock.

    `events`: when each event of the stream was complete, and its data. `failure`: why it ended before its end, if it did.
    """

    begun: float
    connected: float | None = None
    status: int = 0
    events: list[tuple[float, bytes]] = field(default_factory=list)
    body: bytes = b""
    ended: float = 0.0
    failure: str | None = None


class Counting(StrEnum):
    """How the tokens of an event were counted, the surest first."""

    USAGE = "usage in every event"
    TOKEN_IDS = "token ids in every event"
    EVENTS = "one token for every event with text"


@dataclass(frozen=True, slots=True)
class Answer:
    """One request as its client saw it. Times are seconds from its sending, `sent` from the load's begin.

    `token_times[i]` is when the event with output token i had come; `shared_events` of the `events` with tokens carried more than
    one, which have the same time. `output_tokens` is the server's count if it gave one. `server_ttft` is the server's own, and
    `handed_over` whether it says that the KV was handed over.
    """

    arrival: Arrival
    sent: float
    connected: float | None
    ended: float
    token_times: tuple[float, ...]
    output_tokens: int
    prompt_tokens: int | None
    events: int
    shared_events: int
    counting: Counting
    error: str | None
    server_ttft: float | None = None
    handed_over: bool | None = None

    @property
    def lag(self) -> float:
        """How late it was sent."""
        return self.sent - self.arrival.at

    @property
    def ttft(self) -> float | None:
        return self.token_times[0] if self.token_times else None

    @property
    def tpot(self) -> float | None:
        """Mean seconds per output token after the first."""
        if self.output_tokens < 2 or len(self.token_times) < 2:
            return None
        return (self.token_times[-1] - self.token_times[0]) / (self.output_tokens - 1)

    @property
    def e2e(self) -> float:
        return self.ended

    @property
    def gap(self) -> float | None:
        """Seconds between tokens 1 and 2: the hand-over gap, where there is a hand-over."""
        return self.token_times[1] - self.token_times[0] if len(self.token_times) > 1 else None

    @property
    def itl(self) -> list[float]:
        """Seconds between consecutive tokens, from token 2 on."""
        return [late - early for early, late in zip(self.token_times[1:], self.token_times[2:], strict=False)]


def read_answer(arrival: Arrival, wire: Wire, begin: float, *, whole: bool) -> Answer:
    """`begin`: the load's, on the wire's clock. `whole`: the server was told to write all the tokens it was asked for."""
    stream = _Stream()
    for at, data in wire.events:
        stream.event(at - wire.begun, data)
    tokens = len(stream.token_times) if stream.total is None else stream.total
    error = stream.error or wire.failure or _refusal(wire)
    if error is None and not stream.done:
        error = "stream without its end"
    if error is None and not stream.token_times:
        error = "no tokens"
    if error is None and whole and tokens != arrival.output_tokens:
        error = "fewer tokens than asked for" if tokens < arrival.output_tokens else "more tokens than asked for"
    return Answer(
        arrival=arrival,
        sent=wire.begun - begin,
        connected=None if wire.connected is None else wire.connected - wire.begun,
        ended=wire.ended - wire.begun,
        token_times=tuple(stream.token_times),
        output_tokens=tokens,
        prompt_tokens=stream.prompt_tokens,
        events=stream.events,
        shared_events=stream.shared_events,
        counting=stream.counting,
        error=error,
        server_ttft=stream.server_ttft,
        handed_over=stream.handed_over,
    )


class _Stream:
    """The events of one stream, one after another."""

    def __init__(self) -> None:
        self.token_times: list[float] = []
        self.events = self.shared_events = 0
        self.counting = Counting.EVENTS
        self.total: int | None = None
        self.prompt_tokens: int | None = None
        self.server_ttft: float | None = None
        self.handed_over: bool | None = None
        self.error: str | None = None
        self.done = False

    def event(self, at: float, data: bytes) -> None:
        if data == DONE:
            self.done = True
            return
        try:
            message = json.loads(data)
        except ValueError:
            message = None
        if not isinstance(message, dict):
            self.error = self.error or "event that is no JSON object"
        elif error := message.get("error"):
            self.error = self.error or f"error event: {_code_of(error)}"
        else:
            self._tokens(at, message)
            self._timing(message.get("timing"))

    def _tokens(self, at: float, message: dict[str, Any]) -> None:
        choices, usage = message.get("choices") or [], message.get("usage")
        if isinstance(usage, dict):
            total = usage.get("completion_tokens", 0)
            if choices:
                self.counting = Counting.USAGE
            self.total = total
            self.prompt_tokens = usage.get("prompt_tokens")
        if not choices:
            return
        count = self._count(choices[0])
        self.token_times += [at] * count
        self.events += count > 0
        self.shared_events += count > 1

    def _count(self, choice: dict[str, Any]) -> int:
        """Tokens this event brought."""
        if self.counting is Counting.USAGE:
            return max(0, (self.total or 0) - len(self.token_times))
        if isinstance(choice.get("token_ids"), list):
            self.counting = Counting.TOKEN_IDS
            return len(choice["token_ids"])
        return int(bool(choice.get("text")))

    def _timing(self, timing: Any) -> None:
        """Diptych's own, asked for with a header of ours."""
        if isinstance(timing, dict):
            self.server_ttft = timing.get("ttft")
            self.handed_over = bool(timing.get("transport"))


def _refusal(wire: Wire) -> str | None:
    if wire.status == 200:
        return None
    return f"HTTP {wire.status}: {_code_of(_error_of(wire.body))}"


def refusal_text(wire: Wire) -> str:
    """The message in the body of a refusal, for a person."""
    error = _error_of(wire.body)
    message = error.get("message") if isinstance(error, dict) else None
    return str(message or wire.body[:200].decode(errors="replace") or wire.failure or f"HTTP {wire.status}")


def _error_of(body: bytes) -> Any:
    try:
        content = json.loads(body)
    except ValueError:
        return None
    return content.get("error", content) if isinstance(content, dict) else content


def _code_of(error: Any) -> str:
    """The shortest name an error has: kinds are counted, messages hold ids and numbers."""
    if not isinstance(error, dict):
        return "no reason given"
    return str(error.get("code") or error.get("type") or "no reason given")


def kinds(answers: Sequence[Answer]) -> dict[str, int]:
    """How many ended with which error, the most frequent first."""
    counts: dict[str, int] = {}
    for answer in answers:
        if answer.error is not None:
            counts[answer.error] = counts.get(answer.error, 0) + 1
    return dict(sorted(counts.items(), key=lambda entry: (-entry[1], entry[0])))
