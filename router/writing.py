"""One choice on its way to the client: tokens become text, and a stop string may end it."""

from __future__ import annotations

from collections.abc import Sequence

from ..core.generate import Chunk
from ..core.recordings import Doing
from ..core.request import FinishReason, Token
from ..core.spans import span
from .text import Detokeniser, StopStrings


class Writing:
    """What nobody has taken yet is kept. `stopped`: a stop string is complete, and what comes behind it is not sent."""

    def __init__(self, choice: int, decoder: Detokeniser, stop: Sequence[str], *, min_tokens: int) -> None:
        """Before `min_tokens` of them stop strings are not looked for."""
        self.choice = choice
        self.stopped = False
        self._decoder = decoder
        self._stop = StopStrings(stop)
        self._min_tokens = min_tokens
        self._text: list[str] = []
        self._tokens: list[Token] = []
        self._reason: FinishReason | None = None

    def push(self, token: Token) -> None:
        """The next token; not to be called once `stopped`."""
        self._tokens.append(token)
        with span(Doing.DETOKENISE):
            text = self._decoder.push(token.id)
        if token.index >= self._min_tokens:
            text, self.stopped = self._stop.push(text)
        if text:
            self._text.append(text)

    def end(self, reason: FinishReason) -> FinishReason:
        """No token follows; why, for the client. What was held back is text now, unless a stop string ended it."""
        if self.stopped:
            reason = FinishReason.STOP
        else:
            text, stopped = self._stop.push(self._decoder.flush())
            self._text.append(text if stopped else text + self._stop.flush())
        self._reason = reason
        return reason

    def take(self, request_id: str) -> Chunk:
        """What has come since the last time."""
        chunk = Chunk(request_id, "".join(self._text), tuple(self._tokens), choice=self.choice, reason=self._reason)
        self._text, self._tokens, self._reason = [], [], None
        return chunk
