"""The router process: both public faces over one view of the fleet.

    python -m diptych.cluster.programs.route --spec '<RouteSpec as JSON>' [--leash]

It writes one JSON object a line to stdout: `progress`, then `ready` (http, grpc, control: host:port) or `failed` (message, field;
exit status 2). Logs go to stderr. SIGTERM lets running requests finish, a second one does not; with `--leash` it ends with its
parent.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import signal
import sys
from functools import partial
from typing import TYPE_CHECKING

from ...core.errors import DiptychError
from ..process.child import FAILED, hold_leash, log_to_stderr, progress, say
from ..process.spec import RouteSpec, read_spec

if TYPE_CHECKING:
    from ...router.server import Router


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m diptych.cluster.programs.route", description="Run the router of a cluster.")
    parser.add_argument("--spec", required=True, help="RouteSpec as JSON")
    parser.add_argument("--leash", action="store_true", help="end with the process that started this one")
    arguments = parser.parse_args()
    if arguments.leash:
        hold_leash()
    try:
        spec = read_spec(RouteSpec, arguments.spec)
        log_to_stderr(spec.log_level, "router", spec.log_format)
        progress("started")
        asyncio.run(_serve(spec))
    except DiptychError as error:
        say("failed", message=error.message, field=error.field)
        return FAILED
    return 0


async def _serve(spec: RouteSpec) -> None:
    from ...core.model import read_card
    from ...router.placement import Policy
    from ...router.server import RouterSettings, run_router
    from .exporter import Exporter

    progress("imported")
    settings = RouterSettings(
        model_dir=spec.model_dir,
        host=spec.host,
        http_port=spec.http_port,
        grpc_port=spec.grpc_port,
        model_name=spec.model_name,
        chat_template=spec.chat_template,
        policy=Policy(spec.local_prefill, spec.local_prefill_below),
        limits=spec.limits,
        api_keys=spec.api_keys,
        jwt=spec.jwt,
        open_metrics=spec.open_metrics,
        tls=spec.tls,
        internal_tls=spec.internal_tls,
        record=spec.record,
        record_bytes=spec.record_bytes,
    )
    exporter = Exporter(spec.model_name or read_card(spec.model_dir).name)
    await run_router(
        settings,
        recorder=exporter,
        metrics_text=exporter.text,
        ready=partial(_ready, spec),
        stop=_stop_on_signals(),
        grace_s=spec.drain_s,
    )


def _ready(spec: RouteSpec, router: Router) -> None:
    gc.freeze()  # what is there stays; a full search of it for garbage takes 36 ms, in which no token goes out
    say("ready", http=router.http, grpc=router.grpc, control=router.control, tls=spec.tls is not None)


def _stop_on_signals() -> asyncio.Event:
    """Set by the first SIGTERM or SIGINT; the second ends the process at once."""
    stop = asyncio.Event()

    def heard() -> None:
        if stop.is_set():
            sys.exit(128 + signal.SIGTERM)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, heard)
    return stop


if __name__ == "__main__":
    sys.exit(main())
