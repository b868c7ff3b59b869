"""What is written down of a running cluster, for `status` and `down`: one JSON file per cluster on this host.

    <root>/<name>/cluster.json   the state; made when `up` claims the name, removed at its end
    <root>/<name>/logs/          one log per process

<root> is $XDG_RUNTIME_DIR/diptych, or ~/.local/state/diptych where there is none.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from ...core.errors import ConfigError, Unavailable
from ...core.security import TlsFiles
from ..process import processes

FILE = "cluster.json"


class Started(BaseModel):
    """A process the supervisor has started. `address`, `tp` and `pp` once it is ready; ranks from 1 on have none of their own."""

    model_config = ConfigDict(frozen=True)
    name: str
    pid: int | None
    rank: int = 0
    address: str | None = None
    tp: int | None = None
    pp: int | None = None


class ClusterState(BaseModel):
    """`pid` and `started` (see `processes.start_ticks`) are the supervisor's. `http`, `grpc`, `control` are the
    router's, host:port, once ready. `tls`: whether its public faces speak it, `ca` the authority (if not the system's) that vouches for
    them; `internal_tls`: what `control` is asked with.
    `autoplan`: its mode, if it is on, and its latest decisions."""

    model_config = ConfigDict(frozen=True)
    name: str
    id: str
    pid: int
    started: int
    scratch: Path
    logs: Path
    model: str
    http: str | None = None
    grpc: str | None = None
    control: str | None = None
    ready: bool = False
    tls: bool = False
    ca: str | None = None
    internal_tls: TlsFiles | None = None
    autoplan: tuple[str, ...] = ()
    processes: tuple[Started, ...] = ()

    @property
    def alive(self) -> bool:
        """Whether its supervisor runs."""
        return processes.is_running(self.pid, self.started)


def root() -> Path:
    """Where states are kept."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    return Path(runtime, "diptych") if runtime else Path.home() / ".local" / "state" / "diptych"


def directory(name: str) -> Path:
    return root() / name


def read(name: str) -> ClusterState | None:
    """The state of cluster `name`, None if there is none. A file that cannot be understood (an older version's) counts as none
    and is put aside."""
    path = directory(name) / FILE
    try:
        return ClusterState.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError:
        path.replace(path.with_suffix(".unreadable"))
        return None


def running(name: str) -> ClusterState:
    """The state of the cluster `name` that runs on this host; `Unavailable` if there is none, with what to do."""
    found = read(name)
    if found is None or not found.alive:
        others = [other.name for other in all_states() if other.alive]
        also = f" Running here: {', '.join(others)}; choose with --name." if others else ""
        raise Unavailable(f"No cluster named {name!r} runs on this host. Start one with `diptych up`.{also}")
    return found


def all_states() -> Iterator[ClusterState]:
    """The states of all clusters on this host, by name."""
    for path in sorted(root().glob(f"*/{FILE}")):
        if state := read(path.parent.name):
            yield state


def claim(state: ClusterState) -> None:
    """Write a new cluster's state; `ConfigError` if its name is taken by a running one. What a crashed one left is cleaned first."""
    home = directory(state.name)
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    while True:
        draft = _write_draft(home, state)
        try:
            os.link(draft, home / FILE)  # fails if it exists: of two at once, one wins
            return
        except FileExistsError:
            other = read(state.name)
        finally:
            draft.unlink()
        if other and other.alive:
            raise ConfigError(
                f"A cluster named {state.name!r} runs already (pid {other.pid}). "
                f"End it with `diptych down --name {state.name}`, or give this one another --name.",
                field="name",
            )
        if other:
            clean(other)


def write(state: ClusterState) -> None:
    """Replace the state of a claimed name, atomically."""
    home = directory(state.name)
    _write_draft(home, state).replace(home / FILE)


def _write_draft(home: Path, state: ClusterState) -> Path:
    handle, path = tempfile.mkstemp(prefix=f".{FILE}-", dir=home)
    with os.fdopen(handle, "w") as file:
        file.write(state.model_dump_json(indent=1))
    return Path(path)


def clean(state: ClusterState) -> int:
    """End and remove what a dead supervisor left behind, its logs excepted; returns the number of processes found."""
    found = processes.sweep(state.id, (state.scratch,))
    (directory(state.name) / FILE).unlink(missing_ok=True)
    return found


def forget(name: str) -> None:
    """Remove the cluster's directory, with its logs."""
    shutil.rmtree(directory(name), ignore_errors=True)
    if root().is_dir() and not any(root().iterdir()):
        root().rmdir()
