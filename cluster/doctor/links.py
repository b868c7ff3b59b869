"""The link between every pair of workers, tried for real: a prompt of random tokens is read by one and handed over to the other."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from ...core.commands import Decode, Event, Failed, Finished, HandedOver, Prefill
from ...core.errors import DiptychError
from ...core.fleet import Member, Phase
from ...core.request import Request, Tokens, new_attempt_id
from ...core.sampling import SamplingParams
from ...core.security import TlsFiles
from ...core.transfer import Transport
from ...rpc.worker import WorkerClient
from .finding import Finding, note, ok, wrong

PROMPT_TOKENS = 48
"""Three blocks."""
VOCABULARY = 64
"""Ids that every model has; random ones, so that nobody has the prompt cached."""
TRY_S = 20.0
"""For one pair; the first hand-over of a pair opens its lane (gloo: half a second a rank)."""
MAX_PAIRS = 64
"""At most so many pairs are tried, so that each worker is in as many as any other."""


@dataclass(frozen=True, slots=True)
class Link:
    """`error` None: `kv_bytes` went over `transport` in `seconds`."""

    source: str
    destination: str
    error: str | None = None
    transport: str = ""
    kv_bytes: int = 0
    seconds: float = 0.0

    @property
    def name(self) -> str:
        return f"{self.source} → {self.destination}"


def pairs(members: Sequence[Member], most: int = MAX_PAIRS) -> list[tuple[Member, Member]]:
    """Each prefill worker with each decode worker; of more than `most` those whose numbers go round."""
    sources = [member for member in members if member.phase is Phase.PREFILL]
    destinations = [member for member in members if member.phase is Phase.DECODE]
    turns = range(max(1, len(destinations)))
    every = [
        (source, destinations[(index + turn) % len(destinations)]) for turn in turns for index, source in enumerate(sources) if destinations
    ]
    return every[:most]


async def try_links(members: Sequence[Member], tls: TlsFiles | None) -> list[Link]:
    """One pair after another."""
    return [await _try(source, destination, tls) for source, destination in pairs(members)]


async def _try(source: Member, destination: Member, tls: TlsFiles | None) -> Link:
    attempt_id = new_attempt_id()
    tokens = tuple(random.randrange(VOCABULARY) for _ in range(PROMPT_TOKENS))
    sampling = SamplingParams(max_tokens=2, temperature=0.0, seed=0, ignore_eos=True)
    request = Request(f"doctor-{attempt_id[:8]}", "", (Tokens(tokens),), sampling)
    try:
        async with asyncio.timeout(TRY_S), WorkerClient(source.address, tls) as giver, WorkerClient(destination.address, tls) as taker:
            down, up = taker.attach(), giver.attach()
            try:
                down.send(Decode(attempt_id, request))
                up.send(Prefill(attempt_id, request, destination.address))
                told = await _last(aiter(_events(up)), attempt_id)
                if isinstance(told, HandedOver):
                    await _last(aiter(_events(down)), attempt_id)
                    return Link(source.worker_id, destination.worker_id, None, told.transport, told.kv_bytes, told.seconds)
            finally:
                down.close()
                up.close()
    except TimeoutError:
        return Link(source.worker_id, destination.worker_id, f"nothing was handed over within {TRY_S:g} s")
    except DiptychError as error:
        return Link(source.worker_id, destination.worker_id, error.message)
    return Link(source.worker_id, destination.worker_id, "the prefill worker ended without a hand-over")


async def _events(stream: object) -> AsyncIterator[Event]:
    async for step in stream:  # type: ignore[attr-defined]
        for event in step.events:
            yield event


async def _last(events: AsyncIterator[Event], attempt_id: str) -> Event | None:
    """The attempt's terminal event; raises what it failed with. None if the stream ends before."""
    async for event in events:
        if event.attempt_id == attempt_id and isinstance(event, HandedOver | Finished):
            return event
        if event.attempt_id == attempt_id and isinstance(event, Failed):
            raise event.error
    return None


def judge_link(link: Link, transports: Sequence[Transport]) -> Finding:
    """`transports`: the config's, the best first. KV between hosts has no shared memory, so what is not the first is no fault."""
    check = f"link {link.name}"
    if link.error is not None:
        return wrong(
            check,
            f"No KV moves: {link.error}",
            f"transfer.transports is {', '.join(transports)}. Between hosts gloo is needed, and the way must be open; "
            "both workers' logs say what they tried.",
            field="transfer.transports",
        )
    if not link.kv_bytes:
        return wrong(check, "The hand-over moved no byte of KV.", "Both workers' logs say why.", field="transfer.transports")
    speed = f"{link.kv_bytes:,} bytes over {link.transport} in {link.seconds * 1000:.2f} ms"
    if transports and link.transport != transports[0]:
        return note(
            check,
            f"{speed}, not over {transports[0]}.",
            "Between hosts it cannot; on one the destination's log says why.",
        )
    return ok(check, speed)
