"""The rank process: one engine, one pool, one role, served over gRPC.

    python -m diptych.cluster.rank --spec '<RankSpec as JSON>' [--leash]

It writes one JSON object a line to stdout: `progress`, then `ready` (address, incarnation, layout, capacity_tokens) or `failed`
(message, field; exit status 2). Logs go to stderr. SIGTERM lets running work finish, a second one does not; with `--leash` it ends
with its parent. It knows nothing of Ray: an actor, a test and a shell start the same command.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys

from ..core.errors import ConfigError, DiptychError
from ..core.model import read_card
from .child import FAILED, hold_leash, log_to_stderr, progress, say
from .memory import available_bytes, require_memory
from .spec import RankSpec, read_spec


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m diptych.cluster.rank", description="Run one rank process of a cluster.")
    parser.add_argument("--spec", required=True, help="RankSpec as JSON")
    parser.add_argument("--leash", action="store_true", help="end with the process that started this one")
    arguments = parser.parse_args()
    if arguments.leash:
        hold_leash()
    try:
        spec = read_spec(RankSpec, arguments.spec)
        log_to_stderr(spec.log_level, spec.worker_id)
        card = read_card(spec.model_dir)
        require_memory(card, spec, available_bytes())
        _take_cores(spec)
        progress("started")
        # Imported only now: torch reads the number of threads from the environment when it is loaded.
        from .serving import serve

        progress("imported")
        asyncio.run(serve(spec))
    except DiptychError as error:
        say("failed", message=error.message, field=error.field)
        return FAILED
    return 0


def _take_cores(spec: RankSpec) -> None:
    """Run on the cores of the spec, with as many engine threads as it says, from before torch is loaded."""
    if spec.cpus is not None:
        try:
            os.sched_setaffinity(0, spec.cpus)
        except (OSError, OverflowError):
            raise ConfigError(f"This process may not run on the cores {list(spec.cpus)}.", field="cpus") from None
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(spec.threads)


if __name__ == "__main__":
    sys.exit(main())
