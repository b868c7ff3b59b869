"""When the tokens of one request went out, and what follows from it. Seconds on the router's clock. Pure but for the recorder."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean

from ..core.metrics import Recorder


@dataclass(slots=True)
class _Choice:
    """`first` and `last`: when its tokens went out."""

    last: float
    first: float = 0.0
    tokens: int = 0


class Times:
    """Choices are timed apart: one waits for its own next token, not for another's."""

    def __init__(self, accepted: float, choices: int, recorder: Recorder) -> None:
        self.accepted = accepted
        self.ttft: float | None = None
        self.handover_gap: float | None = None
        self._choices = [_Choice(accepted) for _ in range(choices)]
        self._recorder = recorder

    @property
    def tokens(self) -> int:
        return sum(choice.tokens for choice in self._choices)

    @property
    def tpot(self) -> float | None:
        """Mean over the choices of more than one token."""
        timed = [(choice.last - choice.first) / (choice.tokens - 1) for choice in self._choices if choice.tokens > 1]
        return fmean(timed) if timed else None

    def token(self, which: int, now: float, handed_over: bool) -> None:
        """One more token of a choice. The gap between tokens 1 and 2 of a disaggregated request is the hand-over's, reported apart."""
        choice = self._choices[which]
        gap = now - choice.last
        choice.tokens += 1
        choice.last = now
        self._recorder.inc("vllm:generation_tokens_total")
        if choice.tokens == 1:
            choice.first = now
            self._begin(gap)
        elif choice.tokens == 2 and handed_over:
            self._hand_over(gap)
        else:
            self._recorder.observe("vllm:inter_token_latency_seconds", gap)

    def _begin(self, gap: float) -> None:
        if self.ttft is None:
            self.ttft = gap
            self._recorder.observe("vllm:time_to_first_token_seconds", gap)

    def _hand_over(self, gap: float) -> None:
        if self.handover_gap is None:
            self.handover_gap = gap
            self._recorder.observe("diptych_handover_gap_seconds", gap)
