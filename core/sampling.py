"""What a client may ask of the sampler. Validated once, at the router, before anything is spent."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

from .errors import InvalidRequest

MAX_LOGPROBS = 20
MAX_CHOICES = 16
MAX_STOP_TOKEN_IDS = 64
MAX_LOGIT_BIAS = 1024


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How each next token is drawn: bias, penalties, temperature, top-k, top-p and min-p, in this order, then noise.

    `logit_bias`: (token id, what is added to its logit), ascending ids. `repetition_penalty` divides a positive logit, and multiplies
    a negative one, of every token that prompt or output holds (Keskar et al., 2019, section 4.1). `frequency_penalty` is taken off a
    logit for every time the output holds the token, `presence_penalty` once if it does. `min_p`: no token less likely than this
    share of the likeliest one's probability. Before `min_tokens` of output, tokens that would end it cannot be drawn.

    `temperature` 0 is greedy. `top_k` 0 means no limit. Noise is Gumbel from Philox(seed, choice, index): with the same seed
    the same request draws the same tokens on every device and after every retry. The router draws a seed where the client
    gave none, so workers always see one. `logprobs` None means none, n means the chosen token's and the n likeliest ones',
    natural logarithm, of the model's own distribution, before all of this. A stop token ends the request and is
    not part of the text; `ignore_eos` lets the model's own end tokens pass. `n` outputs (choices) are written, each by itself: all
    of this counts and ends for each choice apart, and choice 0 is what `n` = 1 would write.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0
    n: int = 1

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def penalised(self) -> bool:
        """Whether what is drawn depends on the tokens before it by more than the model."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    def ends(self, eos_token_ids: frozenset[int]) -> frozenset[int]:
        """The tokens that end the output, for a model with these end tokens."""
        return frozenset(self.stop_token_ids) | (frozenset() if self.ignore_eos else eos_token_ids)

    def validate(self, vocab_size: int) -> None:
        """Raise `InvalidRequest` naming the first field that is out of range."""
        _whole("max_tokens", self.max_tokens, 1, 2**31 - 1)
        _real("temperature", self.temperature, 0.0, 100.0)
        _real("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _whole("top_k", self.top_k, 0, 2**31 - 1)
        if self.seed is not None:
            _whole("seed", self.seed, 0, 2**64 - 1)
        if self.logprobs is not None:
            _whole("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        if len(self.stop_token_ids) > MAX_STOP_TOKEN_IDS:
            raise InvalidRequest(
                f"stop_token_ids has {len(self.stop_token_ids)} entries; the limit is {MAX_STOP_TOKEN_IDS}.", field="stop_token_ids"
            )
        for token in self.stop_token_ids:
            _whole("stop_token_ids", token, 0, vocab_size - 1)
        _real("min_p", self.min_p, 0.0, 1.0)
        _real("repetition_penalty", self.repetition_penalty, 0.0, 100.0, open_low=True)
        _real("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _real("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        self._check_bias(vocab_size)
        _whole("min_tokens", self.min_tokens, 0, self.max_tokens)
        _whole("n", self.n, 1, MAX_CHOICES)

    def _check_bias(self, vocab_size: int) -> None:
        if len(self.logit_bias) > MAX_LOGIT_BIAS:
            raise InvalidRequest(f"logit_bias has {len(self.logit_bias)} entries; the limit is {MAX_LOGIT_BIAS}.", field="logit_bias")
        for token, bias in self.logit_bias:
            _whole("logit_bias", token, 0, vocab_size - 1)
            _real("logit_bias", bias, -100.0, 100.0)
        if any(earlier >= later for (earlier, _), (later, _) in pairwise(self.logit_bias)):
            raise InvalidRequest("logit_bias must name each token once, in ascending order.", field="logit_bias")


def _whole(field: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise InvalidRequest(f"{field} must be between {low} and {high}, not {value}.", field=field)


def _real(field: str, value: float, low: float, high: float, *, open_low: bool = False) -> None:
    inside = math.isfinite(value) and value <= high and (value > low if open_low else value >= low)
    if not inside:
        bound = f"above {low:g}" if open_low else f"at least {low:g}"
        raise InvalidRequest(f"{field} must be {bound} and at most {high:g}, not {value}.", field=field)
