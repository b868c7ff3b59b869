"""An answer on the terminal as it comes: several choices one after the other, and what was likely for each token."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ...core.generate import Chunk
from ...core.request import FinishReason, Token


class InTurn:
    """Chunks of all choices come mixed: the choice whose turn it is is written at once, what others bring waits for theirs."""

    def __init__(self, choices: int, write: Callable[[str], object]) -> None:
        self.reasons: list[FinishReason | None] = [None] * choices
        self.tokens: list[list[tuple[Token, str]]] = [[] for _ in range(choices)]
        """Of each choice every token, with the text it completed (that of several goes with the last)."""
        self._write = write
        self._waiting = [""] * choices
        self._turn = 0
        self._head()

    def take(self, chunk: Chunk) -> None:
        """The next chunk of the answer."""
        self._waiting[chunk.choice] += chunk.text
        self.reasons[chunk.choice] = chunk.reason or self.reasons[chunk.choice]
        texts = [""] * (len(chunk.tokens) - 1) + [chunk.text]
        self.tokens[chunk.choice] += zip(chunk.tokens, texts, strict=False)
        while self._turn < len(self._waiting):
            self._write(self._waiting[self._turn])
            self._waiting[self._turn] = ""
            if self.reasons[self._turn] is None:
                return
            self._write("\n")
            self._turn += 1
            self._head()

    def _head(self) -> None:
        if len(self._waiting) > 1 and self._turn < len(self._waiting):
            self._write(f"── {self._turn + 1} of {len(self._waiting)} ──\n")


def likelihoods(tokens: Sequence[tuple[Token, str]]) -> list[str]:
    """One line per token: its id, its logarithmic probability, the likeliest ids with theirs, and its text."""
    lines = []
    for token, text in tokens:
        likeliest = "  ".join(f"{other}:{logprob:.3f}" for other, logprob in token.top)
        lines.append(f"{token.id:>8}  {token.logprob or 0.0:8.3f}  {likeliest}  {text!r}")
    return lines
