"""The server under load: what it serves, how it wants to be asked, and asking it."""

from __future__ import annotations

import json
from dataclasses import dataclass

from ...core.errors import ConfigError, Unavailable
from . import prompts
from .answer import Answer, read_answer, refusal_text
from .client import Endpoint, exchange
from .dialect import Dialect, dialects
from .workload import Arrival

LOOK_S = 120.0
"""How long the first answers may take: a server may still be compiling something."""


@dataclass(frozen=True, slots=True)
class Server:
    """Prompts are drawn from `vocabulary` ids and `seed`; a request that takes longer than `timeout_s` is counted as an error."""

    endpoint: Endpoint
    model: str
    dialect: Dialect
    vocabulary: int
    seed: int
    timeout_s: float

    def prepare(self, arrival: Arrival) -> bytes:
        """The body of a request: made before its time has come."""
        make_ids, make_text = prompts.token_ids, prompts.text
        prompt: str | list[int] = (
            make_ids(arrival.prompt_tokens, self.vocabulary, self.seed, arrival.variant, arrival.number)
            if self.dialect.token_ids
            else make_text(arrival.prompt_tokens, self.seed, arrival.variant, arrival.number)
        )
        return self.dialect.body(self.model, prompt, arrival.output_tokens)

    async def ask(self, arrival: Arrival, body: bytes, begin: float) -> Answer:
        """`begin`: the load's, on the clock of `time.perf_counter`."""
        wire = await exchange(self.endpoint, "POST", "/v1/completions", body, self.timeout_s)
        return read_answer(arrival, wire, begin, whole=self.dialect.ignore_eos)


async def find_server(
    url: str, *, model: str | None, api_key: str | None, ca: str | None = None, vocabulary: int, seed: int, timeout_s: float, as_text: bool
) -> Server:
    """Ask for the model's name unless it is given, then with fewer and fewer fields until the server takes a request.

    Raises `Unavailable` if it does not answer, `ConfigError` with its own words if it takes none.
    """
    endpoint = await Endpoint.find(url, api_key, ca)
    name = model or await _first_model(endpoint)
    wire = None
    for dialect in dialects():
        if as_text and dialect.token_ids:
            continue
        server = Server(endpoint, name, dialect, vocabulary, seed, timeout_s)
        body = server.prepare(Arrival(-1, 0.0, 8, 2))
        wire = await exchange(endpoint, "POST", "/v1/completions", body, LOOK_S)
        if wire.failure:
            raise Unavailable(f"{url} does not answer a first request: {wire.failure}.")
        if wire.status == 200:
            return server
        if wire.status not in (400, 422):
            break
    assert wire is not None
    raise ConfigError(f"{url} takes no request (HTTP {wire.status}): {refusal_text(wire)}", field="url")


async def _first_model(endpoint: Endpoint) -> str:
    wire = await exchange(endpoint, "GET", "/v1/models", b"", LOOK_S)
    if wire.failure:
        raise Unavailable(f"http://{endpoint.authority} does not answer: {wire.failure}.")
    try:
        return str(json.loads(wire.body)["data"][0]["id"])
    except (ValueError, LookupError, TypeError):
        raise ConfigError(f"http://{endpoint.authority} does not say what it serves; name it with --model.", field="model") from None
