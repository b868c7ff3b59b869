"""`diptych up` with fake programs, as a process of its own: `fake_up.py CONFIG_JSON`; fleets published go to $FAKES/fleet."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from diptych.cluster.commands.up import Up
from diptych.cluster.supervising.posts import Programs
from diptych.cluster.supervising.restarts import RestartBudget
from diptych.core.config import load_config
from diptych.core.errors import ConfigError, DiptychError
from diptych.core.fleet import Fleet
from diptych.core.workload import Recorded, Window

HERE = Path(__file__).parent


class FilePublisher:
    """Writes each fleet as a line: version, then id=incarnation of each member."""

    def __init__(self, ready: dict[str, Any]) -> None:
        self.told: set[str] = set()
        self.seen: set[str] = set()

    async def publish(self, fleet: Fleet) -> int:
        self.told = {member.worker_id for member in fleet.members}
        note("fleet", json.dumps([fleet.version, {member.worker_id: member.incarnation for member in fleet.members}]))
        return fleet.version

    async def live(self) -> set[str]:
        """A worker is seen when it is asked for the second time, as by a router that takes a moment to connect."""
        seen, self.seen = self.seen, self.told
        return seen

    async def close(self) -> None:
        return None


async def drain(address: str, within_s: float) -> int:
    note("drained", address)
    return 0


def ordered(what: str) -> bool:
    return Path(os.environ["FAKES"], what).exists()


async def recorded(control: str, seconds: float) -> Window:
    """What a test has put into $FAKES/window."""
    if not ordered("window"):
        return Window(seconds, ())
    span, rows = json.loads(text("window"))
    return Window(span, tuple(Recorded(*row) for row in rows))


def text(of: str) -> str:
    return Path(os.environ["FAKES"], of).read_text()


async def no_links(state: object, config: object, joined: object) -> None:
    """The fakes hand nothing over; as if it could not be, if so ordered."""
    if ordered("no-kv-moves"):
        raise ConfigError("transfer.transports: prefill-0 → decode-0: No KV moves.", field="transfer.transports")


def note(name: str, line: str) -> None:
    with Path(os.environ["FAKES"], name).open("a") as file:
        file.write(line + "\n")


def small_budget() -> RestartBudget:
    return RestartBudget(most=3, first_s=0.1)


def main() -> int:
    program = (sys.executable, str(HERE / "fakes.py"))
    programs = Programs(rank=(*program, "rank"), route=(*program, "route"))
    config = load_config(json.loads(sys.argv[1]))
    cores = list(range(int(text("cores")))) if ordered("cores") else sorted(os.sched_getaffinity(0))
    up = Up(
        config, cores=cores, programs=programs, connect=FilePublisher, drain=drain, recorded=recorded, budget=small_budget, links=no_links
    )
    try:
        up.run()
    except DiptychError as error:
        print(error.message, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
