"""The link between every pair of workers, tried for real: a prompt of random tokens is read by one and handed over to the other."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace

from ...core.commands import Decode, Event, Failed, Finished, HandedOver, Prefill
from ...core.errors import DiptychError, Unavailable
from ...core.fleet import Member, Phase, WorkerReport
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
SOON_S = 2.0
"""After so long it is asked whether the pair is too busy to be tried."""
TRY_S = 18.0
"""For one that is not, from then on; the first hand-over of a pair opens its lane (gloo: half a second a rank)."""
REPORT_S = 5.0
MAX_PAIRS = 64
"""At most so many pairs are tried, so that each worker is in as many as any other."""


@dataclass(frozen=True, slots=True)
class Link:
    """`error` None: `kv_bytes` went over `transport` in `seconds`, unless it was `busy`: one of the two had too much else to do."""

    source: str
    destination: str
    error: str | None = None
    transport: str = ""
    kv_bytes: int = 0
    seconds: float = 0.0
    busy: bool = False

    @property
    def works(self) -> bool:
        """As far as is known."""
        return self.error is None and (self.busy or self.kv_bytes > 0)

    @property
    def name(self) -> str:
        return f"{self.source} → {self.destination}"


def pairs(members: Sequence[Member], most: int = MAX_PAIRS, joined: Collection[str] | None = None) -> list[tuple[Member, Member]]:
    """Each prefill worker with each decode worker; of more than `most` those whose numbers go round. `joined`: only those with one of
    these."""
    sources = [member for member in members if member.phase is Phase.PREFILL]
    destinations = [member for member in members if member.phase is Phase.DECODE]
    turns = range(max(1, len(destinations)))
    every = [
        (source, destinations[(index + turn) % len(destinations)]) for turn in turns for index, source in enumerate(sources) if destinations
    ]
    return [pair for pair in every if joined is None or any(member.worker_id in joined for member in pair)][:most]


async def try_links(members: Sequence[Member], tls: TlsFiles | None, joined: Collection[str] | None = None) -> list[Link]:
    """One pair after another."""
    return [await _try(source, destination, tls) for source, destination in pairs(members, joined=joined)]


async def _try(source: Member, destination: Member, tls: TlsFiles | None) -> Link:
    link = Link(source.worker_id, destination.worker_id)
    try:
        async with WorkerClient(source.address, tls) as giver, WorkerClient(destination.address, tls) as taker:
            return await _hand_over(giver, taker, destination.address, link)
    except DiptychError as error:
        return replace(link, error=error.message)


async def _hand_over(giver: WorkerClient, taker: WorkerClient, address: str, link: Link) -> Link:
    attempt_id = new_attempt_id()
    tokens = tuple(random.randrange(VOCABULARY) for _ in range(PROMPT_TOKENS))
    sampling = SamplingParams(max_tokens=2, temperature=0.0, seed=0, ignore_eos=True)
    request = Request(f"doctor-{attempt_id[:8]}", "", (Tokens(tokens),), sampling)
    down, up = taker.attach(), giver.attach()
    down.send(Decode(attempt_id, request))
    up.send(Prefill(attempt_id, request, address))
    told = asyncio.create_task(_told(up, down, attempt_id))
    try:
        for seconds in (SOON_S, TRY_S):
            await asyncio.wait({told}, timeout=seconds)
            if told.done():
                done = await told
                return replace(link, transport=done.transport, kv_bytes=done.kv_bytes, seconds=done.seconds)
            if await _busy(giver, taker):
                return replace(link, busy=True)
        return replace(link, error=f"nothing was handed over within {SOON_S + TRY_S:g} s")
    finally:
        told.cancel()
        await asyncio.wait({told})
        down.close()
        up.close()


async def _told(up: object, down: object, attempt_id: str) -> HandedOver:
    """What P says at the end, when D has ended too; raises what either failed with."""
    done = await _last(aiter(_events(up)), attempt_id)
    if not isinstance(done, HandedOver):
        raise Unavailable("the prefill worker ended without a hand-over")
    await _last(aiter(_events(down)), attempt_id)
    return done


async def _busy(giver: WorkerClient, taker: WorkerClient) -> bool:
    """Whether our prompt has not had its turn beside others, or its Offer has come, and there is no memory for it."""
    read, write = await _report(giver), await _report(taker)
    if read is None or write is None:
        return False
    return read.waiting + read.running > 1 or write.grants_wait


async def _report(client: WorkerClient) -> WorkerReport | None:
    """What the worker says of itself now; None if it says nothing."""
    try:
        async with asyncio.timeout(REPORT_S), aclosing(client.watch()) as reports:
            return await anext(reports, None)
    except TimeoutError:
        return None


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


def on_gpus(transports: Sequence[Transport]) -> bool:
    return any(transport.on_gpu for transport in transports)


def judge_link(link: Link, transports: Sequence[Transport]) -> Finding:
    """`transports`: the config's, the best first. KV between hosts has no shared memory, so what is not the first is no fault."""
    check = f"link {link.name}"
    if link.error is not None:
        across = "nccl is needed, over the interface that NCCL_SOCKET_IFNAME names" if on_gpus(transports) else "gloo is needed"
        return wrong(
            check,
            f"No KV moves: {link.error}",
            f"transfer.transports is {', '.join(transports)}. Between hosts {across}, and the way must be open; "
            "both workers' logs say what they tried.",
            field="transfer.transports",
        )
    if link.busy:
        return note(check, "Not known: there is no turn or no memory for a prompt just now.", "Ask when they have less to do.")
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
