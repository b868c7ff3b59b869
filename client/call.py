"""What the two clients share: the options of a call, and the whole answer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from ..core.errors import InvalidRequest
from ..core.generate import Chunk, Finish, Generate, Timing, Usage
from ..core.request import FinishReason, Token
from ..core.sampling import SamplingParams

Prompt = str | Sequence[int]
"""Text, or token ids taken as they are."""


class Options(TypedDict, total=False):
    """How to answer; all may be left out.

    `model`: by default the one that is served. `max_tokens`: by default 16. `temperature`: by default 1; 0 takes the likeliest
    token. `top_p`, `top_k`: keep only the likeliest tokens of that total probability, or that many. `seed`: the same seed draws the
    same answer. `min_p`: only tokens at least that share as likely as the likeliest. `repetition_penalty`, `presence_penalty`,
    `frequency_penalty`: say less again what was said. `logit_bias`: added to the logits of these token ids. `min_tokens`: end no sooner.
    `stop`: a text, or up to 16, that ends the answer and is not part of it. `stop_token_ids`: the same for tokens.
    `n`: write so many answers (choices), each by itself. `ignore_eos`: go on past the model's own end. `logprobs`: adds to each token
    its logarithmic probability, and so many likeliest ones with theirs. `request_id`: a name of yours for the logs. `timeout_s`: give
    up after so many seconds.
    """

    model: str
    n: int
    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    seed: int | None
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]
    min_tokens: int
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    logprobs: int | None
    request_id: str
    timeout_s: float | None


@dataclass(frozen=True, slots=True)
class Choice:
    """One way the answer went. `finish`: why it ended."""

    text: str
    tokens: tuple[Token, ...]
    finish: FinishReason


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer, its choices by their number. `usage` counts the tokens of all; `timing` is in seconds on the server's clock.
    `text`, `tokens` and `finish` are those of the first choice, which is the only one unless `n` asked for more."""

    choices: tuple[Choice, ...]
    usage: Usage
    timing: Timing
    request_id: str

    @property
    def text(self) -> str:
        return self.choices[0].text

    @property
    def tokens(self) -> tuple[Token, ...]:
        return self.choices[0].tokens

    @property
    def finish(self) -> FinishReason:
        return self.choices[0].finish


def make_call(prompt: Prompt, options: Options) -> tuple[Generate, float | None]:
    """The call that `options` describe, and its time limit; `TypeError` for an option that does not exist."""
    values: dict[str, Any] = dict(options)
    timeout_s = values.pop("timeout_s", None)
    stop = values.pop("stop", ())
    call = Generate(
        prompt=_prompt(prompt),
        model=values.pop("model", ""),
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        request_id=values.pop("request_id", ""),
        sampling=SamplingParams(
            stop_token_ids=tuple(values.pop("stop_token_ids", ())), logit_bias=tuple(sorted(values.pop("logit_bias", {}).items())), **values
        ),
    )
    return call, timeout_s


def _prompt(prompt: Prompt) -> str | tuple[int, ...]:
    if len(prompt) == 0:
        raise InvalidRequest("prompt is empty.", field="prompt")
    return prompt if isinstance(prompt, str) else tuple(prompt)


def gather(chunks: Iterable[Chunk]) -> Answer:
    """The answer that `chunks`, all of it, add up to."""
    parts = list(chunks)
    last: Finish | None = parts[-1].finish if parts else None
    assert last is not None, "a stream of chunks ends with a finish, or raises"
    numbers = sorted({part.choice for part in parts if part.reason})
    return Answer(
        choices=tuple(_choice([part for part in parts if part.choice == number]) for number in numbers),
        usage=last.usage,
        timing=last.timing,
        request_id=parts[-1].request_id,
    )


def _choice(parts: Sequence[Chunk]) -> Choice:
    """One choice from its chunks, of which the one that ends it says why."""
    return Choice(
        text="".join(part.text for part in parts),
        tokens=tuple(token for part in parts for token in part.tokens),
        finish=next(part.reason for part in parts if part.reason),
    )
