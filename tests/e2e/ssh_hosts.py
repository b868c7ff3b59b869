"""Hosts that are reached by ssh and otherwise bare: on each an sshd, its own processes, and disks of its own for /tmp, /run and the home.

They share the programs of this machine (as hosts of one image would) and this directory's keys. Needs root, iproute2, OpenSSH's server
and client, and rsync: `apt-get install openssh-server rsync`.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import hosts
from cluster_harness import wait_for
from hosts import Host

TOOLS = ("sshd", "ssh", "ssh-keygen", "rsync")
SBIN = "/usr/sbin"
CONFIG = """
Port 22
HostKey {root}/host_key
AuthorizedKeysFile {root}/key.pub
StrictModes no
UsePAM no
PidFile none
AcceptEnv PYTHON*
"""
PROGRAMS = (Path(__file__).resolve().parents[2], Path(sys.prefix))
"""The checkout and its environment: what all hosts share, wherever it is."""
DISK = """
set -e
kept=$1 disk=$2; shift 2
for path; do mkdir -p "$kept$path"; mount --bind "$path" "$kept$path"; done
mount -t tmpfs tmpfs "$disk"
for path; do mkdir -p "$path"; mount --bind "$kept$path" "$path"; done
"""
OPTIONS = ("-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR", "-o", "BatchMode=yes")


def missing() -> str | None:
    """Why no such hosts can be made here; None if they can."""
    lacking = [tool for tool in TOOLS if _which(tool) is None]
    return hosts.missing() or (f"{' and '.join(lacking)} not installed: apt-get install openssh-server rsync" if lacking else None)


def _which(tool: str) -> str | None:
    return shutil.which(tool, path=f"{os.environ['PATH']}:{SBIN}")


@dataclass(frozen=True)
class Site:
    """`desk`: where its people sit. `root`: a directory that all hosts see; `key`: opens them; `home`: of root, on each host its own."""

    desk: Host
    others: tuple[Host, ...]
    root: Path

    @property
    def key(self) -> Path:
        return self.root / "key"

    @property
    def home(self) -> Path:
        return self.root / "home"

    def run(self, command: Sequence[str], cwd: Path, timeout_s: float) -> subprocess.CompletedProcess[str]:
        """At the desk, with its output as one."""
        environment = {**_bare(), "HOME": str(self.home)}
        whole = [*self.desk.prefix, "env", "-C", str(cwd), *command]
        return subprocess.run(
            whole, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            timeout=timeout_s, check=False,
        )  # fmt: skip

    def ssh(self, host: Host, command: str) -> list[str]:
        """The command at the desk that runs `command` in an interactive shell of `host`, which reads `.bashrc`."""
        there = f"bash -i -c {shlex.quote(command)}"
        return [*self.desk.prefix, "ssh", *OPTIONS, "-i", str(self.key), f"root@{host.address}", there]

    def on(self, host: Host, command: str, timeout_s: float = 60.0) -> subprocess.CompletedProcess[str]:
        whole = self.ssh(host, command)
        return subprocess.run(
            whole, env=_bare(), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout_s, check=False
        )  # fmt: skip

    def listen(self, host: Host) -> None:
        """Start the host's sshd; it ends with the host."""
        log = (self.root / f"sshd-{host.name}.log").open("ab")
        subprocess.Popen(
            [*host.prefix, str(_which("sshd")), "-D", "-e", "-f", str(self.root / "sshd_config")],
            env=_bare(), stdin=subprocess.DEVNULL, stdout=log, stderr=log,
        )  # fmt: skip
        wait_for(f"the sshd of {host.name}", lambda: self.on(host, "true").returncode == 0)


def _bare() -> dict[str, str]:
    """An environment without what the tests set."""
    return {"PATH": f"{os.environ['PATH']}:{SBIN}", "LANG": "C.UTF-8"}


@contextmanager
def site(*names: str) -> Iterator[Site]:
    """A desk, and hosts of these names with an sshd. At the end nothing is left."""
    with (
        tempfile.TemporaryDirectory(prefix="d", dir="/var/tmp") as directory,
        hosts.hosts("desk", *names, own_processes=True) as (_, desk, *made),
    ):
        root = Path(directory)
        for key in ("key", "host_key"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(root / key)], check=True, timeout=20)
        (root / "sshd_config").write_text(CONFIG.format(root=root))
        (root / "home").mkdir()
        users = Path("/etc/passwd").read_text().splitlines(keepends=True)
        (root / "passwd").write_text("".join(_moved(line, root / "home") for line in users))
        whole = Site(desk, tuple(made), root)
        for host in (desk, *made):
            _furnish(host, root)
        for host in made:
            whole.listen(host)
        yield whole


def _moved(user: str, home: Path) -> str:
    fields = user.split(":")
    return ":".join([*fields[:5], str(home), "/bin/bash\n"]) if fields[0] == "root" else user


def _furnish(host: Host, root: Path) -> None:
    """Disks of its own, and a way out, by which programs find their own address. The home is empty but for a `.bashrc`."""
    subprocess.run([*host.prefix, "ip", "route", "add", "default", "dev", "eth0"], check=True, timeout=20)
    for disk in (Path("/tmp"), Path("/run"), root / "home"):
        kept = [path for path in PROGRAMS if path.is_relative_to(disk)]
        subprocess.run([*host.prefix, "sh", "-c", DISK, "sh", str(root / "kept"), str(disk), *map(str, kept)], check=True, timeout=20)
    script = 'mount --bind "$1/passwd" /etc/passwd && mkdir /run/sshd && touch "$1/home/.bashrc"'
    subprocess.run([*host.prefix, "sh", "-c", script, "sh", str(root)], check=True, timeout=20)
