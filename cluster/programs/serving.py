"""What the process of a worker's first rank, its leader, runs: an engine over a pool, a role, and a gRPC port."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import signal
import socket
from collections.abc import Callable, Sequence
from functools import partial
from queue import SimpleQueue
from typing import Any

from ...core.clock import Clock, MonotonicClock
from ...core.fleet import Phase
from ...core.layout import Layout
from ...core.model import ModelCard, read_card
from ...core.prefix import chained, root_hash
from ...core.request import Request, new_incarnation
from ...decode_worker.role import DecodeRole
from ...decode_worker.scheduler import DecodeScheduler
from ...engine.block_pool import BlockPool
from ...kv_transfer.destination import Destination
from ...kv_transfer.source import Source
from ...kv_transfer.transports.wiring import usable
from ...prefill_worker.role import PrefillRole
from ...prefill_worker.scheduler import PrefillScheduler
from ...rpc.channels import join_address
from ...rpc.lane import dial_lane
from ...rpc.server import serve as serve_faces
from ...worker.face import Face
from ...worker.leader import FollowerRank, Leader
from ...worker.look_ahead import LookAhead
from ...worker.loop import BROKEN_AFTER, DEPTH, EngineLoop, Inbox, RunStep, at_once
from ...worker.meeting import meet
from ...worker.outbox import Call, Delivery
from ...worker.report import ROLE_FLIPS, Reporter
from ..process.child import Leash, died, progress, say
from ..process.spec import BLOCK_SIZE, NewRole, RankSpec, read_spec
from .identity import hello, named, reachable_host, worker_layout
from .lent_cores import lending
from .loading import Loaded, flipped, load

log = logging.getLogger(__name__)

GRACE_S = 0.25
"""How long what was said last may take to reach the routers after the drain, in seconds; their streams would never end by themselves."""


async def serve(spec: RankSpec, listener: socket.socket | None = None, leash: Leash | None = None) -> None:
    """Load, say that all is ready, serve until SIGTERM, drain. `listener`: where the other ranks of this worker come to, if there are any;
    `leash`: where orders come from to be another worker (`NewRole`), which is served in place of the first. Raises `DiptychError` if it
    cannot start, or take the other role."""
    host = reachable_host(spec)
    leader = None if listener is None else _meet(spec, listener)
    loaded = load(spec, host, leader.store if leader else None)
    asked = _Asked(leash)
    try:
        while (order := await _serve_role(spec, host, loaded, leader, asked)) is not None:
            spec = named(order.of(spec))
            loaded = flipped(loaded, spec, leader.store if leader else None)
    finally:
        loaded.disconnect()


async def _serve_role(spec: RankSpec, host: str, loaded: Loaded, leader: Leader | None, asked: _Asked) -> NewRole | None:
    if leader is not None:
        leader.wait_ready()
        progress("all ranks are ready")
    return await _Worker(spec, host, loaded, leader).run(asked)


def _meet(spec: RankSpec, listener: socket.socket) -> Leader:
    layout = worker_layout(spec, read_card(spec.model_dir))
    connections = meet(listener, hello(spec, layout), tls=spec.internal_tls)
    progress("all ranks are there")
    return Leader(connections, layout, died)


class _Worker:
    """The parts of one rank, joined; lives on the asyncio thread."""

    def __init__(self, spec: RankSpec, host: str, loaded: Loaded, leader: Leader | None) -> None:
        """`host`: by which others reach it. `leader`: its way to the other ranks, if there are any."""
        self._spec, self._host, self._card, self._pool, self._layout = spec, host, loaded.card, loaded.pool, loaded.layout
        self._num_blocks = tuple(count - loaded.spare_blocks for count in loaded.layout.num_blocks)
        """Of each group: those that the scheduler may give away."""
        self._leader, self._flips = leader, loaded.flips
        self._look_ahead = LookAhead(loaded.engine.launch) if leader is None and loaded.pool.device.type == "cuda" else None
        self._clock: Clock = MonotonicClock()
        self._incarnation = new_incarnation()
        self._asyncio = asyncio.get_running_loop()
        self._inbox: Inbox = SimpleQueue()
        self._role = self._prefill_role() if spec.phase is Phase.PREFILL else self._decode_role()
        self._face = Face(
            self._role,
            post=self._inbox.put,
            first_report=self._role.report(),
            serve_lane=self._role.transfers.serve_lane if isinstance(self._role, DecodeRole) else None,
            check=self._check_transfers if spec.check else None,
        )
        self._loop: EngineLoop[Any] = EngineLoop(
            self._run_step(loaded),
            self._role,
            inbox=self._inbox,
            clock=self._clock,
            deliver=self._deliver,
            died=died,
            check=spec.check,
            depth=depth(spec.phase, self._layout.pp),
            lending=None if spec.core_table is None else lending(spec.core_table, spec.phase, spec.cpus or ()),
            broken_after=BROKEN_AFTER if leader is None else 1,  # of many ranks none repairs a step that failed at one
        )

    async def run(self, asked: _Asked) -> NewRole | None:
        """Serve until something else is asked for, and finish; the role to take then, None to end."""
        self._loop.start()
        server = await serve_faces(self._spec.listen, worker=self._face, tls=self._spec.internal_tls)
        progress("serving")
        asked.listen()
        say(
            "ready",
            address=join_address(self._host, server.port) if self._spec.advertise else server.address,
            incarnation=self._incarnation,
            layout=dataclasses.asdict(self._layout),
            capacity_tokens=capacity_tokens(self._num_blocks, self._card),
        )
        order = await asked.next()
        unfinished = await self._face.drain(self._spec.drain_s)
        if unfinished:
            log.warning("%d attempts are unfinished after %g s; they end here.", unfinished, self._spec.drain_s)
        await server.stop(GRACE_S)
        await self._role.transfers.close()
        self._loop.stop()
        if self._look_ahead is not None:
            self._look_ahead.close()
        if order is None or asked.to_end:
            if self._leader is not None:
                self._leader.end()
            self._pool.close()
            return None
        say("left", worker=self._spec.worker_id)
        if self._leader is not None:
            self._leader.change_role(order.model_dump_json().encode())
        return order

    def _run_step(self, loaded: Loaded) -> RunStep:
        """On a GPU the next step is launched while one computes, unless there are other ranks: they are told its tokens with it."""
        if self._leader is not None:
            return self._leader.steps(loaded.engine)
        return at_once(loaded.engine.run) if self._look_ahead is None else self._look_ahead.run

    def _check_transfers(self) -> None:
        """On the asyncio thread, while the loop is idle."""
        self._role.transfers.check()
        if leases := self._role.transfers.leases:
            raise AssertionError(f"idle, and yet {leases} transfers hold blocks")

    def _call_soon(self, call: Call) -> None:
        """Have `call` made on the asyncio thread, after those before it. From any thread."""
        self._asyncio.call_soon_threadsafe(self._trusted, call)

    def _trusted(self, call: Call) -> None:
        try:
            call()
        except BaseException as error:  # noqa: BLE001 - asyncio would log it and go on, with a turn half carried out
            died(error)

    def _deliver(self, delivery: Delivery) -> None:
        self._call_soon(partial(self._face.deliver, delivery))

    def _prefill_role(self) -> PrefillRole:
        spec = self._spec
        return PrefillRole(
            PrefillScheduler(**self._scheduling()),
            layers=[tuple(self._layout.stage(rank // self._layout.tp)) for rank in range(self._layout.ranks)],
            vocab_size=self._card.vocab_size,
            reporter=self._reporter(),
            clock=self._clock,
            inbox=self._inbox,
            call_soon=self._call_soon,
            source=lambda events: Source(
                spec.worker_id,
                self._incarnation,
                self._pool,
                self._layout,
                self._clock,
                spec.lease_s,
                events,
                transports=usable(spec.transports, self._pool.device),
                host=self._host,
                dial=partial(dial_lane, tls=spec.internal_tls),
                others=self._others,
            ),
        )

    def _decode_role(self) -> DecodeRole:
        spec = self._spec
        return DecodeRole(
            DecodeScheduler(**self._scheduling(), stages=self._layout.pp),
            vocab_size=self._card.vocab_size,
            reporter=self._reporter(),
            clock=self._clock,
            inbox=self._inbox,
            destination=lambda events: Destination(
                spec.worker_id,
                self._incarnation,
                self._pool,
                self._layout,
                self._clock,
                spec.lease_s,
                spec.offer_wait_s,
                events,
                transports=usable(spec.transports, self._pool.device),
                host=self._host,
                others=self._others,
            ),
        )

    def _reporter(self) -> Reporter:
        reporter = Reporter(self._spec.worker_id, self._incarnation)
        reporter.count(ROLE_FLIPS, self._flips)
        return reporter

    def _others(self, answer: Callable[[Any], None]) -> Sequence[FollowerRank]:
        """Ranks 1.. for the transfers."""
        return () if self._leader is None else self._leader.others(answer, self._call_soon)

    def _scheduling(self) -> dict[str, Any]:
        """What both schedulers are made of."""
        spec, card = self._spec, self._card
        return {
            "pool": BlockPool(self._num_blocks, self._layout.groups, BLOCK_SIZE),
            "hashes_of": partial(_hashes, self._layout),
            "chunk_tokens": spec.chunk_tokens,
            "max_running": spec.max_running,
            "max_context": card.max_context,
            "eos_token_ids": card.eos_token_ids,
        }


def depth(phase: Phase, stages: int) -> int:
    """Steps in flight. With several stages each has one; at a prefill worker one more waits, as with one stage. A decode step of several
    stages is not decided before its rows' last tokens are known, so that no more than one for each stage could be."""
    return DEPTH if stages == 1 else stages + (phase is Phase.PREFILL)


