"""One simulated request: what was asked, where it went, and when what became of it. Pure."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from ...core.prefix import HASH_TOKENS, root_hash
from ...core.request import Request, Tokens
from ...core.sampling import SamplingParams
from ..load.workload import Arrival

TOKEN = 1
"""What every simulated step draws."""
MODEL = "simulated"


@dataclass(slots=True, eq=False)
class Life:
    """Times are seconds from the load's begin; None until it has come to that. `granted`: when the destination lent its blocks."""

    name: str
    arrival: Arrival
    request: Request
    prefill: str | None = None
    decode: str | None = None
    first: float | None = None
    second: float | None = None
    last: float | None = None
    granted: float | None = None
    refused: str | None = None

    @property
    def ttft(self) -> float | None:
        return None if self.first is None else self.first - self.arrival.at

    @property
    def tpot(self) -> float | None:
        """Mean seconds per output token after the first; None of one token."""
        if self.first is None or self.last is None or self.arrival.output_tokens < 2:
            return None
        return (self.last - self.first) / (self.arrival.output_tokens - 1)

    @property
    def gap(self) -> float | None:
        return None if self.first is None or self.second is None else self.second - self.first


@lru_cache(maxsize=8192)
def _sampling(output_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=output_tokens, ignore_eos=True, seed=0)


def request_of(arrival: Arrival, max_context: int) -> Request:
    """Prompts share no token but those of a prefix that their arrivals name alike. What is beyond `max_context` is refused by its length
    and gets no tokens: a hundred million of them took 800 MB."""
    length = min(arrival.prompt_tokens, max_context)
    shared = min(arrival.prefix_tokens, length)
    ids = (arrival.prefix + 2,) * shared + (_OWN + arrival.number,) * (length - shared)
    return Request(f"r{arrival.number}", MODEL, (Tokens(ids),), _sampling(arrival.output_tokens), tenant=arrival.tenant)


_OWN = 1 << 24
"""Ids from here on are one request's; those below are of prefixes."""


def hashes_of(request: Request, prompt: Sequence[int]) -> list[bytes]:
    """What stands for `core.prefix.chained` of a simulated prompt and of its answer, which is known before it is drawn, and is equal where
    that is: of whole blocks of a prefix its id and their place say what is in them and before them, of others the request's own id does.
    13 bytes, of which twice as many are in the CPU's cache, and no hashing, which took a tenth of a simulation."""
    own, length = prompt[-1], len(prompt)
    return [*_hashes(request.tenant, prompt[0], own, bisect_left(prompt, own), length, length + request.sampling.max_tokens)]


@lru_cache(maxsize=64)
def _hashes(tenant: str, first: int, own: int, shared: int, prompt: int, tokens: int) -> tuple[bytes, ...]:
    """The root, then of `tokens` the first `shared` are a prefix's, and the first `prompt` are not drawn. Both workers of a request ask,
    one just after the other: they have the same bytes, not equal ones."""
    if tenant not in _ROOTS:
        _ROOTS[tenant] = root_hash(fingerprint=MODEL, dtype="", tenant=tenant), len(_ROOTS).to_bytes(3, "little")
    (root, number), places = _ROOTS[tenant], _places(tokens // HASH_TOKENS)
    prefix, rest = (number + token.to_bytes(6, "little") for token in (first, own))
    if own < _OWN:  # nothing but a prefix: what is drawn behind it is that of all prompts of this length
        shared, rest = prompt, rest + prompt.to_bytes(4, "little")
    before, all_of_them = shared // HASH_TOKENS, tokens // HASH_TOKENS
    return (root, *[prefix + place for place in places[:before]], *[rest + place for place in places[before:all_of_them]])


_ROOTS: dict[str, tuple[bytes, bytes]] = {}
"""A tenant's root, and its number."""
_PLACES: list[bytes] = []


def _places(count: int) -> list[bytes]:
    """At least so many numbers as bytes, from 0 on."""
    while len(_PLACES) < count:
        _PLACES.append(len(_PLACES).to_bytes(4, "little"))
    return _PLACES
