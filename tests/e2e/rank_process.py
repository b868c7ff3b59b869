"""Real rank processes: a worker of one, or the leader of a worker of many with those that follow it."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from diptych.cluster.process.spec import RankSpec, Worker, new_role
from diptych.core.fleet import Phase
from diptych.core.stages import Stage
from diptych.worker.timeline import read_stamps

START_S = 180.0
"""For a machine that does other things too; alone a rank starts in 3."""
ENDS_S = 60.0


@dataclass
class Rank:
    """A rank process of ours: started with a leash, its log in a file. Rank 0 stands for its worker, and has the others of it with it."""

    spec: RankSpec
    process: subprocess.Popen[bytes]
    log: Path
    start_follower: Callable[[RankSpec, str], Rank]
    """From its spec and the leader's address."""
    followers: list[Rank] = field(default_factory=list)
    """Ranks 1.., once the leader has said where they shall come; empty of one that follows."""
    events: list[dict[str, object]] = field(default_factory=list)
    unread: bytes = b""

    @classmethod
    def start(
        cls,
        spec: RankSpec,
        directory: Path,
        leader: str | None = None,
        *,
        environment: dict[str, str] | None = None,
        prefix: tuple[str, ...] = (),
        program: tuple[str, ...] = ("-m", "diptych.cluster.programs.rank"),
    ) -> Rank:
        """`leader`: where it meets the others, for ranks from 1 on; `prefix`: what runs the command elsewhere (`hosts.Host.prefix`);
        `program`: what Python runs."""
        log = directory / (f"{spec.worker_id}.rank{spec.rank}.log" if spec.rank else f"{spec.worker_id}.log")
        where = ["--leader", leader] if leader is not None else []
        with log.open("ab") as sink:
            process = subprocess.Popen(
                [*prefix, sys.executable, *program, "--spec", spec.model_dump_json(), "--leash", *where],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=sink,
                cwd=directory,
                env={**os.environ, "PYTHONSAFEPATH": "1", **(environment or {})},
            )
        like_it = partial(cls.start, environment=environment, prefix=prefix, program=program)
        return cls(spec, process, log, lambda spec, leader: like_it(spec, directory, leader))

    def wait_for(self, *names: str, timeout_s: float = START_S) -> dict[str, object]:
        """The first event so called; fails with the log if the process ends or is silent before. Of a leader: brings the others to it."""
        if "meeting" not in names:
            self.bring_followers(timeout_s)
        return self._said(names, timeout_s)

    def bring_followers(self, timeout_s: float = START_S) -> None:
        """Start the others of a leader's worker, unless they are or the leader has failed. They end with the thread that calls this."""
        missing = range(len(self.followers) + 1, self.spec.tp * (len(self.spec.stages) or 1)) if self.spec.rank == 0 else range(0)
        if not missing or (met := self._said(("meeting", "failed"), timeout_s))["event"] == "failed":
            return
        self.followers += [self.start_follower(self.spec.model_copy(update={"rank": rank}), str(met["address"])) for rank in missing]

    def _said(self, names: tuple[str, ...], timeout_s: float) -> dict[str, object]:
        end = time.monotonic() + timeout_s
        assert self.process.stdout is not None
        while True:
            for event in self.events:
                if event["event"] in names:
                    return event
            ready, _, _ = select.select([self.process.stdout], [], [], max(0.0, end - time.monotonic()))
            chunk = os.read(self.process.stdout.fileno(), 1 << 16) if ready else b""
            assert chunk, f"{self.spec.worker_id} says {self.events} and no more:\n{self.logs()}"
            *lines, self.unread = (self.unread + chunk).split(b"\n")
            self.events += [json.loads(line) for line in lines]

    def become(self, worker_id: str, phase: Phase, **changes: object) -> None:
        """Order the worker to be another, its processes and weights in place; what it has said before is forgotten."""
        ranks = [rank.spec.model_copy(update={"worker_id": worker_id, "phase": phase, **changes}) for rank in self.members]
        assert self.process.stdin is not None
        self.events = []
        self.process.stdin.write(new_role(Worker(tuple(ranks))).model_dump_json().encode() + b"\n")
        self.process.stdin.flush()
        for rank, spec in zip(self.members, ranks, strict=True):
            rank.spec = spec

    @property
    def members(self) -> list[Rank]:
        """All processes of the worker, the leader first."""
        return [self, *self.followers]

    @property
    def address(self) -> str:
        return str(self.wait_for("ready")["address"])

    @property
    def alive(self) -> bool:
        """Whether every process of the worker is."""
        return all(rank.process.poll() is None for rank in self.members)

    def stop(self) -> int:
        """SIGTERM to the leader, who tells the others. The leader's exit status, or that of another who did not end well."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return next(filter(None, [rank.ended() for rank in self.members]), 0)

    def kill(self) -> int:
        """SIGKILL to every process of the worker; the leader's exit status."""
        for rank in self.members:
            if rank.process.poll() is None:
                rank.process.send_signal(signal.SIGKILL)
        status, *_ = [rank.ended() for rank in self.members]
        return status

    def ended(self, timeout_s: float = ENDS_S) -> int:
        """The exit status of this one process, when it has ended."""
        status = self.process.wait(timeout_s)
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()
        return status

    def logs(self) -> str:
        """Of all the worker's processes."""
        return "\n".join(rank.log.read_text() for rank in self.members)

    def stamps(self, attempt_id: str) -> dict[Stage, float]:
        """Stage → seconds of the host's monotonic clock, from a rank that logs at debug level."""
        return {stage: at for stage, attempt, at in read_stamps(self.log.read_text().splitlines()) if attempt == attempt_id}

    def mapped_pools(self) -> set[int]:
        """The inodes of all pools this process maps: its own, and those it copies from."""
        maps = Path(f"/proc/{self.process.pid}/maps").read_text().splitlines()
        return {int(line.split()[4]) for line in maps if "memfd:diptych-kv" in line}

    def sockets(self) -> set[str]:
        """Names of the abstract sockets on which this process hands out its pool."""
        links = {os.readlink(entry) for entry in Path(f"/proc/{self.process.pid}/fd").iterdir() if entry.is_symlink()}
        lines = [line.split() for line in Path("/proc/net/unix").read_text().splitlines() if "@diptych-kv" in line]
        return {fields[7] for fields in lines if f"socket:[{fields[6]}]" in links}