def capacity_tokens(num_blocks: Sequence[int], card: ModelCard) -> int:
    """The longest sequence the empty pool holds. Every group has blocks for as many tokens."""
    return min(card.max_context, min(num_blocks) * BLOCK_SIZE)


def _hashes(layout: Layout, request: Request, token_ids: Sequence[int]) -> list[bytes]:
    kv_dtype = layout.groups[0].dtype
    root = root_hash(fingerprint=layout.fingerprint, dtype=kv_dtype, tenant=request.tenant, adapter=request.adapter)
    return chained(root, token_ids)


class _Asked:
    """What a worker is asked to do next: to end, by SIGTERM or SIGINT, or to take another role, by its leash. On the asyncio thread."""

    def __init__(self, leash: Leash | None) -> None:
        self._loop = asyncio.get_running_loop()
        self._orders: asyncio.Queue[str | None] = asyncio.Queue()
        self._leash = leash
        self.to_end = False
        """A role that is being left, or taken, is then the last."""

    def listen(self) -> None:
        """From now on a signal no longer ends the process at once."""
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._end)
        if self._leash is not None:
            self._leash.obey = self._obey

    async def next(self) -> NewRole | None:
        """The next order; None to end, and another signal does so at once."""
        if (order := await self._orders.get()) is not None:
            return read_spec(NewRole, order)
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_DFL)
        return None

    def _obey(self, order: str) -> None:
        """On the leash's thread."""
        self._loop.call_soon_threadsafe(self._orders.put_nowait, order)

    def _end(self) -> None:
        self.to_end = True
        self._orders.put_nowait(None)
