"""What a client may ask of the sampler. Validated once, at the router, before anything is spent."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .errors import InvalidRequest

MAX_LOGPROBS = 20
MAX_STOP_TOKEN_IDS = 64


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How each next token is drawn.

    `temperature` 0 is greedy. `top_k` 0 means no limit. Noise is Gumbel from Philox(seed, choice, index): with the same seed
    the same request draws the same tokens on every device and after every retry. The router draws a seed where the client
    gave none, so workers always see one. `logprobs` None means none, n means the chosen token's and the n likeliest ones',
    natural logarithm, of the model's distribution before temperature, top-k and top-p. A stop token ends the request and is
    not part of the text; `ignore_eos` lets the model's own end tokens pass.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

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


def _whole(field: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise InvalidRequest(f"{field} must be between {low} and {high}, not {value}.", field=field)


def _real(field: str, value: float, low: float, high: float, *, open_low: bool = False) -> None:
    inside = math.isfinite(value) and value <= high and (value > low if open_low else value >= low)
    if not inside:
        bound = f"above {low:g}" if open_low else f"at least {low:g}"
        raise InvalidRequest(f"{field} must be {bound} and at most {high:g}, not {value}.", field=field)
