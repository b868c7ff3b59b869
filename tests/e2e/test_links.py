"""Whether KV moves between two workers, as `diptych doctor` and `diptych up` find out: with real workers that can, and that cannot."""

from __future__ import annotations

import asyncio
from pathlib import Path

from diptych.cluster.doctor.finding import State
from diptych.cluster.doctor.links import judge_link, try_links
from diptych.core.fleet import Member, Phase
from diptych.core.layout import Layout
from diptych.core.transfer import Transport
from e2e_harness import Rank, rank_spec, ranks


def member(rank: Rank) -> Member:
    ready = rank.wait_for("ready")
    return Member(rank.spec.worker_id, str(ready["address"]), rank.spec.phase, int(str(ready["incarnation"])), Layout("", (), 16, ()), 1024)


def test_a_pair_that_cannot_is_named_and_the_others_are_tried(tiny_llama_dir: Path, tmp_path: Path) -> None:
    shm, gloo = (Transport.SHM,), (Transport.GLOO,)
    specs = (
        rank_spec(tiny_llama_dir, Phase.PREFILL, "p0", transports=shm),
        rank_spec(tiny_llama_dir, Phase.DECODE, "d0", transports=gloo),
        rank_spec(tiny_llama_dir, Phase.DECODE, "d1", transports=shm),
    )
    with ranks(tmp_path, *specs) as (p0, d0, d1):
        first, second = asyncio.run(try_links([member(p0), member(d0), member(d1)], None))
        assert (first.name, second.name) == ("p0 → d0", "p0 → d1")
        assert judge_link(first, shm).state is State.WRONG
        assert "transport" in (first.error or "")
        assert judge_link(second, shm).state is State.OK
        assert second.transport == "shm"
        gone = member(d1)
        d1.process.kill()
        d1.process.wait()
        (lost,) = asyncio.run(try_links([member(p0), gone], None))
        assert judge_link(lost, shm).state is State.WRONG
