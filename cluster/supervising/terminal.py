"""What `up` shows: a moving line while it loads (plain lines where there is no terminal), one line per process when it is ready."""

from __future__ import annotations

import os
from typing import Any

from rich.console import Console
from rich.status import Status
from rich.table import Table

from .timeline import TimeLine


class _Console(Console):
    """A console whose reader may go away (`| head`, a closed terminal): the cluster goes on without being watched."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())


class Terminal:
    """An `Observer` that tells a person. Output goes to stdout; `warn` and `error` to stderr."""

    def __init__(self, timeline: TimeLine, *, verbose: bool = False) -> None:
        self.timeline = timeline
        self.verbose = verbose
        self._out = _Console(highlight=False, soft_wrap=True)
        self._err = _Console(stderr=True, highlight=False, soft_wrap=True)
        self._status: Status | None = None
        self._doing: dict[str, str] = {}
        self._is_up = False

    def say(self, text: str, style: str = "", end: str = "\n") -> None:
        self._out.print(text, style=style, end=end, markup=False)

    def warn(self, text: str) -> None:
        self._err.print(f"Note: {text}", style="yellow", markup=False)

    def doing(self, who: str, what: str | None) -> None:
        """Show that `who` is at `what`; None: at nothing any more."""
        if what is None:
            self._doing.pop(who, None)
        else:
            self._doing[who] = what
        if not self._out.is_terminal:
            if what is not None and not self._is_up:
                self.say(f"{self.timeline.elapsed():6.1f} s  {who}: {what}")
            return
        text = " · ".join(f"[bold]{name}[/] {step}" for name, step in self._doing.items())
        if not text:
            self.quiet()
        elif self._status is None:
            self._status = self._out.status(text)
            self._status.start()
        else:
            self._status.update(text)

    def quiet(self) -> None:
        """End the moving line."""
        self._doing.clear()
        if self._status is not None:
            self._status.stop()
            self._status = None

    def is_up(self) -> None:
        """The cluster serves: progress of a restart is no longer shown step by step."""
        self._is_up = True
        self.quiet()

    def started(self, name: str, pid: int | None, rank: int = 0) -> None:
        self.timeline.mark(f"{name}.rank{rank}" if rank else name, "process started")
        if rank == 0:
            self._step(name, "starting")

    def progress(self, name: str, what: str) -> None:
        self.timeline.mark(name, what)
        self._step(name, what)

    def _step(self, name: str, what: str) -> None:
        if not self._is_up:
            self.doing(name, what)

    def ready(self, name: str, event: dict[str, Any]) -> None:
        self.timeline.mark(name, "ready")
        if not self._is_up:
            self.doing(name, None)
        if "capacity_tokens" in event:
            ranks = event["layout"]["tp"] * max(1, len(event["layout"]["stages"]))
            several = f" on {ranks} ranks" if ranks > 1 else ""
            detail = f"at {event['address']}, KV for {event['capacity_tokens']:,} tokens{several}"
        elif "http" in event:
            detail = f"at {'https' if event.get('tls') else 'http'}://{event['http']} and grpc {event['grpc']}"
        else:
            detail = f"at {event['address']}"
        self.say(f"{self.timeline.elapsed():6.1f} s  {name} is ready {detail}")
        if note := event.get("note"):
            self.warn(note)

    def lost(self, name: str, reason: str, restart_in: float | None) -> None:
        then = f"Starting it again in {restart_in:.1f} s." if restart_in is not None else "It died too often and is not started again."
        self._err.print(f"{reason}\n{then}", style="yellow", markup=False)

    def left(self, name: str) -> None:
        self.say(f"{self.timeline.elapsed():6.1f} s  {name} has left")

    def flipped(self, name: str, to: str) -> None:
        self.timeline.mark(to, f"was {name}")
        self.say(f"{self.timeline.elapsed():6.1f} s  {name} has left, and becomes {to}")

    def show_timeline(self) -> None:
        table = Table("when", "who", "what", "after", box=None, pad_edge=False, header_style="bold")
        for row in self.timeline.rows():
            table.add_row(*row)
        self._out.print(table)

    def table(self, rows: list[tuple[str, str]]) -> None:
        """Two columns: what, how much."""
        table = Table(box=None, show_header=False, pad_edge=False)
        for row in rows:
            table.add_row(*row)
        self._out.print(table)
