"""Hosts that have only a network in common: each its own network, mount, IPC and UTS namespaces, joined by a switch.

    here ── veth ──┐
    host a ─ veth ─┤ switch (a bridge, in a namespace of its own)
    host b ─ veth ─┘

Each namespace is held by one process with a leash and has no name: when its processes have gone, however they went, the kernel takes
it back with its end of every cable. Needs root and iproute2. `own_processes` gives each host a process namespace too, for what looks for
processes by name (`ray stop` ends all it sees).

As a script it makes hosts and runs one command in each, until all have ended:  python tests/e2e/hosts.py 'command of a' 'command of b'
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

TOOLS = ("ip", "unshare", "nsenter")
NAMESPACES = ("--mount", "--ipc", "--uts", "--net")
OWN_PROCESSES = ("--pid", "--fork", "--mount-proc", "--kill-child")
PRIVATE = 'hostname "$1" && mount -t tmpfs tmpfs /dev/shm && ip link set lo up && echo ready && exec env --ignore-signal=CHLD cat'
"""What holds the namespaces. As the first of a host's own processes it inherits orphans; it ignores SIGCHLD, so none stays a zombie."""


def missing() -> str | None:
    """Why no hosts can be made here; None if they can."""
    if os.geteuid() != 0:
        return "only root can make hosts"
    lacking = [tool for tool in TOOLS if shutil.which(tool) is None]
    return f"{' and '.join(lacking)} is not installed" if lacking else None


@dataclass(frozen=True)
class Host:
    """`prefix` runs a command there: it replaces itself by the command, so a signal reaches that."""

    name: str
    address: str
    holder: int
    own_processes: bool = False

    @property
    def prefix(self) -> tuple[str, ...]:
        processes = (f"--pid=/proc/{self.holder}/ns/pid_for_children",) if self.own_processes else ()
        return ("nsenter", f"--target={self.holder}", *NAMESPACES, *processes, "--")

    @property
    def keepers(self) -> set[int]:
        """The processes that hold its namespaces."""
        children = Path(f"/proc/{self.holder}/task/{self.holder}/children").read_text().split()
        return {self.holder, *map(int, children)}

    @property
    def processes(self) -> list[int]:
        """What runs there, without what holds its namespaces."""
        inside = Path(f"/proc/{self.holder}/ns/net").readlink()
        assert inside != _network(os.getpid()), "its namespace is not ours"
        return [pid for pid in _pids() if pid not in self.keepers and _network(pid) == inside]

    @property
    def received(self) -> int:
        """Bytes that have come over its cable."""
        devices = Path(f"/proc/{self.holder}/net/dev").read_text()
        line = next(line for line in devices.splitlines() if "eth0:" in line)
        return int(line.partition(":")[2].split()[0])

    def crash(self) -> None:
        """End everything that runs there at once, as by a power cut; its cable and its memory stay."""
        while found := self.processes:
            for pid in found:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)  # the kernel takes a moment to end them

    def unplug(self, switch: Host) -> None:
        """Pull the cable: nothing arrives any more, and nobody is told."""
        _run(*switch.prefix, "ip", "link", "set", self.name, "down")

    def plug(self, switch: Host) -> None:
        _run(*switch.prefix, "ip", "link", "set", self.name, "up")


def _pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _network(pid: int) -> Path | None:
    """The network namespace of a process; None for one that has ended, or may not be looked at (whatever runs here may)."""
    try:
        return Path(f"/proc/{pid}/ns/net").readlink()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None


def _run(*command: str) -> None:
    subprocess.run(command, check=True, timeout=20)


@contextmanager
def _host(name: str, address: str, own_processes: bool = False) -> Iterator[Host]:
    namespaces = (*NAMESPACES, *(OWN_PROCESSES if own_processes else ()))
    holder = subprocess.Popen(["unshare", *namespaces, "sh", "-c", PRIVATE, "sh", name], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdin is not None
    assert holder.stdout is not None
    try:
        assert holder.stdout.readline() == b"ready\n", f"the namespaces of {name} cannot be made"
        yield Host(name, address, holder.pid, own_processes)
    finally:
        if holder.poll() is None:
            Host(name, address, holder.pid, own_processes).crash()
        holder.stdin.close()
        holder.wait(timeout=20)
        holder.stdout.close()


@contextmanager
def hosts(*names: str, own_processes: bool = False) -> Iterator[tuple[Host, ...]]:
    """The switch, then a host for each name. This process reaches all of them."""
    number = os.getpid() % 250
    network = f"10.213.{number}"
    with ExitStack() as stack:
        switch = stack.enter_context(_host("switch", ""))
        _run(*switch.prefix, "ip", "link", "add", "bridge", "type", "bridge")
        _run(*switch.prefix, "ip", "link", "set", "bridge", "up")
        made = [stack.enter_context(_host(name, f"{network}.{index}", own_processes)) for index, name in enumerate(names, 1)]
        for host in made:
            _cable(switch, host.name, f"{host.address}/24", "eth0", host)
        _cable(switch, "here", f"{network}.254/24", f"dip{os.getpid()}", None)
        yield (switch, *made)


def _cable(switch: Host, port: str, address: str, device: str, host: Host | None) -> None:
    """From `port` of the switch to `device` of a host, or of this one."""
    inside: tuple[str, ...] = host.prefix if host else ()
    there = ("netns", str(host.holder)) if host else ()
    _run("ip", "link", "add", device, *there, "type", "veth", "peer", "name", port, "netns", str(switch.holder))
    _run(*switch.prefix, "ip", "link", "set", port, "master", "bridge", "up")
    _run(*inside, "ip", "address", "add", address, "dev", device)
    _run(*inside, "ip", "link", "set", device, "up")


def main() -> int:
    if why := missing():
        print(why, file=sys.stderr)
        return 1
    with hosts(*(f"host-{index}" for index in range(len(sys.argv) - 1))) as (_, *made):
        print(*(f"{host.name} {host.address}" for host in made), sep="\n", flush=True)
        running = [subprocess.Popen([*host.prefix, *shlex.split(command)]) for host, command in zip(made, sys.argv[1:], strict=True)]
        return max((process.wait() for process in running), default=0)


if __name__ == "__main__":
    sys.exit(main())
