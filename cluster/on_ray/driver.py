"""The one process of a cluster that speaks with Ray. The supervisor drives it through its stdin and stdout.

    python -m diptych.cluster.on_ray.driver --spec '<RaySpec as JSON>'

It starts a local Ray, or joins one and reserves a place on its nodes for each worker. An actor per rank starts its command and relays
what it says. A process of its own, because a driver whose Ray dies is ended by Ray, and because Ray gives workers the driver's
working directory as an import path: this one runs in the scratch directory.

    in   {"do": "start", "id": 3, "name": …, "argv": […], "log": …, "rank": 0, "leader": 3,
          "together": [[name, phase, [[threads, memory, gpus, accelerator], …], stages], …]}
         {"do": "terminate" | "kill", "id": 3}
    out  {"event": "ready", "address": …, "note": …}   {"event": "failed", "message": …}   {"event": "waiting", "name": …, "what": …}
         {"event": "placed" | "refused" | "pid" | "line" | "ended", "id": 3, …}

It ends at the end of its stdin, and with it the actors, their processes and, if it was started here, Ray.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import sys

from ...core.errors import DiptychError
from ..process.child import FAILED, log_to_stderr, progress, say
from ..process.spec import RaySpec, read_spec
from .vanishing import make_vanishing

_log = logging.getLogger(__name__)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m diptych.cluster.on_ray.driver", description="Place a cluster's workers with Ray.")
    parser.add_argument("--spec", required=True, help="RaySpec as JSON")
    arguments = parser.parse_args()
    try:
        spec = read_spec(RaySpec, arguments.spec)
        log_to_stderr(spec.log_level, "ray", spec.log_format)
        if spec.address is None and not make_vanishing(spec.directory):
            _log.info("no namespace of our own for %s: it is removed by the reaper", spec.directory)
        if spec.address is None:
            # Ray's word for "this host only". Without it a local one listens on all interfaces (2.60), if not without a token.
            os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        from .placement import Driver  # only now: the namespace is entered with one thread

        progress("imported")
        driver = Driver(spec)
        driver.connect()
        say("ready", address=driver.address, note=driver.note)
        asyncio.run(driver.serve())
        driver.close()
    except DiptychError as error:
        say("failed", message=error.message, field=error.field)
        return FAILED
    return 0


if __name__ == "__main__":
    sys.exit(main())
