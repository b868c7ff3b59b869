"""The rank process: one engine over one pool. Rank 0 leads its worker: it has the role, and is served over gRPC.

    python -m diptych.cluster.programs.rank --spec '<RankSpec as JSON>' [--leader HOST:PORT] [--leash]

It writes one JSON object a line to stdout: `progress`, then `ready` or `failed` (message, field; exit status 2). The leader's `ready`
(address, incarnation, layout, capacity_tokens) means that every rank is; a follower's names its `rank`. A leader of several ranks says
`meeting` (address) first: there the others are to find it, each told so by its `--leader`.

On the stdin of a leader with a `--leash` may come the order to be another worker (`NewRole` as JSON, one line): it finishes what it has,
says `left` (worker), and with weights and groups in place all ranks take that role; then it is `ready` anew.

Logs go to stderr. SIGTERM lets running work finish, a second one does not; a follower leaves that to its leader, and ends with it. With
`--leash` a rank ends with its parent. It knows nothing of Ray: an actor, a test and a shell start the same command.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import socket
import sys

from ...core.errors import ConfigError, DiptychError
from ...core.model import read_card
from ...worker.meeting import address_of, listen
from ..process.child import FAILED, Leash, claim_stdout, hold_leash, progress, say
from ..process.spec import RankSpec, read_spec
from ..resources.devices import VISIBLE
from ..resources.memory import available_bytes, require_memory
from .identity import named, reachable_host, worker_layout

SHARED_GPU = "NCCL_MULTI_RANK_GPU_ENABLE"
"""Without it NCCL joins no two ranks that are on one GPU, as those of two workers may be; before 2.30 it joins none at all."""
QUEUES, MOST_QUEUES = "CUDA_DEVICE_MAX_CONNECTIONS", "32"
"""Of the GPU, 8 unless it is told: streams that share one stand behind each other, and each pair and mapped pool has streams of its own."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m diptych.cluster.programs.rank", description="Run one rank process of a cluster.")
    parser.add_argument("--spec", required=True, help="RankSpec as JSON")
    parser.add_argument("--leader", metavar="HOST:PORT", help="where rank 0 of this worker awaits the others")
    parser.add_argument("--leash", action="store_true", help="end with the process that started this one")
    arguments = parser.parse_args()
    claim_stdout()
    leash = hold_leash() if arguments.leash else None
    try:
        _run(read_spec(RankSpec, arguments.spec), arguments.leader, leash)
    except DiptychError as error:
        say("failed", message=error.message, field=error.field)
        return FAILED
    return 0


def _run(spec: RankSpec, leader: str | None, leash: Leash | None) -> None:
    named(spec)
    card = read_card(spec.model_dir)
    ranks = worker_layout(spec, card).ranks
    if (spec.rank > 0) != (leader is not None):
        raise ConfigError(f"Rank {spec.rank} of {ranks} {'leads, and has no' if leader else 'needs a'} --leader.", field="leader")
    require_memory(card, spec, available_bytes())
    _take_cores(spec)
    take_device(spec)
    progress("started")
    listener = _await_others(spec) if ranks > 1 and leader is None else None
    # Imported only now: torch reads the number of threads from the environment when it is loaded.
    if leader is None:
        from .serving import serve

        progress("imported")
        asyncio.run(serve(spec, listener, leash))
    else:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)  # it is the leader that drains
        from .following import follow

        progress("imported")
        asyncio.run(follow(spec, leader))


def _await_others(spec: RankSpec) -> socket.socket:
    """Listen for the other ranks: they are started when it is said where."""
    host = reachable_host(spec)
    listener = listen(host)
    say("meeting", address=address_of(listener, host))
    return listener


def take_device(spec: RankSpec) -> None:
    """See the rank's own GPU and no other, or none, from before torch is loaded."""
    if spec.device == "cpu":
        os.environ[VISIBLE] = ""
        return
    see_gpu(spec.gpu)


def see_gpu(key: str | None) -> None:
    """That GPU and no other, if one is named; another process may be on it."""
    if key is not None:
        os.environ[VISIBLE] = key
    os.environ.setdefault(SHARED_GPU, "1")
    os.environ.setdefault(QUEUES, MOST_QUEUES)


def _take_cores(spec: RankSpec) -> None:
    """Run on the cores of the spec, with as many engine threads as it says, from before torch is loaded. Where cores are lent only the
    engine's threads keep to them: what else the process does goes wherever nobody computes, and OpenMP must see all cores, or its threads
    sleep between two products."""
    if spec.cpus is not None:
        all_cores = os.sched_getaffinity(0)
        try:
            os.sched_setaffinity(0, spec.cpus)
        except (OSError, OverflowError):
            raise ConfigError(f"This process may not run on the cores {list(spec.cpus)}.", field="cpus") from None
        if spec.core_table is not None:
            os.sched_setaffinity(0, all_cores)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(spec.threads)


if __name__ == "__main__":
    sys.exit(main())
