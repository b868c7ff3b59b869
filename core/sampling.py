"""What a client may ask of the sampler. Validated once, at the router, before anything is spent."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from .errors import InvalidRequest

MAX_LOGPROBS = 20
MAX_CHOICES = 16
MAX_STOP_TOKEN_IDS = 64
MAX_LOGIT_BIAS = 1024


@dataclass(frozen=True, slots=True)
class Range:
    """Numbers from `low` to `high`, both among them unless `open_low`; no NaN."""

    low: float
    high: float
    open_low: bool = False

    def check(self, field: str, value: float) -> None:
        """Raise `InvalidRequest` about `field` if `value` is outside."""
        if value <= self.high and (value > self.low if self.open_low else value >= self.low):
            return
        bounds = f"above {self.low:g} and at most {self.high:g}" if self.open_low else f"between {self.low} and {self.high}"
        raise InvalidRequest(f"{field} must be {bounds}, not {value}.", field=field)


BIAS = Range(-100, 100)
RANGES: dict[str, Range] = {
    "max_tokens": Range(1, 2**31 - 1),
    "temperature": Range(0, 100),
    "top_p": Range(0, 1, open_low=True),
    "top_k": Range(0, 2**31 - 1),
    "seed": Range(0, 2**64 - 1),
    "logprobs": Range(0, MAX_LOGPROBS),
    "min_p": Range(0, 1),
    "repetition_penalty": Range(0, 100, open_low=True),
    "presence_penalty": Range(-2, 2),
    "frequency_penalty": Range(-2, 2),
    "n": Range(1, MAX_CHOICES),
}
"""What each of these fields may be (None is always allowed where it is the default)."""


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
        ends = frozenset[int]() if self.ignore_eos else eos_token_ids
        return ends.union(self.stop_token_ids) if self.stop_token_ids else ends

    def validate(self, vocab_size: int) -> None:
        """Raise `InvalidRequest` naming the first field that is out of range."""
        for field, allowed in RANGES.items():
            if (value := getattr(self, field)) is not None:
                allowed.check(field, value)
        if len(self.stop_token_ids) > MAX_STOP_TOKEN_IDS:
            raise InvalidRequest(
                f"stop_token_ids has {len(self.stop_token_ids)} entries; the limit is {MAX_STOP_TOKEN_IDS}.", field="stop_token_ids"
            )
        for token in self.stop_token_ids:
            _token_range(vocab_size).check("stop_token_ids", token)
        self._check_bias(vocab_size)
        Range(0, self.max_tokens).check("min_tokens", self.min_tokens)

    def _check_bias(self, vocab_size: int) -> None:
        if len(self.logit_bias) > MAX_LOGIT_BIAS:
            raise InvalidRequest(f"logit_bias has {len(self.logit_bias)} entries; the limit is {MAX_LOGIT_BIAS}.", field="logit_bias")
        for token, bias in self.logit_bias:
            _token_range(vocab_size).check("logit_bias", token)
            BIAS.check("logit_bias", bias)
        if any(earlier >= later for (earlier, _), (later, _) in pairwise(self.logit_bias)):
            raise InvalidRequest("logit_bias must name each token once, in ascending order.", field="logit_bias")


def _token_range(vocab_size: int) -> Range:
    return Range(0, vocab_size - 1)
