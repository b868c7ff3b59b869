"""Where the choices of an attempt part, and what a decode worker says of them."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from ..core.commands import ChoiceFinished, Finished, NewTokens
from ..core.request import FinishReason, Token
from ..core.value import value
from ..engine.batch import Draw, Drawn
from ..worker.draws import first_finish, next_draw
from .sequence import Sequence


@value
class DecodeOutcome:
    """Events for the router: new tokens in row order, then ends of choices, then terminal events. End tokens are not among the tokens."""

    new_tokens: tuple[NewTokens, ...] = ()
    choices: tuple[ChoiceFinished, ...] = ()
    finished: tuple[Finished, ...] = ()


@dataclass(slots=True)
class Said:
    """An outcome in the making; tokens by attempt."""

    tokens: dict[str, list[Token]] = field(default_factory=dict)
    choices: list[ChoiceFinished] = field(default_factory=list)
    finished: list[Finished] = field(default_factory=list)

    def token(self, attempt_id: str, token: Token) -> None:
        self.tokens.setdefault(attempt_id, []).append(token)

    def outcome(self) -> DecodeOutcome:
        new_tokens = tuple(NewTokens(attempt_id, tuple(tokens)) for attempt_id, tokens in self.tokens.items())
        return DecodeOutcome(new_tokens, tuple(self.choices), tuple(self.finished))


def part(trunk: Sequence, first_tokens: Seq[Token], max_context: int, said: Said, *, told: bool) -> list[tuple[int, list[int]]]:
    """The choices that are left behind what they share, each with all its tokens: that, and its first token or what the client has of
    it. `told`: the router knows the first tokens, and what they end, from the source."""
    firsts, shared = {token.choice: token for token in first_tokens}, len(trunk.tokens)
    left: list[tuple[int, list[int]]] = []
    for choice in trunk.request.live:
        if choice in trunk.stopped:
            continue
        if choice not in trunk.request.opening:
            left.append((choice, [*trunk.tokens, *trunk.request.generated_by(choice)]))
            continue
        first = firsts[choice]
        finish = trunk.finish_of(first.id, shared)
        known = told and first_finish(trunk.request.sampling, first.id, first.index, shared, trunk.stop_ids, max_context)
        if not told and finish is not FinishReason.STOP:
            said.token(trunk.attempt_id, first)
        if finish is None:
            left.append((choice, [*trunk.tokens, first.id]))
        elif not known:
            said.choices.append(ChoiceFinished(trunk.attempt_id, choice, finish))
    return left


def draws_of(sequence: Sequence) -> tuple[Draw, ...]:
    """Its next token, or the first tokens of the choices it stands for."""
    sampling, index, pending = sequence.request.sampling, sequence.length - sequence.prompt_tokens, sequence.pending > 0
    tokens, ends = sequence.tokens, sequence.stop_ids
    if not sequence.shared:
        return (next_draw(sampling, index, tokens, ends, choice=sequence.choice, pending=pending),)
    choices = [choice for choice in sequence.request.opening if choice not in sequence.stopped]
    return tuple(next_draw(sampling, index, tokens, ends, choice=choice, pending=pending) for choice in choices)


def tokens_of(draws: Seq[Draw], drawn: Seq[Drawn]) -> list[Token]:
    """What a step has drawn for one of its rows."""
    return [Token(draw.index, each.token_id, each.logprob, each.top, draw.choice) for draw, each in zip(draws, drawn, strict=True)]
