"""What a rank process runs: one engine over one pool, in one role, behind one gRPC port."""

from __future__ import annotations

import asyncio
import dataclasses
import ipaddress
import logging
import os
import signal
import sys
import traceback
from functools import partial
from queue import SimpleQueue
from typing import Any

import torch

from ..core.clock import Clock, MonotonicClock
from ..core.errors import ConfigError
from ..core.fleet import Phase
from ..core.layout import Layout
from ..core.model import ModelCard
from ..core.prefix import root_hash
from ..core.request import Request, new_incarnation
from ..decode_worker.role import DecodeRole
from ..decode_worker.scheduler import DecodeScheduler
from ..engine.block_pool import BlockPool
from ..engine.engine import Engine
from ..engine.prepared import PreparedModel, open_prepared
from ..kv_transfer.destination import Destination
from ..kv_transfer.pool import Pool
from ..kv_transfer.source import Source
from ..prefill_worker.role import PrefillRole
from ..prefill_worker.scheduler import PrefillScheduler
from ..rpc.channels import join_address, split_address
from ..rpc.lane import dial_lane
from ..rpc.server import serve as serve_faces
from ..worker.face import Face
from ..worker.loop import EngineLoop, Inbox
from ..worker.outbox import Call, Delivery
from ..worker.report import Reporter
from .child import progress, say
from .spec import BLOCK_SIZE, RankSpec

log = logging.getLogger(__name__)

DIED = 70
"""Exit status of a rank whose books or engine could no longer be trusted (EX_SOFTWARE)."""
GRACE_S = 0.25
"""How long what was said last may take to reach the routers after the drain, in seconds; their streams would never end by themselves."""


async def serve(spec: RankSpec) -> None:
    """Load, say that all is ready, serve until SIGTERM, drain. Raises `DiptychError` if it cannot start."""
    host = reachable_host(spec)
    torch.set_num_threads(spec.threads)
    model = open_prepared(spec.model_dir)
    if model.card.slow_path:
        log.warning(model.card.slow_path)
    pool = Pool.allocate(model.card.layout(block_size=BLOCK_SIZE, kv_tokens=spec.kv_tokens))
    progress("model mapped, pool allocated")
    engine = Engine(model, pool.caches, block_size=BLOCK_SIZE, max_slots=spec.max_running)
    engine.warm_up()
    progress("warm")
    worker = _Worker(spec, host, model, pool, engine)
    await worker.run()


def reachable_host(spec: RankSpec) -> str:
    """The host by which routers and peers reach this rank. Raises `ConfigError` for an address that stands for all interfaces: nobody
    can come to it, and a transport that binds to it would listen where nobody asked it to."""
    host = spec.advertise or split_address(spec.listen)[0]
    try:
        everywhere = ipaddress.ip_address(host).is_unspecified
    except ValueError:  # a name
        everywhere = False
    if everywhere:
        raise ConfigError(f"Others cannot come to {host}, which names all interfaces; say which host they shall ask.", field="advertise")
    return host


class _Worker:
    """The parts of one rank, joined; lives on the asyncio thread."""

    def __init__(self, spec: RankSpec, host: str, model: PreparedModel, pool: Pool, engine: Engine) -> None:
        """`host`: by which others reach it."""
        self._spec, self._host, self._card, self._pool, self._layout = spec, host, model.card, pool, pool.layout
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
            engine.run, self._role, inbox=self._inbox, clock=self._clock, deliver=self._deliver, died=died, check=spec.check
        )

    async def run(self) -> None:
        self._loop.start()
        server = await serve_faces(self._spec.listen, worker=self._face)
        progress("serving")
        say(
            "ready",
            address=join_address(self._host, server.port) if self._spec.advertise else server.address,
            incarnation=self._incarnation,
            layout=dataclasses.asdict(self._layout),
            capacity_tokens=capacity_tokens(self._layout, self._card),
        )
        await _terminated(self._asyncio)
        unfinished = await self._face.drain(self._spec.drain_s)
        if unfinished:
            log.warning("%d attempts are unfinished after %g s; ending.", unfinished, self._spec.drain_s)
        await server.stop(GRACE_S)
        await self._role.transfers.close()
        self._loop.stop()
        self._pool.close()

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
            layers=self._card.decoder.layers,
            vocab_size=self._card.vocab_size,
            reporter=Reporter(spec.worker_id, self._incarnation),
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
                transports=spec.transports,
                host=self._host,
                dial=dial_lane,
            ),
        )

    def _decode_role(self) -> DecodeRole:
        spec = self._spec
        return DecodeRole(
            DecodeScheduler(**self._scheduling()),
            vocab_size=self._card.vocab_size,
            reporter=Reporter(spec.worker_id, self._incarnation),
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
                transports=spec.transports,
                host=self._host,
            ),
        )

    def _scheduling(self) -> dict[str, Any]:
        """What both schedulers are made of."""
        spec, card = self._spec, self._card
        return {
            "pool": BlockPool(self._layout.num_blocks, self._layout.groups, BLOCK_SIZE),
            "root_hash_of": partial(_root_hash, card),
            "chunk_tokens": spec.chunk_tokens,
            "max_running": spec.max_running,
            "max_context": card.max_context,
            "eos_token_ids": card.eos_token_ids,
        }


def capacity_tokens(layout: Layout, card: ModelCard) -> int:
    """The longest sequence the empty pool holds. Every group has blocks for as many tokens."""
    return min(card.max_context, min(layout.num_blocks) * layout.block_size)


def _root_hash(card: ModelCard, request: Request) -> bytes:
    return root_hash(fingerprint=card.fingerprint, dtype=card.dtype, tenant=request.tenant, adapter=request.adapter)


def died(error: BaseException) -> None:
    """End the process at once and say why: routers see the streams break and take their attempts elsewhere."""
    traceback.print_exception(error, file=sys.stderr)
    sys.stderr.flush()
    os._exit(DIED)


async def _terminated(loop: asyncio.AbstractEventLoop) -> None:
    """Returns at the first SIGTERM or SIGINT; another ends the process at once."""
    asked = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, asked.set)
    await asked.wait()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.remove_signal_handler(number)
        signal.signal(number, signal.SIG_DFL)
