"""What a router and a worker say on their one stream: commands up, one `StepEvents` down per engine step.

Every command that opens an attempt is answered by exactly one terminal event for it: `HandedOver`, `Finished` or `Failed`.
A `Stop` for a whole attempt also ends in a terminal event (`Failed` with `Cancelled`, unless another was already under way).
`Failed` with `Unavailable` says that the worker leaves and has not begun with it: it costs the request no attempt.
Closing the stream stops every attempt on it, without further events.
"""

from __future__ import annotations

from .errors import DiptychError
from .request import FinishReason, Request, Token
from .value import value


@value
class Prefill:
    """Compute the KV of what the choices share, draw their first tokens, hand the KV to `destination` (a worker's address, host:port).

    `destination` None: nobody decodes this (every live choice is `opening` and may write one token more); the attempt ends with
    `Finished`.
    """

    attempt_id: str
    request: Request
    destination: str | None


@value
class Decode:
    """Write the answer, all live choices of it: after the transfer named `attempt_id`, or, with `local_prefill`, after computing the
    prompt here."""

    attempt_id: str
    request: Request
    local_prefill: bool = False


@value
class Stop:
    """Give the attempt up: at the next step nothing of it is computed, and its blocks return.

    With a `choice`, to D: only that choice is over (its text is complete), without a `ChoiceFinished`. The attempt goes on; when no
    choice is left it ends with `Finished`.
    """

    attempt_id: str
    choice: int | None = None


Command = Prefill | Decode | Stop


@value
class FirstTokens:
    """From P, at once when drawn: one token for each choice that is `opening`, in order of choice; none if all resume.

    `finishes[i]` is set if `tokens[i]` ends its choice (`STOP`: the token is an end token and no output); D says nothing of that choice
    then. If no live choice is left, P cancels the transfer itself. Seconds, measured on P: `queued` from command to first chunk,
    `computed` from first chunk to these tokens. `cached_tokens` of the prompt came from P's prefix cache.
    """

    attempt_id: str
    tokens: tuple[Token, ...]
    finishes: tuple[FinishReason | None, ...]
    queued: float = 0.0
    computed: float = 0.0
    cached_tokens: int = 0


@value
class HandedOver:
    """From P, terminal: D has acknowledged the Commit, `exposed` seconds after the first tokens were drawn."""

    attempt_id: str
    kv_bytes: int
    seconds: float
    transport: str
    exposed: float = 0.0


@value
class NewTokens:
    """From D (and from P never): tokens of its choices, each choice's in order of index. A stop token is not among them.

    `queued`: seconds that an attempt whose prompt D reads itself waited for that to begin; with its first tokens only."""

    attempt_id: str
    tokens: tuple[Token, ...]
    queued: float | None = None


@value
class ChoiceFinished:
    """From D, behind the choice's last token: this choice is complete. The attempt goes on."""

    attempt_id: str
    choice: int
    finish: FinishReason


@value
class Movable:
    """The worker leaves (it drains), and nothing of this attempt is under way here: its prompt has not begun, or no memory has been granted
    for its KV. Elsewhere it would be done sooner. It goes on here unless the router stops it."""

    attempt_id: str


@value
class Finished:
    """Terminal: every choice is complete, and the end of each was told before. `recomputed_tokens` were computed here after a preemption
    or a fork, `local_prefill_tokens` by request; `cached_tokens` of the prompt came from this worker's prefix cache."""

    attempt_id: str
    cached_tokens: int = 0
    local_prefill_tokens: int = 0
    recomputed_tokens: int = 0


@value
class Failed:
    """Terminal: this attempt gives nothing more."""

    attempt_id: str
    error: DiptychError


Event = FirstTokens | HandedOver | NewTokens | ChoiceFinished | Movable | Finished | Failed


@value
class StepEvents:
    """All that one engine step has to say to one router, in order."""

    events: tuple[Event, ...]
