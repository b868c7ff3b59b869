"""What has come of one choice of a request, over all attempts: its tokens in order, each once, and one end. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..core.request import FinishReason, Token


@dataclass(slots=True)
class Output:
    """One choice. `emitted` are the ids that went out, `end` is why nothing follows them; the rest belongs to the attempt under way."""

    emitted: list[int] = field(default_factory=list)
    end: FinishReason | None = None
    held: dict[int, Token] = field(default_factory=dict)
    """Tokens that came before the one that goes out next, by index."""
    finish: FinishReason | None = None
    """What a worker said; it becomes the `end` when nothing before it is missing."""
    awaits_first: bool = False
    """Its next token comes from P, the others from D."""

    @property
    def live(self) -> bool:
        return self.end is None

    @property
    def whole(self) -> bool:
        """Nothing is known to be missing between what went out and what was heard."""
        return not self.held and not self.awaits_first

    def begin(self, *, awaits_first: bool) -> None:
        """An attempt opens: what the last one left unfinished is forgotten."""
        self.held.clear()
        self.finish = None
        self.awaits_first = awaits_first

    def close(self, reason: FinishReason) -> None:
        """Nothing follows any more."""
        self.end = reason
        self.held.clear()

    def take(self, token: Token) -> None:
        """Keep a token, unless it went out before or nothing follows any more."""
        if self.live and token.index >= len(self.emitted):
            self.held[token.index] = token

    def ready(self) -> tuple[Token, ...]:
        """The tokens that continue the output without a gap; they count as emitted."""
        ready: list[Token] = []
        while following := self.held.pop(len(self.emitted), None):
            ready.append(following)
            self.emitted.append(following.id)
        return tuple(ready)
