"""Two hosts, each with one rank: KV really crosses the network, and what breaks there is noticed and mended."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from diptych.core.fleet import Phase
from e2e_harness import Answer, Rank, Workers, attached, rank_spec, request
from hosts import Host, hosts, missing

LEASE_S = 3.0
pytestmark = [pytest.mark.root, pytest.mark.skipif(missing() is not None, reason=missing() or "")]


def prompt(length: int, seed: int) -> list[int]:
    return [2, *(3 + (7 * position + 11 * seed) % 500 for position in range(length - 1))]


@contextmanager
def rank_on(host: Host, model: Path, phase: Phase, directory: Path, listen: str | None = None, **changes: object) -> Iterator[Rank]:
    spec = rank_spec(model, phase, host.name, listen=listen or f"{host.address}:0", lease_s=LEASE_S, **changes)
    rank = Rank.start(spec, directory, prefix=host.prefix)
    try:
        rank.wait_for("ready")
        yield rank
    finally:
        rank.kill()


async def same(workers: Workers, length: int, seed: int) -> Answer:
    asked = request(prompt(length, seed), max_tokens=8)
    apart, together = await workers.disaggregated(asked), await workers.local(asked)
    assert apart.error is None
    assert apart.tokens == together.tokens
    assert apart.handed_over is not None
    assert apart.handed_over.transport == "gloo"
    return apart


def test_kv_crosses_between_hosts(tiny_gemma3_dir: Path, tmp_path: Path) -> None:
    """Both ranks may use shm and gloo. They share a disk, and nothing else, so it must be gloo."""
    with hosts("one", "two") as (_, one, two):
        kept = {Path(f"/proc/{host.holder}/ns/{kind}").readlink() for host in (one, two) for kind in ("net", "mnt", "ipc", "uts")}
        assert len(kept) == 8

        async def twice(p: Rank, d: Rank) -> None:
            async with attached(p, d) as workers:
                before = two.received
                answer = await same(workers, 333, 1)
                assert answer.handed_over is not None
                assert two.received - before > answer.handed_over.kv_bytes
                await same(workers, 100, 2)
                await workers.idle()

        with rank_on(two, tiny_gemma3_dir, Phase.DECODE, tmp_path, listen="0.0.0.0:0", advertise=two.address) as d:
            assert d.address.startswith(two.address)
            with rank_on(one, tiny_gemma3_dir, Phase.PREFILL, tmp_path) as p:
                asyncio.run(twice(p, d))
                p.kill()
            with rank_on(one, tiny_gemma3_dir, Phase.PREFILL, tmp_path) as p:
                asyncio.run(twice(p, d))
        assert "over gloo: one cannot be reached by shared memory from here" in d.log.read_text()
