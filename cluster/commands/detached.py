"""`diptych up --detach`: a cluster in the background, begun again when it fails.

    python -m diptych.cluster.commands.detached NAME

A process of its own, the keeper, runs `diptych up` again and again, until that ends as it was told to, or the Ray cluster it joins no
longer answers. It outlives the shell that started it; what it needs and writes lies in <root>/.kept/<name>/ (<root>: see `state`):

    keeper.json   who the keeper is, for `diptych down`      config.json   the config, flags included      output.log   all that is printed
"""

from __future__ import annotations

import os
import pwd
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from ...core.config import ClusterConfig
from ...core.errors import ConfigError
from ..process import processes
from ..resources import preflight
from ..supervising import exposure, state
from ..supervising.config_file import read_config
from ..supervising.restarts import RestartBudget

KEEPER, CONFIG, OUTPUT = "keeper.json", "config.json", "output.log"
LINGER, SEATS = Path("/var/lib/systemd/linger"), Path("/run/systemd/seats")
"""Who keeps their directory when they log out; there if logind runs."""


class Keeper(BaseModel):
    """`pid`, `started` (see `processes.start_ticks`): the keeper's."""

    model_config = ConfigDict(frozen=True)
    name: str
    pid: int
    started: int

    @property
    def alive(self) -> bool:
        return processes.is_running(self.pid, self.started)


def directory(name: str) -> Path:
    return state.root() / ".kept" / name


def keepers(name: str | None) -> Iterator[Keeper]:
    """The living keepers on this host, or the one of that name."""
    for path in sorted(directory(name or "*").parent.glob(f"{name or '*'}/{KEEPER}")):
        keeper = Keeper.model_validate_json(path.read_bytes())
        if keeper.alive:
            yield keeper


def detach(config: ClusterConfig) -> Path:
    """Start the keeper of this cluster; where its output is. Raises `ConfigError` for what can be known to be wrong before."""
    if kept := next(keepers(config.name), None):
        raise ConfigError(
            f"A cluster named {config.name!r} runs in the background already (keeper {kept.pid}). "
            f"End it with `diptych down --name {config.name}`, or give this one another --name.",
            field="name",
        )
    _refuse_short_lived(state.root())
    exposure.check(config)
    preflight.check_ports(config)
    preflight.check_ray(config)
    home = directory(config.name)
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    (home / CONFIG).write_text(config.model_dump_json(exclude_unset=True))
    with (home / OUTPUT).open("wb") as output:
        keeper = subprocess.Popen(
            [sys.executable, "-m", "diptych.cluster.commands.detached", config.name],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={**os.environ, "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"},
            start_new_session=True,
        )
    started = processes.start_ticks(keeper.pid)
    assert started is not None
    (home / KEEPER).write_text(Keeper(name=config.name, pid=keeper.pid, started=started).model_dump_json())
    return home / OUTPUT


def patience(config: ClusterConfig) -> RestartBudget:
    """How often `up` is started again. While a joined Ray cluster lives its nodes may come back, so that there is no giving up (300 s have
    room for 14 restarts)."""
    return RestartBudget(most=1000, first_s=1.0, cap_s=30.0) if config.ray.joined else RestartBudget()


def _refuse_short_lived(root: Path) -> None:
    """`ConfigError` if what is written there is removed when the user logs out, as logind does with /run/user/<uid>."""
    user = pwd.getpwuid(os.getuid()).pw_name
    if root.is_relative_to(f"/run/user/{os.getuid()}") and SEATS.exists() and not (LINGER / user).exists():
        raise ConfigError(
            f"{root} is removed when you log out, and with it what `diptych status` and `down` need. "
            "Run `loginctl enable-linger` once, or unset XDG_RUNTIME_DIR.",
            field="name",
        )


def keep(command: Sequence[str], answers: Callable[[], bool], budget: RestartBudget, stop: int) -> int:
    """Run `command` until it ends with status 0, or the file descriptor `stop` can be read (then SIGTERM ends it); its last exit status.

    What failed is run again after a delay of `budget`, while that has any left and the Ray cluster `answers`.
    """
    while True:
        status, stopped = _life(subprocess.Popen(command), stop)
        if status == 0 or stopped:
            return status
        delay = budget.delay(time.monotonic())
        if delay is None or not answers():
            why = "too often" if delay is None else "and the Ray cluster answers no more"
            print(f"`diptych up` ended with status {status}, {why}: it is not started again.")
            return status
        print(f"`diptych up` ended with status {status}; it starts again in {delay:g} s.")
        if select.select([stop], [], [], delay)[0]:
            return status


def _life(process: subprocess.Popen[bytes], stop: int) -> tuple[int, bool]:
    """Its exit status, and whether it was stopped."""
    ended = os.pidfd_open(process.pid)
    try:
        stopped = stop in select.select([ended, stop], [], [])[0]
    finally:
        os.close(ended)
    if stopped:
        process.terminate()
    return process.wait(), stopped


def _ray_answers(config: ClusterConfig) -> bool:
    try:
        preflight.check_ray(config)
    except ConfigError:
        return False
    return True


def _stop_by_signal() -> int:
    """A file descriptor that can be read once SIGTERM or SIGINT has come."""
    stop, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    return stop


def main() -> int:
    home, stop = directory(sys.argv[1]), _stop_by_signal()
    config = read_config(home / CONFIG, {})
    command = [sys.executable, "-m", "diptych.cluster.cli", "up", "--file", str(home / CONFIG)]
    status = keep(command, lambda: _ray_answers(config), patience(config), stop)
    (home / KEEPER).unlink(missing_ok=True)
    if status == 0:
        shutil.rmtree(home, ignore_errors=True)
        for parent in (home.parent, state.root()):
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()
    return status


if __name__ == "__main__":
    sys.exit(main())
