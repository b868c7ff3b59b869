"""The options of `generate` and `chat` that say how tokens are drawn and when the answer ends: one for each field a call has for it."""

from __future__ import annotations

from dataclasses import fields
from typing import Annotated, Any

import typer

from ...core.errors import InvalidRequest
from ...core.sampling import SamplingParams

_PANEL = "Sampling"


def _option(*names: str, help: str, metavar: str | None = None) -> Any:
    return typer.Option(*names, help=help, metavar=metavar, rich_help_panel=_PANEL)


MaxTokens = Annotated[int, _option("--max-tokens", help="The most tokens to write.")]
MinTokens = Annotated[int, _option("--min-tokens", help="Do not end before so many tokens.")]
Temperature = Annotated[float, _option("--temperature", "-t", help="0 takes the likeliest token each time.")]
TopP = Annotated[float, _option("--top-p", help="Draw among the likeliest tokens that together have this probability.")]
TopK = Annotated[int, _option("--top-k", help="Draw among so many likeliest tokens; 0: all.")]
MinP = Annotated[float, _option("--min-p", help="Draw among tokens at least that share as likely as the likeliest; 0: all.")]
RepetitionPenalty = Annotated[float, _option("--repetition-penalty", help="Above 1: repeat less of prompt and answer.")]
PresencePenalty = Annotated[float, _option("--presence-penalty", help="Above 0: repeat less of the answer.")]
FrequencyPenalty = Annotated[float, _option("--frequency-penalty", help="The same, for every time it was said.")]
LogitBias = Annotated[
    list[str] | None, _option("--logit-bias", metavar="TOKEN=BIAS", help="Add to the logit of a token id; may be given several times.")
]
Seed = Annotated[int | None, _option("--seed", help="The same seed draws the same answer.")]
Stop = Annotated[list[str] | None, _option("--stop", metavar="TEXT", help="A text that ends the answer; may be given several times.")]
StopTokens = Annotated[list[int] | None, _option("--stop-token", metavar="ID", help="The same for a token id.")]
IgnoreEos = Annotated[bool, _option("--ignore-eos", help="Go on past the model's own end.")]
Choices = Annotated[int, _option("--n", metavar="N", help="Write so many answers, each by itself.")]
Logprobs = Annotated[
    int | None, _option("--logprobs", metavar="N", help="Then print each token's logarithmic probability and the N likeliest, on stderr.")
]


def sampling_of(*, logit_bias: list[str] | None, stop_tokens: list[int] | None, **rest: Any) -> SamplingParams:
    """`rest` are fields of `SamplingParams` by their names. Raises `InvalidRequest` for a bias that is no TOKEN=BIAS."""
    return SamplingParams(stop_token_ids=tuple(stop_tokens or ()), logit_bias=_biases(logit_bias or ()), **rest)


def body_of(sampling: SamplingParams, stop: list[str] | None) -> dict[str, Any]:
    """The same as fields of an OpenAI body; those that ask for nothing are left out."""
    neutral = SamplingParams()
    asked = {field.name: getattr(sampling, field.name) for field in fields(SamplingParams)}
    body = {name: value for name, value in asked.items() if value != getattr(neutral, name)}
    if sampling.logit_bias:
        body["logit_bias"] = {str(token): bias for token, bias in sampling.logit_bias}
    return {**body, "max_tokens": sampling.max_tokens, **({"stop": stop} if stop else {})}


def _biases(given: list[str] | tuple[()]) -> tuple[tuple[int, float], ...]:
    biases: dict[int, float] = {}
    for text in given:
        token, _, bias = text.partition("=")
        try:
            biases[int(token)] = float(bias)
        except ValueError:
            raise InvalidRequest(f"--logit-bias {text!r} is no TOKEN=BIAS, as in 42=-5.", field="logit_bias") from None
    return tuple(sorted(biases.items()))
